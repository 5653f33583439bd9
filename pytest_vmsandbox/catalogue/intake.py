"""Taking an image into the store: by one process at a time, and all of it or nothing."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.files import (
    locked,
    private_folder,
    remove_tree,
    size_on_disk,
    sync_tree,
)
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.store import (
    DISK,
    HOST_KEY,
    IN_USE,
    INITRD,
    KERNEL,
    METADATA,
    SCHEMA,
    BuiltImage,
    ImageStore,
    build_command,
    files_of,
    in_use,
)
from pytest_vmsandbox.core import deadline
from pytest_vmsandbox.core.errors import ImageError, TeardownError

_LARGE_TMP = "/var/tmp"  # noqa: S108  # folders in it are made safely; /tmp is often memory
_INCOMING, _WORK = ".new-", "vmsandbox-work-"


class Intake:
    """The way of an image into the store. All but `lock` is for who holds the lock.

    Args:
        store: where the image goes.
        definition: what it is.
    """

    def __init__(self, store: ImageStore, definition: ImageDefinition) -> None:
        self._store = store
        self._definition = definition
        self._name = definition.name

    @contextmanager
    def lock(self, on_busy: Callable[[], object]) -> Iterator[int]:
        """Be the only one who brings in an image of that name.

        Args:
            on_busy: called before waiting for somebody else.

        Yields:
            The descriptor of the lock. A process that inherits it keeps the lock, too.

        Raises:
            ImageError: the cache folder cannot be made, or is somebody else's.
        """
        root = private_folder(self._store.root)
        with locked(root / f"{self._name}.lock", on_busy=on_busy) as descriptor:
            yield descriptor

    def check_unused(self) -> None:
        """Check that the image, if there is one, can be replaced.

        Raises:
            ImageError: guests use it.
        """
        folder = self._store.folder(self._definition)
        try:
            with suppress(FileNotFoundError), locked(folder / IN_USE):
                pass
        except BlockingIOError as error:
            raise in_use(self._name, folder) from error

    def sweep(self) -> None:
        """Remove what others left who were killed.

        Raises:
            TeardownError: something of it cannot be removed.
        """
        for entry in (self._store.root / self._name).glob(".*"):
            _clear(entry)

    @contextmanager
    def folders(self) -> Iterator[tuple[Path, Path]]:
        """Two empty folders that are gone afterwards: one for the files of the image, which
        `adopt` takes, and one for whatever is needed meanwhile.

        The first lies in the store and is private. The second lies in ``$TMPDIR``, else in
        ``/var/tmp``, and its mode is 0711: the user namespaces of mmdebstrap must be able to
        reach what is in it, and they cannot when the user's home is private.

        Raises:
            ImageError: they cannot be made.
            TeardownError: they cannot be removed.
        """
        parent = private_folder(self._store.root / self._name)
        entry = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=parent))
        base = Path(os.environ.get("TMPDIR") or _LARGE_TMP).absolute()
        work = base / f"{_WORK}{entry.name.removeprefix(_INCOMING)}"
        out = entry / "out"
        try:
            (entry / "work").symlink_to(work)  # first, so that `sweep` finds it in any case
            out.mkdir(mode=0o700)
            try:
                work.mkdir(mode=0o700)
                work.chmod(0o711)
            except OSError as error:
                (entry / "work").unlink()  # a folder of that name is not ours
                raise ImageError(
                    f"there is no folder for temporary files: {error}", remedy="set TMPDIR"
                ) from error
            yield out, work
        except BaseException as error:
            try:
                _clear(entry)
            except TeardownError as left:
                error.add_note(str(left))
            raise
        _clear(entry)

    def adopt(self, out: Path) -> BuiltImage:
        """Make the files in `out` the built image. Older ones of that name go, unless guests
        use them.

        Raises:
            ImageError: a file is missing or wrong, the definition has changed meanwhile, or
                guests use the image that this one is to replace.
            TeardownError: older images cannot be removed.
        """
        definition, store = self._definition, self._store
        _check(out, definition)
        if ImageDefinition.read(definition.folder).digest != definition.digest:
            raise ImageError(
                f"the definition of {self._name!r} has changed while it was being built",
                remedy=build_command(self._name),
            )
        for file in (out / KERNEL, out / INITRD, out / DISK):
            # A QEMU of another user opens them, whatever the umask of the recipe was.
            if file.exists() and stat.S_IMODE(file.stat().st_mode) != 0o644:
                file.chmod(0o644)
        (out / IN_USE).touch(mode=0o600)
        metadata = {
            "schema": SCHEMA,
            "name": self._name,
            "digest": definition.digest,
            "built": deadline.wall(),
            "definition": dataclasses.asdict(definition),
            "digests": {name: integrity.file_digest(out / name) for name in files_of(definition)},
        }
        integrity.write_record(out / METADATA, metadata)
        sync_tree(out)
        folder = store.folder(definition)
        if folder.exists():
            store.remove(definition)
        out.rename(folder)
        sync_tree(folder.parent)
        store.discard([it for it in store.folders(self._name) if it != folder])
        return store.require(definition)


def sweep(store: ImageStore) -> int:
    """Remove what builds left that were killed, of all images; bytes that are free now.

    Raises:
        TeardownError: something of it cannot be removed.
    """
    freed = 0
    for entry in store.root.glob("*/.*"):
        with (
            suppress(BlockingIOError, FileNotFoundError),
            locked(store.root / f"{entry.parent.name}.lock"),
        ):
            size = size_on_disk(entry)
            _clear(entry)
            freed += size
    return freed


def _clear(entry: Path) -> None:
    """Remove a folder of `Intake.folders`, its folder for temporary files, and what is empty then."""
    with suppress(OSError):
        work = (entry / "work").readlink()
        status = work.lstat()
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if ours and work.name.startswith(_WORK):
            remove_tree(work)
    remove_tree(entry)
    with suppress(OSError):  # an image is there
        entry.parent.rmdir()


def _check(out: Path, definition: ImageDefinition) -> None:
    """Check the files of an image.

    Raises:
        ImageError: one is missing, empty, unreadable or more than was asked for.
    """
    wrong = []
    for name in files_of(definition):
        file = out / name
        if file.is_symlink() or not file.is_file():
            wrong.append(f"{name} is missing or not a regular file")
        elif file.stat().st_size == 0 or not os.access(file, os.R_OK):
            wrong.append(f"{name} is empty or cannot be read")
        elif name == HOST_KEY and not _is_host_key(file.read_bytes()):
            wrong.append(f"{name} is not one line with an ssh-ed25519 key")
    if definition.disk_size is None and (out / DISK).exists():
        wrong.append(f"{DISK} is there, but image.toml has no [disk]")
    if wrong:
        raise ImageError(f"the image {definition.name!r} is not complete", details="\n".join(wrong))


def _is_host_key(content: bytes) -> bool:
    """Whether `content` is one line with an Ed25519 key, as ssh-keygen writes it."""
    fields = content.split(None, 2)
    if content.count(b"\n") != 1 or not content.endswith(b"\n") or len(fields) < 2:
        return False
    try:
        key = base64.b64decode(fields[1], validate=True)
    except binascii.Error:
        return False
    head = b"\0\0\0\x0bssh-ed25519\0\0\0\x20"
    return fields[0] == b"ssh-ed25519" and key.startswith(head) and len(key) == len(head) + 32
