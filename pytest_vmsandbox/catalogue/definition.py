"""What an image is: its definition, as ``image.toml`` says it, and the digest of all that goes into it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pytest_vmsandbox.catalogue import variants
from pytest_vmsandbox.catalogue.origin import (
    Addition,
    Login,
    Source,
    hardware,
)
from pytest_vmsandbox.catalogue.own import HELPER_VARIABLE, helper_file
from pytest_vmsandbox.catalogue.tables import Table, line, line_or_empty, load, texts
from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import FIRMWARE, MIB, Firmware, Hardware, format_size

Init = Literal["systemd", "busybox", "openrc", "sysvinit", "rc", "none"]
DEFINITION_FILE = "image.toml"
SCHEMA = 1
BUILD_FORMAT = 1  # part of each digest: raise it when the files that a recipe must make change
INITS: tuple[Init, ...] = get_args(Init)
PYTHON_FLOOR = (3, 9)  # of a guest that tests run inside
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

_KEYS = (
    *("schema", "description", "architecture", "architectures", "recipe", "from", "source"),
    *("uses", "requires", "add", "boot", "disk", "system", "login"),
)
_BOOT_KEYS = ("firmware", "secure_boot", "tpm", "append", "memory_min")
_DISK_KEYS = ("size",)
_SYSTEM_KEYS = ("name", "version", "python", "init", "user")
_TABLES: Mapping[str, Sequence[str]] = {
    "add": tuple(Addition.__annotations__),
    "source": tuple(Source.__annotations__),
    "boot": _BOOT_KEYS,
    "disk": _DISK_KEYS,
    "system": _SYSTEM_KEYS,
    "login": tuple(Login.__annotations__),
}
_PLACES = {
    key: f"into [{table}]" for table, keys in reversed([*_TABLES.items()]) for key in keys
}  # the first table that has a key: `user` is rather one of [system]
_PLACES |= {key: "to the top, before the first table" for key in _KEYS if key not in _PLACES}
_MEMORY_MIN = 256 * MIB
LARGEST_SCRIPT = 4 * MIB  # a larger file is no script
_SETTLED = 2.0  # seconds after which another change of a file has another time, on any file system
_IGNORED = {"__pycache__"}  # folders that Python makes
_SIZE = "a size such as '256MiB' or '10GiB'"
_YES_OR_NO = (True, False)


def check_name(name: str, where: object) -> None:
    """Check the name of an image, which is the name of its folder.

    Raises:
        ConfigError: the name is invalid.
    """
    if not NAME.fullmatch(name) or name == variants.ALL:
        raise ConfigError(
            f"{where}: {name!r} is not a name for an image",
            remedy="use lower-case letters, digits, dots, underscores and hyphens, but not 'all'",
        )


@dataclass(frozen=True, kw_only=True)
class ImageDefinition:
    """An image that can be made. It has exactly one origin: `recipe`, `base` or `source`.

    Attributes:
        name: the name of its folder. If the folder defines images for several architectures, the name
            ends with the architecture, unless that is this machine's: ``debian-13_arm64``.
        folder: holds ``image.toml``, the recipe and the recipe's files.
        description: one line for people.
        architecture: one of `core.architecture.ARCHITECTURES`.
        recipe: the executable in `folder` that builds the image; or empty.
        uses: further files and folders that the recipe reads, relative to `folder`.
        requires: programs of this machine that the recipe calls.
        append: the kernel's command line; empty with another firmware.
        memory_min: bytes of memory that a guest needs to boot.
        disk_size: bytes of its root disk; None for an image without one.
        python: whether the guest has Python.
        init: one of `INITS`.
        user: the default user of commands in the guest.
        system: what it is, such as ``debian``; or empty.
        version: of the system, such as ``13``; or empty.
        base: the name of the image that it derives from; or empty.
        add: what it adds to its base; None without a base.
        source: where its files come from; None with another origin.
        firmware: one of `core.spec.FIRMWARE`. With ``kernel``, QEMU boots the kernel directly.
        secure_boot: whether UEFI only boots what is signed.
        tpm: whether the guest has a TPM.
        login: how the first login works. A derived image has its base's.
        python_version: of the guest's Python, such as ``3.11``; empty if it is not known.
        has_initrd: whether its kernel boots with an initial RAM disk. Without that firmware it does not.
        variant_of: the name of its folder if its own name ends with the architecture; or empty.
        of_several: whether its folder defines images for several architectures.
        parent: the definition of its base. Records of built images do not have it.
    """

    name: str
    folder: Path
    description: str
    architecture: str
    recipe: str
    uses: tuple[str, ...]
    requires: tuple[str, ...]
    append: str
    memory_min: int
    disk_size: int | None
    python: bool
    init: Init
    user: str
    system: str = ""
    version: str = ""
    base: str = ""
    add: Addition | None = None
    source: Source | None = None
    firmware: Firmware = "kernel"
    secure_boot: bool = False
    tpm: bool = False
    login: Login = field(default_factory=Login)
    python_version: str = ""
    has_initrd: bool = True
    variant_of: str = ""
    of_several: bool = False
    parent: ImageDefinition | None = field(default=None, repr=False, compare=False)

    @classmethod
    def read(
        cls,
        folder: Path,
        base: Callable[[str], ImageDefinition] | None = None,
        architecture: str = "",
    ) -> ImageDefinition:
        """The definition in `folder`. What a derived one leaves out comes from its base.

        Args:
            folder: its name is the image's, or the beginning of that.
            base: returns the definition of a base by name.
            architecture: which one of a definition for several; empty for this machine's.

        Raises:
            ConfigError: a key is missing or unknown, its value is not allowed, or it cannot be used
                together with another one; a file that it names does not exist; or there is no such base.
        """
        check_name(folder.name, folder)
        return _read(folder / DEFINITION_FILE, base, architecture)

    def reread(self) -> ImageDefinition:
        """The definition as the folder has it now, with the same base.

        Raises:
            ConfigError: it is invalid now.
        """
        parent = self.parent
        base = None if parent is None else lambda _: parent
        return self.read(self.folder, base, self.architecture)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ImageDefinition:
        """The definition that `record` has put into the record of a built image.

        Records of older versions lack what was not there at that time.

        Raises:
            KeyError, TypeError: a value is missing, or there is an unknown one.
        """
        values = dict(record)
        for key, kind in (("folder", Path), ("uses", tuple), ("requires", tuple)):
            values[key] = kind(values[key])
        if (add := values.get("add")) is not None:
            values["add"] = Addition(**{**add, "packages": tuple(add["packages"])})
        if (source := values.get("source")) is not None:
            values["source"] = Source(**source)
        if "login" in values:
            values["login"] = Login(**values["login"])
        return cls(**values)

    def record(self) -> dict[str, object]:
        """Its values for a record of a built image, without its base's."""
        values = dataclasses.asdict(replace(self, parent=None))
        del values["parent"]
        return values

    @property
    def origin(self) -> Literal["recipe", "from", "source"]:
        """Which of the three makes it."""
        if self.base:
            return "from"
        return "recipe" if self.source is None else "source"

    @property
    def in_vm(self) -> bool:
        """Whether tests can run inside: its Python is new enough. Otherwise it is host-driven."""
        version = tuple(map(int, self.python_version.split("."))) if self.python_version else ()
        return self.python and (not version or version >= PYTHON_FLOOR)

    def hardware(self, defaults: Hardware, arguments: Mapping[str, object]) -> Hardware:
        """The hardware of a guest of this image. Without another name, its user is the image's.

        Args:
            defaults: the run's default hardware.
            arguments: what differs, as `Hardware.changed` takes it.

        Raises:
            ConfigError: an argument is unknown, or its value is invalid.
        """
        hardware = defaults.changed(arguments)
        return replace(hardware, user=hardware.user or self.user)

    def check(self, hardware: Hardware) -> None:
        """Check that a guest of this image can have some hardware.

        Raises:
            ConfigError: it cannot.
        """
        if hardware.memory < self.memory_min:
            raise ConfigError(
                f"{format_size(hardware.memory)} of memory is too little for {self.name}",
                remedy=f"give it at least {format_size(self.memory_min)}: memory= (marker vm, boot), "
                "vm_memory (ini file), --memory (vmsandbox)",
            )
        if hardware.disk is not None and self.disk_size is None:
            raise ConfigError(
                f"disk= cannot be used with {self.name}: this image has no root disk",
                remedy="leave disk= out. To add blank disks, use disks=['1GiB']",
            )
        if hardware.disk is not None and hardware.disk < (self.disk_size or 0):
            raise ConfigError(
                f"a disk of {format_size(hardware.disk)} is smaller than that of the image "
                f"{self.name}",
                remedy=f"use at least {format_size(self.disk_size or 0)}",
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of everything that goes into the image. Computed once for each object.

        It covers the architecture; every file in the image's folder and in ``uses``, and which of them
        are executable; the source of the helper, if one of them names the helper's variable; and the
        digest of its base. It ignores the other bits of a file's mode, as git
        does: they differ between checkouts. Disks and kernels count by their digests in ``image.toml``,
        wherever they lie.

        Raises:
            ConfigError: a file cannot be read, or is not a regular file.
        """
        name = self.variant_of or self.name  # this one is the same on machines of each architecture
        total = hashlib.sha256(f"{BUILD_FORMAT} {name} {self.architecture}\n".encode())
        if self.parent is not None:
            total.update(f"from {self.parent.digest}\n".encode())
        stated = self.folder / DEFINITION_FILE
        places = self._places_with_digest()
        skipped = {self.folder / place for place in places.values()}
        contents: set[_Content] = set()
        for label, file in self.files():
            if file in skipped:
                continue
            try:
                status = file.stat()
                if not stat.S_ISREG(status.st_mode):  # reading a FIFO would wait for its writer
                    raise ConfigError(
                        f"{file} belongs to the image {self.name}, but is not a regular file",
                        remedy="remove it, or move it out of the image's folder",
                    )
                content = (
                    _Content(_without(places, stated))
                    if places and file == stated
                    else _content(file, status)
                )
            except OSError as error:
                raise ConfigError(
                    f"{file} belongs to the image {self.name}, but cannot be read: "
                    f"{error.strerror or error}",
                    remedy="make it readable, or remove it",
                ) from error
            kind = "x" if status.st_mode & stat.S_IXUSR else "-"
            total.update(os.fsencode(f"{label}\0{kind}{content.digest}\n"))
            contents.add(content)
        helper = (
            helper_file() if self.recipe and any(one.names_helper for one in contents) else None
        )
        if helper is not None and (source := _content(helper, helper.stat())) not in contents:
            total.update(f"helper {source.digest}\n".encode())
        return total.hexdigest()

    def files(self) -> list[tuple[str, Path]]:
        """The files in its folder and in ``uses``, each with the path that the digest covers."""
        sources = [("", self.folder), *((use, self.folder / use) for use in self.uses)]
        return sorted(found for source in sources for found in _files(*source))

    def _places_with_digest(self) -> dict[str, str]:
        """Keys and places of the files whose digest is in ``image.toml``. Reading them again is no use."""
        source = self.source or Source()
        known = {
            "url": (source.url, source.sha256 or source.sha512),
            "kernel": (source.kernel, source.kernel_sha256),
            "initrd": (source.initrd, source.initrd_sha256),
        }
        return {key: place for key, (place, digest) in known.items() if place and digest}


class _Content(NamedTuple):
    """What counts of a file: SHA-256, and whether it names the variable with the helper's path."""

    digest: str
    names_helper: bool = False


_contents: dict[tuple[int, ...], _Content] = {}  # of files that several images use


def _content(file: Path, status: os.stat_result) -> _Content:
    """What counts of a file. It is read once, unless it has changed so lately that we could not see it."""
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key not in _contents:
        with file.open("rb") as stream:
            is_script = status.st_size < LARGEST_SCRIPT
            names_helper = is_script and HELPER_VARIABLE.encode() in stream.read()
            stream.seek(0)
            content = _Content(hashlib.file_digest(stream, "sha256").hexdigest(), names_helper)
        if wall() - changed / 1e9 < _SETTLED:
            return content
        _contents[key] = content
    return _contents[key]


def _without(places: Collection[str], file: Path) -> str:
    """SHA-256 of what a definition says, without the places of its files: they differ between machines."""
    values = load(file)
    if isinstance(source := values.get("source"), dict):
        values["source"] = {key: value for key, value in source.items() if key not in places}
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _files(label: str, source: Path) -> Iterator[tuple[str, Path]]:
    """The files in or at `source`, each with the path that the digest covers."""
    if not source.is_dir():
        yield label, source
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = (name for name in subfolders if name not in _IGNORED)
        links = (name for name in subfolders if (Path(folder) / name).is_symlink())
        for name in (*files, *links):  # a link to a folder is refused later: it is no regular file
            file = Path(folder) / name
            yield f"{label}/{file.relative_to(source)}", file


# -- how image.toml is read ---------------------------------------------------------------------------


def _read(
    file: Path, base: Callable[[str], ImageDefinition] | None, wanted: str
) -> ImageDefinition:
    """See `ImageDefinition.read`."""
    content = load(file)
    # The schema comes first: a newer one has keys that we do not know.
    Table(file, "", content, tuple(content)).choice("schema", (SCHEMA,))
    top = Table(file, "", content, _KEYS, _PLACES)
    _check_origin(top)
    folder, parent, source = file.parent, _parent(top, base), Source.read(top)
    for key in ("uses", "requires"):
        top.only(key, "recipe" in top, "without a recipe", "name a recipe")
    executable, paths = partial(_executable, folder), partial(_paths, folder)
    architecture, name, of_several = variants.which(top, parent, wanted)
    boot = _boot(top, source, parent, architecture)
    disk_size = _disk_size(top, source, parent, boot["firmware"])
    return ImageDefinition(
        name=name,
        variant_of=folder.name if name != folder.name else "",
        of_several=of_several,
        folder=folder,
        description=top.read("description", "one line of text", line),
        architecture=architecture,
        recipe=top.read("recipe", "an executable file in this folder", executable, ""),
        uses=top.read("uses", "a list of paths, relative to this folder", paths, ()),
        requires=top.read("requires", "a list of names of programs", _programs, ()),
        base="" if parent is None else parent.name,
        parent=parent,
        add=Addition.read(top),
        source=source,
        disk_size=disk_size,
        login=_login(top, source, parent, boot["firmware"], disk=disk_size is not None),
        **boot,
        **_system(top, parent),
    )


def _check_origin(top: Table) -> None:
    origins = [key for key in ("recipe", "from", "source") if key in top]
    if len(origins) != 1:
        found = " and ".join(map(repr, origins)) or "none"
        raise ConfigError(
            f"{top.file}: an image has one origin, but this one has {found}",
            remedy="name exactly one: recipe (a program builds it), from (another image, with more in "
            "it), or [source] (a disk or a kernel from elsewhere)",
        )


def _parent(top: Table, base: Callable[[str], ImageDefinition] | None) -> ImageDefinition | None:
    if "from" not in top:
        return None
    name = top.read("from", "the name of an image", line)
    if base is None:
        raise ConfigError(
            f"{top.file}: from = {name!r}, but no other images are known here",
            remedy="read it through a Catalogue",
        )
    return base(name)


def _boot(
    top: Table, source: Source | None, parent: ImageDefinition | None, architecture: str
) -> dict[str, Any]:
    """The values that say how it boots."""
    table = variants.adapted(top.table("boot", _BOOT_KEYS), top, architecture)
    firmware = table.choice("firmware", FIRMWARE, "kernel" if parent is None else parent.firmware)
    _check_firmware(top, source, parent, firmware)
    direct, where = firmware == "kernel", f"with boot.firmware = {firmware!r}"
    secure_boot = table.choice(
        "secure_boot", _YES_OR_NO, parent is not None and parent.secure_boot and firmware == "uefi"
    )
    tpm = table.choice("tpm", _YES_OR_NO, parent is not None and parent.tpm)
    table.only("append", direct, where, 'set boot.firmware = "kernel"')
    if secure_boot:
        table.only("secure_boot", firmware == "uefi", where, 'set boot.firmware = "uefi"')
    if tpm:
        table.only("tpm", not direct, where, 'set boot.firmware = "uefi" or "bios"')
    append, append_allowed = "", "one line of text, or ''"
    if direct and parent is not None:
        append = table.read("append", append_allowed, line_or_empty, parent.append)
    elif direct:
        append = table.read("append", append_allowed, line_or_empty)
    memory_min = _MEMORY_MIN if parent is None else parent.memory_min
    has_initrd = source is None or bool(source.initrd)
    return {
        "firmware": firmware,
        "secure_boot": secure_boot,
        "tpm": tpm,
        "append": variants.with_console(append, architecture),
        "memory_min": table.read("memory_min", _SIZE, partial(hardware, "memory"), memory_min),
        "has_initrd": direct and (has_initrd if parent is None else parent.has_initrd),
    }


def _check_firmware(
    top: Table, source: Source | None, parent: ImageDefinition | None, firmware: Firmware
) -> None:
    if parent is not None and (firmware == "kernel") != (parent.firmware == "kernel"):
        raise ConfigError(
            f"{top.file}: boot.firmware = {firmware!r}, but its base {parent.name} boots by "
            f"{parent.firmware!r}",
            remedy="remove boot.firmware, or derive from another image",
        )
    if source is None:
        return
    if firmware == "kernel" and not source.kernel:
        raise ConfigError(
            f"{top.file}: missing key 'source.kernel', because boot.firmware is 'kernel'",
            remedy='set boot.firmware = "uefi" or "bios" for a disk with a boot loader of its own. '
            "Otherwise name source.kernel, source.initrd and boot.append",
        )
    if firmware != "kernel" and source.kernel:
        raise ConfigError(
            f"{top.file}: source.kernel cannot be used with boot.firmware = {firmware!r}",
            remedy="remove source.kernel and source.initrd, or remove boot.firmware",
        )


def _disk_size(
    top: Table, source: Source | None, parent: ImageDefinition | None, firmware: Firmware
) -> int | None:
    table = top.table("disk", _DISK_KEYS)
    size: Callable[[object], int | None] = partial(hardware, "disk")
    if parent is not None:
        base_size = parent.disk_size
        if base_size is None:
            why = f"with from = {parent.name!r}, because that image has no disk"
            top.only("disk", False, why, "derive from an image with a disk")
            return None
        disk_size = table.read("size", _SIZE, size, base_size)
        if disk_size < base_size:
            raise ConfigError(
                f"{top.file}: disk.size = {format_size(disk_size)} is smaller than the disk of its "
                f"base {parent.name}",
                remedy=f"disk.size must be at least {format_size(base_size)}. Or remove it: the disk "
                "has the size of the base's then",
            )
        return disk_size
    if source is not None:
        why = "without source.url: this image has no disk"
        top.only("disk", bool(source.url), why, "name the disk by source.url")
    if "disk" in top:
        return table.read("size", _SIZE, size)
    if firmware != "kernel" or (source is not None and source.url):
        raise table.missing("size", f"disk.size must be {_SIZE}. A smaller disk is grown to it")
    return None


def _login(
    top: Table,
    source: Source | None,
    parent: ImageDefinition | None,
    firmware: Firmware,
    *,
    disk: bool,
) -> Login:
    if parent is None:
        return Login.read(top, source, firmware, disk=disk)
    top.only("login", False, "with a base", "set system.user if other users run commands")
    return parent.login


def _system(top: Table, parent: ImageDefinition | None) -> dict[str, Any]:
    """The values of ``[system]``, most of them from the base if there is one."""
    table = top.table("system", _SYSTEM_KEYS)
    user_allowed, user = "the name of a user", partial(hardware, "user")
    if parent is None:
        python, version = table.read("python", _PYTHON, _python)
        init = table.choice("init", INITS)
    else:
        inherited = parent.python, parent.python_version
        python, version = table.read("python", _PYTHON, _python, inherited)
        init = table.choice("init", INITS, parent.init)
    return {
        "system": table.read("name", "one line of text", line, parent.system if parent else ""),
        "version": table.read(
            "version", "one line of text", line, parent.version if parent else ""
        ),
        "python": python,
        "python_version": version,
        "init": init,
        "user": table.read("user", user_allowed, user, parent.user if parent else "root"),
    }


_PYTHON = "true, false or a version such as '3.11'"


def _python(value: object) -> tuple[bool, str] | None:
    """Whether there is a Python, and which."""
    if isinstance(value, bool):
        return value, ""
    if isinstance(value, str) and re.fullmatch(r"\d{1,3}(\.\d{1,3}){1,2}", value, re.ASCII):
        return True, value
    return None


def _programs(value: object) -> tuple[str, ...] | None:
    return texts(value, lambda name: re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) is not None)


def _paths(folder: Path, value: object) -> tuple[str, ...] | None:
    paths = texts(value, lambda path: path.isprintable() and not Path(path).is_absolute())
    for path in paths or ():
        if not (folder / path).exists():
            raise ConfigError(
                f"{folder / DEFINITION_FILE}: uses names {path!r}, which does not exist",
                remedy=f"paths in uses are relative to {folder}",
            )
    return paths


def _executable(folder: Path, value: object) -> str | None:
    name = line(value)
    if name is None or Path(name).name != name:
        return None
    return name if (folder / name).is_file() and os.access(folder / name, os.X_OK) else None
