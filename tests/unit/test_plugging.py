"""Disks that are attached to a guest: what is refused, what is kept, and what is put right."""

import os
import subprocess
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox import AttachedDisk, CommandTimeout, ConfigError, GuestLost
from pytest_vmsandbox.catalogue.importing import vmdk, vpc
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.spec import GIB, MIB, Hardware
from pytest_vmsandbox.guests.lead import Lead
from pytest_vmsandbox.guests.running import plugging
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.guests.running.plugging import TakesDisks, name_of, refuse_left
from pytest_vmsandbox.machine.cmdline import PORTS
from pytest_vmsandbox.machine.disk import Disks


class FakeEngine:
    """A guest that finds a disk, and lets go of it, or does not."""

    name = "tiny-1"
    command_seconds = 5.0
    stretch = staticmethod(lambda _: 0.0)

    def __init__(self, machines):
        self.machines = machines
        self.orderly = ExitStack()
        self.is_on = True
        self.finds = self.lets_go = True
        self.loss: GuestLost | None = None
        self.plugged: list[str] = []
        self.machine = SimpleNamespace(check=self.check, drives=self)

    def check(self):
        if self.loss:
            raise self.loss

    @contextmanager
    def use(self):
        yield self

    @contextmanager
    def still(self, running):
        self.check()
        yield

    @contextmanager
    def explained(self):
        yield

    def plug(self, disk):
        self.plugged.append(disk.name)

    def unplug(self, name, deadline, check):
        check()
        if self.lets_go:
            self.plugged.remove(name)
        return self.lets_go

    def run(self, command, timeout):
        assert timeout >= 1
        self.check()
        return SimpleNamespace(stdout=b"/dev/vdb\n" if self.finds else b"")


@pytest.fixture
def machines(tmp_path):
    blueprint: Any = SimpleNamespace(
        hardware=Hardware(disks=(MIB,)), architecture=ARCHITECTURES["x86_64"]
    )
    hypervisor: Any = SimpleNamespace(cache=tmp_path)
    key: Any = None
    made = Machines(
        blueprint,
        hypervisor,
        name="tiny-1",
        key=key,
        disks=Disks(base=None, overlays=()),
        logs=None,
    )
    yield made
    made.close()


@pytest.fixture
def engine(machines):
    return FakeEngine(machines)


@pytest.fixture
def vm(engine):
    guest = TakesDisks()
    guest.engine = engine
    return guest


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_disk_of_another_guest(vm, machines):
    disk = replace(vm.attach_disk(size="1MiB"), guest="tiny-2")
    with pytest.raises(ConfigError, match="attached to tiny-2, not to tiny-1"):
        vm.detach(disk)
    with pytest.raises(ConfigError, match="attached to tiny-2, not to tiny-1"):
        name_of(machines, disk)
    assert name_of(machines, "attached0") == "attached0"


