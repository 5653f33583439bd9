"""Makes kernels of users ready to boot, and keeps them in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pytest_vmsandbox.cache.store import KERNELS, Entry, Store
from pytest_vmsandbox.catalogue import kernel_files, kernels
from pytest_vmsandbox.catalogue.kernels import BOOT_MODULES, Kernel, ModuleIndex
from pytest_vmsandbox.catalogue.store import BuiltImage
from pytest_vmsandbox.core.errors import CacheError, ConfigError
from pytest_vmsandbox.core.paths import CACHE
from pytest_vmsandbox.guests.blueprint import OwnKernel
from pytest_vmsandbox.guests.callbacks import Callbacks
from pytest_vmsandbox.machine.disk import image_file

FORMAT = 1  # of what is kept; raise it when we change what we make of a kernel
IMAGE, ARCHIVE, MODULES = "vmlinuz", "modules.cpio", "modules.img"
_MODULES_FOLDER = "boot-modules"
_BLOCK, _SPARE = 4096, 8 << 20  # bytes of the file system with the modules
_TRIES = 3
_UUID = "b6a7e1f0-0000-4000-8000-000000000000"  # the same modules make the same file system
_TIME = 1


@dataclass(frozen=True, kw_only=True)
class ReadyKernel(Entry):
    """A kernel of a user that guests can boot. It does not change when the user builds it again."""

    @property
    def image(self) -> Path:
        """The file that QEMU boots."""
        return self.folder / IMAGE

    @property
    def archive(self) -> Path:
        """What is added to the initial RAM file system of an image: the modules to load first."""
        return self.folder / ARCHIVE

    @property
    def modules(self) -> Path | None:
        """A file system with all of its modules; None without any."""
        return self.folder / MODULES if MODULES in self.record["digests"] else None

    @property
    def release(self) -> str:
        """What ``uname -r`` shows."""
        return str(self.record["release"])

    @property
    def digest(self) -> str:
        """Identifies its content, to the byte: guests that are saved have parts of it in memory."""
        return hashlib.sha256(
            json.dumps(self.record["digests"], sort_keys=True).encode()
        ).hexdigest()


class KernelStore:
    """The kernels that one run uses. They stay in the cache, and are held until the run ends."""

    def __init__(self, cache: Path, callbacks: Callbacks, stack: ExitStack) -> None:
        self._store: Store[ReadyKernel] = Store(cache, KERNELS, ReadyKernel)
        self._callbacks = callbacks
        self._stack = stack
        self._ready: dict[Path, ReadyKernel] = {}
        self._own: dict[tuple[Path, Path], OwnKernel] = {}

    def get(self, path: Path, built: BuiltImage, firmware: str | None = None) -> OwnKernel:
        """A kernel, ready to boot guests of an image.

        Args:
            firmware: what boots them, if it is not what the image says.

        Raises:
            ConfigError: there is no such kernel, or guests cannot run on it.
            CacheError: it cannot be kept.
            ImageError: the image is damaged.
        """
        image = built.definition
        kernels.check_image(image, firmware)
        if path not in self._ready:
            self._ready[path] = self._obtained(kernels.find(path))
        ready = self._ready[path]
        kernels.check_options(
            ready.release,
            path,
            ready.record["options"],
            has_modules=ready.modules is not None,
            has_disk=image.disk_size is not None,
            init=image.init,
        )
        if (path, built.folder) not in self._own:
            assert built.initrd is not None
            initrd = self._joined(built.initrd, ready.archive)
            self._own[path, built.folder] = OwnKernel(
                release=ready.release,
                digest=ready.digest,
                image=ready.image,
                initrd=initrd,
                modules=ready.modules,
            )
        return self._own[path, built.folder]

    def _joined(self, *files: Path) -> Path:
        """Several archives, one behind the other, in a file that is gone when the run ends.

        QEMU takes one file, which all guests share. A kernel wants each archive at a multiple of four.
        """
        try:
            joined: IO[bytes] = self._stack.enter_context(
                tempfile.TemporaryFile(dir=self._store.root)  # noqa: SIM115
            )
            for file in files:
                with image_file(file) as stream:
                    content = stream.read()
                joined.write(content + bytes(-len(content) % 4))
            joined.flush()
            os.fchmod(joined.fileno(), 0o444)  # QEMU, which opens it again, may be another user
        except OSError as error:
            raise CacheError(
                f"{self._store.root} cannot be written: {error.strerror or error}",
                remedy=f"make room there, or set the environment variable {CACHE} to another folder",
            ) from error
        return Path(f"/proc/self/fd/{joined.fileno()}")

    def _obtained(self, kernel: Kernel) -> ReadyKernel:
        """The kernel from the cache, undamaged and held."""
        key = _key(kernel)
        for _ in range(_TRIES):
            ready = self._store.get(key) or self._made(key, kernel)
            # FileNotFoundError: another process has removed it.
            with ExitStack() as own, suppress(FileNotFoundError):
                own.enter_context(self._store.hold(ready.folder))
                if not ready.damage():
                    self._stack.push(own.pop_all())
                    return ready
            self._store.throw_away(key, ready)
        raise CacheError(
            f"the kernel {kernel.path} was damaged in the cache {_TRIES} times in a row"
        )

    def _made(self, key: str, kernel: Kernel) -> ReadyKernel:
        self._callbacks.say(f"preparing the kernel {kernel.release} from {kernel.path}, once")

        def fill(folder: Path, _lock: int) -> Mapping[str, object]:
            with self._store.work_folder(key, self._store.root) as work:
                (unpacked := work / "package").mkdir()
                with _as_of(kernel.path, unpacked):
                    record = _fill(folder, kernels.unpacked(kernel, unpacked), work)
                if _key(kernel) != key:
                    raise ConfigError(
                        f"the kernel {kernel.path} changed while it was prepared",
                        remedy="wait until its build has ended, and start the tests again",
                    )
                return record

        try:
            return self._store.make(
                key, fill, on_busy=lambda: self._callbacks.say("waiting: another run prepares it")
            )
        except OSError as error:
            raise ConfigError(f"the kernel {kernel.path} cannot be read: {error}") from error


@contextmanager
def _as_of(package: Path, unpacked: Path) -> Iterator[None]:
    """Let errors name a package, and not the folder to which it was unpacked: that is gone soon."""
    try:
        yield
    except ConfigError as error:
        texts = (error.brief, error.details, error.remedy)
        brief, details, remedy = (text.replace(str(unpacked), str(package)) for text in texts)
        raise ConfigError(brief, details=details, remedy=remedy) from error


def _fill(folder: Path, kernel: Kernel, work: Path) -> dict[str, Any]:
    """Make all files of a kernel. Returns the record."""
    assert kernel.image is not None
    _copy(kernel_files.content(kernel.image), folder / IMAGE)
    if kernel.modules is not None:
        tree = work / "tree"
        (tree / "lib/modules" / kernel.release).mkdir(parents=True)
        staged = tree / "lib/modules" / kernel.release
        _stage(kernel, staged)
        argv = ["depmod", "--basedir", str(tree), kernel.release]
        kernels.run_program(argv, "find out how the kernel's modules depend on each other")
        index = ModuleIndex.read(staged)
        _check_drivers(kernel, index)
        if index.files:
            _make_file_system(staged, folder / MODULES)
        (folder / ARCHIVE).write_bytes(_archive(staged, index.to_load(BOOT_MODULES)))
    else:
        (folder / ARCHIVE).write_bytes(_archive(work, []))
    options = kernels.options_that_matter(kernels.read_config(kernel))
    return {"release": kernel.release, "options": options}


def _check_drivers(kernel: Kernel, index: ModuleIndex) -> None:
    """Check that a kernel without a known configuration has the drivers that every guest needs."""
    if index.builtin and (lacks := index.missing_options()):
        raise kernels.lacking(kernel.release, kernel.path, lacks)


def _key(kernel: Kernel) -> str:
    """The digest of a kernel's content and that of its modules. It does not depend on paths."""
    total = hashlib.sha256(f"{FORMAT} {kernel.release}\n".encode())
    files = [
        ("", kernel.image or kernel.path, None),
        *((name, file, kernel.home) for name, file in kernels.module_files(kernel)),
    ]
    if kernel.config is not None:
        files.append(("config", kernel.config, None))
    for name, file, below in files:
        with kernel_files.opened(file, below) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(os.fsencode(f"{name}\0{digest}\n"))
    return total.hexdigest()[:32]


