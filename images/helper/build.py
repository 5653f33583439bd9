#!/usr/bin/env python3
"""Build the helper for every architecture, for a wheel: with Zig, and byte for byte as SHA256SUMS says.

The programs go to `pytest_vmsandbox/helpers`, where a wheel or a source archive takes them along. Without them,
an installation makes its own. `tox run -e release` does all of it. After a change to helper.c, or to the version
of Zig in pyproject.toml, run this with `--record`.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

from pytest_vmsandbox.catalogue.helpers import SUMS, compiled, recorded, zig
from pytest_vmsandbox.core.architecture import ARCHITECTURES

SOURCE = Path(__file__).resolve().with_name("helper.c")
PACKAGED = SOURCE.parents[2] / "pytest_vmsandbox" / "helpers"


def main() -> None:
    """Build them, and compare or record their digests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--into", type=Path, default=PACKAGED, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=[*ARCHITECTURES], default=[*ARCHITECTURES])
    parser.add_argument("--record", action="store_true", help=f"write {SUMS}")
    options = parser.parse_args()
    if options.record and len(options.only) < len(ARCHITECTURES):
        parser.error("--record needs all architectures")
    expected, found = recorded(SOURCE), {SOURCE.name: digest(SOURCE)}
    with tempfile.TemporaryDirectory(prefix="vmsandbox-helpers-") as name:
        for architecture in options.only:
            found[architecture] = built(architecture, Path(name))
        if options.record:
            lines = [f"{value}  {key}\n" for key, value in found.items()]
            SOURCE.with_name(SUMS).write_text("".join(lines), encoding="utf-8")
        elif wrong := [key for key, value in found.items() if expected.get(key) != value]:
            sys.exit(f"{SUMS} has other digests of {', '.join(wrong)}; --record writes new ones")
        options.into.mkdir(parents=True, exist_ok=True)
        for architecture in options.only:
            shutil.copy2(Path(name, architecture), options.into / architecture)


def built(architecture: str, folder: Path) -> str:
    """Build one program. Returns its digest."""
    began, work = time.monotonic(), folder / "work"
    work.mkdir(exist_ok=True)
    program = folder / architecture
    with SOURCE.open("rb") as lock:
        why = compiled(zig(architecture), architecture, SOURCE, program, work, lock.fileno())
    if why:
        sys.exit(f"{architecture}: {why}")
    took = f"{time.monotonic() - began:.0f} s"
    print(
        f"{digest(program)}  {architecture:8} {program.stat().st_size:7} bytes, {took}", flush=True
    )
    return digest(program)


def digest(file: Path) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
