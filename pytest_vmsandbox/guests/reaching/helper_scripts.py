"""What the guest's shell does to get a helper: find out what the guest is, put the program there, start it.

The scripts run as root on systems that we know nothing about. So they use little: POSIX shell, and the
most common programs. Each prints lines ``NAME=VALUE`` about what it found or did.
"""

from __future__ import annotations

from typing import Final

_PATHS: Final = (
    'PATH="${PATH:+$PATH:}/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin"; export PATH\n'
)

# What the guest is. It also runs on systems that are no Linux.
LOOK: Final = (
    _PATHS
    + r"""
echo "system=$(uname -s)"
echo "machine=$(uname -m)"
echo "release=$(uname -r)"
echo "user=$(id -u)"
"""
)

# Puts the program from standard input into the first folder from which it can run.  $1: its size in bytes.
# Given a descriptor that ends at once, the program says hello, and ends with 0. So all that it needs at
# its start is tried: the processor, system calls, and the right to run it from there.
PLACE: Final = (
    _PATHS
    + r"""
umask 022
buffer='' tried=''
for folder in /run /dev/shm /tmp /var/tmp /root; do
    buffer=$folder/.vmsandbox-helper
    rm -f "$buffer"
    (: >"$buffer") 2>/dev/null && break
    buffer=''
done
[ -n "$buffer" ] || { echo "failed=place"; echo "why=no folder can be written to"; exit 0; }
cat >"$buffer"
if [ "$(wc -c <"$buffer")" -ne "$1" ]; then
    rm -f "$buffer"
    echo "failed=place"
    echo "why=there is no room for it in ${buffer%/*}"
    exit 0
fi
label() {
    [ -e /sys/fs/selinux/enforce ] || return 0
    restorecon "$1"
    chcon -t bin_t "$1"
} >/dev/null 2>&1
for place in /usr/lib/vmsandbox /usr/local/lib/vmsandbox /opt/vmsandbox /var/lib/vmsandbox /root/.vmsandbox \
    /run/vmsandbox-helper /dev/shm/vmsandbox-helper /tmp/.vmsandbox-helper; do
    mkdir -p "$place" 2>/dev/null || continue
    rm -f "$place/helper.new" 2>/dev/null
    (cat "$buffer" >"$place/helper.new" && chmod 0755 "$place/helper.new") 2>/dev/null || continue
    label "$place/helper.new"
    said=$( (exec "$place/helper.new" 3 3<>/dev/null) 2>&1 </dev/null)
    status=$?
    if [ $status -eq 0 ] && mv -f "$place/helper.new" "$place/helper"; then
        rm -f "$buffer"
        echo "place=$place"
        exit 0
    fi
    rm -f "$place/helper.new"
    said=$(echo "$said" | head -n 1 | tr -cd ' -~')
    tried="$tried$place/helper ended with status $status${said:+ ($said)}; "
done
rm -f "$buffer"
[ -n "$tried" ] && echo "failed=run" || echo "failed=place"
echo "why=${tried:-no folder can be written to}"
"""
)

# Is left in the guest, beside the program. $1: "once" if something else starts it again.
START: Final = (
    "#!/bin/sh\n# Starts the helper of pytest-vmsandbox, by which this machine's host runs programs.\n"
    + _PATHS
    + r"""
umask 022
cd /
here=${0%/*}
port() {
    for file in /sys/class/virtio-ports/*/name; do
        [ -e "$file" ] && read -r name <"$file" && [ "$name" = vmsandbox.helper ] || continue
        file=${file%/name}
        echo "${file##*/}"
        return 0
    done
    return 1
}
tries=0
until device=$(port); do
    [ $tries -gt 0 ] || modprobe virtio_console 2>/dev/null
    tries=$((tries + 1))
    [ $tries -lt 30 ] || exit 0
    sleep 1
done
if [ ! -c "/dev/$device" ] && IFS=: read -r major minor <"/sys/class/virtio-ports/$device/dev"; then
    mknod -m 0600 "/dev/$device" c "$major" "$minor"
fi
# Nothing stops it before everything else has been stopped.
omit() { [ ! -d /run/sendsigs.omit.d ] || echo "$1" >/run/sendsigs.omit.d/vmsandbox-helper.pid; }
if [ "$1" = once ]; then
    omit $$
    exec "$here/helper" </dev/null
fi
while :; do
    "$here/helper" </dev/null &
    omit $!
    wait $!
    status=$?
    [ $status -ne 0 ] || break
    echo "the helper ended with status $status" >&2
    sleep 1
done
"""
)

_UNIT: Final = """\
[Unit]
Description=The tests' host starts programs with it
DefaultDependencies=no
RequiresMountsFor=$place
StartLimitIntervalSec=0

[Service]
ExecStart=/bin/sh $place/start once
Type=notify
KillMode=process
Restart=always
RestartSec=100ms
# There is no port.
RestartPreventExitStatus=0
# A program that is killed for want of memory is no end of the service.
OOMPolicy=continue
TimeoutStartSec=40s

[Install]
WantedBy=sysinit.target
"""

