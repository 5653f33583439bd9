"""The programs of distributions, such as ``pytest``, made for the Python of a guest."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from importlib.metadata import Distribution
from pathlib import Path

ENV = "/opt/vmsandbox/env"  # the virtual environment in the guest
_FIRST_LINE = f"#!{ENV}/bin/python\n"


def console_scripts(distribution: Distribution) -> dict[str, bytes]:
    """The programs of a distribution as files for the folder bin of `ENV`, by name."""
    return {
        entry.name: (
            f"{_FIRST_LINE}import sys\n"
            f"from {entry.module} import {entry.attr.partition('.')[0]}\n"
            'if __name__ == "__main__":\n'
            f"    sys.exit({entry.attr}())\n"
        ).encode()
        for entry in distribution.entry_points.select(group="console_scripts")
        if "/" not in entry.name and entry.attr  # else: no file name, or nothing to call
    }


def move_programs(site_packages: Path, folder: Path) -> None:
    """Make the programs of all distributions in `site_packages`, in a new folder.

    uv has put them into a folder there, for this machine's Python.
    """
    folder.mkdir()
    theirs = site_packages / "bin"
    programs = {}
    if theirs.is_dir():
        files = [file for file in theirs.iterdir() if file.is_file()]
        programs = {file.name: _for_the_guest(file.read_bytes()) for file in files}
        shutil.rmtree(theirs)
    for distribution in importlib.metadata.distributions(path=[os.fspath(site_packages)]):
        programs |= console_scripts(distribution)
    for name, content in programs.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o755)


def _for_the_guest(script: bytes) -> bytes:
    """A program with the guest's Python in its first line, if that names a Python."""
    first, _, rest = script.partition(b"\n")
    if first == b"#!/bin/sh" and rest.startswith(b"'''exec'"):  # for a path that is too long
        rest = rest.split(b"\n", 2)[-1]
    elif not (first.startswith(b"#!") and b"python" in first):
        return script
    return _FIRST_LINE.encode() + rest