class TestAttach:
    def test_a_blank_one(self, vm, engine):
        assert vm.attach_disk(size="1MiB") == AttachedDisk(
            name="attached0", size=MIB, device="/dev/vdb", read_only=False, guest="tiny-1"
        )
        assert engine.plugged == ["attached0"]
        (disk,) = engine.machines.disks.plugged
        assert (disk.port, disk.base, disk.layers[0].mode) == ("port0", None, "rb+")

    def test_a_file(self, vm, engine, tmp_path):
        (tmp_path / "file").write_bytes(b"x" * 1000)
        assert vm.attach_disk(tmp_path / "file", read_only=True).size == 1024
        assert vm.attach_disk(str(tmp_path / "file"), size="1MiB").size == MIB
        first, second = engine.machines.disks.plugged
        assert (first.base.mode, first.layers[0].mode) == ("rb", "rb")
        assert (second.base.mode, second.layers[0].mode) == ("rb", "rb+")

    @pytest.mark.parametrize("name", ["armv7l", "riscv64", "ppc64le"])
    def test_where_debian_has_no_driver_for_it(self, vm, machines, name):
        machines.blueprint.architecture = ARCHITECTURES[name]
        with pytest.raises(ConfigError, match=f"Debian's kernels for {name}") as caught:
            vm.attach_disk(size="1MiB")
        assert "disks=['1GiB']" in caught.value.remedy

    @pytest.mark.parametrize("name", ["aarch64", "s390x", "i686"])
    def test_where_it_has(self, vm, machines, name):
        machines.blueprint.architecture = ARCHITECTURES[name]
        assert vm.attach_disk(size="1MiB").name == "attached0"

    def test_in_the_first_free_port(self, vm, engine):
        disks = [vm.attach_disk(size="1MiB") for _ in range(4)]
        with pytest.raises(ConfigError, match="no free port for another disk") as caught:
            vm.attach_disk(size="1MiB")
        assert "vm.detach()" in caught.value.remedy
        engine.machines.disks = replace(plugged := engine.machines.disks, plugged=())
        cards = [SimpleNamespace(port=port, network="lan") for port in PORTS]
        engine.machines.cards.extend(SimpleNamespace(card=card) for card in cards)
        with pytest.raises(ConfigError, match="a card on lan") as caught:
            vm.attach_disk(size="1MiB")
        assert caught.value.remedy.startswith("use fewer networks")
        engine.machines.cards.clear()
        engine.machines.disks = plugged
        vm.detach(disks[1])
        assert vm.attach_disk(size="1MiB", name="again").name == "again"
        assert [disk.port for disk in engine.machines.disks.plugged] == [
            *("port0", "port2", "port3", "port1")
        ]

    @pytest.mark.parametrize("name", ["", "a" * 21, "a.b", "a b", "-a", "ä", "a/b", "a,b", 5])
    def test_a_bad_name(self, vm, name):
        with pytest.raises(ConfigError, match="cannot be the name of a disk"):
            vm.attach_disk(size="1MiB", name=name)

    @pytest.mark.parametrize("name", ["a", "7", "a_b-C", "x" * 20, "root"])
    def test_a_good_name(self, vm, name):
        assert vm.attach_disk(size="1MiB", name=name).name == name

    def test_a_name_that_is_taken(self, vm):
        vm.attach_disk(size="1MiB", name="attached0")
        assert vm.attach_disk(size="1MiB").name == "attached1"
        for name in ("attached1", "disk0"):
            with pytest.raises(ConfigError, match=f"already has a disk '{name}'"):
                vm.attach_disk(size="1MiB", name=name)

    @pytest.mark.parametrize("size", ["1GB", "-1MiB", "0MiB", 5, ""])
    def test_a_bad_size(self, vm, size):
        with pytest.raises(ConfigError, match="is not a size"):
            vm.attach_disk(size=size)

    def test_nothing(self, vm):
        with pytest.raises(ConfigError, match="needs a size or a file"):
            vm.attach_disk()

    @pytest.mark.parametrize(
        ("content", "told", "remedy"),
        [
            (None, "No such file", "size='1GiB'"),
            (b"", "it is empty", "size='1GiB'"),
            (b"QFI\xfb\0\0\0\3", "its format is qcow2", "convert -f qcow2 -O raw disk"),
            (vmdk.MAGIC + bytes(600), "its format is vmdk", "convert -f vmdk"),
            (vpc.COOKIE + bytes(600), "its format is vpc", "convert -f vpc"),
        ],
    )
    def test_a_file_that_is_no_disk(self, vm, tmp_path, content, told, remedy):
        if content is not None:
            (tmp_path / "disk").write_bytes(content)
        before = descriptors()
        with pytest.raises(ConfigError, match=told) as caught:
            vm.attach_disk(tmp_path / "disk")
        assert remedy in caught.value.remedy
        assert descriptors() == before

    def test_what_is_no_file(self, vm, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        before = descriptors()
        for path in (tmp_path / "fifo", "/dev/null", tmp_path):
            with pytest.raises(ConfigError, match="is not a regular file|Is a directory"):
                vm.attach_disk(path)
        assert descriptors() == before

    def test_a_file_that_is_too_large(self, vm, tmp_path):
        (tmp_path / "file").write_bytes(bytes(2 * MIB))
        with pytest.raises(ConfigError, match="has 2MiB, which is more than size='1MiB'"):
            vm.attach_disk(tmp_path / "file", size="1MiB")

    def test_is_pulled_out_if_the_guest_does_not_find_it(self, vm, engine, tmp_path):
        (tmp_path / "file").write_bytes(b"x")
        before = descriptors()
        engine.finds = False
        with pytest.raises(CommandTimeout, match="did not find the disk 'attached0' within 0 s"):
            vm.attach_disk(tmp_path / "file", timeout=0)
        assert (engine.plugged, engine.machines.disks.plugged) == ([], ())
        assert descriptors() == before

    def test_stays_if_it_cannot_be_pulled_out_either(self, vm, engine):
        """The port is taken, and the next boot finds the disk."""
        engine.finds = engine.lets_go = False
        with pytest.raises(CommandTimeout, match="did not find"):
            vm.attach_disk(size="1MiB", timeout=0)
        (disk,) = engine.machines.disks.plugged
        assert not disk.layers[0].closed
        engine.lets_go = True
        vm.detach("attached0")

    def test_to_a_guest_that_is_lost_meanwhile(self, vm, engine):
        before = descriptors()
        found = engine.run

        def run(*args, **more):
            answer = found(*args, **more)
            engine.loss = GuestLost("the plug was pulled")
            return answer

        engine.run = run
        with pytest.raises(GuestLost, match="plug"):
            vm.attach_disk(size="1MiB")
        assert engine.machines.disks.plugged == ()
        assert descriptors() == before


class TestDetach:
    def test_by_name_and_by_value(self, vm, engine):
        before = descriptors()
        vm.attach_disk(size="1MiB", name="a")
        vm.detach(vm.attach_disk(size="1MiB", name="b"))
        vm.detach("a")
        assert (engine.plugged, engine.machines.disks.plugged) == ([], ())
        assert descriptors() == before

    def test_what_is_not_attached(self, vm):
        with pytest.raises(ConfigError, match="no disk 'a' is attached") as caught:
            vm.detach("a")
        assert "vm.attach_disk()" in caught.value.remedy
        vm.attach_disk(size="1MiB", name="b")
        with pytest.raises(ConfigError, match="no disk 'a' is attached") as caught:
            vm.detach("a")
        assert caught.value.remedy == "these are: b"
        with pytest.raises(TypeError, match="not int"):
            vm.detach(5)

    def test_that_the_guest_does_not_let_go_of(self, vm, engine):
        disk = vm.attach_disk(size="1MiB")
        engine.lets_go = False
        with pytest.raises(CommandTimeout, match="did not let go of the disk 'attached0' within 1"):
            vm.detach(disk, timeout=1)
        assert engine.machines.disks.plugged
        engine.is_on = False
        vm.detach(disk)
        assert engine.machines.disks.plugged == ()


class TestSnapshot:
    def test_keeps_what_was_attached(self, vm, engine, machines, tmp_path):
        (tmp_path / "file").write_bytes(b"x")
        first = vm.attach_disk(tmp_path / "file")
        vm.attach_disk(tmp_path / "file", read_only=True)
        with ExitStack() as stack:
            frozen = machines.disks.frozen(stack)
            machines.disks = frozen.on_top(machines._fresh_overlay)
            writable, fixed = machines.disks.plugged
            assert [file.mode for file in writable.layers] == ["rb", "rb+"]
            assert fixed == frozen.plugged[1]
            assert machines.disks.tops() == [writable.layers[-1]]
            vm.detach(first)
            vm.attach_disk(size="1MiB")
            (own,) = machines.disks.plugged[-1].layers
            saved: Any = SimpleNamespace(
                disks=frozen, state=None, lead=Lead(), console="", blueprint=machines.blueprint
            )
            machines.roll_back(saved)
            assert own.closed
            assert [disk.name for disk in machines.disks.plugged] == ["attached0", "attached1"]
            for disk in machines.disks.plugged:
                assert not any(file.closed for file in (disk.base, *disk.layers))


class TestPreparation:
    def test_may_not_leave_any(self, vm, engine):
        refuse_left(engine)
        disk = vm.attach_disk(size="1MiB")
        with pytest.raises(ConfigError, match="has left disks attached: attached0") as caught:
            refuse_left(engine)
        assert "disks=['1GiB']" in caught.value.remedy
        vm.detach(disk)
        refuse_left(engine)


def test_how_a_disk_is_found(tmp_path):
    """The program that runs in a guest, with other folders than the guest's."""
    for name, serial in {"vda": "root", "vdb": "da", "vdc": "data", "loop0": ""}.items():
        (tmp_path / "block" / name).mkdir(parents=True)
        (tmp_path / "block" / name / "serial").write_text(serial)
    program = plugging.FIND_DISK.replace("/sys/block", f"{tmp_path}/block").replace("-b ", "-n ")
    argv = ["/bin/sh", "-c", program.replace("udevadm", "no-such-program"), "sh"]

    def find(serial):
        return subprocess.run([*argv, serial], capture_output=True, text=True, check=True).stdout

    assert find("data") == "/dev/vdc\n"
    assert find("da") == "/dev/vdb\n"
    assert find("d") == ""


def test_sizes_of_disks_are_whole_sectors(vm):
    assert vm.attach_disk(size="1.3KiB").size == 1536
    assert vm.attach_disk(size="1GiB").size == GIB
