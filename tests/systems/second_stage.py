"""Build an image twice, by programs that run here and by a second stage in a guest, and compare the two systems.

    python tests/systems/second_stage.py [IMAGE] [--work DIR] [--again] [--only WAY]

Each way has a cache of its own below --work, so what was built is not built again unless --again says so.
The trees are read from the disks without a guest: file by file, with type, mode, owner and content. What may
differ is in `MAY_DIFFER`, with the reason. The states of the
packages and the enabled units are among these files. Exit status 0 if nothing else differs.

The other way needs no foreign programs here: `VMSANDBOX_NO_BINFMT=all` asks for it even if they could run.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageStore

WAYS = {"here": {}, "guest": {"VMSANDBOX_NO_BINFMT": "all"}}
# Patterns of paths → why they need not be the same.
MAY_DIFFER = {
    "etc/ssh/ssh_host_ed25519_key*": "each build makes a host key",
    "etc/*-": "copies of the lists of users, as they were before the last change",
    "run/*": "no guest sees it: it is in memory there",
    "usr/lib/modules/*/modules.*.bin": "the guest's are written by depmod of this machine, which may be older",
    "usr/lib/modules/*/modules.weakdep": "likewise: older ones do not write it",
    "var/lib/apt/extended_states": "what the guest's packages need is marked, even of those that stay anyway",
    "var/lib/dpkg/status-old": "what packages were before the last change",
}
# Lists whose order, and numbers in them, depend on the order in which packages were configured.
LISTS = ("etc/passwd", "etc/group", "etc/shadow", "etc/gshadow")


def main() -> int:
    """Build, read and compare. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("image", nargs="?", default="debian-13")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/vmsandbox-second-stage")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", choices=WAYS)
    args = parser.parse_args()
    trees = {}
    for way, environment in WAYS.items():
        if args.only in (None, way):
            trees[way] = tree_of(build(args.image, args.work / way, environment, again=args.again))
    if args.only:
        return 0
    differences = compare(trees["here"], trees["guest"])
    for line in differences:
        print(line)
    print(f"{args.image}: {len(trees['here'])} files, {len(differences)} differences")
    return 1 if differences else 0


def build(image: str, cache: Path, more: dict[str, str], *, again: bool) -> Path:
    """The disk of an image in a cache, built if it is not there."""
    cache.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "VMSANDBOX_CACHE": str(cache), **more}
    command = [sys.executable, "-m", "pytest_vmsandbox", "images", "build", image]
    subprocess.run([*command, *(["--force"] if again else [])], env=environment, check=True)
    disk = ImageStore(cache).require(Catalogue().get(image)).disk
    assert disk is not None
    subprocess.run(["e2fsck", "-fn", disk], check=True, stdout=subprocess.DEVNULL)
    return disk


def tree_of(disk: Path) -> dict[str, str]:
    """What a disk holds: each path, and a line about it."""
    command = [sys.executable, __file__, "--read", os.fspath(disk)]
    if os.geteuid() != 0:  # so that files can belong to others
        command = ["unshare", "--user", "--map-root-user", "--map-auto", *command]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(line.split("\t", 1) for line in lines.splitlines())


def read(disk: Path) -> None:
    """Show what a disk holds. This is a process of its own, which may own files as each user."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        command = ["debugfs", "-R", f"rdump / {folder}", os.fspath(disk)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        root = Path(folder)
        users, groups = (numbers(root / f"etc/{name}") for name in ("passwd", "group"))
        for path in sorted(root.rglob("*")):
            name, info = str(path.relative_to(root)), path.lstat()
            owner = f"{users[info.st_uid]}:{groups[info.st_gid]}"
            print(f"{name}\t{stat.filemode(info.st_mode)} {owner} {content(path, name)}")


def numbers(file: Path) -> dict[int, str]:
    """The names of users or groups by their numbers."""
    lines = (line.split(":") for line in file.read_text(encoding="utf-8").splitlines())
    return {int(parts[2]): parts[0] for parts in lines}


def content(path: Path, name: str) -> str:
    """What stands for the content of a file."""
    if path.is_symlink():  # /lib is a link
        return f"-> {path.readlink()}".replace("-> /lib/", "-> /usr/lib/")
    if not path.is_file():
        return ""
    data = path.read_bytes()
    if name in LISTS:
        data = b"\n".join(sorted(re.sub(rb"\d+", b"N", line) for line in data.splitlines()))
    elif name == "var/lib/dpkg/triggers/File":
        data = b"\n".join(sorted(data.splitlines()))
    return hashlib.sha256(data).hexdigest()[:16]


def compare(here: dict[str, str], guest: dict[str, str]) -> list[str]:
    """A line for each file that differs, and that may not."""
    found = []
    for path in sorted({*here, *guest}):
        one, other = here.get(path, "(not there)"), guest.get(path, "(not there)")
        if one != other and not any(fnmatch.fnmatch(path, pattern) for pattern in MAY_DIFFER):
            found.append(f"{path}\n    here   {one}\n    guest  {other}")
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]))
    else:
        sys.exit(main())
