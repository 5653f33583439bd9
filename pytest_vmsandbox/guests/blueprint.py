"""What a guest is made of, and a digest of everything that its saved state depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pytest_vmsandbox.catalogue.store import BuiltImage
from pytest_vmsandbox.core.spec import Hardware, Network
from pytest_vmsandbox.machine import cmdline, host
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.cmdline import Descriptors, MachineSpec, Start
from pytest_vmsandbox.machine.disk import Disks
from pytest_vmsandbox.machine.qemu import Qemu

FORMAT = 4  # of templates; raise it when we change what we do to a guest before we save it


@dataclass(frozen=True, kw_only=True)
class OwnKernel:
    """What guests of an image boot instead of the image's kernel.

    Attributes:
        release: what ``uname -r`` shows.
        digest: identifies the kernel's content, with that of its modules.
        image: the kernel.
        initrd: the image's initial RAM file system, and behind it the modules to load first.
        modules: a file system with all modules; None without any.
    """

    release: str
    digest: str
    image: Path
    initrd: Path
    modules: Path | None


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What interchangeable guests have in common.

    Attributes:
        built: their image.
        qemu: the program that runs them.
        verdict: the accelerator and the CPU model.
        hardware: of the guests.
        qemu_args: returns further arguments for QEMU.
        kernel: what boots instead of the image's kernel; None for that.
        pace: what we know about this host's speed.
    """

    built: BuiltImage
    qemu: Qemu
    verdict: Verdict
    hardware: Hardware
    qemu_args: Callable[[MachineSpec], Sequence[str]]
    kernel: OwnKernel | None = None
    pace: host.Pace = field(default_factory=host.Pace, compare=False)

    @property
    def image(self) -> str:
        """The name of the image."""
        return self.built.definition.name

    @property
    def has_way_in(self) -> bool:
        """Whether somebody can log in. If not, the guest is driven by its console."""
        return self.built.definition.login.method != "none"

    def stretch(self, seconds: float) -> float:
        """A timeout for something in a guest, in seconds, on this host and accelerator.

        Args:
            seconds: the timeout on a usual host with KVM.
        """
        return self.pace.stretch(seconds, self.verdict.time_scale)

    def machine(self, name: str, public_key: str, start: Start = Start.POWER_ON) -> MachineSpec:
        """The machine of one guest.

        Args:
            public_key: opens the guest; as in ``authorized_keys``.
        """
        key = public_key.split()[1]
        spec = MachineSpec(
            name=name,
            qemu=str(self.qemu.path),
            version=self.qemu.version,
            accelerator=self.verdict.accelerator,
            processor=self.verdict.processor,
            hardware=self.hardware,
            append=f"{self.built.definition.append} vmsandbox.key={key} vmsandbox.name={name}",
            start=start,
            kernel=self.built.kernel,
            initrd=self.built.initrd,
        )
        if self.kernel is not None:
            spec = self._on_own_kernel(spec, self.kernel)
        return replace(spec, more_args=tuple(self.qemu_args(spec)))

    def _on_own_kernel(self, spec: MachineSpec, kernel: OwnKernel) -> MachineSpec:
        """The machine with another kernel than the image's."""
        append = spec.append
        if kernel.modules is not None:  # the last of the disks
            append += f" vmsandbox.modules=/dev/vd{'abcdefghijkl'[self._count_of_disks]}"
        return replace(
            spec,
            append=append,
            kernel=kernel.image,
            initrd=kernel.initrd,
            modules=kernel.modules,
        )

    @property
    def _count_of_disks(self) -> int:
        """The root disk, if there is one, and the blank disks."""
        return len(self.hardware.disks) + (self.built.disk is not None)

    def disks(
        self, folder: Path, frozen: Sequence[Sequence[Path]] = ()
    ) -> AbstractContextManager[Disks]:
        """Fresh disks for one guest, removed at the end. `frozen` has what was written before."""
        return Disks.open(
            base=self.built.disk,
            root_size=self.hardware.disk,
            blank=self.hardware.disks,
            folder=folder,
            frozen=frozen,
        )

    def with_network(self, network: Network) -> Blueprint:
        """The same blueprint with another network."""
        return replace(self, hardware=replace(self.hardware, network=network))

    def with_user(self, user: str) -> Blueprint:
        """The same blueprint for another user."""
        return replace(self, hardware=replace(self.hardware, user=user))

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of everything that a saved state depends on: image, machine, QEMU and CPU.

        The network is no part of it, because only this side knows whether it is isolated.
        """
        spec = self.with_network("isolated").machine(self.image, "- -", Start.CLONED)
        fds = Descriptors(
            kernel=0,
            initrd=0,
            memory=0,
            base=None if self.built.disk is None else 0,
            modules=None if spec.modules is None else 0,
            overlays=((0,),) * self._count_of_disks,
        )
        parts = {
            "format": FORMAT,
            "image": self.built.digest,
            "built": self.built.build_id,
            "kernel": None if self.kernel is None else self.kernel.digest,
            "argv": cmdline.argv(spec, fds),
            "disks": [self.hardware.disk, *self.hardware.disks],
            "qemu": self.qemu.build,
            "processor": "" if self.verdict.accelerator == "tcg" else host.processor(),
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
