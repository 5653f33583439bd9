"""Kernels of users: where one is, which release it is, and what it can do."""

from __future__ import annotations

import lzma
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pytest_vmsandbox.catalogue import kernel_files, programs
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.core.architecture import ARCHITECTURES, debian_name
from pytest_vmsandbox.core.errors import ConfigError

_HEADER_BYTES = (
    0x8200  # where the text of the release must have begun; see the kernel's boot protocol
)
_RELEASE = re.compile(r"[0-9][\w.+~-]{0,63}(?![\w.+~-])")  # no kernel has a longer one
_PACKAGE = re.compile(r"linux-image-(?:unsigned-)?([0-9][\w.+~-]*?)(?:-unsigned|-dbg)?")
_LEAST_PROTOCOL = 0x20C  # of booting, from Linux 3.8 on: its header says whether it has 64 bits
_LEAST_BYTES = 0x250  # of its header, up to where its content lies
_MODULE = re.compile(r".*\.ko(\.(gz|xz|zst|bz2|lzma))?", re.DOTALL)
_PROGRAM_SECONDS = 120.0
_NOT_A_KERNEL = (
    "name a bzImage or vmlinuz for x86_64, a folder in which you built a kernel, a folder with "
    "boot/vmlinuz-* and lib/modules, or a .deb file"
)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that a user names.

    Attributes:
        path: what the user names.
        release: what ``uname -r`` shows.
        image: the file that QEMU boots; None while it is in a package.
        modules: the folder with its modules; None without any. It is a folder as ``make
            modules_install`` makes it, or the folder in which the kernel was built.
        config: the file with its configuration; None if there is no such file. It may lie anywhere, as links to
            a .config are common: guests get nothing of it.
        root: the folder that links of its modules must not lead out of; None for that of the modules.
    """

    path: Path
    release: str
    image: Path | None
    modules: Path | None = None
    config: Path | None = None
    root: Path | None = None

    @property
    def home(self) -> Path | None:
        """The folder that all of its modules come from; None without any."""
        return self.root or self.modules


def find(path: Path) -> Kernel:
    """The kernel at `path`: a kernel's file, a folder with one, or a package.

    Raises:
        ConfigError: there is none that can be used, or not only one.
    """
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.suffix == ".deb":
            return Kernel(path=path, release=_release_of_package(path), image=None)
        return _of_file(path)
    except OSError as error:
        raise kernel_files.unreadable(path, error) from error


def _of_file(file: Path) -> Kernel:
    """The kernel in a file, with the modules and the configuration that lie where they usually do."""
    release, real = read_release(file), file.resolve()
    root = None
    if real.match("arch/x86/boot/bzImage"):
        return _built(file, real.parents[3], real, release)
    modules = real.parent if real.parent.name == release else None
    if real.parent.name == "boot":
        root = real.parent.parent
        modules = _modules_below(root, release)
    elif real.parent.parent.name == "modules":  # they may be links to those of other releases
        root = real.parent.parent
    return Kernel(
        path=file,
        release=release,
        image=file,
        modules=modules,
        config=_first(real.parent / f"config-{release}", real.parent / "config"),
        root=root,
    )


def _in_folder(folder: Path) -> Kernel:
    image = folder / "arch/x86/boot/bzImage"
    if image.is_file():
        return _built(folder, folder, image, read_release(image))
    if (folder / "arch/x86").is_dir():
        raise ConfigError(
            f"no kernel was built in {folder}: there is no arch/x86/boot/bzImage",
            remedy=f"build it first: make -C {folder} bzImage modules",
        )
    patterns = ("boot/vmlinuz-*", "lib/modules/*/vmlinuz", "usr/lib/modules/*/vmlinuz", "vmlinuz*")
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    found = {file.resolve(): file for file in files if file.is_file()}
    for build in (*folder.glob("lib/modules/*/build"), *folder.glob("usr/lib/modules/*/build")):
        image = build / "arch/x86/boot/bzImage"
        if not found and image.is_file():
            found[image.resolve()] = image
    if len(found) != 1:
        listed = "\n".join(map(str, found.values()))
        raise ConfigError(
            f"there are {len(found)} kernels in {folder}" if found else f"{folder} has no kernel",
            details=listed,
            remedy="name one of these files" if found else _NOT_A_KERNEL,
        )
    (file,) = found.values()
    release = read_release(file)
    modules = file.parent if file.parent.name == release else _modules_below(folder, release)
    configs = (
        folder / f"boot/config-{release}",
        file.parent / "config",
        _built_in(file, ".config"),
    )
    return Kernel(
        path=folder,
        release=release,
        image=file,
        modules=modules,
        config=_first(*configs),
        root=folder,
    )


def _built(path: Path, tree: Path, image: Path, release: str) -> Kernel:
    """The kernel in the folder in which it was built."""
    modules = tree if (tree / "modules.order").is_file() else None
    config = _first(tree / ".config")
    return Kernel(path=path, release=release, image=image, modules=modules, config=config)


def _built_in(image: Path, name: str) -> Path:
    """A file of the folder in which a bzImage was built."""
    return image.parent.parent.parent.parent / name


def _modules_below(root: Path, release: str) -> Path | None:
    """The folder of the modules for a release.

    Raises:
        ConfigError: there are only modules for other releases.
    """
    folders = (root / "lib/modules", root / "usr/lib/modules")
    others = sorted({entry.name for folder in folders for entry in folder.glob("*/modules.order")})
    for folder in folders:
        if (folder / release).is_dir():
            return folder / release
        others += [entry.name for entry in folder.glob("*") if (entry / "kernel").is_dir()]
    if others and root != Path("/"):
        raise ConfigError(
            f"the kernel in {root} is {release}, but the modules there are for {', '.join(sorted({*others}))}",
            remedy="put the modules of this kernel there (make modules_install), or name the "
            "kernel's file, if you do not need them",
        )
    return None


def _first(*files: Path) -> Path | None:
    return next((file for file in files if file.is_file()), None)


# -- what is in its files -----------------------------------------------------------------------------


def read_release(file: Path) -> str:
    """The release of a kernel, from the header of its file. It may be a link to anywhere: only a kernel has such a header.

    Raises:
        ConfigError: it cannot be read, or is no kernel for x86_64 that QEMU can boot.
    """
    with kernel_files.opened(file) as stream:
        head, size = stream.read(_HEADER_BYTES), os.fstat(stream.fileno()).st_size
    if head[0x1FE:0x200] != b"\x55\xaa" or head[0x202:0x206] != b"HdrS":
        raise ConfigError(f"{file} is {_kind_of(head)}", remedy=_NOT_A_KERNEL)
    if size < (whole := _size_of(head)):
        raise ConfigError(
            f"{file} is cut short: it has {size} bytes of at least {whole}",
            remedy="copy, fetch or build it again",
        )
    (protocol,) = struct.unpack_from("<H", head, 0x206)
    if protocol < _LEAST_PROTOCOL or not head[0x211] & 1:
        raise ConfigError(
            f"{file} is a kernel from before 2012, or no bzImage, so it cannot boot guests",
            remedy=_NOT_A_KERNEL,
        )
    (flags,) = struct.unpack_from("<H", head, 0x236)
    if not flags & 1:
        raise ConfigError(
            f"{file} is a kernel for 32-bit machines, and the images need one for x86_64",
            remedy="set CONFIG_64BIT=y, and build it again",
        )
    (pointer,) = struct.unpack_from("<H", head, 0x20E)
    text = head[pointer + 0x200 :].partition(b"\0")[0].decode("ascii", "replace")
    if not pointer or not (found := _RELEASE.match(text)):
        raise ConfigError(f"the header of {file} does not say its release", remedy=_NOT_A_KERNEL)
    return found[0]


def _size_of(head: bytes) -> int:
    """How many bytes a kernel has by its header, without signatures behind it."""
    if len(head) < _LEAST_BYTES:
        return _LEAST_BYTES
    paragraphs = int.from_bytes(head[0x1F4:0x1F8], "little")
    return max(_LEAST_BYTES, _setup_size(head) + paragraphs * 16)


def _setup_size(image: bytes) -> int:
    return ((image[0x1F1] or 4) + 1) * 512


def _kind_of(head: bytes) -> str:
    if head[:4] == b"\x7fELF":
        return (
            "an ELF file, such as vmlinux. QEMU boots the compressed kernel: arch/x86/boot/bzImage"
        )
    if head[0x38:0x3C] == b"ARM\x64" or head[4:8] == b"zimg":
        return "a kernel for another architecture. The images need one for x86_64"
    return "no kernel for x86_64" if head else "empty"


def _release_of_package(file: Path) -> str:
    kernel_files.check_package(file)
    name = run_program(["dpkg-deb", "--field", str(file), "Package"], f"read {file}").strip()
    if not (found := _PACKAGE.fullmatch(name)):
        raise ConfigError(
            f"{file} is the package {name}, which has no kernel",
            remedy="name a package linux-image-VERSION. If its modules are in another package, unpack "
            "both into one folder (dpkg-deb -x FILE FOLDER), and name the folder",
        )
    return found[1]


def unpacked(kernel: Kernel, folder: Path) -> Kernel:
    """The same kernel, after its package was unpacked to an empty folder.

    Links that lead out of the folder are left out: what they name is this machine's, and not for guests.

    Raises:
        ConfigError: the package is damaged, or has no kernel.
    """
    if kernel.image is not None:
        return kernel
    run_program(["dpkg-deb", "--extract", str(kernel.path), str(folder)], f"unpack {kernel.path}")
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not _leads_into(path, folder):
                path.unlink()
    return _in_folder(folder)


def _leads_into(link: Path, folder: Path) -> bool:
    try:
        return link.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # it leads to itself
        return False


def run_program(argv: list[str], what: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a program of this machine, and return its output.

    Args:
        what: what it is for, for the error: it could not …
        environment: further variables.

    Raises:
        ConfigError: it is missing, or failed.
    """
    program = programs.find(argv[0])
    if program is None:
        raise ConfigError(
            f"{argv[0]}, which is needed to {what}, is not on this machine",
            remedy=f"install it: {programs.install_line([programs.package_of(argv[0])])}",
        )
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            check=False,
            capture_output=True,
            timeout=_PROGRAM_SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{argv[0]} could not {what}: {error}") from error
    if done.returncode:
        raise ConfigError(
            f"{argv[0]} could not {what}",
            details=done.stderr.decode(errors="replace"),
            remedy="look at the lines above: a file may be damaged (copy, fetch or build it again), or the disk full",
        )
    return done.stdout.decode(errors="replace")


