"""The programs that we need of this machine: where they lie, and which package holds them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

PACKAGES = {  # Debian's and Ubuntu's, of programs that are not called like their package
    "awk": "mawk",
    "debugfs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "e2fsck": "e2fsprogs",
    "gpg": "gnupg",
    "losetup": "mount",
    "mke2fs": "e2fsprogs",
    "mkfs.ext4": "e2fsprogs",
    "newgidmap": "uidmap",
    "newuidmap": "uidmap",
    "qemu-img": "qemu-utils",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-x86_64": "qemu-system-x86",
    "resize2fs": "e2fsprogs",
    "setpriv": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "tune2fs": "e2fsprogs",
    "unshare": "util-linux",
    "xz": "xz-utils",
}
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not in an ordinary user's PATH


def package_of(program: str) -> str:
    """The package of Debian and Ubuntu that holds a program."""
    return PACKAGES.get(program, program)


def search_path() -> str:
    """PATH, and behind it the folders that only root has there."""
    path = os.environ.get("PATH") or os.defpath
    return os.pathsep.join(dict.fromkeys((*path.split(os.pathsep), *SBIN)))


def find(program: str) -> str | None:
    """The path of a program, also where only root has its folder in PATH."""
    return shutil.which(program, path=search_path())


def missing(programs: Iterable[str]) -> tuple[str, ...]:
    """Those of `programs` that are not on this machine, each once."""
    return tuple(program for program in dict.fromkeys(programs) if find(program) is None)
