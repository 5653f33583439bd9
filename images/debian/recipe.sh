# The Debian images; sourced.
. ../debian/second-stage.sh

# recipe SUITE
recipe() {
    enter 2500
    here=$PWD/../debian

    stage "installing Debian ($1)"
    # INITRD: the initial RAM file system is ours.
    export INITRD=No DEBIAN_FRONTEND=noninteractive
    install_system "$1" "$(echo \
        "$(kernel_package)" systemd systemd-sysv libpam-systemd udev dbus dbus-user-session openssh-server openssh-sftp-server python3 busybox-static \
        ca-certificates iproute2 iputils-ping procps kmod util-linux mount e2fsprogs fdisk login passwd less netbase |
        tr ' ' ',')" \
        --dpkgopt='force-unsafe-io' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*'
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
        second_stage "VMSANDBOX_CONSOLE=$VMSANDBOX_CONSOLE"
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
    systemd=$ROOT/etc/systemd
    mkdir -p "$systemd/system" "$systemd/system.conf.d" "$systemd/journald.conf.d" "$systemd/system-generators" "$systemd/system/systemd-udev-trigger.service.d"
    # As early as can be: the network, the key, the helper's port and the root file system are there before systemd.
    # Nothing stops the helper at shutdown: what it has started can tell its end as long as anything runs.
    cat >"$systemd/system/vmsandbox-helper.service" <<'EOF'
[Unit]
Description=The tests' host starts programs with it
DefaultDependencies=no
Before=sysinit.target
Before=systemd-udevd.service systemd-udev-trigger.service systemd-tmpfiles-setup.service systemd-tmpfiles-setup-dev.service
Before=systemd-tmpfiles-setup-dev-early.service systemd-modules-load.service systemd-sysctl.service
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/lib/vmsandbox/helper
Type=notify
KillMode=process
Restart=always
RestartSec=100ms
# There is no port.
RestartPreventExitStatus=0
# A program that is killed for want of memory is no end of the service.
OOMPolicy=continue

[Install]
WantedBy=sysinit.target
EOF
    cat >"$systemd/system/ssh.service" <<'EOF'
[Unit]
Description=OpenBSD Secure Shell server
Documentation=man:sshd(8) man:sshd_config(5)
DefaultDependencies=no
Before=sysinit.target shutdown.target
After=vmsandbox-helper.service
# Nothing else competes for the processor until it listens.
Before=systemd-udevd.service systemd-udev-trigger.service systemd-tmpfiles-setup.service systemd-tmpfiles-setup-dev.service
Before=systemd-tmpfiles-setup-dev-early.service systemd-modules-load.service systemd-sysctl.service
Conflicts=shutdown.target

[Service]
EnvironmentFile=-/etc/default/ssh
ExecStart=/usr/sbin/sshd -D $SSHD_OPTS
ExecStartPost=-/bin/busybox sh -c 'echo "vmsandbox: ssh" >/dev/console'
ExecReload=/usr/sbin/sshd -t
ExecReload=/bin/kill -HUP $MAINPID
KillMode=process
Restart=on-failure
Type=notify
RuntimeDirectory=sshd
RuntimeDirectoryMode=0755

[Install]
WantedBy=sysinit.target
Alias=sshd.service
EOF
    cat >"$systemd/system.conf.d/vmsandbox.conf" <<'EOF'
[Manager]
DefaultTimeoutStopSec=5s
DefaultTimeoutStartSec=180s
DefaultDeviceTimeoutSec=180s
RuntimeWatchdogSec=off
EOF
    cat >"$systemd/journald.conf.d/vmsandbox.conf" <<'EOF'
[Journal]
Storage=volatile
RuntimeMaxUse=32M
Audit=no
EOF
    for unit in apt-daily.timer apt-daily-upgrade.timer apt-daily.service apt-daily-upgrade.service dpkg-db-backup.timer \
        e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-tmpfiles-clean.timer logrotate.timer man-db.timer motd-news.timer \
        getty@tty1.service serial-getty@"$VMSANDBOX_CONSOLE".service getty-static.service \
        systemd-random-seed.service systemd-machine-id-commit.service systemd-journal-flush.service systemd-journal-catalog-update.service \
        systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-update-done.service systemd-firstboot.service \
        systemd-sysusers.service ldconfig.service systemd-hwdb-update.service systemd-pstore.service \
        kmod-static-nodes.service systemd-tmpfiles-setup-dev-early.service systemd-udev-load-credentials.service \
        modprobe@configfs.service modprobe@fuse.service modprobe@drm.service modprobe@efi_pstore.service modprobe@loop.service modprobe@dm_mod.service \
        systemd-remount-fs.service systemd-fsck-root.service proc-sys-fs-binfmt_misc.automount \
        sshd-keygen.service sshd-unix-local.socket sshd-vsock.socket systemd-pcrphase.service; do
        ln -sfn /dev/null "$systemd/system/$unit"
    done
    for generator in getty gpt-auto hibernate-resume bless-boot tpm2 ssh system-update debug rc-local run; do
        ln -sfn /dev/null "$systemd/system-generators/systemd-$generator-generator"
    done
    # Coldplug without what has neither a driver nor a rule that matters here: most of the devices there are.
    cat >"$systemd/system/systemd-udev-trigger.service.d/vmsandbox.conf" <<'EOF'
[Service]
ExecStart=
ExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=block --subsystem-match=net --subsystem-match=virtio --subsystem-match=pci --subsystem-match=usb --subsystem-match=virtio-ports --subsystem-match=input --subsystem-match=scsi --subsystem-match=hwmon --subsystem-match=rtc --subsystem-match=misc
EOF
    ln -sfn /usr/lib/systemd/system/multi-user.target "$systemd/system/default.target"
    # Started when somebody connects to its socket, or asks for it by D-Bus.
    rm -f "$ROOT/usr/lib/systemd/system/multi-user.target.wants/dbus.service"
    rm -f "$ROOT/usr/lib/systemd/system/multi-user.target.wants/systemd-logind.service"
    rm -f "$systemd/system/multi-user.target.wants/ssh.service" "$systemd/system/sshd.service"
    mkdir -p "$systemd/system/sysinit.target.wants"
    ln -s ../ssh.service ../vmsandbox-helper.service "$systemd/system/sysinit.target.wants/"
    ln -s ssh.service "$systemd/system/sshd.service"
    rm -f "$ROOT/etc/systemd/system/multi-user.target.wants/e2scrub_reap.service"
    # What was left out to keep the image small is not left out of what a test installs.
    rm -f "$ROOT"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$ROOT"/etc/apt/apt.conf.d/99mmdebstrap
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
    for module in $(panic_modules) virtio_pci virtio_rng virtio_net virtio_blk virtio_console ext4; do
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