# -- its configuration ----------------------------------------------------------------------------------

# What tests' guests need of a kernel. A driver may be a module.
_ALWAYS = {
    "BLK_DEV_INITRD": "y",
    "BINFMT_ELF": "y",
    "BINFMT_SCRIPT": "y",
    "PROC_FS": "y",
    "SYSFS": "y",
    "DEVTMPFS": "y",
    "TMPFS": "y",
    "SIGNALFD": "y",
    "UNIX": "ym",
    "INET": "y",
    "SERIAL_8250_CONSOLE": "y",
    "VIRTIO_PCI": "ym",
    "VIRTIO_CONSOLE": "ym",
    "VIRTIO_NET": "ym",
}
_FOR_DISK = {"VIRTIO_BLK": "ym", "EXT4_FS": "ym"}
_FOR_SYSTEMD = {"CGROUPS": "y", "EPOLL": "y", "FHANDLE": "y", "INOTIFY_USER": "y", "TIMERFD": "y"}
_OF_MODULES = {
    "virtio_pci": "VIRTIO_PCI",
    "virtio_console": "VIRTIO_CONSOLE",
    "virtio_net": "VIRTIO_NET",
    "virtio_blk": "VIRTIO_BLK",
    "ext4": "EXT4_FS",
}
# Loaded before the first program of the image, where they are no part of the kernel itself.
BOOT_MODULES = ("pvpanic", "pvpanic_pci", "virtio_rng", *_OF_MODULES)


