"""Chooses the accelerator. KVM is chosen only after it has run a kernel here.

``/dev/kvm`` may exist, open and create a virtual machine, and still run no guest. So `auto` takes KVM
only after the image's own kernel has started its first program with it. The verdict is cached for this
boot of the host, this build of QEMU and this kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.architecture import Architecture, debian_name, native_architecture
from pytest_vmsandbox.core.deadline import monotonic
from pytest_vmsandbox.core.errors import LaunchError, VMSandboxError
from pytest_vmsandbox.core.spec import MIB, Hardware
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.cmdline import MachineSpec, processor_models
from pytest_vmsandbox.machine.disk import NO_DISKS, Disks, image_file
from pytest_vmsandbox.machine.firmware import Uefi
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.process import LauncherError
from pytest_vmsandbox.machine.progress import wait_for_guest_time, wait_for_user_space
from pytest_vmsandbox.machine.qemu import Qemu

STANDSTILL_SECONDS = 3.0  # without progress; a native kernel needs about 1 s in all
_MENU_SECONDS = 20.0  # likewise; a boot loader may wait that long for keys
PROOF_SECONDS = 180.0  # in all, even with progress; KVM in an emulated host needs about 20
EMULATION_SCALE = 10.0
_FORMAT = "3"  # of the cached verdict; raise it when that changes
_PROOF_MEMORY = 512 * MIB
_REMEDY = "use --vm-accel=auto (pytest) or --accel=auto (vmsandbox) to detect what works here"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """An accelerator that runs guests here.

    Attributes:
        accelerator: ``kvm`` or ``tcg`` (emulation).
        processor: QEMU's CPU model that works with it.
        reason: why it was chosen, for people.
        seconds: how long the proof took, now or earlier; 0 without a proof.
        slowness: how much slower emulated guests of this architecture are than those of x86.
    """

    accelerator: str
    processor: str
    reason: str
    seconds: float = 0.0
    slowness: float = 1.0

    @property
    def time_scale(self) -> float:
        """The factor for timeouts, compared to real hardware."""
        return EMULATION_SCALE * self.slowness if self.accelerator == "tcg" else 1.0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is booted for a proof: a kernel, or a disk by firmware.

    Attributes:
        architecture: of the guest.
        kernel, initrd, append: what QEMU boots directly. Without a kernel, firmware boots.
        disk_id: stands for the content of the disk, if firmware boots.
        memory: bytes.
        uefi: the firmware; without it and without a kernel it is BIOS.
        disks: opens the disks.
    """

    architecture: Architecture
    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    disk_id: str = ""
    memory: int = _PROOF_MEMORY
    uefi: Uefi | None = None
    disks: Callable[[], AbstractContextManager[Disks]] = field(
        default=lambda: nullcontext(NO_DISKS)
    )

    def machine(self, qemu: Qemu, processor: str) -> MachineSpec:
        """The machine that boots it with KVM."""
        return MachineSpec(
            name="vmsandbox-proof",
            qemu=str(qemu.path),
            version=qemu.version,
            architecture=self.architecture,
            accelerator="kvm",
            processor=processor,
            hardware=Hardware(memory=self.memory),
            append=self.append,
            kernel=self.kernel,
            initrd=self.initrd,
            uefi=self.uefi,
        )


