"""What a recipe knows of programs, modules and keys that this machine cannot run."""

from __future__ import annotations

import base64
import importlib.util
import lzma
import struct
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pytest_vmsandbox.guests.reaching.access import KeyPair

PROGRAM = Path(__file__).resolve().parents[2] / "images/debian/natively.py"
FORMATS = [
    pytest.param(wide, order, id=f"{32 << wide}{order}") for wide in (0, 1) for order in "<>"
]


@pytest.fixture(scope="module")
def natively() -> ModuleType:
    spec = importlib.util.spec_from_file_location("natively", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def elf(wide: int, order: str, *, needed: list[str], linker: str = "", info: str = "") -> bytes:
    """A program, library or module: one loaded segment at address 0x10000, and a section .modinfo."""
    header, base = (64, 0x10000) if wide else (52, 0x10000)
    each = 56 if wide else 32
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in needed)
    entries, at = [], 1
    for name in needed:
        entries.append((1, at))
        at += len(name) + 1
    body = header + 3 * each
    text = linker.encode() + b"\0"
    table = body + len(text)
    dynamic = table + len(strings)
    entries += [(5, base + table), (0, 0)]
    pairs = b"".join(struct.pack(order + ("QQ" if wide else "II"), *entry) for entry in entries)
    names = b"\0.modinfo\0.names\0"
    modinfo = dynamic + len(pairs)
    named = modinfo + len(info.encode())
    sections = named + len(names)
    total = sections
    segments = [(1, 0, base, total), (2, dynamic, base + dynamic, len(pairs))]
    segments.append((3, body, base + body, len(text)) if linker else (4, 0, 0, 0))

    def segment(kind: int, offset: int, address: int, size: int) -> bytes:
        if wide:
            return struct.pack(order + "IIQQQQQQ", kind, 0, offset, address, address, size, size, 1)
        return struct.pack(order + "IIIIIIII", kind, offset, address, address, size, size, 0, 1)

    def section(name: int, offset: int, size: int) -> bytes:
        if wide:
            return struct.pack(order + "IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)
        return struct.pack(order + "IIIIIIIIII", name, 1, 0, 0, offset, size, 0, 0, 1, 0)

    start = b"\x7fELF" + bytes((wide + 1, 1 if order == "<" else 2, 1)) + bytes(9)
    start += struct.pack(
        order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"),
        *(3, 0, 1, 0, header, sections, 0, header, each, 3, 64 if wide else 40, 3, 2),
    )
    return b"".join(
        (
            start,
            *(segment(*one) for one in segments),
            text + strings + pairs + info.encode() + names,
            section(0, 0, 0),
            section(1, modinfo, len(info.encode())),
            section(10, named, len(names)),
        )
    )


def put(file: Path, content: bytes = b"") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


class TestLibraries:
    @pytest.mark.parametrize(("wide", "order"), FORMATS)
    def test_all(self, natively, tmp_path, wide, order):
        linker = "/lib64/ld.so.2"
        program = elf(wide, order, needed=["libone.so.1"], linker=linker)
        put(tmp_path / "usr/bin/program", program)
        library = tmp_path / "usr/lib/some-linux-gnu"
        put(library / "libone.so.1", elf(wide, order, needed=["libc.so.6"]))
        put(library / "libc.so.6", elf(wide, order, needed=["ld.so.2"]))
        put(library / "ld.so.2", elf(wide, order, needed=[]))
        (tmp_path / "usr/lib64").mkdir()
        (tmp_path / "usr/lib64/ld.so.2").symlink_to("/usr/lib/some-linux-gnu/ld.so.2")
        assert natively.libraries(tmp_path, [Path("usr/bin/program")]) == [
            f"usr/lib/some-linux-gnu/{file} {place}"
            for file, place in (
                ("ld.so.2", "lib64/ld.so.2"),
                ("ld.so.2", "usr/lib/some-linux-gnu/ld.so.2"),
                ("libc.so.6", "usr/lib/some-linux-gnu/libc.so.6"),
                ("libone.so.1", "usr/lib/some-linux-gnu/libone.so.1"),
            )
        ]

    def test_static(self, natively, tmp_path):
        put(tmp_path / "program", elf(1, "<", needed=[]))
        assert natively.libraries(tmp_path, [Path("program")]) == []

    def test_missing(self, natively, tmp_path, capsys):
        put(tmp_path / "program", elf(1, "<", needed=["libnone.so"]))
        assert natively.main(["libraries", str(tmp_path), "program"]) == 1
        assert capsys.readouterr().err == "program needs libnone.so, which is missing\n"

    def test_no_program(self, natively, tmp_path, capsys):
        put(tmp_path / "program", b"#!/bin/sh\n" * 20)
        assert natively.main(["libraries", str(tmp_path), "program"]) == 1
        assert "not an ELF file" in capsys.readouterr().err


class TestModules:
    @pytest.fixture
    def tree(self, tmp_path) -> Path:
        put(tmp_path / "kernel/one.ko", elf(1, "<", needed=[], info="depends=two,three-x\0"))
        two = elf(0, ">", needed=[], info="depends=\0alias=fs-two\0alias=char-*\0")
        put(tmp_path / "kernel/a/two.ko", two)
        packed = elf(1, ">", needed=[], info="license=GPL\0depends=two\0")
        put(tmp_path / "kernel/three_x.ko.xz", lzma.compress(packed))
        put(tmp_path / "modules.builtin", b"kernel/virtio/virtio_pci.ko\n")
        return tmp_path

    def test_order(self, natively, tree, capsys):
        assert natively.main(["modules", str(tree), "virtio-pci", "one", "none?", "two"]) == 0
        assert capsys.readouterr().out.split() == [
            "kernel/a/two.ko",
            "kernel/three_x.ko.xz",
            "kernel/one.ko",
        ]

    def test_missing(self, natively, tree, capsys):
        assert natively.main(["modules", str(tree), "one", "none"]) == 1
        assert capsys.readouterr().err == "the kernel has no module none\n"

    def test_index(self, natively, tree):
        put(tree / "kernel/three_x.ko", elf(1, ">", needed=[], info="depends=two\0"))
        (tree / "kernel/three_x.ko.xz").unlink()
        assert natively.main(["index", str(tree)]) == 0
        assert (tree / "modules.dep").read_text().splitlines() == [
            "kernel/a/two.ko:",
            "kernel/one.ko: kernel/three_x.ko kernel/a/two.ko",
            "kernel/three_x.ko: kernel/a/two.ko",
        ]
        assert (tree / "modules.alias").read_text().splitlines() == [
            "alias fs-two two",
            "alias char-* two",
        ]


class TestApplets:
    def test_list(self, natively, tmp_path, capsys):
        file = put(
            tmp_path / "busybox", b"\x7fELF[\0[[\0x\0...[\0[[\0acpid\0fsck.minix\0sh\0\0-x\0"
        )
        assert natively.main(["applets", str(file)]) == 0
        assert capsys.readouterr().out.split() == ["[", "[[", "acpid", "fsck.minix", "sh"]

    def test_no_list(self, natively, tmp_path, capsys):
        assert natively.main(["applets", str(put(tmp_path / "busybox", b"other"))]) == 1
        assert "has no list of its programs" in capsys.readouterr().err


class TestKey:
    def test_openssh(self, natively, tmp_path, capsys):
        file = tmp_path / "key"
        assert natively.main(["key", "openssh", str(file)]) == 0
        assert KeyPair.of(file.read_text()).public == capsys.readouterr().out.strip()
        assert file.stat().st_mode & 0o777 == 0o600

    def test_dropbear(self, natively, tmp_path, capsys):
        file = tmp_path / "key"
        assert natively.main(["key", "dropbear", str(file)]) == 0
        content = file.read_bytes()
        assert content[:19] == b"\0\0\0\x0bssh-ed25519\0\0\0\x40"
        private, public = content[19:51], content[51:]
        shown = base64.b64decode(capsys.readouterr().out.split()[1])
        assert shown == b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + public
        made = Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
        assert made == public

    def test_never_over_another(self, natively, tmp_path, capsys):
        file = put(tmp_path / "key", b"mine")
        assert natively.main(["key", "dropbear", str(file)]) == 1
        assert file.read_bytes() == b"mine"
