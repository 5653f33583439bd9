"""The programs that we need on this machine: where they are, and how to install their packages."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence

from pytest_vmsandbox.core.architecture import ARCHITECTURES, Architecture, native_architecture

_HELD = {  # package of Debian and Ubuntu → its programs, where the names differ
    "dpkg": ["dpkg-deb"],
    "e2fsprogs": ["debugfs", "e2fsck", "mke2fs", "mkfs.ext4", "resize2fs", "tune2fs"],
    "gcc": ["cc"],
    "gnupg": ["gpg"],
    "kmod": ["depmod"],
    "libc6-dev": ["libc.a"],
    "mawk": ["awk"],
    "mount": ["losetup"],
    "openssh-client": ["ssh", "ssh-keygen"],
    "qemu-utils": ["qemu-img", "qemu-io"],
    "swtpm": ["swtpm"],
    "uidmap": ["newgidmap", "newuidmap"],
    "util-linux": ["setpriv", "unshare"],
    "xz-utils": ["xz"],
}
PACKAGES = {program: package for package, held in _HELD.items() for program in held} | {
    f"qemu-system-{one.qemu}": one.package for one in ARCHITECTURES.values()
}
COMPILER = ("gcc", "libc6-dev")  # the packages that make the helper from its source
_OTHER_SYSTEMS = {  # package manager → its command, and the image tools
    "dnf": (
        "sudo dnf install",
        (
            "qemu-img mmdebstrap e2fsprogs cpio zstd xz openssh-clients shadow-utils debian-keyring "
            "gcc glibc-static"
        ),
    ),
    "pacman": ("sudo pacman -S", "qemu-img debootstrap e2fsprogs cpio zstd xz openssh gcc"),
    "zypper": (
        "sudo zypper install",
        "qemu-tools mmdebstrap e2fsprogs cpio zstd xz openssh gcc glibc-devel-static",
    ),
    "brew": ("brew install", ""),
}
APT_GET = (
    *("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"),
    *("-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=120"),
)
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not in an ordinary user's PATH


def package_of(program: str) -> str:
    """The package of Debian and Ubuntu that contains a program."""
    return PACKAGES.get(program, program)


def search_path() -> str:
    """PATH, followed by the folders that usually only root has in PATH."""
    path = os.environ.get("PATH") or os.defpath
    return os.pathsep.join(dict.fromkeys((*path.split(os.pathsep), *SBIN)))


def find(program: str) -> str | None:
    """The path of a program, even if only root has its folder in PATH."""
    return shutil.which(program, path=search_path())


def missing(programs: Iterable[str]) -> tuple[str, ...]:
    """The members of `programs` that are not on this machine, each once."""
    return tuple(program for program in dict.fromkeys(programs) if find(program) is None)


def with_theirs(programs: Iterable[str]) -> list[str]:
    """`programs`, and those that they need in turn on this system."""
    wanted = list(programs)
    if "mmdebstrap" in wanted and _system() != "debian":
        wanted.append("gpg")  # it finds the keys of a suite that is not of this system
    return wanted


def _system() -> str:
    """What this system calls itself, such as ``debian`` or ``ubuntu``."""
    try:
        return platform.freedesktop_os_release()["ID"]
    except (OSError, KeyError):
        return ""


def install_line(packages: Sequence[str]) -> str:
    """The command that installs some packages on this machine, to type by hand.

    Args:
        packages: by their names in Debian.
    """
    if find("apt-get"):
        sudo = "" if os.geteuid() == 0 else "sudo "
        return f"{sudo}apt-get install {' '.join(packages)}"
    for manager, (command, tools) in _OTHER_SYSTEMS.items():
        if find(manager):
            native = ARCHITECTURES.get(native_architecture(), ARCHITECTURES["x86_64"])
            return f"{command} {native.elsewhere[manager]} {tools}".rstrip()
    return f"install what these packages of Debian contain: {', '.join(packages)}"


def emulator_line(architecture: Architecture) -> str:
    """The command that installs the emulator for an architecture on this machine, to type by hand."""
    if find("apt-get"):
        return install_line([architecture.elsewhere.get(_system(), architecture.package)])
    for manager, (command, _) in _OTHER_SYSTEMS.items():
        if find(manager):
            return f"{command} {architecture.elsewhere[manager]}"
    return install_line([architecture.package])


def emulator_packages(architecture: Architecture) -> list[str]:
    """The packages that have the emulator for an architecture, and its firmware, where there is apt."""
    emulator = architecture.elsewhere.get(_system(), architecture.package)
    return [name for name in (emulator, architecture.firmware_package) if name]


def as_root(argv: Sequence[str]) -> list[str]:
    """`argv`, through sudo for an ordinary user."""
    return [*([] if os.geteuid() == 0 else ["sudo"]), *argv]


def apt_install(packages: Sequence[str]) -> list[str]:
    """The command line that installs packages without asking."""
    return as_root([*APT_GET, "install", "--yes", "--no-install-recommends", *packages])


def apt_knows(packages: Sequence[str]) -> bool:
    """Whether apt's package lists on this machine have all of `packages`."""
    simulated = subprocess.run(
        [*APT_GET, "install", "--simulate", "--no-install-recommends", *packages],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return simulated.returncode == 0


def shown(argv: Sequence[str]) -> str:
    """A command line for people, without the options that only keep it quiet."""
    words = [word for word in argv if word not in APT_GET or word == "apt-get"]
    return shlex.join(words)
