"""Power cuts at every point: programs that are wrong are found, and those that are right are not accused."""

from __future__ import annotations

import pytest

from pytest_vmsandbox import ConfigError, CrashPointError
from pytest_vmsandbox.guests.crash.freeing import FUNCTIONS

FOLDER = "/mnt"
KEEP = "cd /mnt; echo $1 >new; {sync_file} mv new file; {sync_folder}"
RIGHT = KEEP.format(sync_file="sync new;", sync_folder="sync .;")
WRONG = KEEP.format(sync_file="", sync_folder="")
# A program as a check: `file` has a whole word that is not older than the last acknowledged one.
CHECK = """
word=$(cat file)
case $word in old | [1-9]) ;; *) echo "the file has '$word'"; exit 2 ;; esac
case $VMSANDBOX_ACKNOWLEDGED in
*3*) [ "$word" = 3 ] ;;
*2*) [ "$word" = 2 ] || [ "$word" = 3 ] ;;
*1*) [ "$word" != old ] ;;
esac || { echo "an acknowledged word is lost"; exit 3; }
"""
PANICS = f"[ $VMSANDBOX_ACKNOWLEDGED = '[1]' ] && echo c >/proc/sysrq-trigger; {CHECK}"
STATES = 40


def check(folder, acknowledged):
    word = (folder / "file").read_text().strip()
    assert word in {"old", "1", "2", "3"}, "no word"
    number = 0 if word == "old" else int(word)
    assert number >= max(acknowledged, default=0), "an acknowledged word is lost"


def record(vm, keep):
    """Let a program keep three words."""
    vm.shell(f"echo old >{FOLDER}/file; sync")
    with vm.crash_points("disk0") as cuts:
        for number in (1, 2, 3):
            vm.run(["sh", "-c", keep, "sh", str(number)])
            cuts.acknowledge(number)
    return cuts


def mount(vm, device):
    vm.run(["mkfs.ext4", "-q", device])
    vm.run(["mount", "-o", "noatime", device, FOLDER])


def failure_of(cuts, check, states=STATES):
    with pytest.raises(CrashPointError) as caught:
        cuts.check(check, states=states)
    assert caught.value.report.failures
    return caught.value


@pytest.mark.vm("tiny", disks=["64MiB"])
@pytest.mark.origins("cloned")
class TestPrograms:
    def test_what_is_wrong_is_found(self, vm, tmp_path):
        mount(vm, "/dev/vda")
        vm.popen(["sh", "-c", f"exec 3<{FOLDER}/; sleep 1000"])  # it is in the way
        # It keeps the file system of before, so all states would look like that.
        vm.popen(["unshare", "-m", "sh", "-c", "echo >/root/unshared; sleep 1000"])
        vm.shell("until test -e /root/unshared; do sleep 0.1; done", timeout=60)
        cuts = record(vm, WRONG)
        error = failure_of(cuts, ["sh", "-c", CHECK])

        first = error.report.failures[0]
        assert first.kind == "status 3: an acknowledged word is lost"
        assert first.acknowledged[-1] == max(first.acknowledged)
        assert f'with cuts.state("{first.state}")' in str(error)
        again = failure_of(cuts, ["sh", "-c", CHECK])
        assert again.details == error.details  # the same seed gives the same verdicts

        # The guest is as before, and has any state in a block.
        assert vm.run(["pidof", "sleep"]).stdout
        assert vm.read_text(f"{FOLDER}/file") == "3\n"
        with cuts.state(first.state) as folder:
            assert folder == FOLDER
            assert vm.read_text(f"{FOLDER}/file").strip() in {"old", "1", "2"}
        assert vm.read_text(f"{FOLDER}/file") == "3\n"

        # The whole disk in that state, for other tests.
        cuts.write_state(first.state, tmp_path / "disk.raw")
        disk = vm.attach_disk(tmp_path / "disk.raw")
        vm.shell(f"mkdir /root/disk; mount {disk.device} /root/disk")
        assert vm.read_text("/root/disk/file").strip() in {"old", "1", "2"}
        with pytest.raises(ConfigError, match="no power cut"), cuts.state("9999"):
            pass

    def test_what_is_right_survives(self, vm):
        with pytest.raises(ConfigError, match="no disk 'modules'.*\n.*use one of these: disk0\n"):
            vm.crash_points("modules")
        mount(vm, "/dev/vda")
        cuts = record(vm, RIGHT)
        report = cuts.check(["sh", "-c", CHECK], states=STATES)
        assert report.states > 20
        assert report.broken == 0

        # A state on which the guest panics is broken, and the others are tried nevertheless.
        kernel = failure_of(cuts, ["sh", "-c", PANICS], states=12)
        assert [it.kind for it in kernel.report.failures] == ["the guest's kernel panics"]
        assert kernel.report.states == 12 > kernel.report.broken
        with pytest.raises(ConfigError, match="no python3"):
            cuts.check(check)
        with pytest.raises(CrashPointError, match="No power cut is to blame"):
            cuts.check(["false"])

        # It boots from states where that is asked for.
        booted = ["sh", "-c", f"mount /dev/vda {FOLDER} && cd {FOLDER} && {{ {CHECK} }}"]
        assert cuts.check(booted, states=1, boot=True).broken == 0
        with cuts.state("0", boot=True):
            vm.run(["mount", "/dev/vda", FOLDER])
            assert vm.read_text(f"{FOLDER}/file") == "old\n"
        assert vm.read_text(f"{FOLDER}/file") == "3\n"

        # Whatever has the disk is noticed, even if the kernel has no name for it.
        probe = f"{FUNCTIONS}probe /dev/vda"
        assert vm.shell(probe).stdout
        assert vm.shell(f"umount {FOLDER}; {probe}").stdout == ""


@pytest.mark.vm("debian-13", disks=["64MiB"])
@pytest.mark.origins("cloned")
def test_functions(vm):
    vm.shell("modprobe loop; losetup /dev/loop0 /dev/vdb")
    with vm.crash_points("disk0") as cuts:
        vm.shell("dd if=/dev/zero of=/dev/loop0 bs=4096 count=1 oflag=direct; sync")
    with pytest.raises(ConfigError, match="used by the loop device loop0"):
        cuts.check(check)
    vm.run(["losetup", "-d", "/dev/loop0"])

    mount(vm, "/dev/vdb")
    kinds = [it.kind for it in failure_of(record(vm, WRONG), check).report.failures]
    assert "AssertionError: an acknowledged word is lost" in kinds
    assert record(vm, RIGHT).check(check, states=STATES).broken == 0