def choose(
    wanted: str,
    qemu: Qemu,
    trial: Trial,
    *,
    cache: Path,
    hypervisor: Callable[[], Hypervisor],
    say: Callable[[str], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """The accelerator for guests like this one.

    Args:
        wanted: ``auto``, or the accelerator to take without a proof.
        cache: the user's cache folder, which keeps verdicts.
        hypervisor: called when a proof is needed.
        say: gets a line when a proof begins. It takes seconds, and at most three minutes for each CPU
            model.
        tell: gets a line if the cached verdict was damaged and is made again.

    Raises:
        ImageError: what would be booted cannot be read.
        LaunchError: this user cannot use the wanted accelerator on this machine, or a proof is not
            possible now.
        ConfigError: the cache folder cannot be used.
    """
    its = trial.architecture
    _require(wanted, its)
    folder = cache / "accelerator"
    if wanted != "auto":
        asked = _unproven(wanted, qemu, its, "as asked for")
        known = recall(folder / f"{_key(wanted, qemu, trial)}.json") if wanted != "tcg" else None
        return replace(asked, seconds=known.seconds) if known else asked  # timeouts fit this host
    if is_foreign(its):
        return _unproven("tcg", qemu, its, f"guests of {its.debian}")
    if problem := host.kvm_problem():
        return _unproven("tcg", qemu, its, problem)
    with ExitStack() as stack:
        with paths.usable(cache, paths.CACHE):
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            # Of several processes, only one makes the proof.
            stack.enter_context(locked(folder / ".lock", on_busy=lambda: None))
        path = folder / f"{_key('kvm', qemu, trial)}.json"
        if verdict := recall(path):
            return verdict
        if path.exists():
            tell("the cached verdict on kvm was damaged, so kvm is tried again")
        say("checking whether kvm runs guests here (once after each boot of this machine)")
        verdict = _prove(qemu, trial, hypervisor())
        with paths.usable(cache, paths.CACHE):
            part = folder / ".part"  # under the lock; the next proof overwrites what a kill leaves
            integrity.write_record(part, asdict(verdict))
            part.replace(path)
        return verdict


def is_foreign(architecture: Architecture) -> bool:
    """Whether this machine's processor cannot run such guests, so they are always emulated."""
    return native_architecture() not in architecture.kvm_on


def _require(wanted: str, architecture: Architecture) -> None:
    """Check that an accelerator that somebody wants can be used for such guests."""
    problem = ""
    if wanted == "hvf":
        problem = ": guests run on Linux only"
    elif wanted == "kvm" and is_foreign(architecture):
        problem = f" for guests of {architecture.debian}: this machine is {debian_name(native_architecture())}"
    elif wanted == "kvm" and (why := host.kvm_problem()):
        problem = f": {why}"
    if problem:
        raise LaunchError(f"the accelerator {wanted} cannot be used{problem}", remedy=_REMEDY)


def recall(path: Path) -> Verdict | None:
    """The cached verdict; None if it is missing or cannot be read."""
    try:
        return Verdict(**integrity.read_record(path))
    except (OSError, ValueError, TypeError):
        return None


def _unproven(accelerator: str, qemu: Qemu, architecture: Architecture, reason: str) -> Verdict:
    model = processor_models(architecture, accelerator, qemu.version)[0]
    return Verdict(
        accelerator=accelerator, processor=model, reason=reason, slowness=architecture.slowness
    )


def _prove(qemu: Qemu, trial: Trial, hypervisor: Hypervisor) -> Verdict:
    """The verdict on whether KVM runs this. Other problems are raised.

    Raises:
        LaunchError: there is no room for a guest now, or the launcher failed.
    """
    host.require_memory(trial.memory)
    ran: list[str] = []
    refused: list[str] = []
    for model in processor_models(trial.architecture, "kvm", qemu.version):
        spec = trial.machine(qemu, model)
        start = monotonic()
        try:
            with trial.disks() as disks, Machine.running(hypervisor, spec, disks=disks) as machine:
                if trial.kernel is not None:
                    wait_for_user_space(
                        machine, standstill=STANDSTILL_SECONDS, at_most=PROOF_SECONDS
                    )
                else:
                    wait_for_guest_time(
                        machine,
                        first=STANDSTILL_SECONDS,
                        standstill=_MENU_SECONDS,
                        at_most=PROOF_SECONDS,
                    )
        except LauncherError:
            raise
        except VMSandboxError as error:
            hypervisor.launcher.check()  # if the launcher is gone, that is the cause
            (refused if isinstance(error, LaunchError) else ran).append(error.brief)
        else:
            what = (
                "a kernel ran its first program"
                if trial.kernel is not None
                else "a system began to boot"
            )
            # How long firmware takes tells nothing about how fast this host is.
            seconds = monotonic() - start if trial.kernel is not None else 0.0
            return Verdict(
                accelerator="kvm", processor=model, reason=f"proven: {what}", seconds=seconds
            )
    reason = f"kvm is here but does not run guests: {(ran or refused)[-1]}"
    return _unproven("tcg", qemu, trial.architecture, reason)


def _key(accelerator: str, qemu: Qemu, trial: Trial) -> str:
    content = trial.disk_id
    if trial.kernel is not None:
        with image_file(trial.kernel) as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    parts = (_FORMAT, accelerator, _host_boot(), qemu.build, content)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _host_boot() -> str:
    """An id that changes with each boot of this host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