def read_config(kernel: Kernel) -> dict[str, str]:
    """A kernel's configuration, from its file or from the kernel itself; empty if it is unknown."""
    if kernel.config is not None:
        text = kernel_files.content(kernel.config).decode(errors="replace")
    else:
        text = _embedded(kernel_files.content(kernel.image)) if kernel.image is not None else ""
    return dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE))


def _embedded(image: bytes) -> str:
    """The configuration in a bzImage that was built with CONFIG_IKCONFIG; empty without one."""
    if len(image) < _LEAST_BYTES:  # it has changed meanwhile
        return ""
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = _setup_size(image) + offset
    payload = image[start : start + length]
    for magic, unpack in kernel_files.DECOMPRESSORS.items():
        if payload.startswith(magic):
            try:
                begin, end = (
                    (payload := unpack(payload)).find(b"IKCFG_ST"),
                    payload.find(b"IKCFG_ED"),
                )
                if 0 <= begin < end:
                    return kernel_files.gunzip(payload[begin + 8 : end]).decode(errors="replace")
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, ConfigError):
                break  # then it is unknown
    return ""


def options_that_matter(config: Mapping[str, str]) -> dict[str, str]:
    """The part of a configuration that `missing_options` looks at; empty if it is unknown."""
    needed = {**_ALWAYS, **_FOR_DISK, **_FOR_SYSTEMD}
    return {name: config.get(name, "n") for name in needed} if config else {}


