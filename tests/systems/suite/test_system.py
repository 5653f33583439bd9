"""The same file for every system: what all guests have in common, driven from outside."""

import base64
import os

import pytest

MACHINE = os.environ[
    "SYSTEM_MACHINE"
]  # as `uname -m` says it; other names of it follow, with commas


def test_it_is_the_system_that_was_asked_for(vm):
    assert vm.run(["uname", "-m"]).stdout.strip() in MACHINE.split(",")
    assert vm.run(["hostname"]).stdout.strip() == vm.name
    assert vm.run(["id", "-u"]).stdout.strip() == "0"


def test_a_program_is_as_here(vm):
    data = bytes(range(256)) * 4000
    done = vm.run(["cat"], input=data, text=False)
    assert done.stdout == data
    failed = vm.shell("echo out; echo err >&2; exit 7", check=False)
    assert (failed.stdout, failed.stderr, failed.returncode) == ("out\n", "err\n", 7)
    assert vm.shell("kill -TERM $$", check=False).returncode == -15
    assert (
        vm.run(["sh", "-c", 'echo "$1" "$KEY"', "-", "ä b"], env={"KEY": "ü"}).stdout == "ä b ü\n"
    )


def test_files_come_and_go(vm, tmp_path):
    (tmp_path / "tree" / "below").mkdir(parents=True)
    (tmp_path / "tree" / "below" / "program").write_text("#!/bin/sh\necho works\n")
    (tmp_path / "tree" / "below" / "program").chmod(0o755)
    (tmp_path / "tree" / "link").symlink_to("below/program")
    vm.push(tmp_path / "tree", "/root/tree")
    assert vm.run(["/root/tree/link"]).stdout == "works\n"
    vm.pull("/root/tree", tmp_path / "back")
    assert (tmp_path / "back" / "below" / "program").stat().st_mode & 0o777 == 0o755
    assert os.readlink(tmp_path / "back" / "link") == "below/program"


def test_the_clock_is_right(vm):
    here = float(os.popen("date +%s").read())
    assert abs(float(vm.run(["date", "+%s"]).stdout) - here) < 30


@pytest.mark.parametrize("number", [1, 2])
def test_nobody_was_here_before(vm, number, record_property):
    assert vm.run(["test", "-e", "/root/mark"], check=False).returncode == 1
    vm.write_text("/root/mark", "")
    random = vm.run(["head", "-c", "16", "/dev/urandom"], text=False).stdout
    record_property("random", base64.b64encode(random).decode())
    record_property("origin", str(vm.origin))


def test_memory_is_rolled_back(vm):
    if vm.origin == "booted":
        pytest.skip("this guest was booted")
    vm.write_text("/root/before", "")
    with vm.snapshot():
        vm.run(["rm", "/root/before"])
    assert vm.run(["test", "-e", "/root/before"], check=False).returncode == 0


def test_power(vm):
    vm.reboot()
    assert vm.run(["hostname"]).stdout.strip() == vm.name
    vm.power_off()
    vm.power_on()
    assert vm.run(["uname", "-m"]).stdout.strip() in MACHINE.split(",")


@pytest.mark.vm(disks=["64MiB"])
def test_a_second_disk(vm):
    sizes = vm.shell("cat /sys/block/*/size").stdout.split()
    assert str((64 << 20) // 512) in sizes


def test_a_picture_of_the_display(vm, tmp_path):
    vm.screenshot(tmp_path / "display.png")
    assert (tmp_path / "display.png").read_bytes().startswith(b"\x89PNG")
