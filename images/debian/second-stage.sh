# Images of architectures whose programs cannot run on this machine; sourced, as lib.sh.  Their systems are unpacked here by
# native programs only, and configured by their own programs at the first boot of the disk: the second stage.

# runs_here: whether programs of the image run on this machine, by themselves or by an emulator.  Inside only.
runs_here() {
    [ "${VMSANDBOX_NO_BINFMT-}" != all ] && { [ -z "${VMSANDBOX_EMULATOR-}" ] || [ -n "${VMSANDBOX_BINFMT-}" ]; }
}

# is_foreign: whether the image is of another architecture, so that its programs run slowly here or not at all.
is_foreign() { [ -n "${VMSANDBOX_EMULATOR-}" ]; }

# install_system SUITE PACKAGES [mmdebstrap options]: fill $ROOT with a small system and these packages.  If programs of the image
# do not run here, it is only unpacked.
install_system() {
    suite=$1 packages=$2
    shift 2
    ! is_foreign || command -v depmod >/dev/null || fail "depmod is missing (Debian: package kmod)"
    [ -z "${VMSANDBOX_BINFMT-}" ] || set -- "$@" --setup-hook='
        # By an emulator, these take minutes: this machine makes the list of modules, and Python compiles what it loads.
        mkdir -p "$1/usr/local/sbin"
        for program in depmod py3compile; do printf "#!/bin/sh\n" >"$1/usr/local/sbin/$program"; done
        chmod 0755 "$1"/usr/local/sbin/*'
    if runs_here; then
        printf '#!/bin/sh\n' >"$TMPDIR/run-me"
        chmod 0755 "$TMPDIR/run-me"
        "$TMPDIR/run-me" 2>/dev/null || fail "no program can be run in ${VMSANDBOX_WORK%/*}, which may be mounted with noexec: set TMPDIR to a folder elsewhere"
        # We know that programs run. mmdebstrap would want arch-test for that, also for i386 on amd64.
        bootstrap "$suite" minbase "$packages" --skip=check/qemu "$@"
        [ -z "${VMSANDBOX_BINFMT-}" ] || rm "$ROOT"/usr/local/sbin/*
        return
    fi
    # What the variant minbase has by itself.
    bootstrap "$suite" extract "apt,$packages" --include='?or(?essential,?priority(required))' \
        --extract-hook="mkdir -p '$ROOT.packages' && mv \"\$1\"/var/cache/apt/archives/*.deb '$ROOT.packages/'" "$@"
    # Until base-passwd is configured: dpkg here and programs in the guest have users.
    for file in passwd group; do cp "$ROOT/usr/share/base-passwd/$file.master" "$ROOT/etc/$file"; done
    unpack "$packages"
}

# unpack WANTED: have this machine's dpkg note in $ROOT that the packages are unpacked, so that the guest's has only to configure them.
# It runs no program of a package: `preinst`, the only one that it would run, is taken out and comes back afterwards.  WANTED are the
# packages that somebody asked for: apt may remove others with the last one that needs them.
unpack() {
    mkdir -p "$ROOT.stripped" "$ROOT/var/lib/apt"
    for package in "$ROOT.packages"/*.deb; do
        (
            cd "$ROOT.stripped"
            rm -rf control && mkdir control
            dpkg-deb --ctrl-tarfile "$package" | tar -C control -xf -
            case ",apt,$1,$(control Essential),$(control Priority)," in
            *",$(control Package),"* | *",$(control Package)/"* | *,yes,* | *,required,*) ;;
            *) printf 'Package: %s\nArchitecture: %s\nAuto-Installed: 1\n\n' "$(control Package)" "$VMSANDBOX_DEBIAN_ARCHITECTURE" >>"$ROOT/var/lib/apt/extended_states" ;;
            esac
            if [ -e control/preinst ]; then
                mkdir -p "$ROOT.preinst"
                mv control/preinst "$ROOT.preinst/$(control Package)$([ "$(control Multi-Arch)" != same ] || echo ":$(control Architecture)")"
            fi
            tar -C control --numeric-owner --owner=0 --group=0 -cf control.tar .
            dpkg-deb --fsys-tarfile "$package" >data.tar
            echo 2.0 >debian-binary
            { printf '!<arch>\n' && for member in debian-binary control.tar data.tar; do member $member; done; } >"${package##*/}"
        )
    done
    rm -rf "$ROOT.stripped/control"
    # With the settings of the image, not those of this machine.
    [ ! -d /etc/dpkg/dpkg.cfg.d ] || mount --bind "$ROOT/etc/dpkg/dpkg.cfg.d" /etc/dpkg/dpkg.cfg.d
    (
        set -f
        # shellcheck disable=SC2046  # words
        dpkg $(sed 's/^/--/' "$ROOT"/etc/dpkg/dpkg.cfg.d/99mmdebstrap) --root="$ROOT" --log=/dev/null \
            --force-architecture --force-depends --unpack --recursive "$ROOT.stripped"
    ) >"$TMPDIR/log" 2>&1 ||
        fail "dpkg could not unpack the packages: $(tail -n3 "$TMPDIR/log")"
    [ ! -d /etc/dpkg/dpkg.cfg.d ] || umount /etc/dpkg/dpkg.cfg.d
    for script in "$ROOT.preinst"/*; do cp "$script" "$ROOT/var/lib/dpkg/info/${script##*/}.preinst"; done
    rm -rf "$ROOT.packages" "$ROOT.stripped" "$ROOT.preinst"
}

