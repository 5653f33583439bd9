"""Machines for the contract tests: of a fake QEMU, an old and a new one, and of the real one.

The real one's guests are firmware only.
"""

import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.spec import MIB, Hardware
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.cmdline import MachineSpec, Start, processor_models
from pytest_vmsandbox.machine.disk import NO_DISKS, Disks
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.qemu import Qemu, find_qemu

FAKE = Path(__file__).with_name("fake_qemu.py")
X86_64 = ARCHITECTURES["x86_64"]
OLD, NEW = "7.2.22", "11.1.3"


@dataclass
class Stand:
    """Where machines of one QEMU are started.

    Attributes:
        kind: fake or real.
        logs: the folder for the machines' logs.
    """

    kind: str
    qemu: Qemu
    hypervisor: Hypervisor
    logs: Path

    @contextmanager
    def machine(
        self,
        *,
        fault=None,
        accelerator="tcg",
        disks=None,
        memory=64,
        name="it",
        kernel=None,
        start=Start.POWER_ON,
        ram=None,
        state=None,
        architecture=X86_64,
    ):
        spec = MachineSpec(
            name=name,
            qemu=str(self.qemu.path),
            version=self.qemu.version,
            architecture=architecture,
            accelerator=accelerator,
            processor=processor_models(architecture, accelerator, self.qemu.version)[0],
            hardware=Hardware(memory=memory * MIB, disks=(MIB,) * (disks is not None)),
            start=start,
            kernel=kernel,
            more_args=("-fake", fault) if fault else (),
        )
        with Machine.running(
            replace(
                self.hypervisor, pace=host.Pace()
            ),  # what faults are slow at is no fault of the host
            spec,
            disks=disks or NO_DISKS,
            logs=self.logs,
            memory=ram,
            state=state,
        ) as machine:
            yield machine


@pytest.fixture(scope="module")
def hypervisor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hypervisor")
    with Hypervisor.running(runtime=folder / "runtime", cache=folder / "cache") as hypervisor:
        yield hypervisor


@pytest.fixture(scope="module")
def fake_qemu(tmp_path_factory):
    """Makes a fake QEMU that plays a version."""
    folder = tmp_path_factory.mktemp("fake")

    def make(release):
        program = folder / f"qemu-system-fake-{release}"
        program.write_text(f"#!{sys.executable} -IS\n{FAKE.read_text()}")
        program.chmod(0o755)
        version = tuple(map(int, release.split(".")))
        return Qemu(path=program, version=version, build=f"fake {release}")

    return make


@pytest.fixture
def fake_of(fake_qemu, hypervisor, tmp_path, monkeypatch):
    """Fakes run as us: another user may not be allowed to execute our Python."""
    monkeypatch.setattr(host, "guest_identity", lambda accelerator: None)
    return lambda release: Stand("fake", fake_qemu(release), hypervisor, tmp_path)


@pytest.fixture
def fake(fake_of):
    return fake_of(OLD)


@pytest.fixture
def real(hypervisor, tmp_path):
    if not shutil.which("qemu-system-x86_64") and not os.environ.get("CI"):
        pytest.skip("there is no qemu-system-x86_64 here, and this is not CI")
    return Stand("real", find_qemu(X86_64.name), hypervisor, tmp_path)


@pytest.fixture(params=[f"fake {OLD}", f"fake {NEW}", "real"])
def stand(request):
    kind, _, release = request.param.partition(" ")
    if kind == "real":
        return request.getfixturevalue("real")
    return request.getfixturevalue("fake_of")(release)


@pytest.fixture
def machine(stand):
    with stand.machine() as machine:
        yield machine


@pytest.fixture
def state(tmp_path):
    """A file for the state of a guest."""
    with (tmp_path / "state").open("x+b", buffering=0) as file:
        yield file


@pytest.fixture
def disks(tmp_path):
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    with Disks.open(
        base=tmp_path / "base.raw", root_size=2 * MIB, blank=[MIB], folder=tmp_path
    ) as disks:
        yield disks
