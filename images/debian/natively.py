"""What a recipe has to know of programs, modules and keys that this machine cannot run.

It reads files only, so it does the same for each architecture. Recipes start it with the Python of
pytest-vmsandbox, which `VMSANDBOX_PYTHON` names.
"""

from __future__ import annotations

import argparse
import base64
import lzma
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_DYNAMIC, _INTERPRETER = 2, 3  # kinds of ELF segments
_NEEDED, _STRINGS = 1, 5  # tags of ELF's dynamic section
_LOADED = 1
_APPLETS = re.compile(rb"\[\0\[\[\0(?:[a-z0-9][a-z0-9_.-]*\0)+")


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question on standard output; 0 if there is an answer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    questions = parser.add_subparsers(dest="question", required=True)
    libraries_of = questions.add_parser("libraries", help="the files that programs load")
    libraries_of.add_argument("root", type=Path)
    libraries_of.add_argument("programs", nargs="+", type=Path)
    modules_of = questions.add_parser(
        "modules", help="the files of modules, in the order to load them"
    )
    modules_of.add_argument("root", type=Path)
    modules_of.add_argument("names", nargs="+", help="those that end with ? may be missing")
    index_of = questions.add_parser("index", help="write the lists of modules that modprobe reads")
    index_of.add_argument("root", type=Path)
    applets_of = questions.add_parser("applets", help="the programs that busybox contains")
    applets_of.add_argument("busybox", type=Path)
    key = questions.add_parser("key", help="make a host key; shows its public part")
    key.add_argument("format", choices=["dropbear", "openssh"])
    key.add_argument("file", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.question == "libraries":
            lines = libraries(args.root, args.programs)
        elif args.question == "modules":
            lines = ModuleTree(args.root).order(args.names)
        elif args.question == "index":
            lines = ModuleTree(args.root).index()
        elif args.question == "applets":
            lines = applets(args.busybox)
        else:
            lines = [make_key(args.format, args.file)]
    except (LookupError, OSError, ValueError) as error:
        print(error.args[0] if isinstance(error, LookupError) else error, file=sys.stderr)
        return 1
    for line in lines:
        print(line)
    return 0


# -- programs --------------------------------------------------------------------------------------------


def libraries(root: Path, programs: Sequence[Path]) -> list[str]:
    """All that the dynamic linker loads for some programs, and itself: each file, and its place in a system.

    Raises:
        LookupError: a library is missing.
        ValueError: a file is not an ELF file.
    """
    folders = [*_folders(root)]
    found: dict[str, str] = {}  # place → file
    todo = [root / program for program in programs]
    while todo:
        user = todo.pop()
        elf = Elf(user.read_bytes())
        linker = elf.interpreter().lstrip("/")
        for name in (*elf.needed(), *([linker] if linker else [])):
            file = next(
                (path for folder in folders if (path := folder / Path(name).name).exists()), None
            )
            if file is None:
                raise LookupError(f"{user.name} needs {name}, which is missing")
            relative = str(file.relative_to(root))
            place = name if name == linker else relative
            if place not in found:
                found[place] = relative
                todo.append(file)
    return sorted(f"{file} {place}" for place, file in found.items())


def _folders(root: Path) -> list[Path]:
    """Where libraries are."""
    return [
        folder
        for lib in (root / "usr/lib", root / "usr/lib64")
        for folder in (*sorted(lib.glob("*-linux-gnu*")), lib)
        if folder.is_dir()
    ]


class Elf:
    """A program, library or module."""

    def __init__(self, data: bytes) -> None:
        """Read the header.

        Raises:
            ValueError: it is not an ELF file.
        """
        if data[:4] != b"\x7fELF" or len(data) < 64:
            raise ValueError("this is not an ELF file")
        self._data = data
        self._wide = data[4] == 2
        self._order = "<" if data[5] == 1 else ">"

    def interpreter(self) -> str:
        """The path of its dynamic linker; empty if it has none."""
        for kind, offset, _, size in self._segments():
            if kind == _INTERPRETER:
                return self._data[offset : offset + size].rstrip(b"\0").decode()
        return ""

    def needed(self) -> list[str]:
        """The names of the libraries that it asks for."""
        segments = [*self._segments()]
        entries = [entry for segment in segments for entry in self._dynamic(segment)]
        address = dict(entries).get(_STRINGS)
        if address is None:
            return []
        start = next(
            offset + address - at
            for kind, offset, at, size in segments
            if kind == _LOADED and at <= address < at + size
        )
        return [self._text(start + value) for tag, value in entries if tag == _NEEDED]

    def information(self, key: str) -> list[str]:
        """What a kernel module says of itself under a key, such as ``depends``."""
        for name, offset, size in self._sections():
            if name == ".modinfo":
                texts = self._data[offset : offset + size].split(b"\0")
                pairs = (text.decode(errors="replace").partition("=") for text in texts)
                return [value for name, _, value in pairs if name == key]
        return []

    def _segments(self) -> Iterator[tuple[int, int, int, int]]:
        """Kind, offset, address and size of each."""
        (start,) = self._unpack("Q" if self._wide else "I", 32 if self._wide else 28)
        each, count = self._unpack("HH", 54 if self._wide else 42)
        for at in range(start, start + each * count, each):
            if self._wide:
                kind, _, offset, address, _, size = self._unpack("IIQQQQ", at)
            else:
                kind, offset, address, _, size = self._unpack("IIIII", at)
            yield kind, offset, address, size

    def _dynamic(self, segment: tuple[int, int, int, int]) -> Iterator[tuple[int, int]]:
        kind, offset, _, size = segment
        if kind != _DYNAMIC:
            return
        shape = "QQ" if self._wide else "II"
        for at in range(offset, offset + size, struct.calcsize(shape)):
            tag, value = self._unpack(shape, at)
            yield tag, value

    def _sections(self) -> Iterator[tuple[str, int, int]]:
        """Name, offset and size of each."""
        (start,) = self._unpack("Q" if self._wide else "I", 40 if self._wide else 32)
        each, count, names = self._unpack("HHH", 58 if self._wide else 46)
        places = []
        for at in range(start, start + each * count, each):
            (name,) = self._unpack("I", at)
            offset, size = (
                self._unpack("QQ", at + 24) if self._wide else self._unpack("II", at + 16)
            )
            places.append((name, offset, size))
        for name, offset, size in places:
            yield self._text(places[names][1] + name), offset, size

    def _text(self, at: int) -> str:
        return self._data[at : self._data.index(b"\0", at)].decode()

    def _unpack(self, shape: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(self._order + shape, self._data, at)


def applets(busybox: Path) -> list[str]:
    """The programs that busybox contains, from the list of their names in it.

    Raises:
        LookupError: there is no such list.
    """
    lists = _APPLETS.findall(busybox.read_bytes())
    if not lists:
        raise LookupError(f"{busybox} has no list of its programs")
    return [name.decode() for name in max(lists, key=len).split(b"\0") if name]


# -- modules ---------------------------------------------------------------------------------------------


class ModuleTree:
    """The modules of a kernel, in a folder lib/modules/RELEASE."""

    def __init__(self, root: Path) -> None:
        """Look into the folder when it is asked for something."""
        self.root = root

    def order(self, names: Sequence[str]) -> list[str]:
        """The files of modules and of those that they need, in the order in which to load them.

        Args:
            names: the modules. One that ends with ``?`` may be missing. What is built in has no file.

        Raises:
            LookupError: a module is missing.
        """
        files = {_plain(path.name): path for path in sorted(self.root.rglob("*.ko*"))}
        builtin = {_plain(Path(line).name) for line in self._builtin()}
        found: dict[str, None] = {}

        def add(name: str) -> None:
            wanted = _plain(name.rstrip("?"))
            if wanted in files:
                path = files[wanted]
                for needed in ",".join(_module(path).information("depends")).split(","):
                    if needed:
                        add(needed)
                found[str(path.relative_to(self.root))] = None
            elif wanted not in builtin and not name.endswith("?"):
                raise LookupError(f"the kernel has no module {name}")

        for name in names:
            add(name)
        return [*found]

    def index(self) -> list[str]:
        """Write the lists that ``modprobe`` reads, of the modules in the folder. Returns nothing."""
        depends, aliases = [], []
        for path in sorted(self.root.rglob("*.ko")):
            *before, last = self.order([path.name])
            depends.append(" ".join((f"{last}:", *reversed(before))))
            name = _plain(path.name)
            aliases += [f"alias {alias} {name}" for alias in _module(path).information("alias")]
        for file, lines in (("modules.dep", depends), ("modules.alias", aliases)):
            (self.root / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return []

    def _builtin(self) -> list[str]:
        return (self.root / "modules.builtin").read_text(encoding="utf-8").splitlines()


def _plain(name: str) -> str:
    """The name of a module, which may have hyphens for underscores."""
    return name.partition(".ko")[0].replace("-", "_")


def _module(path: Path) -> Elf:
    data = path.read_bytes()
    return Elf(lzma.decompress(data) if path.suffix == ".xz" else data)


# -- keys ------------------------------------------------------------------------------------------------


def make_key(kind: str, file: Path) -> str:
    """Make a host key, in the format of dropbear or OpenSSH. Returns its public part."""
    private = Ed25519PrivateKey.generate()
    raw, raw_public = private.private_bytes_raw(), private.public_key().public_bytes_raw()
    if kind == "dropbear":
        content = _string(b"ssh-ed25519") + _string(raw + raw_public)
    else:
        content = private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    file.touch(0o600, exist_ok=False)
    file.write_bytes(content)
    public = base64.b64encode(_string(b"ssh-ed25519") + _string(raw_public)).decode()
    return f"ssh-ed25519 {public}"


def _string(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


if __name__ == "__main__":
    sys.exit(main())
