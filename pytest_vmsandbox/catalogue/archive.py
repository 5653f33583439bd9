"""What the archive of a distribution has now: newer versions of an image's packages.

This is for people, before an image is built again. apt checks the archive's signatures when it is built.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

from pytest_vmsandbox.catalogue.importing import download
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import ImageError

_UNPACKED_LIMIT = 512 << 20  # bytes of one list of packages
_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


class Suite(NamedTuple):
    """A suite of an archive, as an image's record has it: `date` is that of its release file."""

    url: str
    name: str
    date: str

    def place(self, path: str) -> str:
        """The URL of one of its files.

        Raises:
            ImageError: it is no http(s) URL.
        """
        if not download.is_url(self.url):
            raise _unusable(self.url, "only http and https are supported")
        return f"{self.url}/dists/{self.name}/{path}"


def newer_packages(
    archive: Iterable[str], packages: Collection[str], architecture: str
) -> list[tuple[str, str]]:
    """What of an image's packages the archive has in a newer version. It is asked over the network.

    Args:
        archive: URL, name and date of each suite that the image was built from.
        packages: name and version of each package.
        architecture: of the image.

    Returns:
        Each such package, as in `packages`, and the newest one. None of them if no suite has changed.

    Raises:
        ImageError: the archive cannot be asked.
    """
    suites = [Suite(*words) for line in archive if len(words := line.split()) == 3]
    releases = {suite: download.read_text(suite.place("InRelease")) for suite in suites}
    if all(_date(suite, text) <= suite.date for suite, text in releases.items()):
        return []
    ours = dict(package.split(" ", 1) for package in packages if " " in package)
    there: defaultdict[str, set[str]] = defaultdict(set)
    debian = ARCHITECTURES[architecture].debian
    for suite, text in _that_have(debian, releases).items():
        for name, version in _listed(suite, text, debian):
            if name in ours:
                there[name].add(version)
    found = []
    for name, version in ours.items():
        newest = version
        for other in there[name]:
            newest = other if _is_newer(other, newest) else newest
        if newest != version:
            found.append((f"{name} {version}", f"{name} {newest}"))
    return sorted(found)


def _that_have(architecture: str, releases: Mapping[Suite, str]) -> dict[Suite, str]:
    """The suites for an architecture. Old ones have fewer architectures in their security suites."""
    lists = {
        suite: re.search(r"(?m)^Architectures: (.+)$", text) for suite, text in releases.items()
    }
    found = [
        suite for suite, listed in lists.items() if not listed or architecture in listed[1].split()
    ]
    return {suite: releases[suite] for suite in found or releases}


def _date(suite: Suite, release: str) -> str:
    found = re.search(r"(?m)^Date: (.+)$", release)
    try:
        return parsedate_to_datetime(found[1] if found else "").astimezone(UTC).strftime(_FORMAT)
    except ValueError as error:
        raise _unusable(suite.url, f"the release file of {suite.name} has no date") from error


def _listed(suite: Suite, release: str, architecture: str) -> Iterator[tuple[str, str]]:
    """Name and version of each package of a suite."""
    path = f"main/binary-{architecture}/Packages.xz"
    digests = re.findall(rf"(?m)^ ([0-9a-f]{{64}}) +\d+ {re.escape(path)}$", release)
    if not digests:
        raise _unusable(suite.url, f"the release file of {suite.name} does not list {path}")
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:
        file = Path(folder, "Packages.xz")
        download.fetch(suite.place(path), file, lambda _: None)
        packed = file.read_bytes()
    if hashlib.sha256(packed).hexdigest() not in digests:  # a mirror in the middle of its update
        raise _unusable(suite.url, f"{path} does not fit the release file. Try again later")
    try:
        unpacker = lzma.LZMADecompressor()
        unpacked = unpacker.decompress(packed, _UNPACKED_LIMIT)
    except lzma.LZMAError as error:
        raise _unusable(suite.url, f"{path} is damaged: {error}") from error
    if not unpacker.eof:
        raise _unusable(suite.url, f"{path} is too large, or incomplete")
    for paragraph in unpacked.decode(errors="replace").split("\n\n"):
        fields = dict(re.findall(r"(?m)^(Package|Version): (\S+)", paragraph))
        if len(fields) == 2:
            yield fields["Package"], fields["Version"]


def _is_newer(one: str, other: str) -> bool:
    try:
        done = subprocess.run(["dpkg", "--compare-versions", one, "gt", other], check=False)
    except OSError as error:
        raise ImageError(
            f"versions of packages cannot be compared: dpkg: {error.strerror}",
            remedy="install dpkg, which the tools for building images need as well",
        ) from error
    return done.returncode == 0


def _unusable(url: str, why: str) -> ImageError:
    return ImageError(
        f"the archive {url} cannot be asked for newer packages: {why}",
        remedy="check the network, or add --offline to leave the archive out",
    )
