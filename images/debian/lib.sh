# Shared by the image recipes; sourced, not run.  POSIX sh.
#
# A recipe runs twice: first as the user who asked for the image, then, started by `enter`, inside name spaces of its
# own, where it is uid 0, has the user's subordinate ids, and may mount.  Nothing of what it mounts or starts there
# outlives it: when the outer half ends, however it ends, the kernel kills the inner half and drops its mounts.

stage() { printf '== %s\n' "$*"; }
fail() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# Run the recipe again inside; returns only there.  $1: MiB of memory from which the tree is kept in memory.
enter() {
    if [ "${VMSANDBOX_INSIDE-}" = "$$" ]; then
        inside "$1"
        return
    fi
    [ -d "${VMSANDBOX_OUT-}" ] || fail "VMSANDBOX_OUT is not a directory"
    [ -d "${VMSANDBOX_WORK-}" ] || fail "VMSANDBOX_WORK is not a directory"
    set -- --mount --pid --fork --kill-child --mount-proc
    if [ "$(id -u)" != 0 ]; then
        command -v newuidmap >/dev/null || fail "newuidmap is missing (Debian: package uidmap)"
        for map in /etc/subuid /etc/subgid; do
            awk -F: -v n="$(id -un)" -v u="$(id -u)" '($1 == n || $1 == u) && $3 >= 65536 { f = 1 } END { exit !f }' $map ||
                fail "no 65536 subordinate ids for $(id -un) in $map (usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $(id -un))"
        done
        set -- --user --map-root-user --map-auto "$@"
        unshare "$@" true ||
            fail "user name spaces do not work here (Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0)"
    fi
    # In its own name space the recipe is process 1.
    VMSANDBOX_INSIDE=1 setpriv --pdeathsig KILL unshare "$@" "$0" &
    child=$!
    trap 'kill -KILL $child 2>/dev/null; wait $child; exit 143' HUP INT TERM
    status=0
    wait $child || status=$?
    exit $status
}

inside() {
    umask 022
    unset TMPDIR
    export LC_ALL=C.UTF-8 SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(date +%s)}"
    # The tree under construction: in memory if there is plenty, else in the scratch directory; by a path that apt's own user can reach.
    free=$(awk '$1 == "MemAvailable:" { print int($2 / 1024) }' /proc/meminfo)
    if [ "$free" -ge "$1" ]; then
        mount -t tmpfs -o mode=0755 tmpfs /var/tmp
    else
        chmod 0755 "$VMSANDBOX_WORK"
        mount --bind "$VMSANDBOX_WORK" /var/tmp
    fi
    ROOT=/var/tmp/root
    export TMPDIR=/var/tmp
}

# runs_here: whether programs of the image run on this machine.  If not, its system is unpacked here, and `second_stage` leaves
# the rest to a guest.  Inside only.
runs_here() {
    [ "${VMSANDBOX_NO_BINFMT-}" != all ] && [ -z "${VMSANDBOX_EMULATOR-}" ]
}

# install_system SUITE PACKAGES [mmdebstrap options]: fill $ROOT with a small system and these packages.  If programs of the image
# do not run here, it is only unpacked.
install_system() {
    suite=$1 packages=$2
    shift 2
    if runs_here; then
        bootstrap "$suite" minbase "$packages" "$@"
        return
    fi
    # What the variant minbase has by itself; and the packages are kept for the second stage.
    bootstrap "$suite" extract "apt,$packages" --include='?or(?essential,?priority(required))' \
        --extract-hook='mkdir -m 0700 "$1/second-stage" "$1/second-stage/packages" && ln "$1"/var/cache/apt/archives/*.deb "$1/second-stage/packages/"' "$@"
    # Until base-passwd is configured: programs in the guest have a user.
    for file in passwd group; do cp "$ROOT/usr/share/base-passwd/$file.master" "$ROOT/etc/$file"; done
}

