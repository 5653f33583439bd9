"""Which accelerator runs guests here: proven by running a kernel, not assumed.

``/dev/kvm`` can exist, open and create a virtual machine, and still not run a guest. So `auto`
takes an accelerator only after the image's own kernel has started its first program with it. The
verdict is remembered for this boot of the host, this build of QEMU and this kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.deadline import monotonic
from pytest_vmsandbox.core.errors import LaunchError, VMSandboxError
from pytest_vmsandbox.core.spec import MIB, Hardware
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.cmdline import MachineSpec, processor_models
from pytest_vmsandbox.machine.disk import image_file
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.process import LauncherError
from pytest_vmsandbox.machine.progress import wait_for_user_space
from pytest_vmsandbox.machine.qemu import Qemu

STANDSTILL_SECONDS = 3.0  # without progress; a kernel that runs natively needs about one for all
PROOF_SECONDS = 180.0  # however much progress there is; KVM in an emulated host needs about 20
EMULATION_SCALE = 10.0
_FORMAT = "3"  # of what is kept; raise it when that changes
_PROOF_MEMORY = 512 * MIB
_REMEDY = "use the best one that works here: --vm-accel=auto (pytest), --accel=auto (vmsandbox)"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """An accelerator that runs guests here.

    Attributes:
        accelerator: ``kvm`` or ``tcg`` (emulation).
        processor: the processor model that runs with it.
        reason: why it is that one, for people.
        seconds: what the guest that proved it took, now or formerly; 0 where none did.
    """

    accelerator: str
    processor: str
    reason: str
    seconds: float = 0.0

    @property
    def time_scale(self) -> float:
        """By how much time-outs have to be longer than on real hardware."""
        return EMULATION_SCALE if self.accelerator == "tcg" else 1.0


def choose(
    wanted: str,
    qemu: Qemu,
    *,
    kernel: Path,
    initrd: Path,
    append: str,
    cache: Path,
    hypervisor: Callable[[], Hypervisor],
    say: Callable[[str], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """The accelerator for guests with this kernel.

    Args:
        wanted: ``auto``, or the one to take unproven.
        append: the kernel's command line.
        cache: the user's cache folder; verdicts are kept there.
        hypervisor: called when there is something to prove.
        say: told when a proof begins. It takes seconds, and at most three minutes for each model.
        tell: told that the verdict was damaged, which is made anew then.

    Raises:
        ImageError: the kernel cannot be read.
        LaunchError: the wanted one cannot be used by this user on this machine, or nothing can be
            proven now.
        ConfigError: the cache folder cannot be used.
    """
    if wanted == "kvm" and (problem := host.kvm_problem()):
        raise LaunchError(f"KVM was asked for: {problem}", remedy=_REMEDY)
    if wanted == "hvf":
        raise LaunchError("HVF was asked for: guests run on Linux only", remedy=_REMEDY)
    folder = cache / "accelerator"
    if wanted != "auto":
        asked = _unproven(wanted, qemu, "as asked for")
        known = recall(folder / f"{_key(wanted, qemu, kernel)}.json") if wanted != "tcg" else None
        return replace(asked, seconds=known.seconds) if known else asked  # limits suit this host
    if problem := host.kvm_problem():
        return _unproven("tcg", qemu, problem)
    with ExitStack() as stack:
        with paths.usable(cache, paths.CACHE):
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            # Several processes prove once.
            stack.enter_context(locked(folder / ".lock", on_busy=lambda: None))
        path = folder / f"{_key('kvm', qemu, kernel)}.json"
        if verdict := recall(path):
            return verdict
        if path.exists():
            tell("the verdict on kvm was damaged; it is made anew")
        say("trying whether kvm runs guests here; this is done once, and takes seconds")
        verdict = _prove(qemu, kernel, initrd, append, hypervisor())
        with paths.usable(cache, paths.CACHE):
            part = folder / ".part"  # one name, under the lock: what a kill leaves is overwritten
            integrity.write_record(part, asdict(verdict))
            part.replace(path)
        return verdict


def recall(path: Path) -> Verdict | None:
    """A remembered verdict; None where there is none that can be read."""
    try:
        return Verdict(**integrity.read_record(path))
    except (OSError, ValueError, TypeError):
        return None


def _unproven(accelerator: str, qemu: Qemu, reason: str) -> Verdict:
    model = processor_models(accelerator, qemu.version)[0]
    return Verdict(accelerator=accelerator, processor=model, reason=reason)


def _prove(qemu: Qemu, kernel: Path, initrd: Path, append: str, hypervisor: Hypervisor) -> Verdict:
    """Whether KVM runs this kernel; what is no fault of KVM is raised.

    Raises:
        LaunchError: there is no room for a guest now, or the launcher failed.
    """
    host.require_memory(_PROOF_MEMORY)
    ran: list[str] = []
    refused: list[str] = []
    for model in processor_models("kvm", qemu.version):
        spec = MachineSpec(
            name="vmsandbox-proof",
            qemu=str(qemu.path),
            version=qemu.version,
            accelerator="kvm",
            processor=model,
            hardware=Hardware(memory=_PROOF_MEMORY),
            append=append,
            kernel=kernel,
            initrd=initrd,
        )
        start = monotonic()
        try:
            with Machine.running(hypervisor, spec) as machine:
                wait_for_user_space(machine, standstill=STANDSTILL_SECONDS, at_most=PROOF_SECONDS)
        except LauncherError:
            raise
        except VMSandboxError as error:
            hypervisor.launcher.check()  # QEMU dies with it
            (refused if isinstance(error, LaunchError) else ran).append(error.brief)
        else:
            return Verdict(
                accelerator="kvm",
                processor=model,
                reason="proven: a kernel ran its first program",
                seconds=monotonic() - start,
            )
    reason = f"kvm is here but does not run guests: {(ran or refused)[-1]}"
    return _unproven("tcg", qemu, reason)


def _key(accelerator: str, qemu: Qemu, kernel: Path) -> str:
    with image_file(kernel) as file:
        kernel_digest = hashlib.file_digest(file, "sha256").hexdigest()
    parts = (_FORMAT, accelerator, _host_boot(), qemu.build, kernel_digest)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _host_boot() -> str:
    """What differs after each boot of this host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
