"""`Guest.push`, `pull`, `read_text` and `write_text` on a real guest."""

from __future__ import annotations

import hashlib
import os
import stat
import tracemalloc
from pathlib import Path

import pytest

from pytest_vmsandbox import TransferError

pytestmark = pytest.mark.vm("tiny", isolation="module")

ODD_NAMES = [
    "a b",
    "-rf",
    "new\nline",
    "quote'\"",
    "ümlaut",
    "*",
    "$x",
    "\\",
    os.fsdecode(b"\xff\xfe"),
]


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    for number, name in enumerate(ODD_NAMES):
        (root / name).write_bytes(bytes([number]) * number)
    (root / "empty").mkdir()
    deep = root / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").write_text("deep")
    (root / "link").symlink_to("a/b/c/file")
    (root / "dangling").symlink_to("/no/such/thing")
    (root / "to-folder").symlink_to("a")
    script = root / "script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o750)
    read_only = root / "read-only"
    read_only.mkdir()
    (read_only / "inside").write_text("x")
    (read_only / "inside").chmod(0o400)
    read_only.chmod(0o555)
    return root


def picture(root: Path) -> dict[str, tuple[object, ...]]:
    """Kind, mode and content of everything in a tree."""
    seen: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            key = os.fspath(path.relative_to(root))
            status = path.lstat()
            if path.is_symlink():
                seen[key] = ("link", os.readlink(path))
            elif path.is_dir():
                seen[key] = ("folder", stat.S_IMODE(status.st_mode))
            else:
                seen[key] = ("file", stat.S_IMODE(status.st_mode), path.read_bytes())
    return seen


def test_a_tree_goes_there_and_back(vm, tree, tmp_path):
    vm.push(tree, "/tmp/copy")
    vm.pull("/tmp/copy", tmp_path / "back")
    assert picture(tmp_path / "back") == picture(tree)
    assert vm.run(["stat", "-c", "%U %a", "/tmp/copy/script"]).stdout == "root 750\n"


@pytest.mark.origins("cloned")
def test_a_large_file_is_not_held_in_memory(vm_factory, tmp_path):
    """Over 1 GiB, mostly holes here so that it is quick; both ways."""
    size = (1 << 30) + 12_345
    source = tmp_path / "large"
    with source.open("wb") as file:
        file.write(b"begin")
        file.seek(size - 3)
        file.write(b"end")
    with vm_factory.boot("tiny", memory="3GiB") as vm:
        tracemalloc.start()
        vm.push(source, "/tmp/large")
        vm.run(["truncate", "-s", str(size), "/tmp/back"])
        assert vm.shell("wc -c < /tmp/large; tail -c 3 /tmp/large").stdout == f"{size}\nend"
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 << 20


def test_random_bytes_there_and_back(vm, tmp_path):
    data = os.urandom(20_000_000)
    (tmp_path / "data").write_bytes(data)
    vm.push(tmp_path / "data", "/tmp/data")
    there = vm.run(["sha256sum", "/tmp/data"], timeout=300).stdout.split()[0]
    assert there == hashlib.sha256(data).hexdigest()
    vm.pull("/tmp/data", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_where_a_file_goes(vm, tmp_path):
    file = tmp_path / "name"
    file.write_text("1")
    vm.run(["mkdir", "-p", "/tmp/where/there"])
    vm.push(file, "/tmp/where/file")
    vm.push(file, "/tmp/where/there")
    vm.push(file, "/tmp/where/new/")
    vm.push(file, "/tmp/where/deep/er/file")
    found = vm.shell("cd /tmp/where; find . -type f | sort").stdout.split()
    assert found == ["./deep/er/file", "./file", "./new/name", "./there/name"]


def test_where_a_pulled_file_goes(vm, tmp_path):
    vm.write_text("/tmp/pulled", "text")
    (tmp_path / "there").mkdir()
    vm.pull("/tmp/pulled", tmp_path / "file")
    vm.pull("/tmp/pulled", tmp_path / "there")
    vm.pull("/tmp/pulled", f"{tmp_path}/new/")
    found = sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    )
    assert found == ["file", "new/pulled", "there/pulled"]


def test_a_file_takes_its_place_whole(vm, tmp_path):
    """A reader of the old file keeps it; nothing half-written is ever at the name."""
    vm.write_text("/tmp/replaced", "old\n")
    with vm.popen(["sh", "-c", "exec 3</tmp/replaced; echo open; read go; cat <&3"]) as reader:
        assert reader.stdout.readline() == "open\n"
        vm.write_text("/tmp/replaced", "new\n")
        reader.stdin.write("go\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "old\n"
    assert vm.read_text("/tmp/replaced") == "new\n"


@pytest.mark.parametrize(
    "name", ["/tmp/a b", "/tmp/-x", "/tmp/ü'\"$x", "relative", "/tmp/new\nline"]
)
def test_text(vm, name):
    vm.write_text(name, "ünï\ncode\n")
    assert vm.read_text(name) == "ünï\ncode\n"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda vm: vm.push("/no/such", "/tmp/x"), "/no/such cannot be read"),
        (lambda vm: vm.pull("/no/such", "here"), "/no/such could not be pulled"),
        (lambda vm: vm.read_text("/no/such"), "/no/such cannot be read"),
        (lambda vm: vm.write_text("/proc/x/y", "text"), "/proc/x/y cannot be written"),
        (lambda vm: vm.push("/dev/null", "/tmp/x"), "neither a file nor a folder"),
        (lambda vm: vm.pull("", "here"), "is not a path in the guest"),
    ],
)
def test_what_cannot_be_copied(vm, call, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TransferError, match=text):
        call(vm)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(vm, tmp_path):
    (tmp_path / "data").write_bytes(bytes(3_000_000))
    vm.shell("mkdir -p /mnt/small && mount -t tmpfs -o size=1m none /mnt/small")
    with pytest.raises(TransferError, match="No space left") as caught:
        vm.push(tmp_path / "data", "/mnt/small/data")
    assert "larger one" in caught.value.remedy
    assert vm.run(["ls", "-A", "/mnt/small"]).stdout == ""
    vm.run(["umount", "/mnt/small"])
