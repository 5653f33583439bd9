"""The Python distributions of this machine: which stay here, and what guests get of the others."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import Distribution, distributions, packages_distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

OURSELVES = "pytest-vmsandbox"
SITES = {"site-packages", "dist-packages"}
ENV = "/opt/vmsandbox/env"  # the virtual environment in the guest
_FIRST_LINE = f"#!{ENV}/bin/python\n"
# Files that are added when a wheel is installed.
_OF_THE_INSTALLER = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})

# Guests do not get these, nor what only these need.
LEFT_OUT = frozenset(
    {
        OURSELVES,
        # They install packages. Guests have no network for that.
        *("pip", "uv", "wheel"),
        # They start test runs, or check sources.
        *("mypy", "nox", "pre-commit", "ruff", "tox"),
        # Plugins that select tests. That happens here.
        *("pytest-picked", "pytest-shard", "pytest-split", "pytest-testmon"),
    }
)
# Plugins that work on this side. They are installed in guests, because conftest files may import them,
# but not loaded there.
HOST_ONLY = frozenset(
    {"pytest-cov", "pytest-forked", "pytest-reportlog", "pytest-timeout", "pytest-xdist"}
)


def installed(sys_path: Sequence[str] | None = None) -> dict[str, Distribution]:
    """The distributions on `sys_path` (default: ``sys.path``) by canonical name.

    If several have one name, the first counts, as for an import.
    """
    return _installed(tuple(sys.path if sys_path is None else sys_path))


@cache  # reading all metadata takes 0.1 s, and nothing is installed during a run
def _installed(path: tuple[str, ...]) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    for distribution in distributions(path=list(path)):
        # An uninstall may leave metadata without a name. Python 3.12 warns if we ask for its key.
        if name := dict(distribution.metadata.items()).get("Name"):  # type: ignore[attr-defined]
            found.setdefault(canonicalize_name(name), distribution)
    return found


def sources(distribution: Distribution) -> Iterator[str]:
    """The folders on this machine that may hold the project of a distribution.

    The first holds its metadata. It is an entry of ``sys.path``.
    """
    yield str(distribution.locate_file(""))
    found = _origin(distribution)
    url = urlsplit(str(found.get("url", "")))
    if url.scheme == "file" and "dir_info" in found:
        yield unquote(url.path)


def is_editable(distribution: Distribution) -> bool:
    """Whether a distribution is imported from its project's folder."""
    editable = _origin(distribution).get("dir_info", {}).get("editable", False)
    return bool(editable) or _is_developed(distribution)


def is_local(distribution: Distribution) -> bool:
    """Whether a distribution did not come from a package index."""
    is_egg = _is_developed(distribution) and bool(distribution.read_text("PKG-INFO"))
    return is_egg or bool(_origin(distribution))


def _is_developed(distribution: Distribution) -> bool:
    return Path(str(distribution.locate_file(""))).name not in SITES


def _origin(distribution: Distribution) -> dict[str, Any]:
    """The content of ``direct_url.json`` (PEP 610); empty for a distribution from an index."""
    try:
        found = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def requirements_of(distribution: Distribution) -> Iterator[Requirement]:
    """The requirements of a distribution, with all extras, for all Pythons and platforms."""
    for line in distribution.requires or ():
        try:
            yield Requirement(line)
        except InvalidRequirement:
            continue  # older than PEP 508; pip ignores it, too


def is_imported(name: str) -> bool:
    """Whether this process has imported anything of a distribution."""
    return any(
        module in sys.modules and name in set(map(canonicalize_name, names))
        for module, names in packages_distributions().items()
    )


def providers(module: str) -> list[str]:
    """The names of the distributions that installed a top-level module here."""
    return sorted(set(packages_distributions().get(module, ())))


# -- programs, made for the Python of a guest -------------------------------------------------------


def console_scripts(distribution: Distribution) -> dict[str, bytes]:
    """The programs of a distribution by name, as files for the folder bin of `ENV`."""
    return {
        entry.name: (
            f"{_FIRST_LINE}import sys\n"
            f"from {entry.module} import {entry.attr.partition('.')[0]}\n"
            'if __name__ == "__main__":\n'
            f"    sys.exit({entry.attr}())\n"
        ).encode()
        for entry in distribution.entry_points.select(group="console_scripts")
        if "/" not in entry.name and entry.attr  # otherwise no file name, or nothing to call
    }


def move_programs(site_packages: Path, folder: Path) -> None:
    """Make the programs of all distributions in `site_packages`, in a new folder.

    uv has put programs for this machine's Python into a folder there.
    """
    theirs = site_packages / "bin"
    theirs.mkdir(exist_ok=True)
    theirs.rename(folder)
    files = [file for file in folder.iterdir() if file.is_file()]
    programs = {file.name: _for_the_guest(file.read_bytes()) for file in files}
    for distribution in distributions(path=[os.fspath(site_packages)]):
        programs |= console_scripts(distribution)
    for name, content in programs.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o755)


def _for_the_guest(script: bytes) -> bytes:
    """A program with the guest's Python in its first line, if that names a Python."""
    first, _, rest = script.partition(b"\n")
    if first == b"#!/bin/sh" and rest.startswith(b"'''exec'"):  # for long paths
        rest = rest.split(b"\n", 2)[-1]
    elif not (first.startswith(b"#!") and b"python" in first):
        return script
    return _FIRST_LINE.encode() + rest


# -- wheels made from installed distributions -------------------------------------------------------
#
# Some packages are published as sources only. What was built for this environment works in any guest,
# if nothing in it is compiled.


def is_pure(distribution: Distribution) -> bool:
    """Whether a distribution is pure Python for any system, according to its metadata."""
    lines = (distribution.read_text("WHEEL") or "").splitlines()
    tags = [line.partition(":")[2].strip() for line in lines if line.startswith("Tag:")]
    return "Root-Is-Purelib: true" in lines and any(
        tag.startswith(("py3-", "py2.py3-")) and tag.endswith("-none-any") for tag in tags
    )


def make_wheel(distribution: Distribution, folder: Path) -> Path | None:
    """Pack an installed distribution as a wheel in `folder`; None if it is not pure or not complete."""
    if not is_pure(distribution):
        return None
    files = dict(_files(distribution))
    info = next((path.parts[0] for path in files if path.parts[0].endswith(".dist-info")), None)
    if info is None:
        return None
    wheel = folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
    try:
        contents = {str(path): place.read_bytes() for path, place in files.items()}
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in with_record(contents, info).items():
                archive.writestr(name, content)
    except OSError:
        wheel.unlink(missing_ok=True)
        return None
    return wheel


def with_record(files: Mapping[str, bytes], info: str) -> dict[str, bytes]:
    """The files of a distribution by path, with their RECORD in its folder `info`."""
    lines = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}\n")
    return {**files, f"{info}/RECORD": "".join([*lines, f"{info}/RECORD,,\n"]).encode()}


def _files(distribution: Distribution) -> Iterator[tuple[Path, Path]]:
    """The files of a distribution by path below site-packages, without programs and bytecode."""
    for path in distribution.files or ():
        name = Path(path)
        if (
            not name.is_absolute()
            and {"..", "__pycache__"}.isdisjoint(name.parts)
            and name.parts[0] != "bin"  # uv puts programs there; we make them again
            and not (name.parent.suffix == ".dist-info" and name.name in _OF_THE_INSTALLER)
        ):
            yield name, Path(str(distribution.locate_file(path)))
