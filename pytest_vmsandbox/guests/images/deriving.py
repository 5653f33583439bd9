"""Makes an image from another one: packages, a script, a user, a larger disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.making import Build
from pytest_vmsandbox.catalogue.origin import Addition
from pytest_vmsandbox.catalogue.store import (
    ARCHIVE,
    DISK,
    INITRD,
    NOTES,
    PACKAGES,
    BuiltImage,
    files_of,
)
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.images import changing, examining, started
from pytest_vmsandbox.guests.reaching.access import KeyPair

_FOLDER = "/root/.vmsandbox-add"  # of the definition's files, in the guest

_INSTALL = """
set -e
export DEBIAN_FRONTEND=noninteractive
if command -v apt-get; then
    apt-get -q -o Acquire::Retries=3 update
    apt-get -q -y -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold install -- "$@"
elif command -v dnf; then dnf -y install -- "$@"
elif command -v microdnf; then microdnf -y install "$@"
elif command -v yum; then yum -y install -- "$@"
elif command -v zypper; then zypper --non-interactive install -- "$@"
elif command -v apk; then apk --no-cache add "$@"
elif command -v pacman; then pacman -Syu --noconfirm --needed -- "$@"
else
    echo "there is no package manager that we know: apt-get, dnf, microdnf, yum, zypper, apk or pacman"
    exit 1
fi
"""
_ADD_USER = """
id -u "$1" && exit 0
if command -v useradd; then
    useradd --create-home --shell "$([ -x /bin/bash ] && echo /bin/bash || echo /bin/sh)" "$1" &&
        usermod --password '*' "$1"
elif command -v adduser; then
    adduser -D "$1" && sed -i "s/^$1:!:/$1:*:/" /etc/shadow
else
    number=1001
    while cut -d : -f 3 /etc/passwd /etc/group | grep -qx $number; do number=$((number + 1)); done
    echo "$1:*:$number:$number:$1:/home/$1:/bin/sh" >>/etc/passwd &&
        echo "$1:*:$number:" >>/etc/group &&
        mkdir -p "/home/$1" && chown $number:$number "/home/$1"
fi || exit 1
[ "$2" = key ] || exit 0
home=$(awk -F: -v name="$1" '$1 == name { print $6 }' /etc/passwd)
mkdir -p "$home/.ssh" && cp /root/.ssh/authorized_keys "$home/.ssh/" && chmod 0700 "$home/.ssh" &&
    chown -R "$1" "$home/.ssh"