control() { sed -n "s/^$1: *//p" control/control; }

# member FILE: as it is in an archive of ar.
member() {
    size=$(stat -c %s "$1")
    printf '%-16s%-12s%-6s%-6s%-8s%-10s`\n' "$1" 0 0 0 100644 "$size"
    cat "$1"
    [ $((size % 2)) = 0 ] || echo
}

# second_stage NAME=VALUE…: what is left to be done for an unpacked $ROOT is done at the first boot of the disk, by the
# programs in ../debian/second-stage with these variables.  The file tells the builder so; see guests/second_stage.py.
second_stage() {
    mkdir -m 0700 "$ROOT/second-stage"
    cp -R ../debian "$ROOT/second-stage/debian"
    cp ../debian/second-stage/* "$ROOT/second-stage/"
    cp "$ROOT/usr/bin/busybox" "$ROOT/second-stage/busybox" 2>/dev/null || cp "$ROOT/bin/busybox" "$ROOT/second-stage/busybox"
    for setting in "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH" "$@"; do
        printf "%s='%s'\n" "${setting%%=*}" "$(printf %s "${setting#*=}" | sed "s/'/'\\\\''/g")"
    done >"$ROOT/second-stage/settings"
    echo /second-stage >"$VMSANDBOX_OUT/second-stage"
}

# configure_packages: in the guest, have dpkg do with the unpacked packages what it does in a new system.  ROOT=/.
configure_packages() {
    printf '#!/bin/sh\nexit 101\n' >"$ROOT/usr/sbin/policy-rc.d"    # no service is started
    chmod 0755 "$ROOT/usr/sbin/policy-rc.d"
    count=$(dpkg-query -W | wc -l)
    for script in "$ROOT"/var/lib/dpkg/info/*.preinst; do
        [ ! -e "$script" ] || preinst "$script"
    done
    # First, and in this order, what the scripts of others need; there are no dependencies between them that dpkg could follow.
    for package in base-passwd base-files dpkg libc6 perl-base mawk debconf; do
        dpkg --force-depends --configure "$package"
    done
    follow 'Setting up' "configuring packages" dpkg --configure --pending
    rm "$ROOT/usr/sbin/policy-rc.d"
    unconfigured=$(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' | awk '$1 != "ii" { print $2 }')
    # shellcheck disable=SC2086  # words
    [ -z "$unconfigured" ] || fail "these packages are not configured:" $unconfigured
}

# preinst SCRIPT: run what dpkg would have run before it unpacked a package.
preinst() {
    package=${1##*/} package=${package%.preinst}
    DPKG_MAINTSCRIPT_NAME=preinst DPKG_MAINTSCRIPT_PACKAGE=${package%:*} DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 \
        DPKG_MAINTSCRIPT_ARCH=$(dpkg --print-architecture) DPKG_ADMINDIR=/var/lib/dpkg DPKG_ROOT='' \
        DPKG_RUNNING_VERSION=$(dpkg-query -W -f '${Version}' dpkg) "$1" install || fail "$package: its preinst ended with status $?"
}

# follow WORD WHAT PROGRAM…: run it, and tell people now and then how many lines have begun with WORD.
follow() {
    word=$1 what=$2 done=0
    shift 2
    stage "$what"
    { "$@" 2>&1 || echo "$?" >"$TMPDIR/failed"; } | while IFS= read -r line; do
        printf '%s\n' "$line"
        case $line in
        "$word "*)
            done=$((done + 1))
            [ $((done % 20)) != 0 ] || stage "$what: $done of $count" ;;
        esac
    done
    [ ! -e "$TMPDIR/failed" ] || fail "$what: dpkg ended with status $(cat "$TMPDIR/failed")"
}
