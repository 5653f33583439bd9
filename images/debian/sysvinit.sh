# sysvinit in the images of Debian; sourced.

# Start the helper and SSH before all else.
configure_init() {
    mkdir -p "$ROOT/usr/lib/vmsandbox"
    cat >"$ROOT/usr/lib/vmsandbox/keep" <<'EOF'
#!/bin/sh
# Keep the helper running, also while the system shuts down: what it has started can tell its end.
# A second one of these waits until the first is gone.
exec 9>/run/vmsandbox/keep </dev/null >/dev/null 2>&1
flock 9
mkdir -p /run/sendsigs.omit.d
while :; do
    /usr/lib/vmsandbox/helper 9>&- &
    echo "$$ $!" >/run/sendsigs.omit.d/vmsandbox
    wait $! && exec sleep infinity    # there is no port
    sleep 0.1 9>&-
done
EOF
    cat >"$ROOT/usr/lib/vmsandbox/early" <<'EOF'
#!/bin/sh
: >/run/.tmpfs    # nothing in it is from an earlier boot
hostname -F /etc/hostname
setsid /usr/lib/vmsandbox/keep &
/etc/init.d/ssh start >/dev/null && echo 'vmsandbox: ssh'
EOF
    chmod 0755 "$ROOT"/usr/lib/vmsandbox/*
    # In its first levels init starts nothing again, and waits for the end of all that it has started.
    sed -i -e '/getty/d' -e '/^si::/i \
vs::sysinit:/usr/lib/vmsandbox/early\
vk:12345:respawn:/usr/lib/vmsandbox/keep' "$ROOT/etc/inittab"
    for script in brightness hwclock.sh; do chroot "$ROOT" update-rc.d "$script" disable; done
}
