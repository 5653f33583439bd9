"""How the packages that hold the programs we need are installed."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence

from pytest_vmsandbox.catalogue import programs

_OTHER_SYSTEMS = {  # what brings QEMU there; the image tools have other names on each
    "dnf": "sudo dnf install qemu-system-x86-core qemu-img mmdebstrap e2fsprogs cpio zstd xz "
    "openssh-clients shadow-utils debian-keyring",
    "pacman": "sudo pacman -S qemu-system-x86 qemu-img debootstrap e2fsprogs cpio zstd xz openssh",
    "zypper": "sudo zypper install qemu-x86 qemu-tools mmdebstrap e2fsprogs cpio zstd xz openssh",
    "brew": "brew install qemu",
}
_APT_GET = (
    *("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"),
    *("-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=120"),
)


def install_line(packages: Sequence[str]) -> str:
    """What a person types to install packages of Debian's names, on this machine."""
    if programs.find("apt-get"):
        sudo = "" if os.geteuid() == 0 else "sudo "
        return f"{sudo}apt-get install {' '.join(packages)}"
    for manager, line in _OTHER_SYSTEMS.items():
        if programs.find(manager):
            return line
    return f"install what Debian calls {', '.join(packages)}"


def as_root(argv: Sequence[str]) -> list[str]:
    """`argv`, through sudo for an ordinary user."""
    return [*([] if os.geteuid() == 0 else ["sudo"]), *argv]


def apt_install(packages: Sequence[str]) -> list[str]:
    """The command line that installs packages without questions."""
    return as_root([*_APT_GET, "install", "--yes", "--no-install-recommends", *packages])


def apt_update() -> list[str]:
    """The command line that fetches the lists of packages."""
    return as_root([*_APT_GET, "update"])


def apt_knows(packages: Sequence[str]) -> bool:
    """Whether the lists of packages that are here are enough to install `packages`."""
    simulated = subprocess.run(
        [*_APT_GET, "install", "--simulate", "--no-install-recommends", *packages],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return simulated.returncode == 0


def shown(argv: Sequence[str]) -> str:
    """A command line for people: without what only keeps it quiet."""
    words = [word for word in argv if word not in _APT_GET or word == "apt-get"]
    return shlex.join(words)
