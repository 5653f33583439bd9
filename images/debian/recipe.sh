# The Debian images; sourced, as lib.sh, systemd.sh and sysvinit.sh beside it.
. ../debian/second-stage.sh

# Coldplug without what has neither a driver nor a rule that matters here: most of the devices there are.
coldplug=$(printf ' --subsystem-match=%s' block net virtio pci usb virtio-ports input scsi hwmon rtc misc)

# recipe SUITE [backports | sysvinit]: with the kernel of its -backports suite, or without systemd
recipe() {
    enter 2500
    here=$PWD/../debian
    suite=$1 feature=${2:-} init=systemd
    kernel=$(kernel_package) drivers=$(panic_modules)
    start='systemd systemd-sysv libpam-systemd dbus dbus-user-session'

    # What differs between the suites, as options of mmdebstrap.
    set --
    case $suite in
    bullseye | bookworm)
        # Later ones merge /usr by themselves.  These leave it to their installer, or to a package that needs all of perl.
        set -- "$@" --setup-hook='for dir in bin sbin lib lib32 lib64 libx32; do mkdir -p "$1/usr/$dir"; ln -s "usr/$dir" "$1/$dir"; done' \
            --setup-hook='printf "Package: usrmerge\nPin: release *\nPin-Priority: -1\n" >"$1/etc/apt/preferences.d/vmsandbox"' ;;
    testing | sid)
        # A mirror may lag behind, until the release files have expired: then the newest that there is.
        set -- "$@" --aptopt='Acquire::Check-Valid-Until "false"' ;;
    esac
    if [ "$suite" = bullseye ]; then
        # Its support has ended: the suite with security updates lists packages that are gone.
        set -- "$@" --setup-hook='sed -i "/ bullseye main\$/!d" "$1/etc/apt/sources.list"'
        drivers=''    # its kernel has none; the console tells of a panic, too
    fi
    case $feature in
    backports)
        kernel=$kernel/$suite-backports
        set -- "$@" --setup-hook="sed -i 's/^\(.*\) $suite main\$/&\n\1 $suite-backports main/' \"\$1/etc/apt/sources.list\"" ;;
    sysvinit)
        init=sysvinit
        start='sysvinit-core initscripts sysv-rc orphan-sysvinit-scripts systemd-standalone-sysusers systemd-standalone-tmpfiles rsyslog' ;;
    esac

    stage "installing Debian ($suite${feature:+, $feature})"
    # INITRD: the initial RAM file system is ours.
    export INITRD=No DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086  # words
    install_system "$suite" "$(echo $kernel $start udev openssh-server openssh-sftp-server python3 busybox-static \
        ca-certificates iproute2 iputils-ping procps kmod util-linux mount e2fsprogs fdisk login passwd less netbase |
        tr ' ' ',')" \
        --dpkgopt='force-unsafe-io' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' "$@"
    version=$(ls "$ROOT/usr/lib/modules")
    if is_foreign || ! runs_here; then depmod -b "$ROOT" "$version"; fi

    # An ordinary user cannot make device nodes: lend those of the host.
    rm -rf "$ROOT"/dev/*
    for node in null zero urandom; do
        : >"$ROOT/dev/$node"
        mount --bind "/dev/$node" "$ROOT/dev/$node"
    done
    if runs_here; then
        stage "configuring it"
        configure
        report
    else
        second_stage "init=$init" "VMSANDBOX_CONSOLE=$VMSANDBOX_CONSOLE"
    fi
    helper "$ROOT"

    stage "making the initial RAM file system"
    initramfs

    stage "making the disk"
    cp "$ROOT"/boot/vmlinu[xz]-"$version" "$VMSANDBOX_OUT/vmlinuz"
    archive
    umount "$ROOT/dev/null" "$ROOT/dev/zero" "$ROOT/dev/urandom"
    rm -rf "$ROOT"/dev/*
    tidy
    size=$(awk -F '"' '/^size/ { print $2 }' image.toml)
    truncate -s "${size%iB}" "$VMSANDBOX_OUT/disk.raw"
    mke2fs -q -F -t ext4 -L root -m 0 -b 4096 -i 16384 -O ^orphan_file,^metadata_csum_seed \
        -E lazy_itable_init=1,lazy_journal_init=1,nodiscard -J size=32 -d "$ROOT" "$VMSANDBOX_OUT/disk.raw" 2>"$TMPDIR/log" ||
        fail "mke2fs: $(tail -n1 "$TMPDIR/log")"
    chmod 0644 "$VMSANDBOX_OUT"/*
}

# report: write down what the system has.
report() {
    chroot "$ROOT" dpkg-query -W -f '${Package} ${Version}\n' | sort >"$VMSANDBOX_OUT/packages.txt"
    awk '{ print $1, $2 }' "$ROOT/etc/ssh/ssh_host_ed25519_key.pub" >"$VMSANDBOX_OUT/host_key.pub"
}

# tidy: remove what the packages' programs have left.
tidy() {
    rm -rf "$ROOT"/boot/* "$ROOT"/vmlinuz* "$ROOT"/initrd.img* "$ROOT"/var/log/* "$ROOT"/var/cache/* "$ROOT"/tmp/*
    mkdir -p "$ROOT/var/cache/apt/archives/partial"
    # No time stamps in the future of what the guest compares them with; nothing to update at the first boot.
    touch "$ROOT/etc/.updated" "$ROOT/var/.updated"
}

# configure: also runs in a guest, as the second stage, with ROOT=/.
configure() {
    echo vmsandbox >"$ROOT/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 vmsandbox\n::1 localhost ip6-localhost ip6-loopback\n' >"$ROOT/etc/hosts"
    rm -f "$ROOT/etc/resolv.conf"
    printf 'nameserver 10.0.2.3\n' >"$ROOT/etc/resolv.conf"
    : >"$ROOT/etc/machine-id"
    : >"$ROOT/etc/fstab"
    # Accounts without a password, but not locked: the key opens them.
    chroot "$ROOT" useradd --create-home --uid 1000 --shell /bin/bash tester
    chroot "$ROOT" usermod -p '*' root
    chroot "$ROOT" usermod -p '*' tester

    # SSH: one host key, made now; the user's key comes with the kernel's command line.
    rm -f "$ROOT"/etc/ssh/ssh_host_*
    chroot "$ROOT" ssh-keygen -q -t ed25519 -N '' -C vmsandbox -f /etc/ssh/ssh_host_ed25519_key
    cat >"$ROOT/etc/ssh/sshd_config.d/vmsandbox.conf" <<'EOF'
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /run/vmsandbox/authorized_keys .ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes no
MaxSessions 100
MaxStartups 100:30:200
ClientAliveInterval 0
PrintLastLog no
PrintMotd no
LogLevel ERROR
EOF
    . "../debian/$init.sh"
    configure_init
    # What was left out to keep the image small is not left out of what a test installs.
    rm -f "$ROOT"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$ROOT"/etc/apt/apt.conf.d/99mmdebstrap "$ROOT"/etc/apt/preferences.d/vmsandbox
}

# needed_by MODULE: what to load for it.
needed_by() {
    if is_foreign; then
        modprobe --dirname "$ROOT" --set-version "$version" --show-depends "$1"
    else
        chroot "$ROOT" modprobe --set-version "$version" --show-depends "$1"
    fi
}

initramfs() {
    tree=$TMPDIR/tree
    mkdir -p "$tree" "$tree/bin" "$tree/dev" "$tree/proc" "$tree/sys" "$tree/run" "$tree/root"
    cp "$ROOT/usr/bin/busybox" "$tree/bin/" 2>/dev/null || cp "$ROOT/bin/busybox" "$tree/bin/"
    for applet in sh mount mknod insmod ifconfig route mkdir poweroff switch_root; do ln -s busybox "$tree/bin/$applet"; done
    cp "$here/init" "$tree/init"
    chmod 0755 "$tree/init"
    for module in $drivers virtio_pci virtio_rng virtio_net virtio_blk virtio_console ext4; do
        needed_by "$module" 2>/dev/null || fail "the kernel has no module $module"
    done >"$TMPDIR/insmod"    # no pipe: in one, failing would end its half of it only
    awk -v root="$ROOT" '$1 == "insmod" && !seen[$2]++ { sub("^" root, "", $2); print $2 }' "$TMPDIR/insmod" >"$TMPDIR/modules"
    while read -r module; do
        name=${module##*/}
        case $name in
        *.xz) xz -dc "$ROOT$module" >"$tree/${name%.xz}" ;;
        *) cp "$ROOT$module" "$tree/$name" ;;
        esac
        echo "/${name%.xz}"
    done <"$TMPDIR/modules" >"$tree/modules"
    # The device nodes that load their modules when they are opened.
    awk '!/^#/ { split(substr($3, 2), n, ":"); print $2, substr($3, 1, 1), n[1], n[2] }' "$ROOT/usr/lib/modules/$version/modules.devname" >"$tree/nodes"
    (cd "$tree" && find . -print0 | LC_ALL=C sort -z | cpio --quiet -0 -o -H newc -R 0:0) >"$VMSANDBOX_OUT/initrd.img"
}