"""
# All of the root file system, with the folders that others are mounted on.
_PACK = """
set -e
mkdir /run/vmsandbox-view
mount --bind / /run/vmsandbox-view
cd /run/vmsandbox-view
find . -print0 | cpio -0 -o -H newc
"""
# The kernel that runs, whether its modules are there, and the kernels that the system itself has.
_KERNELS = """
uname -r
[ -d "/lib/modules/$(uname -r)" ] && echo modules
for file in /boot/vmlinu[xz]* /boot/initrd.img* /boot/initramfs* /lib/modules/*/modules.builtin; do
    [ -f "$file" ] && [ ! -L "$file" ] && sha256sum "$file"
done
:
"""
# The guest's SSH servers may still hold what they read when they started, so this looks at the files.
_HOST_KEYS = """
for file in /etc/ssh/ssh_host_ed25519_key /etc/dropbear/*; do
    [ -f "$file" ] && sha256sum "$file"
done
:
"""


def derive(build: Build, base: BuiltImage, settings: Settings) -> Mapping[str, object]:
    """Fill the folder of an image that derives from `base`.

    Returns:
        What the record has of the base.

    Raises:
        ImageError: the base is damaged or gone, or something cannot be added.
        BootError: the base does not boot.
        OSError: a file cannot be copied.
    """
    with base.hold():
        base.verified()
        is_changed = _is_changed(build.definition, base)
        for name in (*files_of(base.definition), PACKAGES, ARCHIVE, NOTES):
            made_anew = name in (DISK if base.disk else INITRD, PACKAGES)
            if (base.folder / name).exists() and not (is_changed and made_anew):
                changing.copy_file(base.folder / name, build.out / name)
        found = _change(build, base, settings) if is_changed else {}
        record = base.record()
        of_base = {key: record[key] for key in ("source",) if key in record}
        return {**of_base, **found, "base": base.as_base()}


def _is_changed(definition: ImageDefinition, base: BuiltImage) -> bool:
    """Whether something has to be changed in a guest. If not, the files are copied."""
    add, of_base = definition.add, base.definition
    return (
        (add is not None and bool(add.packages or add.script))
        or definition.disk_size != of_base.disk_size
        or definition.user not in ("root", of_base.user)
        # It says something of its own about the guest, which is compared with the guest.
        or (definition.python, definition.python_version)
        != (of_base.python, of_base.python_version)
        or definition.init != of_base.init
    )


def _change(build: Build, base: BuiltImage, settings: Settings) -> Mapping[str, object]:
    """Boot the base, make the changes in the guest, and keep its disk.

    Returns:
        What was found in the guest afterwards.
    """
    definition = build.definition
    add = definition.add or Addition()
    hardware = changing.hardware_for(base, disk=definition.disk_size, network=add.network)
    build.say(f"booting {base.definition.name}")
    with changing.changing(build, base, hardware, settings, KeyPair.for_image(base.key)) as guest:
        started.await_started(guest, base.definition.init)
        if definition.disk_size != base.definition.disk_size:
            changing.grow(build, guest)
        before = guest.shell(_KERNELS, user="root").stdout
        keys = guest.shell(_HOST_KEYS, user="root").stdout
        if definition.user not in ("root", base.definition.user):
            build.say(f"adding the user {definition.user}")
            changing.run(
                build, guest, _ADD_USER, [definition.user, "key" if base.key is not None else ""]
            )
        if add.packages:
            build.say(f"installing {', '.join(add.packages)}")
            changing.run(build, guest, _INSTALL, add.packages, what="the package manager")
        with changing.named(build, add.script):
            if add.script:
                build.say(f"running {add.script}")
                _run_script(build, guest, definition.folder, add.script)
            _tell_of_kernels(build, before, guest.shell(_KERNELS, user="root").stdout)
            _check_host_key(build, keys, guest.shell(_HOST_KEYS, user="root").stdout)
            return _examined(build, base, guest)


def _examined(build: Build, base: BuiltImage, guest: Guest) -> Mapping[str, object]:
    """Look at a guest that was changed, and clean it up. Returns what was found in it."""
    found = examining.check(guest, build.definition)
    packages = examining.packages(guest)
    if not packages and (base.folder / PACKAGES).exists():
        packages = (base.folder / PACKAGES).read_text(encoding="utf-8")
    (build.out / PACKAGES).write_text(packages, encoding="utf-8")
    changing.clean(build, guest)
    if base.disk is None:
        build.say("making the initial RAM file system")
        with (build.out / INITRD).open("xb") as initrd:
            guest.engine.stream_script(_PACK, stdout=initrd.write)
    return found


def _run_script(build: Build, guest: Guest, folder: Path, script: str) -> None:
    """Run a script of the definition in the guest. Its working folder has the definition's files."""
    guest.push(folder, _FOLDER)
    with (folder / script).open("rb") as file:
        has_interpreter = file.read(2) == b"#!"
    start = 'chmod u+x "$2" && exec "./$2"' if has_interpreter else 'exec /bin/sh "./$2"'
    changing.run(build, guest, f'cd "$1" || exit; {start}', [_FOLDER, script], what=script)
    guest.run(["rm", "-rf", _FOLDER], user="root")


def _check_host_key(build: Build, before: str, after: str) -> None:
    """Check that a guest still has the host key of its base, which the image keeps.

    Raises:
        ImageError: it has another one, or none.
    """
    if before != after:
        raise ImageError(
            f"making {build.definition.name!r} failed: it changes or removes the guest's SSH host key, so "
            "nobody could log in to its guests",
            remedy="leave /etc/ssh/ssh_host_ed25519_key (or the key in /etc/dropbear) as it is",
        )


def _tell_of_kernels(build: Build, before: str, after: str) -> None:
    """Say what counts if the guest's kernels have changed. The image keeps the kernel of its base.

    Raises:
        ImageError: the modules of that kernel are gone.
    """
    if before == after or build.definition.firmware != "kernel":
        return
    release = before.partition("\n")[0]
    if "\nmodules\n" in before and "\nmodules\n" not in after:
        raise ImageError(
            f"making {build.definition.name!r} failed: it removes the modules of its kernel, {release}",
            remedy="its guests boot the kernel of the base, directly. Leave the package of that kernel "
            "installed",
        )
    build.say(
        f"the kernels or modules on the disk have changed. That does not change what boots: guests boot "
        f"the kernel and the initial RAM disk of the base ({release})"
    )
