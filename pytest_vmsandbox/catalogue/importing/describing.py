"""Writes the definition of an image that is imported by hand, as far as its files tell what it needs."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from pytest_vmsandbox.catalogue.definition import DEFINITION_FILE, SCHEMA, ImageDefinition
from pytest_vmsandbox.catalogue.importing.archives import pack
from pytest_vmsandbox.catalogue.importing.fetch import Fetcher
from pytest_vmsandbox.catalogue.importing.source import SourceFile, opened
from pytest_vmsandbox.catalogue.importing.unpacking import Unpacked, unpacked_disk
from pytest_vmsandbox.core.architecture import ARCHITECTURES, native_architecture
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import MIB

DIRECT_APPEND = (
    "console={console} root=/dev/vda rw"  # the name comes from the table of architectures
)
_KERNELS = ((0x202, b"HdrS"), (0x38, b"ARM\x64"))  # what kernels have, and where
_HEAD = 0x206
# cpio, zstd, xz, bzip2, lz4. A kernel of Arm may be compressed with gzip.
_ARCHIVES = (b"070701", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"\x02\x21\x4c\x18")
_NEW = ".new-"  # a folder that catalogues ignore


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a person has said about an image. What is empty is found out, or has a default.

    Attributes:
        name: of the image.
        files: of its disk: one file, or all files of a split VMDK; none for a kernel without a disk.
        format: of the disk's file.
        firmware: what boots it.
        kernel: a kernel to boot directly.
        initrd: its initial RAM disk.
        append: its command line.
        login: the values of ``[login]``.
        system: the values of ``[system]``.
        architecture: of the image.
        description: one line for people.
        memory_min: such as ``512MiB``.
    """

    name: str
    files: tuple[Path, ...] = ()
    format: str = ""
    firmware: str = ""
    kernel: Path | None = None
    initrd: Path | None = None
    append: str | None = None
    login: Mapping[str, str] = field(default_factory=dict)
    system: Mapping[str, object] = field(default_factory=dict)
    architecture: str = ""
    description: str = ""
    memory_min: str = ""


@dataclass(frozen=True)
class Described:
    """A definition that is not written yet.

    Attributes:
        content: of ``image.toml``.
        notes: what was found out or taken as a default, for people: what, and why.
    """

    content: dict[str, Any]
    notes: tuple[tuple[str, str], ...]


