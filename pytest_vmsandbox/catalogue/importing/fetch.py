"""Gets the files that a definition names: from a server, from this machine, or from the cache.

Nothing reads such a file before its digest was compared. What was downloaded is kept by its digest, so the image
can be made again without the network.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pytest_vmsandbox.cache.store import DOWNLOADS, Entry, Store
from pytest_vmsandbox.catalogue.importing import checksums, download, signatures
from pytest_vmsandbox.catalogue.importing.checksums import Digest
from pytest_vmsandbox.catalogue.importing.convert import write_sparsely
from pytest_vmsandbox.catalogue.importing.source import SourceFile, opened
from pytest_vmsandbox.catalogue.origin import Source
from pytest_vmsandbox.core.errors import ImageError

_DATA = "data"
_SMALL = 4 << 20  # bytes of a list of digests, or of its signature
_SUFFIXES = ("sum", "sums", "")  # of lists for one file: NAME.sha256, NAME.SHA256SUM, NAME.CHECKSUM


class Fetcher:
    """Gets the files of one definition.

    Args:
        cache: the user's cache folder.
        folder: of the definition. Paths are relative to it.
        say: gets lines for people.
        offline: whether the network must not be used.
        patience: how long to wait for servers.
    """

    def __init__(
        self,
        cache: Path,
        folder: Path,
        say: Callable[[str], None],
        *,
        offline: bool = False,
        patience: download.Patience = download.PATIENCE,
    ) -> None:
        self._store = Store(cache, DOWNLOADS, Entry)
        self._folder = folder
        self._say = say
        self._offline = offline
        self._patience = patience

    def digest(self, source: Source) -> Digest:
        """The digest of the disk of a source. A list of digests is looked up.

        Raises:
            ImageError: the list cannot be read, is not signed as it must be, or does not have it.
        """
        return self.digest_and_check(source)[0]

    def digest_and_check(self, source: Source) -> tuple[Digest, str]:
        """The digest of the disk of a source, and where it came from, for people.

        Raises:
            ImageError: see `digest`.
        """
        if source.sha256:
            return Digest("sha256", source.sha256), "sha256 given by the definition"
        if source.sha512:
            return Digest("sha512", source.sha512), "sha512 given by the definition"
        name, place = name_of(source.url), source.checksums
        scheme = place.partition(":")[0].lower() if download.is_url(place) else "a path"
        about = f"list of digests over {scheme}"
        if download.is_url(place):
            self._check_online(place)
            text = download.read_text(place, self._patience)
        else:
            with opened(self._folder / place, place) as file:
                text = file.head(_SMALL).decode("utf-8", errors="replace")
        if source.keyring:
            signature = self._small(source.signature) if source.signature else None
            keyring = self._folder / source.keyring
            signed, keys = signatures.checked(text.encode(), signature, keyring, name_of(place))
            text, about = signed.decode(errors="replace"), f"{about}, signed by {keys}"
        ending = name_of(place).removeprefix(name).lower()
        alone = ending in {
            f".{word}{suffix}" for word in ("sha256", "sha512", "check") for suffix in _SUFFIXES
        }
        return checksums.find(text, name, alone=alone and name_of(place) != name), about

    def _small(self, place: str) -> bytes:
        """The content of a small file at a place."""
        if not download.is_url(place):
            with opened(self._folder / place, place) as file:
                return file.head(_SMALL)
        self._check_online(place)
        with tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:
            target = Path(folder, _DATA)
            download.fetch(place, target, self._say, self._patience)
            with target.open("rb") as stream:
                return stream.read(_SMALL)

    @contextmanager
    def opened(self, place: str, digest: Digest) -> Iterator[SourceFile]:
        """The file at a place, open, after its digest was compared. Afterwards it must be as it was.

        Args:
            place: an http(s) URL, or a path.

        Raises:
            ImageError: it cannot be fetched or read, has another digest, or was changed meanwhile.
            CacheError: what was downloaded cannot be kept.
        """
        name, key = name_of(place), key_of(digest)
        path = self._folder / place
        kept = self._store.get(key)
        if kept is None and not download.is_url(place):
            if not os.path.lexists(path):
                raise ImageError(
                    f"{name} is not there: {path}",
                    remedy="put it there again, or change the path in image.toml. If it was imported by hand, "
                    "import it again",
                )
            with opened(path, name) as file:
                check(file, digest)
                yield file
                file.check_unchanged()
            return
        if kept is None:
            kept = self._download(place, digest)
        with Store.hold(kept.folder), opened(kept.folder / _DATA, name) as file:
            try:
                check(file, digest)
            except ImageError:
                self._store.throw_away(key, kept)
                raise
            yield file
            file.check_unchanged()

    def keep(self, file: SourceFile) -> Digest:
        """Copy a file into the cache, so that it can be used where its place is not to be found."""
        digest = Digest("sha256", file.digest())

        def fill(folder: Path, _lock: int) -> dict[str, object]:
            write_sparsely(file.chunks(), folder / _DATA)
            return {"url": file.name, "digest": digest.hex}

        self._store.make(key_of(digest), fill, on_busy=lambda: None)
        return digest

    def _download(self, url: str, digest: Digest) -> Entry:
        self._check_online(url)

        def fill(folder: Path, _lock: int) -> dict[str, object]:
            target = folder / _DATA
            self._say(f"fetching {download.shown(url)}")
            resumed = download.fetch(url, target, self._say, self._patience)
            with opened(target, name_of(url)) as file:
                try:
                    check(file, digest)
                    resumed = False
                except ImageError:
                    if not resumed:
                        raise
            if resumed:  # the pieces may be of two files
                self._say("the pieces do not fit: fetching it again from the start")
                target.unlink()
                download.fetch(url, target, self._say, self._patience)
                with opened(target, name_of(url)) as file:
                    check(file, digest)
            return {"url": download.shown(url), "digest": digest.hex}

        return self._store.make(
            key_of(digest),
            fill,
            on_busy=lambda: self._say("waiting: another process is fetching it"),
        )

    def _check_online(self, url: str) -> None:
        if self._offline:
            raise ImageError(
                f"{download.shown(url)} is needed, but the network must not be used",
                remedy="fetch the image once without --vm-offline (pytest) or --offline (vmsandbox): it is kept",
            )


def key_of(digest: Digest) -> str:
    """The key of a download in its store."""
    return f"{digest.kind}-{digest.hex[:40]}"


def discard(cache: Path, unneeded: Collection[str], needed: Collection[str]) -> int:
    """Remove downloads, unless they are in use.

    Args:
        cache: the user's cache folder.
        unneeded: URLs and hexadecimal digests of what is to be removed.
        needed: likewise of what stays.

    Returns:
        Bytes that were freed.

    Raises:
        TeardownError: files cannot be removed.
    """
    store = Store(cache, DOWNLOADS, Entry)
    gone, stays = ({_known_by(word) for word in words} for words in (unneeded, needed))
    folders = []
    for entry in store.all():
        known = {entry.record["digest"], entry.record["url"]}
        if known & gone and not known & stays:
            folders.append(entry.folder)
    return store.discard(folders).freed


def _known_by(word: str) -> str:
    return download.shown(word) if download.is_url(word) else word


def name_of(place: str) -> str:
    """The name of the file at a URL or path, for people and for lists of digests."""
    path = unquote(urlsplit(place).path) if download.is_url(place) else place
    return Path(path).name or "the file"


def check(file: SourceFile, digest: Digest) -> None:
    """Compare the digest of a file.

    Raises:
        ImageError: it has another one.
    """
    found = file.digest(digest.kind)
    if found != digest.hex:
        raise ImageError(
            f"{file.name} does not have its digest, so nothing reads it",
            details=f"{digest.kind} stated: {digest.hex}\n{digest.kind} found:  {found}",
            remedy="if the vendor published a new file, compare its digest with the vendor's, and change image.toml. "
            "Otherwise somebody changed the file",
        )