def _stage(kernel: Kernel, folder: Path) -> None:
    """Put modules and their lists where ``depmod`` expects them, without compression."""
    for name, file in kernels.module_files(kernel):
        place = folder / name
        if ".ko" in place.name:
            place = place.with_name(place.name.partition(".ko")[0] + ".ko")
            place.parent.mkdir(parents=True, exist_ok=True)
            _copy(kernel_files.plain_module(file, kernel.home), place)
        else:
            _copy(kernel_files.content(file, kernel.home), place)


def _copy(data: bytes, place: Path) -> None:
    place.write_bytes(data)
    place.chmod(0o644)


def _make_file_system(tree: Path, file: Path) -> None:
    """Make a file system of a tree. The driver for ext4 can mount it, and it needs no other code."""
    paths = [tree, *tree.rglob("*")]
    size = sum(-(-path.stat().st_size // _BLOCK) + 1 for path in paths) * _BLOCK
    with file.open("xb") as stream:
        stream.truncate(size + size // 16 + _SPARE)
    for path in paths:
        os.utime(path, (_TIME, _TIME))
    argv = [
        *(
            "mke2fs",
            "-q",
            "-F",
            "-t",
            "ext2",
            "-b",
            str(_BLOCK),
            "-m",
            "0",
            "-N",
            str(len(paths) + 64),
        ),
        *("-L", "modules", "-U", _UUID, "-E", f"hash_seed={_UUID}", "-d", str(tree), str(file)),
    ]
    fixed = {"E2FSPROGS_FAKE_TIME": str(_TIME), "SOURCE_DATE_EPOCH": str(_TIME)}
    kernels.run_program(argv, "make a file system with the modules", fixed)


# -- the archive ------------------------------------------------------------------------------------------


def _archive(tree: Path, modules: Iterable[str]) -> bytes:
    """What is added to an image's initial RAM file system. It replaces the image's lists.

    Args:
        tree: the folder lib/modules/RELEASE.
        modules: paths below it, in the order in which they are loaded.
    """
    entries: list[tuple[str, int, bytes]] = [(_MODULES_FOLDER, stat.S_IFDIR | 0o755, b"")]
    names = []
    for path in modules:
        name = f"{_MODULES_FOLDER}/{Path(path).name}"
        entries.append((name, stat.S_IFREG | 0o644, (tree / path).read_bytes()))
        names.append(f"/{name}\n")
    entries.append(("modules", stat.S_IFREG | 0o644, "".join(names).encode()))
    entries.append(("nodes", stat.S_IFREG | 0o644, _nodes(tree / "modules.devname").encode()))
    return newc(entries)


def _nodes(file: Path) -> str:
    """The device nodes that load their modules when they are opened: name, kind, major, minor."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [line.split() for line in lines if not line.startswith("#") and line.count(" ") == 2]
    return "".join(
        f"{name} {numbers[0]} {numbers[1:].replace(':', ' ')}\n" for _, name, numbers in rows
    )


def newc(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive, in the format that Linux takes as an initial RAM file system.

    Args:
        entries: path, mode and content of each file or folder, a folder before what is in it.
    """
    total = bytearray()
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        is_folder = stat.S_ISDIR(mode)
        fields = (
            number,
            mode,
            0,
            0,
            2 if is_folder else 1,
            0,
            len(content),
            0,
            0,
            0,
            0,
            len(path),
            0,
        )
        total += b"070701" + b"".join(b"%08X" % value for value in fields) + path
        total += bytes(-len(total) % 4) + content
        total += bytes(-len(total) % 4)
    return bytes(total + bytes(-len(total) % 512))