def check_image(image: ImageDefinition, firmware: str | None = None) -> None:
    """Check that guests of an image can boot another kernel than the image's own.

    Args:
        firmware: what boots them, if it is not what the image says.

    Raises:
        ConfigError: they cannot.
    """
    if ARCHITECTURES[image.architecture].board != ARCHITECTURES["x86_64"].board:
        raise ConfigError(
            f"kernel= cannot be used with {image.name}: only kernels for amd64 are known here, and its guests "
            f"are {debian_name(image.architecture)}",
            remedy="let these guests boot the image's own kernel: kernel='image'",
        )
    origin = image
    while origin.parent is not None:
        origin = origin.parent
    if (firmware or image.firmware) == "kernel" and image.has_initrd and origin.source is None:
        return
    raise ConfigError(
        f"kernel= cannot be used with {image.name}: guests of it do not boot by an initial RAM file system "
        "of ours, which would load the modules of another kernel",
        remedy="use an image that is built by a recipe, such as debian-13 or tiny, and no firmware=; or let these "
        "guests boot the image's own kernel: kernel='image'",
    )


def missing_options(
    config: Mapping[str, str], *, has_modules: bool, has_disk: bool, init: str
) -> list[str]:
    """The options that a guest needs and a configuration lacks; none if it is unknown.

    Args:
        has_modules: whether there are modules, so that a driver may be one.
        has_disk: whether the guest has a root disk.
        init: of the image; see `INITS`.
    """
    needed = {**_ALWAYS, **(_FOR_DISK if has_disk else {})}
    needed |= _FOR_SYSTEMD if init == "systemd" else {}
    if not has_modules:
        needed = dict.fromkeys(needed, "y")
    lacks = [name for name, good in needed.items() if config.get(name, "n") not in good]
    return [f"CONFIG_{name}=y" for name in lacks] if config else []


def check_options(
    release: str,
    path: Path,
    config: Mapping[str, str],
    *,
    has_modules: bool,
    has_disk: bool,
    init: str,
) -> None:
    """Check that a kernel can run guests of an image, as far as its configuration is known.

    Raises:
        ConfigError: it lacks options.
    """
    if lacks := missing_options(config, has_modules=has_modules, has_disk=has_disk, init=init):
        raise lacking(release, path, lacks)


def lacking(release: str, path: Path, options: Iterable[str]) -> ConfigError:
    """The error for a kernel that was built without options that guests need."""
    return ConfigError(
        f"the kernel {release} ({path}) cannot run guests: it was built without {', '.join(options)}",
        remedy="set these options, and build the kernel again. If they are drivers that you have as modules, "
        "build those, too, and name the folder or the package that has them",
    )


# -- its modules ------------------------------------------------------------------------------------------


