"""Disks that are slow, fail, vanish or are full, as the guest sees it."""

import threading

import pytest

from pytest_vmsandbox import CommandError, ConfigError

shared = pytest.mark.vm("tiny", memory="160MiB", disks=["64MiB"], isolation="module")
own = pytest.mark.vm("tiny", memory="160MiB", disks=["64MiB"])
DISK = "/dev/vda"
SECTOR = 40_000  # behind what is in the file system
EIO, ENOSPC = "Input/output error", "No space left on device"


def said(vm, script):
    """What a script writes to standard error."""
    return vm.shell(script, check=False).stderr


def write(sector=SECTOR, count=1, then=""):
    """In blocks of 4 KiB: the guest's kernel reads before it writes less."""
    return f"dd if=/dev/zero of={DISK} bs=4k seek={sector // 8} count={count} oflag=direct {then}"


def read(sector=SECTOR):
    return f"dd if={DISK} of=/dev/null bs=4k skip={sector // 8} count=1 iflag=direct"


def failing(vm, sector=SECTOR):
    """The kinds of requests that the disk refuses."""
    flush = write(sector, then="conv=fsync")
    tried = {"read": read(sector), "write": write(sector), "flush": flush}
    failed = {kind for kind, script in tried.items() if EIO in said(vm, script)}
    return failed - ({"flush"} if "write" in failed else set())


def filters(vm):
    """What is left of faults in QEMU."""
    nodes = {it["node-name"] for it in vm.qmp("query-named-block-nodes", flat=True)}
    objects = {it["name"] for it in vm.qmp("qom-list", path="/objects")}
    return {name for name in nodes | objects if name.startswith("filter-")}


def seconds(vm, script):
    """How long a script takes, by the guest's own clock."""
    uptime = "read -r now _ </proc/uptime; echo $now"
    first, last = vm.shell(f"{uptime}; {script}; {uptime}").stdout.split()
    return float(last) - float(first)


@pytest.fixture
def mounted(vm):
    """A fresh file system on the disk."""
    vm.shell(f"mkfs.ext4 -q -F {DISK} 16M && mount {DISK} /mnt")
    yield vm
    vm.shell(f"umount /mnt; fsck.ext4 -fn {DISK}")


@shared
def test_requests_fail(vm):
    for kinds in "read", "write", "flush", ("read", "flush"):
        with vm.faults.disk("disk0", fail=kinds, error="EROFS"):
            assert failing(vm) == set([kinds] if isinstance(kinds, str) else kinds)
        assert failing(vm) == set()
    with vm.faults.disk("disk0", fail="all"), vm.faults.disk("disk0", rate="1GiB"):
        assert failing(vm) == {"read", "write"}
    with vm.faults.disk("disk0", gone=True):
        assert failing(vm) == {"read", "write"}
    assert failing(vm) == set()
    assert filters(vm) == set()
    vm.engine.check_disks()


@shared
def test_a_request_fails_once(vm):
    with vm.faults.disk("disk0", fail="write", once=True, error="ENOSPC"):
        assert EIO in said(vm, write())
        assert failing(vm) == set()
    with vm.faults.disk("disk0", fail=("flush", "read"), once=True):
        for script in read(), write(then="conv=fsync"):
            assert EIO in said(vm, script)
            assert EIO not in said(vm, script)
    # QEMU since 10.0 tells only of the first one of two errors in a second.
    always = vm.faults.disk("disk0", fail="read", error="EROFS")
    with vm.faults.disk("disk0", fail="write", once=True):
        assert said(vm, f"{read()}; {write()}").count(EIO) == 2
        with vm.faults.disk("disk0", rate="1GiB"):
            assert EIO not in said(vm, write())
    always.end()
    vm.engine.check_disks()


@shared
def test_our_own_flush_does_not_use_it_up(vm):
    """QEMU flushes all disks when it stops the CPUs."""
    with vm.faults.disk("disk0", fail="flush", once=True):
        vm.shell(write())
        with vm.faults.freeze():
            pass
        with vm.faults.suspend():
            pass
        assert EIO in said(vm, write(then="conv=fsync"))
        assert EIO not in said(vm, write(then="conv=fsync"))
    vm.engine.check_disks()


@shared
def test_sectors_fail(vm):
    with vm.faults.disk("disk0", fail="read", sectors=range(SECTOR, SECTOR + 4096)):
        for sector in SECTOR, SECTOR + 4095:
            assert failing(vm, sector) == {"read"}
        for sector in SECTOR - 1, SECTOR + 4096:
            assert failing(vm, sector) == set()
    assert failing(vm) == set()


