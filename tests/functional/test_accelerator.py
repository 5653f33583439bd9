"""The accelerator is proven, not assumed."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.spec import MIB, Hardware
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.cmdline import MachineSpec, processor_models
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.qemu import find_qemu

X86_64 = ARCHITECTURES["x86_64"]


@pytest.fixture
def firmware(vm_factory):
    """Starts a guest that is only firmware, with an accelerator."""
    with ExitStack() as stack:

        def start(accelerator: str) -> Machine:
            qemu = find_qemu(X86_64.name)
            hypervisor = vm_factory.backend.hypervisor
            spec = MachineSpec(
                name="firmware",
                qemu=str(qemu.path),
                version=qemu.version,
                architecture=X86_64,
                accelerator=accelerator,
                processor=processor_models(X86_64, accelerator, qemu.version)[-1],
                hardware=Hardware(memory=128 * MIB),
            )
            return stack.enter_context(Machine.running(hypervisor, spec))

        yield start


@pytest.mark.origins("booted")
def test_the_verdict_is_remembered(vm_factory):
    verdict = vm_factory.backend.accelerator("tiny")
    vm_factory.backend._verdicts.clear()
    assert vm_factory.backend.accelerator("tiny") == verdict


@pytest.mark.origins("cloned")
def test_auto_is_right(vm_factory):
    """Where KVM runs kernels `auto` takes it; where it only looks as if, it does not."""
    verdict = vm_factory.backend.accelerator("tiny")
    if host.kvm_problem():
        assert verdict.accelerator == "tcg"
    with vm_factory.boot("tiny") as vm:
        assert vm.qmp("query-kvm")["enabled"] is (verdict.accelerator == "kvm")


@pytest.mark.skipif(bool(host.kvm_problem()), reason=f"KVM cannot be tried: {host.kvm_problem()}")
def test_firmware_runs_under_kvm(firmware):
    """It does even where no kernel runs: firmware alone is no proof."""
    machine = firmware("kvm")
    machine.console.wait_for("SeaBIOS", timeout=30)
    assert machine.monitor.execute("query-kvm")["enabled"] is True
    assert machine.monitor.execute("query-status")["status"] == "running"
    machine.check()


def test_firmware_runs_emulated(firmware):
    firmware("tcg").console.wait_for("SeaBIOS", timeout=60)
