"""Disks that are attached to a guest while it runs."""

import pytest

from pytest_vmsandbox import CommandError, ConfigError, GuestLost

pytestmark = pytest.mark.vm("tiny", memory="160MiB")


def disks(vm):
    """What the guest has, by serial number."""
    shown = vm.shell("for f in /sys/block/vd*/serial; do cat $f && echo; done", check=False).stdout
    return sorted(shown.split())


def left_in_qemu(vm):
    """Descriptors and block devices of disks."""
    return vm.qmp("query-fdsets"), vm.qmp("query-named-block-nodes", flat=True)


@pytest.mark.origins("cloned")
def test_attach_and_detach(vm, tmp_path):
    (tmp_path / "seed").write_bytes(b"seed" * 1000)
    disk = vm.attach_disk(size="16MiB", name="data")
    seed = vm.attach_disk(tmp_path / "seed", read_only=True)
    own = vm.attach_disk(tmp_path / "seed", size="8KiB")
    assert (disk.name, disk.size, disk.read_only) == ("data", 16 << 20, False)
    assert [seed.name, own.name] == ["attached0", "attached1"]
    assert (seed.size, own.size) == (4096, 8192)
    assert disks(vm) == ["attached0", "attached1", "data"]

    vm.shell(f"mkfs.ext4 -q {disk.device} && mount {disk.device} /mnt && echo kept >/mnt/file")
    assert vm.run(["head", "-c", "8", seed.device]).stdout == "seedseed"
    with pytest.raises(CommandError, match="Operation not permitted|Read-only"):
        vm.shell(f"echo x >{seed.device}")
    vm.shell(f"echo X | dd of={own.device} conv=notrunc,fsync")
    assert vm.run(["head", "-c", "4", own.device]).stdout == "X\ned"
    assert (tmp_path / "seed").read_bytes() == b"seed" * 1000

    with vm.snapshot():
        vm.detach(seed)
        vm.shell("echo changed >/mnt/file; sync")
        vm.attach_disk(size="1MiB", name="later")
        vm.attach_disk(size="1MiB", name="fourth")
        with pytest.raises(
            ConfigError, match="has no free port for another disk: the disk .* are in its 4"
        ):
            vm.attach_disk(size="1MiB")
    assert disks(vm) == ["attached0", "attached1", "data"]
    assert vm.read_text("/mnt/file") == "kept\n"
    assert vm.run(["head", "-c", "4", seed.device]).stdout == "seed"

    vm.detach(disk)  # though it is mounted
    vm.detach("attached0")
    vm.detach(own)
    assert disks(vm) == []
    assert left_in_qemu(vm) == ([], [])
    with pytest.raises(ConfigError, match="no disk 'data' is attached"):
        vm.detach(disk)


@pytest.mark.origins("booted")
def test_stays_attached_when_the_guest_is_off(vm):
    disk = vm.attach_disk(size="16MiB")
    other = vm.attach_disk(size="1MiB", read_only=True)
    vm.shell(f"mkfs.ext4 -q {disk.device} && mount {disk.device} /mnt && echo kept >/mnt/file")
    vm.reboot()
    vm.shell(f"mount {disk.device} /mnt && echo and kept >>/mnt/file && sync")
    vm.power_cut()
    vm.detach(other)
    with pytest.raises(GuestLost, match="is switched off"):
        vm.attach_disk(size="1MiB")
    vm.power_on()
    assert disks(vm) == [disk.name]
    vm.shell(f"mount {disk.device} /mnt")
    assert vm.read_text("/mnt/file") == "kept\nand kept\n"
    vm.detach(disk)
    assert left_in_qemu(vm) == ([], [])


@pytest.mark.origins("cloned")
def test_one_that_fails_on_purpose(vm):
    """Another block device is put under a disk while the guest runs. That is no failure of ours."""
    disk = vm.attach_disk(size="1MiB", name="data")
    rule = {"event": "none", "iotype": "write", "errno": 5}
    failing = {"driver": "blkdebug", "node-name": "failing", "image": "at-data"}
    vm.qmp("blockdev-add", **failing, **{"inject-error": [rule]})
    drive = {"path": "/machine/peripheral/disk-data", "property": "drive"}
    vm.qmp("qom-set", **drive, value="failing")
    write = ["dd", "if=/dev/zero", f"of={disk.device}", "count=1", "conv=fsync"]
    assert "Input/output error" in vm.run(write, check=False).stderr
    vm.qmp("qom-set", **drive, value="at-data")
    vm.run(write)
    assert vm.alive