@shared
def test_it_is_slow(vm):
    with vm.faults.disk("disk0", rate="64KiB"):
        assert seconds(vm, write(count=32)) > 1.5  # 2 s, and QEMU lets a tenth of a second pass
    with vm.faults.disk("disk0", iops=10), vm.faults.disk("disk0", iops=1000):
        assert seconds(vm, write(count=20)) > 1.5
    assert filters(vm) == set()


@shared
def test_one_hundred_swaps_under_writes(mounted):
    """The file system is clean afterwards: see the fixture."""
    vm = mounted
    writer = "i=0; while [ ! -e /run/stop ]; do i=$((i + 1)); echo $i >/mnt/$((i % 50)); sync; done; echo $i"
    with vm.popen(["sh", "-c", f"rm -f /run/stop; {writer}"]) as process:
        for number in range(50):
            with vm.faults.disk("disk0", rate="1GiB", fail="read", sectors=[SECTOR + number]):
                vm.shell("cat /mnt/1 2>/dev/null", check=False)
        vm.shell("touch /run/stop")
        assert process.wait(60) == 0
        assert int(process.stdout.read()) > 50
    assert EIO not in vm.shell("dmesg").stdout


@shared
def test_the_file_system_is_full(mounted):
    vm = mounted
    for path, left in ("/mnt/lost+found", 0), ("/mnt", "1MiB"):
        with vm.faults.full(path, left=left):
            room = {0: 0, "1MiB": 900}[left]
            assert (ENOSPC in said(vm, "echo x >/mnt/file")) == (left == 0)
            many = said(vm, f"head -c {room}k /dev/zero >/mnt/file && sync")
            assert many == ""
            vm.shell("rm /mnt/file")
        vm.shell("head -c 10000k /dev/zero >/mnt/file && sync && rm /mnt/file")
    assert vm.shell("ls -A /mnt").stdout == "lost+found\n"
    with vm.faults.full("/run"):
        assert ENOSPC in said(vm, "echo x >/run/file")
    vm.shell("echo x >/run/file && rm /run/file")
    for path in "/nowhere", "/proc":
        with pytest.raises(ConfigError, match=path):
            vm.faults.full(path)
    with pytest.raises(ConfigError, match=r"only .*iB of room, so left=100TiB would fill nothing"):
        vm.faults.full("/mnt", left="100TiB")
    vm.shell("mount -o remount,ro /mnt")
    with pytest.raises(CommandError, match="with /mnt in .* cannot be filled"):
        vm.faults.full("/mnt")


@shared
def test_a_full_file_system_is_found_wherever_it_is(mounted):
    vm = mounted
    vm.shell("mkdir -p '/a b'")
    hide = "mount -t tmpfs -o size=4M none"
    for path, meanwhile, then in (
        ("/mnt", f"umount /mnt && mount {DISK} '/a b'", "true"),
        ("/a b", "umount '/a b'", f"mount {DISK} /mnt"),
        ("/mnt", f"{hide} /mnt", "umount /mnt"),
        ("/mnt", f"mount --bind /mnt/lost+found '/a b' && umount /mnt && {hide} '/a b'", "true"),
    ):
        with vm.faults.full(path):
            vm.shell(meanwhile)
        vm.shell(then)
        for left in "/mnt", "/a b":
            assert "vmsandbox" not in vm.run(["ls", "-A", left]).stdout
    vm.shell(f"umount '/a b' '/a b'; {hide} '/a b'; mount {DISK} /mnt")
    with vm.faults.full("/a b"):  # in memory: it is looked for, or gone
        vm.shell("mkdir -p /b && mount --bind '/a b' /b && umount '/a b'")
    assert vm.run(["ls", "-A", "/b"]).stdout == ""
    with vm.faults.full("/b"):
        vm.shell(f"umount /b && {hide} '/a b'")
    hidden = vm.faults.full("/a b")
    vm.shell(f"{hide} '/a b'")
    with pytest.raises(CommandError, match="cannot be removed") as caught:
        hidden.end()
    assert "another one is mounted over it" in caught.value.details
    vm.shell("umount '/a b' '/a b'")