# Starts the program now, and at each boot if the system can do so.  $1: the folder of the program.
INSTALL: Final = (
    _PATHS
    + "umask 022\nplace=$1\n"
    + f"cat >\"$place/start\" <<'END_OF_START'\n{START}END_OF_START\n"
    + r"""
chmod 0755 "$place/start" || { echo "failed=place"; echo "why=$place/start cannot be written"; exit 0; }
[ ! -e /sys/fs/selinux/enforce ] || { restorecon "$place/start"; chcon -t bin_t "$place/start"; } >/dev/null 2>&1
name=vmsandbox-helper

# -- the port --
port() { grep -qx vmsandbox.helper /sys/class/virtio-ports/*/name 2>/dev/null; }
said=''
port || said=$(modprobe virtio_console 2>&1)
tries=0
until port || [ $tries -ge 20 ]; do
    tries=$((tries + 1))
    sleep 0.2 2>/dev/null || sleep 1
done
if ! port; then
    echo "failed=port"
    echo "why=$(echo "${said:-the module virtio_console shows none}" | head -n 1)"
    exit 0
fi

# -- by what it is started: each of these returns whether it has done so --
by_systemd() {
    units=/etc/systemd/system
    [ -w $units ] || units=/run/systemd/system
    mkdir -p $units/sysinit.target.wants || return 1
    cat >$units/$name.service <<END_OF_UNIT || return 1
@UNIT@END_OF_UNIT
    ln -sf ../$name.service $units/sysinit.target.wants/$name.service
    systemctl daemon-reload && systemctl start $name.service && return 0
    journalctl -b -u $name.service -o cat -n 5 --no-pager
    systemctl stop $name.service
    rm -f $units/$name.service $units/sysinit.target.wants/$name.service
    systemctl daemon-reload
    return 1
}
by_openrc() {
    runner=$(command -v openrc-run || command -v runscript) || return 1
    cat >/etc/init.d/$name <<END_OF_SERVICE || return 1
#!$runner
description="The tests' host starts programs with it"
command="$place/start"
command_background=yes
pidfile=/run/$name.pid
depend() {
    after localmount
    before sshd ssh dropbear
}
stop() {
    return 0
}
END_OF_SERVICE
    chmod 0755 /etc/init.d/$name
    rc-update add $name default && rc-service $name start
}
by_runit() {
    for services in /etc/service /var/service /service; do
        [ -d $services ] && [ -w $services ] || continue
        mkdir -p /etc/sv/$name || return 1
        printf '#!/bin/sh\nexec %s/start once\n' "$place" >/etc/sv/$name/run || return 1
        chmod 0755 /etc/sv/$name/run
        ln -sf /etc/sv/$name $services/$name
        return 0
    done
    return 1
}
# Adds a line to a file, before the first line with a text; else at the end.  $1: line, $2: text, $3: file
add() {
    grep -qF "$place/start" "$3" && return 0
    [ -w "$3" ] || return 1
    done=''
    while IFS= read -r old || [ -n "$old" ]; do
        case $old in
        '#'*) ;;
        *"$2"*) [ -n "$done" ] || { printf '%s\n' "$1"; done=1; } ;;
        esac
        printf '%s\n' "$old"
    done <"$3" >"$3.new" || return 1
    grep -qF "$place/start" "$3.new" || printf '%s\n' "$1" >>"$3.new"
    cat "$3.new" >"$3" && rm -f "$3.new"
}
by_inittab() {
    add "vmsb:0123456:respawn:$place/start once" :wait: /etc/inittab || return 1
    telinit q || init q || kill -HUP 1
}
by_busybox() {
    add "::respawn:$place/start once" ::once: /etc/inittab && kill -HUP 1
}
by_hand() {
    if command -v setsid >/dev/null; then
        setsid "$place/start" </dev/null >/dev/null 2>"$log" &
    else
        (trap '' HUP; exec "$place/start" </dev/null >/dev/null 2>"$log") &
    fi
}
by_rc() {
    for file in /etc/rc.local /etc/rc.d/rc.local /etc/init.d/rcS /etc/rc; do
        [ -f $file ] && [ -x $file ] && grep -q '^#!.*sh' $file || continue
        grep -qF "$place/start" $file || {
            { head -n 1 $file; echo "$place/start </dev/null >/dev/null 2>&1 &"; tail -n +2 $file; } >$file.new &&
                cat $file.new >$file
        } || continue
        rm -f $file.new
        by_hand
        return 0
    done
    return 1
}
log=/run/$name.log
(: >$log) 2>/dev/null || log=/tmp/$name.log
read -r first </proc/1/comm
what=$(readlink /proc/1/exe)
if [ -d /run/systemd/system ]; then way=systemd
elif [ -d /run/openrc ] && command -v rc-update >/dev/null; then way=openrc
elif [ "$first" = runit ] || [ "$first" = runit-init ]; then way=runit
elif [ -f /etc/inittab ]; then
    way=inittab
    case $what in *busybox*) way=busybox ;; esac
    initctl version >/dev/null 2>&1 && way=rc
else way=rc
fi
if ! said=$(by_$way 2>&1); then
    [ $way = rc ] || echo "not=$way: $(echo "$said" | tail -n 1)"
    way=hand
    by_hand
fi
echo "way=$way"
"""
).replace("@UNIT@", _UNIT)

# Why the program that was started does not answer.  $1: the folder of the program.
LAST_WORDS: Final = (
    _PATHS
    + r"""
for log in /run/vmsandbox-helper.log /tmp/vmsandbox-helper.log; do
    [ -s $log ] && tail -n 3 $log
done
command -v journalctl >/dev/null && journalctl -b -u vmsandbox-helper.service -o cat -n 5 --no-pager
dmesg | grep -i 'avc: *denied' | tail -n 3
ps | grep "[h]elper"
:
"""
)
