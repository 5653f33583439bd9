# Shared by the image recipes; sourced, not run.  POSIX sh.
#
# A recipe runs twice: first as the user who asked for the image, then, started by `enter`, inside name spaces of its
# own, where it is uid 0, has the user's subordinate ids, and may mount.  Nothing of what it mounts or starts there
# outlives it: when the outer half ends, however it ends, the kernel kills the inner half and drops its mounts.

LIB=$PWD/../debian    # recipes start in their own folder

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
    elif [ -n "${VMSANDBOX_BINFMT-}" ]; then
        # A user name space also for root: in a mere mount name space there is only the binfmt_misc of the whole machine.
        mkfifo "$VMSANDBOX_WORK/mapped"
        set -- --user sh -c 'read -r _ <"$VMSANDBOX_WORK/mapped"; exec setpriv --pdeathsig KILL unshare "$@"' sh "$@"
    fi
    VMSANDBOX_OUTSIDE=$(readlink /proc/self/ns/user)
    export VMSANDBOX_OUTSIDE
    # In its own name space the recipe is process 1.
    VMSANDBOX_INSIDE=1 setpriv --pdeathsig KILL unshare "$@" "$0" &
    child=$!
    trap 'kill -KILL $child 2>/dev/null; wait $child; exit 143' HUP INT TERM
    [ ! -p "$VMSANDBOX_WORK/mapped" ] || map_all
    status=0
    wait $child || status=$?
    exit $status
}

# map_all: give all users of this name space to that of $child, which waits for it.
map_all() {
    exec 3<>"$VMSANDBOX_WORK/mapped"    # stays open: the other end may not be yet
    while [ "$(readlink "/proc/$child/ns/user")" = "$VMSANDBOX_OUTSIDE" ]; do sleep 0.02; done
    for map in uid_map gid_map; do
        awk '{ print $1, $1, $3 }' /proc/self/$map >"/proc/$child/$map" || { kill -KILL $child; fail "root cannot map users into a user name space here"; }
    done
    echo >&3
}

# binfmt: have the kernel run programs of the image by the emulator, in this user name space only.
binfmt() {
    # Elsewhere this would be the list of the whole machine, or that of whoever called us.
    [ "$(readlink /proc/self/ns/user)" != "$VMSANDBOX_OUTSIDE" ] || fail "this is no user name space of its own"
    mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    printf '%s' "$VMSANDBOX_BINFMT" >/proc/sys/fs/binfmt_misc/register || fail "the kernel does not take the emulator (VMSANDBOX_NO_BINFMT=1 does without)"
}

inside() {
    [ -z "${VMSANDBOX_BINFMT-}" ] || binfmt
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

# helper TREE: put the program that starts programs for the host into a tree. No recipe needs a compiler.
helper() {
    install -D -m 0755 "$VMSANDBOX_HELPER" "$1/usr/lib/vmsandbox/helper"
}

# natively QUESTION…: what this machine can tell of programs, modules and keys without running programs of the image.
natively() { "$VMSANDBOX_PYTHON" "$LIB/natively.py" "$@" || fail "natively $1 failed"; }

# kernel_package: the smallest kernel for virtual machines that Debian has.
kernel_package() {
    case $VMSANDBOX_DEBIAN_ARCHITECTURE in
    amd64 | arm64) echo "linux-image-cloud-$VMSANDBOX_DEBIAN_ARCHITECTURE" ;;
    armhf) echo linux-image-armmp ;;
    i386) echo linux-image-686-pae ;;
    ppc64el) echo linux-image-powerpc64le ;;
    *) echo "linux-image-$VMSANDBOX_DEBIAN_ARCHITECTURE" ;;
    esac
}

# panic_modules: the drivers that report a panic to QEMU, of boards that have a device for it.
panic_modules() { case $VMSANDBOX_DEBIAN_ARCHITECTURE in amd64 | i386) echo pvpanic pvpanic_pci ;; esac; }

# bootstrap SUITE VARIANT PACKAGES [mmdebstrap options]: fill $ROOT. The release files of the archive are left in $ROOT.releases.
bootstrap() {
    suite=$1 variant=$2 packages=$3
    shift 3
    mkdir -p "$ROOT.releases"
    set -- --extract-hook="cp \"\$1\"/var/lib/apt/lists/*Release '$ROOT.releases/'" "$@"
    # mmdebstrap looks for the suite's key among apt's; where those lack it, the full Debian key ring must have it.
    set -- --mode=root --variant="$variant" --format=directory --include="$packages" --components=main \
        --architectures="$VMSANDBOX_DEBIAN_ARCHITECTURE" \
        --aptopt='APT::Install-Recommends "false"' --aptopt='APT::Sandbox::User "root"' --aptopt='Acquire::Languages "none"' "$@"
    mmdebstrap "$@" "$suite" "$ROOT" >"$TMPDIR/log" 2>&1 && return
    # Some mirrors keep lists of updates, of the rarer architectures mostly, that do not match their release files.
    if grep -q 'Mirror sync in progress' "$TMPDIR/log"; then
        stage "the mirror's lists of updates to $suite do not match their release files: going on without updates"
        rm -rf "$ROOT" "$ROOT.releases"/*
        mmdebstrap "$@" "$suite" "$ROOT" http://deb.debian.org/debian >"$TMPDIR/log" 2>&1 && return
    fi
    cat "$TMPDIR/log" >&2
    grep -q -e NO_PUBKEY -e 'not signed' "$TMPDIR/log" &&
        fail "the archive's signature for $suite cannot be verified with the keys of this machine (Debian and Ubuntu: install or update debian-archive-keyring)"
    fail "mmdebstrap could not build $suite: $(grep -m1 -e '^E: ' "$TMPDIR/log" || echo 'see above')"
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