def module_name(path: str) -> str:
    """A module's name, from the path of its file.

    Example:
        >>> module_name("kernel/drivers/misc/pvpanic/pvpanic-pci.ko.xz")
        'pvpanic_pci'
    """
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def module_files(kernel: Kernel) -> Iterator[tuple[str, Path]]:
    """A kernel's modules, and the lists that belong to them: path below lib/modules/RELEASE, and file.

    Links may be among them. Read them with `kernel_files`, below the kernel's home.

    Raises:
        ConfigError: a name or a link leads elsewhere.
    """
    folder = kernel.modules
    if folder is None:
        return
    kernel_files.check_folder(folder, kernel.root or folder)
    if (folder / "arch/x86").is_dir():  # it was built there
        yield from _built_modules(folder)
    else:
        for file in sorted(folder.rglob("*.ko*")):
            name = str(file.relative_to(folder))
            if _MODULE.fullmatch(name) and file.is_file() and not _is_below_link(name):
                yield _plain_name(name, folder), file
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        if (folder / name).is_file():
            yield name, folder / name


def _built_modules(tree: Path) -> Iterator[tuple[str, Path]]:
    order = kernel_files.content(tree / "modules.order", tree).decode(errors="surrogateescape")
    for line in order.split():
        path = _plain_name(re.sub(r"\.o$", ".ko", line.removeprefix("kernel/")), tree)
        if (tree / path).is_file():  # «make modules» may come later
            yield f"kernel/{path}", tree / path


def _is_below_link(name: str) -> bool:
    """Whether a path leads through the links to the folders of the build."""
    return not {"build", "source"}.isdisjoint(name.split("/"))


def _plain_name(name: str, folder: Path) -> str:
    """The name of a module's file, if it stays in its folder and in a list of names."""
    is_plain = re.fullmatch("[!-~]+", name) and _MODULE.fullmatch(name)
    if not is_plain or name.startswith("/") or ".." in name.split("/"):
        raise ConfigError(
            f"a module in {folder} has a name that cannot be used: {name!r}",
            remedy="modules have paths below that folder that end in .ko, in letters, digits and signs of ASCII, "
            "without blanks",
        )
    return name


@dataclass(frozen=True, kw_only=True)
class ModuleIndex:
    """What is known about the modules of a kernel.

    Attributes:
        files: name → path.
        below: name → paths of what must be loaded before it, in order.
        builtin: the names of those that are part of the kernel.
    """

    files: Mapping[str, str]
    below: Mapping[str, tuple[str, ...]]
    builtin: frozenset[str]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    softly: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> ModuleIndex:
        """What ``depmod`` has written to a folder lib/modules/RELEASE."""
        files: dict[str, str] = {}
        below: dict[str, tuple[str, ...]] = {}
        for line in _lines(folder / "modules.dep"):
            path, _, rest = line.partition(":")
            files[module_name(path)] = path
            below[module_name(path)] = tuple(reversed(rest.split()))
        aliases: dict[str, tuple[str, ...]] = {}
        for _, alias, name in _words(folder / "modules.alias", "alias", 3):
            aliases[alias] = (*aliases.get(alias, ()), name)
        softly: dict[str, tuple[str, ...]] = {}
        for words in _words(folder / "modules.softdep", "softdep", 4):
            name, before = words[1], " ".join(words[2:]).partition("pre:")[2].partition("post:")[0]
            softly[name] = (*softly.get(name, ()), *before.split())
        builtin = frozenset(map(module_name, _lines(folder / "modules.builtin")))
        return cls(files=files, below=below, builtin=builtin, aliases=aliases, softly=softly)

    def to_load(self, names: Iterable[str]) -> list[str]:
        """The paths of modules, in the order in which they can be loaded. Others are left out."""
        loaded: dict[str, None] = {}
        begun: set[str] = set()

        def load(name: str) -> None:
            name = name.replace("-", "_")
            if name in begun:
                return
            begun.add(name)
            if name not in self.files:
                for module in self.aliases.get(name, ()):
                    load(module)
                return
            for other in (*self.softly.get(name, ()), *map(module_name, self.below[name])):
                load(other)
            loaded[self.files[name]] = None

        for name in names:
            load(name)
        return list(loaded)

    def missing_options(self) -> list[str]:
        """The options for drivers that are neither modules nor part of the kernel."""
        there = self.builtin | {*self.files}
        return [f"CONFIG_{option}=y" for name, option in _OF_MODULES.items() if name not in there]


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _words(file: Path, first: str, least: int) -> Iterator[list[str]]:
    for words in map(str.split, _lines(file)):
        if words[:1] == [first] and len(words) >= least:
            yield words
