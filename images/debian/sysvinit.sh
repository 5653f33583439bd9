# sysvinit in the images of Debian; sourced.

# Start the helper and SSH before all else.
configure_init() {
    mkdir -p "$ROOT/usr/lib/vmsandbox"
    cat >"$ROOT/usr/lib/vmsandbox/keep" <<'EOF'
#!/bin/sh
# Keep the helper running, also while the system shuts down: what it has started can tell its end.
mkdir -p /run/sendsigs.omit.d
while :; do
    /usr/lib/vmsandbox/helper </dev/null >/dev/null 2>&1 &
    echo "$$ $!" >/run/sendsigs.omit.d/vmsandbox
    wait $! && exec sleep infinity    # there is no port
    sleep 0.1
done
EOF
    cat >"$ROOT/usr/lib/vmsandbox/early" <<'EOF'
#!/bin/sh
: >/run/.tmpfs    # nothing in it is from an earlier boot
/etc/init.d/ssh start >/dev/null && echo 'vmsandbox: ssh'
EOF
    chmod 0755 "$ROOT"/usr/lib/vmsandbox/*
    # Before the first script of the system: init's own names for its levels at that time are # and *.
    sed -i -e '/getty/d' -e '/^si::/i \
vk:#*S0123456:respawn:/usr/lib/vmsandbox/keep\
vs::sysinit:/usr/lib/vmsandbox/early' "$ROOT/etc/inittab"
}
