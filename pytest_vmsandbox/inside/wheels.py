"""A wheel of a distribution that lies unpacked on this machine, if it is pure Python.

Some packages are published as sources only. What was built of them for this environment fits any
guest, as long as nothing in it is compiled.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution
from pathlib import Path

# What the installation has added.
_OF_THE_INSTALLER = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})


def is_pure(distribution: Distribution) -> bool:
    """Whether all of a distribution is Python for any system, and its metadata say so."""
    lines = (distribution.read_text("WHEEL") or "").splitlines()
    tags = [line.partition(":")[2].strip() for line in lines if line.startswith("Tag:")]
    return "Root-Is-Purelib: true" in lines and any(
        tag.startswith(("py3-", "py2.py3-")) and tag.endswith("-none-any") for tag in tags
    )


def make_wheel(distribution: Distribution, folder: Path) -> Path | None:
    """Pack a distribution again as a wheel in `folder`; None if it is not pure, or not whole."""
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
    """The files of a distribution by path, and the RECORD of them in its folder `info`."""
    lines = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}\n")
    return {**files, f"{info}/RECORD": "".join([*lines, f"{info}/RECORD,,\n"]).encode()}


def _files(distribution: Distribution) -> Iterator[tuple[Path, Path]]:
    """The files of a distribution by their paths below site-packages, but for programs and bytecode."""
    for path in distribution.files or ():
        name = Path(path)
        if (
            not name.is_absolute()
            and ".." not in name.parts
            and "__pycache__" not in name.parts
            and name.parts[0] != "bin"  # where uv puts programs; they are made anew
            and not (name.parent.suffix == ".dist-info" and name.name in _OF_THE_INSTALLER)
        ):
            yield name, Path(str(distribution.locate_file(path)))
