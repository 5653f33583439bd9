"""Lists of digests, as vendors publish them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from pytest_vmsandbox.core.errors import ImageError

_KINDS = {64: "sha256", 128: "sha512"}
_WEAK = {32: "MD5", 40: "SHA-1"}
_PLAIN = re.compile(
    r"([0-9A-Fa-f]{32,128})(?:[ \t]+\*?(.+))?"
)  # `hex  name`, `hex *name`, or hex alone
_BSD = re.compile(r"([A-Z0-9-]+) \((.+)\) = ([0-9A-Fa-f]{32,128})")
_SIGNED = "-----BEGIN PGP SIGNED MESSAGE-----"
_SIGNATURE = "-----BEGIN PGP SIGNATURE-----"


@dataclass(frozen=True)
class Digest:
    """A digest: its kind, ``sha256`` or ``sha512``, and its hexadecimal digits."""

    kind: str
    hex: str


def find(text: str, name: str, *, alone: bool) -> Digest:
    """The digest of a file in a list.

    Args:
        text: the list, also inside of a clear-signed text, whose signature is not looked at.
        name: of the file.
        alone: whether the list is there for this file only, so that another name does not matter.

    Raises:
        ImageError: the list does not have it, has two, or only a weak one.
    """
    entries = _entries(text)
    named = [(digits, known) for digits, known in entries if known == name]
    if not named and (alone or not any(known for _, known in entries)) and len(entries) == 1:
        named = entries
    found = {digits for digits, _ in named}
    strong = {digits for digits in found if len(digits) in _KINDS}
    by_kind = {_KINDS[len(digits)]: digits for digits in sorted(strong)}
    if len(by_kind) != len(strong):
        raise ImageError(
            f"the list of digests has two different ones for {name}",
            remedy="look into the list, and put the right one into image.toml: sha256 = …",
        )
    if not by_kind:
        weak = sorted({_WEAK[len(digits)] for digits in found if len(digits) in _WEAK})
        raise ImageError(
            f"the list of digests has only {' and '.join(weak)} for {name}: too weak to rely on"
            if weak
            else f"the list of digests has none for {name}",
            remedy="check the URL of the list. Or put a digest into image.toml: sha256 = …",
        )
    kind = max(by_kind)  # sha512 if there are both
    return Digest(kind, by_kind[kind])


def _entries(text: str) -> list[tuple[str, str]]:
    """Digits and name (or none) of each line that has a digest."""
    lines = text.splitlines()
    if _SIGNED in lines:  # what is outside of it is not what was signed
        lines = lines[lines.index(_SIGNED) + 1 :]
        lines = lines[: lines.index(_SIGNATURE)] if _SIGNATURE in lines else lines
    found = []
    for line in (line.removeprefix("- ").strip() for line in lines):
        if entry := _BSD.fullmatch(line):
            found.append((entry[3].lower(), PurePosixPath(entry[2]).name))
        elif entry := _PLAIN.fullmatch(line):
            found.append((entry[1].lower(), PurePosixPath(entry[2] or "").name))
    return found
