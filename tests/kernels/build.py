"""Builds the kernel of ``examples/kernel``, from Debian's source package, and two kselftests.

It is no part of CI. The build takes 5 minutes on two cores. It goes on where it was ended:

    python tests/kernels/build.py --into ~/kernel
    KERNEL=~/kernel python -m pytest examples/kernel

It needs make, gcc, flex, bison, bc, libelf-dev, and apt-get with the package lists of Debian.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/kernel"
SELFTESTS = {
    "sigaltstack/sas": [],
    "size/get_size": ["-ffreestanding", "-nostartfiles"],
}


def run(*argv: str | os.PathLike[str], cwd: Path) -> None:
    """Run a program with low priority, with its output on the terminal."""
    print("+", *argv, flush=True)
    subprocess.run(["nice", *argv], cwd=cwd, check=True)


def source(folder: Path, package: str) -> Path:
    """The unpacked source of a package such as ``linux-source-6.1``."""
    tree = folder / package
    if not tree.is_dir():
        if not (debs := sorted(folder.glob(f"{package}_*.deb"))):
            run("apt-get", "download", package, cwd=folder)
            debs = sorted(folder.glob(f"{package}_*.deb"))
        part = folder / "part"
        shutil.rmtree(part, ignore_errors=True)
        run("dpkg-deb", "--extract", debs[-1], part, cwd=folder)
        run("tar", "-xf", f"usr/src/{package}.tar.xz", cwd=part)
        (part / package).rename(tree)
        shutil.rmtree(part)
    return tree


def configure(tree: Path, build: Path) -> None:
    """tinyconfig, with the options of the example."""
    wanted = EXAMPLE / "kernel.config"
    build.mkdir(exist_ok=True)
    run("make", "-s", f"O={build}", "tinyconfig", cwd=tree)
    merge = tree / "scripts/kconfig/merge_config.sh"
    run(merge, "-Q", "-m", "-O", build, build / ".config", wanted, cwd=tree)
    run("make", "-s", f"O={build}", "olddefconfig", cwd=tree)
    lines = (build / ".config").read_text(encoding="utf-8").splitlines()
    options = [line for line in wanted.read_text(encoding="utf-8").splitlines() if "=" in line]
    if lost := [option for option in options if option not in lines]:
        sys.exit(f"this kernel does not have: {', '.join(lost)}")


def selftests(tree: Path, folder: Path) -> None:
    """Build kselftests without shared libraries, for guests of any kind."""
    folder.mkdir(exist_ok=True)
    for name, flags in SELFTESTS.items():
        path = tree / "tools/testing/selftests" / f"{name}.c"
        run("gcc", "-static", "-O2", "-w", *flags, path, "-o", folder / path.stem, cwd=path.parent)


def main() -> None:
    """Build it, and print how long that took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--into", type=Path, required=True, help="the folder for all of it")
    parser.add_argument("--package", default="linux-source-6.1", help="of Debian")
    options = parser.parse_args()
    folder = options.into.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    tree, build = source(folder, options.package), folder / "build"
    configure(tree, build)
    jobs = f"-j{os.cpu_count() or 1}"
    run("make", "-s", jobs, f"O={build}", "bzImage", "modules", cwd=tree)
    selftests(tree, folder / "selftests")
    size = (build / "arch/x86/boot/bzImage").stat().st_size
    print(f"built in {time.monotonic() - begun:.0f} s: {build}, a bzImage of {size} bytes")


if __name__ == "__main__":
    main()