@own
@pytest.mark.origins("cloned")
def test_with_snapshots_and_power_cuts(vm):
    once = vm.faults.disk("disk0", fail="read", once=True, error="EROFS")
    with vm.snapshot():
        assert EIO in said(vm, read())
        assert EIO not in said(vm, read())
    assert EIO not in said(vm, read())  # it has failed once
    always = vm.faults.disk("disk0", fail=("write", "flush"))
    said(vm, write(then="conv=fsync"))
    with vm.snapshot():
        assert failing(vm) == {"write"}
        inner = vm.faults.disk("disk0", rate="1GiB")
    assert failing(vm) == {"write"}
    vm.power_cut()
    inner.end()
    vm.power_on()
    assert failing(vm) == {"write"}
    vm.reboot()
    assert failing(vm) == {"write"}
    later = threading.Thread(target=always.end)
    later.start()
    later.join()
    assert failing(vm) == set()
    once.end()
    assert filters(vm) == set()

    vm.power_cut()
    with vm.faults.disk("disk0", gone=True):
        vm.power_on()
        assert failing(vm) == {"read", "write"}
    assert failing(vm) == set()

    vm.shell(f"mkfs.ext4 -q {DISK} && mount {DISK} /mnt")
    full = vm.faults.full("/mnt")
    with vm.snapshot():
        full.end()
    assert vm.shell("ls -A /mnt").stdout == "lost+found\n"  # it was ended once more
    full = vm.faults.full("/mnt")
    vm.power_cut()
    vm.power_on()
    vm.shell(f"mount {DISK} /mnt")
    assert ENOSPC in said(vm, "echo x >/mnt/file")
    vm.power_cut()
    full.end()
    vm.power_on()
    vm.shell(f"mount {DISK} /mnt")
    vm.shell("echo x >/mnt/other")
    assert set(vm.shell("ls -A /mnt").stdout.split()) - {"file"} == {"lost+found", "other"}
    vm.engine.check_disks()


@own
@pytest.mark.origins("cloned")
def test_an_attached_disk_is_gone(vm):
    def there():
        shown = vm.shell("cat /sys/block/*/serial", check=False).stdout
        return "data" in shown

    data = vm.attach_disk(size="16MiB", name="data")
    vm.shell(f"echo kept | dd of={data.device} conv=fsync")
    find = 'for f in /sys/block/*/serial; do [ "$(cat $f)" != data ] || { f=${f%/*}; echo /dev/${f##*/}; }; done'
    content = f"head -n 1 $({find})"
    with vm.faults.disk(data, fail="write"):
        with vm.faults.disk(data, gone=True), vm.faults.disk(data, rate="1GiB"):
            assert not there()
        assert EIO in said(vm, f"echo lost | dd of=$({find}) conv=fsync")
    with vm.faults.disk(data, gone=True):
        assert not there()
        with vm.snapshot():
            vm.attach_disk(size="1MiB", name="other")
            vm.power_cut()
        vm.power_cut()
        vm.power_on()
        assert not there()
    assert vm.shell(content).stdout == "kept\n"

    gone = vm.faults.disk("data", gone=True)
    with vm.snapshot():
        gone.end()
        assert vm.shell(content).stdout == "kept\n"
    assert vm.shell(content).stdout == "kept\n"
    with vm.snapshot():
        gone = vm.faults.disk("data", gone=True)
        assert not there()
    assert EIO in said(vm, content)  # it is there again, but fails
    gone.end()
    assert vm.shell(content).stdout == "kept\n"
    with vm.faults.disk("data", gone=True):
        vm.detach("data")
    assert not there()
    assert filters(vm) == set()


@pytest.mark.vm("debian-13")
@pytest.mark.origins("cloned")
def test_the_root_disk(vm):
    with vm.faults.full("/var"):
        assert ENOSPC in said(vm, "head -c 100k /dev/zero >/var/file")
    vm.shell("head -c 1M /dev/zero >/var/file && sync")
    with vm.faults.disk(rate="1MiB"):
        flags = "bs=64k count=32 oflag=direct status=none"
        assert seconds(vm, f"dd if=/dev/zero of=/var/file {flags}") > 1.5
    with vm.faults.disk(fail="write", once=True):
        assert EIO in said(vm, "dd if=/dev/zero of=/var/file bs=64k count=1 oflag=direct")
        vm.shell("dd if=/dev/zero of=/var/file bs=64k count=1 oflag=direct conv=notrunc")
    assert filters(vm) == set()
    vm.engine.check_disks()