def describe(
    wishes: Wishes, folder: Path, cache: Path, work: Path, say: Callable[[str], None]
) -> Described:
    """The definition of an image, after its files were checked.

    Args:
        wishes: what the person has said.
        folder: where the definition will be.
        cache: the user's cache folder, which keeps the files of a split disk.
        work: a folder for what is unpacked.
        say: gets lines for people.

    Raises:
        ConfigError: a value is missing, or does not fit to another one.
        ImageError: a file is damaged, or made to do harm.
        CacheError: the files of a split disk cannot be kept.
    """
    notes: list[tuple[str, str]] = []
    content: dict[str, Any] = {"schema": SCHEMA}
    source: dict[str, str] = {}
    found: Unpacked | None = None
    with ExitStack() as stack:
        if wishes.files:
            file, url, digest = stack.enter_context(_file(wishes, folder, cache, work))
            kind = "vmdk" if len(wishes.files) > 1 else wishes.format
            found = stack.enter_context(unpacked_disk(file, kind, work, say))
            file.check_unchanged()  # since its digest was taken
            source |= {"url": url, "sha256": digest, "format": found.kind}
            if not kind:
                notes.append((f"format: {found.kind}", "by what the file holds"))
    for key, path in (("kernel", wishes.kernel), ("initrd", wishes.initrd)):
        if path is not None:
            with opened(path) as extra:
                _check_order(key, extra)
                source |= {key: _relative(path, folder), f"{key}_sha256": extra.digest()}
    content["description"] = wishes.description or f"imported from {_shown(wishes)}"
    content["architecture"] = architecture = _architecture(wishes, found, notes)
    content["source"] = source
    content["boot"] = _boot(wishes, found, notes, architecture)
    if found is not None:
        size = -(-found.disk.size // MIB)
        content["disk"] = {"size": f"{size}MiB"}
        if found.left_out:
            notes.append(
                (
                    f"left out: {', '.join(found.left_out)}",
                    "only the disk that it boots from is taken",
                )
            )
    content["system"] = _system(wishes, notes)
    content["login"] = _login(wishes, found, notes)
    _put(content, work / "definition" / wishes.name)
    return Described(content, tuple(notes))


def write(described: Described, folder: Path) -> ImageDefinition:
    """Write a definition, all of it or nothing.

    Raises:
        ConfigError: it is invalid, or there is something with its name.
    """
    check_free(folder)
    # Its name is checked, too, so it is made below a folder that catalogues ignore.
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = folder.parent / f"{_NEW}{folder.name}"
        shutil.rmtree(new, ignore_errors=True)  # of a command that was killed
        new.mkdir()
    except OSError as error:
        raise ConfigError(
            f"{folder.parent} cannot be written: {error.strerror}",
            remedy="name another folder with --into, or set VMSANDBOX_CACHE",
        ) from error
    try:
        inner = new / folder.name
        _put(described.content, inner)
        inner.rename(folder)
    finally:
        shutil.rmtree(new)
    return ImageDefinition.read(folder)


def _put(content: Mapping[str, Any], folder: Path) -> None:
    """Write and check a definition. An error does not name the folder, which is not its last place.

    Raises:
        ConfigError: the definition is invalid.
    """
    file = folder / DEFINITION_FILE
    folder.mkdir(parents=True)
    file.write_text(tomli_w.dumps(content), encoding="utf-8")
    try:
        ImageDefinition.read(folder)
    except ConfigError as error:
        brief = error.brief.replace(f"{file}: ", "")
        raise ConfigError(brief, details=error.details, remedy=error.remedy) from error


def check_free(folder: Path) -> None:
    """Check that a definition can be written.

    Raises:
        ConfigError: there is something with its name.
    """
    if os.path.lexists(folder):
        raise ConfigError(
            f"{folder} is there already",
            remedy=f"choose another name, or remove it: rm -r {shlex.quote(os.fspath(folder))}",
        )


# -- its values -------------------------------------------------------------------------------------


@contextmanager
def _file(
    wishes: Wishes, folder: Path, cache: Path, work: Path
) -> Iterator[tuple[SourceFile, str, str]]:
    """The one file that has the disk, open; its place for the definition, and its digest."""
    with ExitStack() as stack:
        files = [stack.enter_context(opened(path)) for path in wishes.files]
        if len(files) == 1:
            yield files[0], _relative(wishes.files[0], folder), files[0].digest()
            return
        # A split disk becomes one file, which is kept: so one digest locks all of it.
        packed = work / "packed"
        pack(_in_order(files), packed)
        for part in files:
            part.check_unchanged()
        file = stack.enter_context(opened(packed, f"{wishes.name}.tar"))
        stack.callback(packed.unlink)
        digest = Fetcher(cache, folder, lambda _: None).keep(file)
        yield file, f"{wishes.name}.tar", digest.hex


def _in_order(files: Sequence[SourceFile]) -> list[SourceFile]:
    names = [file.name for file in files]
    if len(set(names)) != len(names):
        raise ConfigError(
            "two of the files have the same name",
            remedy="give the files of one disk, from one folder",
        )
    return sorted(files, key=lambda file: file.name)


def _relative(path: Path, folder: Path) -> str:
    """The place of a file for a definition in `folder`."""
    place = os.path.relpath(path.resolve(), folder.resolve())
    if not place.isprintable() or place != place.strip():
        raise ConfigError(f"the path {place!r} has strange characters", remedy="rename the file")
    return place


def _check_order(key: str, file: SourceFile) -> None:
    """Check that a kernel and its initial RAM disk were not swapped."""
    head = file.head(_HEAD)
    is_kernel = any(head[at : at + len(magic)] == magic for at, magic in _KERNELS)
    is_archive = not is_kernel and head.startswith(_ARCHIVES)
    if is_kernel if key == "initrd" else is_archive:
        raise ConfigError(
            f"--{key}={file.name} is {'a kernel' if is_kernel else 'no kernel, but an archive'}",
            remedy="give the kernel by --kernel, and its initial RAM disk by --initrd",
        )


def _shown(wishes: Wishes) -> str:
    paths = wishes.files or tuple(path for path in (wishes.kernel, wishes.initrd) if path)
    names = ", ".join(path.name for path in paths[:2])
    return f"{names} and more" if len(paths) > 2 else names


def _architecture(wishes: Wishes, found: Unpacked | None, notes: list[tuple[str, str]]) -> str:
    if wishes.architecture:
        return wishes.architecture
    if found is not None and found.architecture:
        return found.architecture
    notes.append((f"architecture: {native_architecture()}", "that of this machine; --architecture"))
    return native_architecture()


def _boot(
    wishes: Wishes, found: Unpacked | None, notes: list[tuple[str, str]], architecture: str
) -> dict[str, str]:
    firmware = wishes.firmware
    if not firmware and wishes.kernel is not None:
        firmware = "kernel"
    if not firmware and found is not None and found.firmware:
        firmware = found.firmware
        notes.append((f"firmware: {firmware}", f"as the {found.kind} says; --firmware"))
    if not firmware:
        its = ARCHITECTURES[architecture]
        firmware = "uefi" if its.uefi_board and not its.has_bios else "bios"
        notes.append(
            (f"firmware: {firmware}", "a guess; if it does not boot: --firmware=uefi or bios")
        )
    boot = {"firmware": firmware}
    if firmware == "kernel":
        guess = DIRECT_APPEND.format(console=ARCHITECTURES[architecture].console)
        boot["append"] = guess if wishes.append is None else wishes.append
        if wishes.append is None:
            notes.append((f"append: {guess}", "a guess; --append"))
    if wishes.memory_min:
        boot["memory_min"] = wishes.memory_min
    return boot


def _system(wishes: Wishes, notes: list[tuple[str, str]]) -> dict[str, object]:
    system = dict(wishes.system)
    for key, value, option in (("python", True, "--python"), ("init", "systemd", "--init")):
        if key not in system:
            system[key] = value
            notes.append((f"{key}: {str(value).lower()}", f"most systems have it; {option}"))
    return system


def _login(wishes: Wishes, found: Unpacked | None, notes: list[tuple[str, str]]) -> dict[str, str]:
    login = dict(wishes.login)
    if "method" in login:
        return login
    if found is not None and found.kind == "box":
        method, why = "vagrant", "boxes have the well-known key of Vagrant, which is replaced"
    elif found is None:
        reader = "its initial RAM disk" if wishes.initrd else "the system"
        method = "key"
        why = f"a guess: {reader} takes our key from the command line; otherwise --login=none"
    else:
        method, why = "cloud-init", "images of vendors have it; otherwise --login=password or none"
    notes.append((f"login: {method}", why))
    return {"method": method, **login}
