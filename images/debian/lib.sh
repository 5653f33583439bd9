# Shared by the image recipes; sourced, not run.  POSIX sh.
#
# A recipe runs twice: first as the user who asked for the image, then, started by `enter`, inside name spaces of its
# own, where it is uid 0, has the user's subordinate ids, and may mount.  Nothing of what it mounts or starts there
# outlives it: when the outer half ends, however it ends, the kernel kills the inner half and drops its mounts.

LIB=$PWD/../debian    # recipes start in their own folder

stage() { STAGE=$*; printf '== %s\n' "$STAGE"; }
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
    # The tree under construction: in memory if there is plenty, else in the scratch directory.  By a short path, and where nothing is:
    # a mount hides what the recipe or its tools may need (OUT, Python, apt's own files).
    for place in /mnt /media /srv "$VMSANDBOX_WORK/tree"; do
        [ "$place" != "$VMSANDBOX_WORK/tree" ] || mkdir -p "$place"
        ! is_empty "$place" || break
    done
    place=$(readlink -f "$place")
    free=$(awk '$1 == "MemAvailable:" { print int($2 / 1024) }' /proc/meminfo)
    if [ "$free" -ge "$1" ]; then
        mount -t tmpfs -o mode=0755 tmpfs "$place"
    else
        chmod 0755 "$VMSANDBOX_WORK"
        mount --bind "$VMSANDBOX_WORK" "$place"
    fi
    ROOT=$place/root
    export TMPDIR="$place"
}

# is_empty FOLDER: whether it is one, and we can see that nothing is in it.
is_empty() { [ -d "$1" ] && content=$(ls -A "$1" 2>/dev/null) && [ -z "$content" ]; }

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

UPDATED='Mirror sync in progress\|Hash Sum mismatch'    # as apt says it

# stale_suites: the suites whose lists do not match, as apt has named them in the log.
stale_suites() { sed -n "/$UPDATED/s|.*/dists/\([^/ ]*\)/.*|\1|p" "$TMPDIR/log" | sort -u | tr '\n' ' ' | sed 's/ $//'; }

# are_updates: whether $stale are such that a system can be made without them.
are_updates() {
    [ -n "$stale" ] || return 1
    for name in $stale; do case $name in "$suite-updates" | "$suite-security") ;; *) return 1 ;; esac; done
}

# bootstrap SUITE VARIANT PACKAGES [mmdebstrap options]: fill $ROOT. The release files of the archive are left in $ROOT.releases.
bootstrap() {
    suite=$1 variant=$2 packages=$3 what="${STAGE:-installing Debian ($1)}"
    shift 3
    mkdir -p "$ROOT.releases"
    set -- --extract-hook="cp \"\$1\"/var/lib/apt/lists/*Release '$ROOT.releases/'" "$@"
    # mmdebstrap looks for the suite's key among apt's; where those lack it, the full Debian key ring must have it.
    set -- --mode=root --variant="$variant" --format=directory --include="$packages" --components=main \
        --architectures="$VMSANDBOX_DEBIAN_ARCHITECTURE" \
        --aptopt='APT::Install-Recommends "false"' --aptopt='APT::Sandbox::User "root"' --aptopt='Acquire::Languages "none"' "$@"
    # While a mirror is being updated, its lists do not match its release files.
    is_native=false pauses=10
    [ "$(dpkg --print-architecture)" != "$VMSANDBOX_DEBIAN_ARCHITECTURE" ] || is_native=true pauses='20 60'
    for pause in $pauses ''; do
        watched mmdebstrap "$@" "$suite" "$ROOT" && return
        grep -q "$UPDATED" "$TMPDIR/log" || break
        rm -rf "$ROOT" "$ROOT.releases"/*
        [ -n "$pause" ] || break
        stage "the mirror of $suite is being updated: trying again in $pause seconds"
        sleep "$pause"
    done
    if grep -q "$UPDATED" "$TMPDIR/log"; then
        stale=$(stale_suites)
        # For other architectures, some mirrors keep lists of updates that never match.
        if ! $is_native && are_updates; then
            stage "the mirror's lists of $stale do not match their release files: going on without these updates"
            echo "no updates from $stale: when it was built, the mirror's lists for $VMSANDBOX_DEBIAN_ARCHITECTURE did not match" >"$VMSANDBOX_OUT/notes.txt"
            for name in $stale; do set -- "$@" --setup-hook="sed -i '/ $name main\$/d' \"\$1/etc/apt/sources.list\""; done
            watched mmdebstrap "$@" "$suite" "$ROOT" && return
        else
            cat "$TMPDIR/log" >&2
            fail "the mirror is being updated: its lists (${stale:-of $suite}) do not match its release files. Try again later, or from another network, which may have another mirror"
        fi
    fi
    cat "$TMPDIR/log" >&2
    grep -q -e NO_PUBKEY -e 'not signed' "$TMPDIR/log" &&
        fail "the archive's signature for $suite cannot be verified with the keys of this machine (Debian and Ubuntu: install or update debian-archive-keyring)"
    crash=$(grep -m1 -e '^qemu: ' "$TMPDIR/log") || crash=''
    [ -z "${VMSANDBOX_BINFMT-}" ] || [ -z "$crash" ] ||
        fail "the emulator for single programs failed ($crash): install another version of it, or set VMSANDBOX_NO_BINFMT=1, so that a guest runs the programs of the image"
    fail "mmdebstrap could not build $suite: $(grep -m1 -e '^E: ' "$TMPDIR/log" || echo 'see above')"
}

# watched PROGRAM…: run it with its output in $TMPDIR/log, and tell people each half minute how far the packages of $ROOT are.
watched() {
    (
        trap '[ -z "${!-}" ] || kill -KILL $!; exit' TERM    # a plain one could come before it is `sleep`, and be lost
        while :; do
            sleep 30 &
            wait $!
            so_far=$(packages_so_far)
            [ -z "$so_far" ] || stage "$what: $so_far"
        done
    ) &
    watch=$! status=0
    "$@" >"$TMPDIR/log" 2>&1 || status=$?
    kill $watch
    wait $watch || :
    return $status
}

# packages_so_far: what dpkg, or before it apt, has done with the packages of $ROOT.  It is empty if that is nothing yet.
packages_so_far() {
    if [ -s "$ROOT/var/log/dpkg.log" ]; then
        awk '$3 == "install" || $3 == "configure" || $3 == "trigproc" { now = $4 }
            $3 == "status" && $4 == "unpacked" && !unpacked[$5]++ { u++ }
            $3 == "status" && $4 == "installed" && !configured[$5]++ { c++ }
            END { sub(":.*", "", now); printf "%d packages unpacked, %d configured, now %s", u, c, now }' "$ROOT/var/log/dpkg.log"
    else
        find "$ROOT/var/cache/apt/archives" -name '*.deb' 2>/dev/null | awk 'END { if (NR) printf "%d packages downloaded", NR }'
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