# second_stage NAME=VALUE…: what is left to be done for an unpacked $ROOT is done at the first boot of the disk, by the
# programs in ../debian/second-stage with these variables.  The file tells the builder so; see guests/second_stage.py.
second_stage() {
    cp -R ../debian "$ROOT/second-stage/debian"
    cp ../debian/second-stage/* "$ROOT/second-stage/"
    cp "$ROOT/usr/bin/busybox" "$ROOT/second-stage/busybox" 2>/dev/null || cp "$ROOT/bin/busybox" "$ROOT/second-stage/busybox"
    for setting in "$@"; do printf "%s='%s'\n" "${setting%%=*}" "${setting#*=}"; done >"$ROOT/second-stage/settings"
    echo /second-stage >"$VMSANDBOX_OUT/second-stage"
}

# configure_packages: in the guest, have dpkg do with the unpacked packages what it does in a new system.
configure_packages() {
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 0755 /usr/sbin/policy-rc.d
    count=$(ls /second-stage/packages | wc -l)
    # First, and in this order, what the scripts of others need; there are no dependencies between them that dpkg could follow.
    for package in base-passwd base-files dpkg libc6 perl-base mawk debconf; do
        dpkg --force-depends --install /second-stage/packages/"$package"_*.deb
    done
    follow Unpacking "unpacking packages" dpkg --force-depends --unpack --skip-same-version --recursive /second-stage/packages
    follow 'Setting up' "configuring packages" dpkg --configure --pending
    rm /usr/sbin/policy-rc.d
    unconfigured=$(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' | awk '$1 != "ii" { print $2 }')
    [ -z "$unconfigured" ] || fail "these packages are not configured:" $unconfigured
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

# compile SUITE SOURCE PROGRAM: a C program for the image, in a tree of its own: no compiler is ever in the image's.
compile() {
    image=$ROOT ROOT=/var/tmp/compiler
    bootstrap "$1" extract tcc,libc6-dev
    [ -e "$ROOT/lib" ] || { ln -s usr/lib "$ROOT/lib"; ln -s usr/lib64 "$ROOT/lib64"; }
    cp "$2" "$ROOT/source.c"
    chroot "$ROOT" tcc -o /program /source.c || fail "${2##*/} cannot be compiled"
    mkdir -p "${3%/*}"
    cp "$ROOT/program" "$3"
    rm -rf "$ROOT"
    ROOT=$image
}

# bootstrap SUITE VARIANT PACKAGES [mmdebstrap options]: fill $ROOT. The release files of the archive are left in $ROOT.releases.
bootstrap() {
    suite=$1 variant=$2 packages=$3
    shift 3
    mkdir -p "$ROOT.releases"
    set -- --extract-hook="cp \"\$1\"/var/lib/apt/lists/*Release '$ROOT.releases/'" "$@"
    # mmdebstrap looks for the suite's key among apt's; where those lack it, the full Debian key ring must have it.
    set -- --mode=root --variant="$variant" --format=directory --include="$packages" --components=main \
        --aptopt='APT::Install-Recommends "false"' --aptopt='APT::Sandbox::User "root"' --aptopt='Acquire::Languages "none"' "$@"
    if ! mmdebstrap "$@" "$suite" "$ROOT" >"$TMPDIR/log" 2>&1; then
        cat "$TMPDIR/log" >&2
        grep -q -e NO_PUBKEY -e 'not signed' "$TMPDIR/log" &&
            fail "the archive's signature for $suite cannot be verified with the keys of this machine (Debian and Ubuntu: install or update debian-archive-keyring)"
        fail "mmdebstrap could not build $suite: $(grep -m1 -e '^E: ' "$TMPDIR/log" || echo 'see above')"
    fi
}

# archive: write down the archive that filled $ROOT: URL, suite and date of each release file, and the keys that signed it.
# apt has verified the signatures.  Here they only tell their keys, where gpgv and the key ring are there; else "-".
archive() {
    for release in "$ROOT.releases"/*Release; do
        suite=${release##*_dists_} suite=${suite%_*}
        url=$(sed 's/\[[^]]*\]//' "$ROOT/etc/apt/sources.list" | awk -v suite="$suite" '$1 == "deb" && $3 == suite { print $2; exit }')
        date=$(sed -n 's/^Date: //p' "$release" | head -n1)
        keys=$(gpgv --status-fd 1 --keyring /usr/share/keyrings/debian-archive-keyring.gpg "$release" 2>/dev/null |
            awk '$2 == "VALIDSIG" { printf "%s%s", n++ ? "," : "", $NF }') || :
        echo "${url:--} $suite $(date -u -d "$date" +%Y-%m-%dT%H:%M:%SZ) ${keys:--}"
    done | LC_ALL=C sort >"$VMSANDBOX_OUT/archive.txt"
    [ -s "$VMSANDBOX_OUT/archive.txt" ] || fail "the archive's release files are missing"
}
