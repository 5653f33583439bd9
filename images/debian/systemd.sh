# systemd in the images of Debian; sourced.

# Start the helper and SSH with it, and as little else as can be.
configure_init() {
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
RuntimeWatchdogSec=0
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
    printf '[Service]\nExecStart=\nExecStart=-udevadm trigger --type=devices --action=add%s\n' "$coldplug" \
        >"$systemd/system/systemd-udev-trigger.service.d/vmsandbox.conf"
    ln -sfn /usr/lib/systemd/system/multi-user.target "$systemd/system/default.target"
    # Started when somebody connects to its socket, or asks for it by D-Bus.
    rm -f "$ROOT/usr/lib/systemd/system/multi-user.target.wants/dbus.service"
    rm -f "$ROOT/usr/lib/systemd/system/multi-user.target.wants/systemd-logind.service"
    rm -f "$systemd/system/multi-user.target.wants/ssh.service" "$systemd/system/sshd.service"
    mkdir -p "$systemd/system/sysinit.target.wants"
    ln -s ../ssh.service ../vmsandbox-helper.service "$systemd/system/sysinit.target.wants/"
    ln -s ssh.service "$systemd/system/sshd.service"
    rm -f "$ROOT/etc/systemd/system/multi-user.target.wants/e2scrub_reap.service"
}
