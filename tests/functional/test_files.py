"""`Guest.push`, `pull`, `read_text` and `write_text` on a real guest."""

from __future__ import annotations

import hashlib
import os
import stat
import tracemalloc
from pathlib import Path, PurePosixPath

import pytest

from pytest_vmsandbox import TransferError
from pytest_vmsandbox.guests.reaching import transfer

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
def test_a_large_file_is_not_held_in_memory(vm_factory, tmp_path, monkeypatch):
    """Over 1 GiB with holes, and 128 MiB of which each byte is sent, though most are holes here."""
    with vm_factory.boot("tiny") as vm:
        for size in ((1 << 30) + 12_345, (1 << 27) + 12_345):
            source = tmp_path / "large"
            with source.open("wb") as file:
                file.write(b"begin")
                file.seek(size - 3)
                file.write(b"end")
            tracemalloc.start()
            vm.push(source, "/tmp/large")
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            look = "stat -c %s /tmp/large; head -c 5 /tmp/large; tail -c 3 /tmp/large"
            assert vm.shell(look).stdout == f"{size}\nbeginend"
            assert peak < 16 << 20
            vm.run(["rm", "/tmp/large"])
            monkeypatch.setattr(transfer, "_parts", lambda file: None)


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


def test_files_that_do_not_say_their_size(vm, tmp_path):
    vm.pull("/proc/cpuinfo", tmp_path / "cpuinfo")
    assert "processor" in (tmp_path / "cpuinfo").read_text()
    vm.pull("/proc/sys/kernel/random", tmp_path / "proc")
    assert (tmp_path / "proc/boot_id").read_text() == vm.read_text(
        PurePosixPath("/proc/sys/kernel/random/boot_id")
    )
    vm.pull("/sys/devices/virtual/net/lo/queues/rx-0", tmp_path / "sys")
    assert (tmp_path / "sys/rps_flow_cnt").read_text() == "0\n"


def test_a_tree_in_motion(vm, tmp_path):
    """Files are made, removed, cut and prolonged while it is read."""
    change = (
        "i=0; while :; do i=$((i+1)); echo $i > $i; rm -f $((i-5)); : > log; seq 2000 > log; done"
    )
    with vm.popen(["sh", "-c", f"mkdir /tmp/motion; cd /tmp/motion; mkfifo pipe; {change}"]):
        vm.wait_until(["test", "-e", "/tmp/motion/log"], timeout=60)
        for number in range(6):
            with pytest.warns(UserWarning, match="/tmp/motion was pulled without") as warned:
                vm.pull("/tmp/motion", tmp_path / f"{number}")
            assert "pipe (pipe)" in str(warned[0].message)
            assert warned[0].filename == __file__
            assert "log" in os.listdir(tmp_path / f"{number}")


def test_what_is_no_file_is_left_out(vm, tmp_path):
    vm.shell("syslogd; test -S /dev/log")
    with pytest.warns(UserWarning, match="/dev was pulled without .* more") as warned:
        vm.pull("/dev", tmp_path / "dev")
    assert len(warned) == 1
    assert all(path.is_dir() or path.is_symlink() for path in (tmp_path / "dev").rglob("*"))
    os.mkfifo(tmp_path / "dev/pipe")
    with pytest.warns(UserWarning, match=r"dev was pushed without \./pipe \(pipe\)"):
        vm.push(tmp_path / "dev", "/tmp/dev")


def test_a_file_of_the_kernel_is_written(vm, tmp_path):
    file = PurePosixPath("/proc/sys/kernel/randomize_va_space")
    for value in ("2", "0"):
        vm.write_text(file, value)
        assert vm.read_text(file) == f"{value}\n"
    (tmp_path / "value").write_text("1")
    vm.push(tmp_path / "value", file)
    assert vm.read_text(file) == "1\n"
    for value in ("1", "0"):
        vm.write_text("/sys/kernel/rcu_expedited", value)
        assert vm.read_text("/sys/kernel/rcu_expedited") == f"{value}\n"


def test_places_where_no_file_can_be_replaced(vm):
    vm.shell("mkdir /tmp/place; mount -t tmpfs none /tmp/place; touch /tmp/place/file /tmp/bound")
    vm.shell("mount -o remount,ro /tmp/place")
    with pytest.raises(TransferError, match="Read-only file system"):
        vm.write_text("/tmp/place/file", "new")
    vm.shell("mount --bind /tmp/bound /tmp/place/file")  # a mount point: `mv` cannot replace it
    vm.write_text("/tmp/place/file", "new")
    assert vm.read_text("/tmp/bound") == "new"
    vm.shell("umount /tmp/place/file; umount /tmp/place")


def test_through_a_link(vm):
    vm.shell("cd /tmp; echo old > real; chmod 755 real; chown 7:8 real; ln -s real link")
    vm.write_text("/tmp/link", "new")
    assert vm.shell("cat /tmp/real; readlink /tmp/link; stat -c %a,%u,%g /tmp/real").stdout == (
        "newlink\n755,7,8\n".replace("link", "real")
    )
    vm.shell("mkdir /tmp/far; ln -s ../fresh /tmp/far/link; ln -s far/link /tmp/chain")
    vm.write_text("/tmp/chain", "made")
    assert vm.read_text("/tmp/fresh") == "made"


def test_special_bits_and_holes(vm, tmp_path):
    (tmp_path / "tree").mkdir()
    program, image = tmp_path / "tree/program", tmp_path / "tree/image"
    program.touch()
    program.chmod(0o4755)
    with image.open("wb") as file:
        file.truncate(20 << 20)
        for start in (0, 5 << 20, 10 << 20):
            file.seek(start)
            file.write(b"data")
    vm.push(tmp_path / "tree", "/tmp/special")
    vm.push(image, "/tmp/special/single")
    seen = vm.shell("cd /tmp/special; stat -c '%a %s' *; du -k image single").stdout
    assert seen == "644 20971520\n4755 0\n644 20971520\n12\timage\n12\tsingle\n"
    vm.pull("/tmp/special", tmp_path / "back")
    vm.pull("/tmp/special/single", tmp_path / "single")
    for path in (tmp_path / "single", tmp_path / "back/single", tmp_path / "back/image"):
        assert path.stat().st_blocks * 512 < 1 << 20
        assert path.read_bytes() == image.read_bytes()
    assert (tmp_path / "back/program").stat().st_mode & 0o7777 == 0o4755


def test_a_full_disk_is_named(vm, tmp_path):
    (tmp_path / "data").write_bytes(bytes(3_000_000))
    vm.shell("mkdir -p /mnt/small && mount -t tmpfs -o size=1m none /mnt/small")
    with pytest.raises(TransferError, match="No space left") as caught:
        vm.push(tmp_path / "data", "/mnt/small/data")
    assert "larger one" in caught.value.remedy
    assert vm.run(["ls", "-A", "/mnt/small"]).stdout == ""
    vm.run(["umount", "/mnt/small"])
