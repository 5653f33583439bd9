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
class Blueprint:
    """What interchangeable guests have in common.

    Attributes:
        built: their image.
        qemu: the program that runs them.
        verdict: the accelerator and the CPU model.
        hardware: of the guests.
        qemu_args: returns further arguments for QEMU.
        pace: what we know about this host's speed.
    """

    built: BuiltImage
    qemu: Qemu
    verdict: Verdict
    hardware: Hardware
    qemu_args: Callable[[MachineSpec], Sequence[str]]
    pace: host.Pace = field(default_factory=host.Pace, compare=False)

    @property
    def image(self) -> str:
        """The name of the image."""
        return self.built.definition.name

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
        return replace(spec, more_args=tuple(self.qemu_args(spec)))

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
        count = len(self.hardware.disks) + (self.built.disk is not None)
        spec = self.with_network("isolated").machine(self.image, "- -", Start.CLONED)
        fds = Descriptors(
            kernel=0,
            initrd=0,
            memory=0,
            base=None if self.built.disk is None else 0,
            overlays=((0,),) * count,
        )
        parts = {
            "format": FORMAT,
            "image": self.built.digest,
            "built": self.built.build_id,
            "argv": cmdline.argv(spec, fds),
            "disks": [self.hardware.disk, *self.hardware.disks],
            "qemu": self.qemu.build,
            "processor": "" if self.verdict.accelerator == "tcg" else host.processor(),
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
