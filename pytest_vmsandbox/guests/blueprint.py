"""What a guest is made of, and a digest of everything that its saved state depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.store import BuiltImage, damaged
from pytest_vmsandbox.core.architecture import ARCHITECTURES, Architecture, debian_name
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Firmware, Hardware, Network, format_size
from pytest_vmsandbox.machine import cmdline, firmware, host
from pytest_vmsandbox.machine.accelerator import Trial, Verdict
from pytest_vmsandbox.machine.cmdline import Descriptors, MachineSpec, Start
from pytest_vmsandbox.machine.disk import Disks
from pytest_vmsandbox.machine.firmware import Uefi
from pytest_vmsandbox.machine.qemu import Qemu

FORMAT = 5  # of templates; raise it when we change what we do to a guest before we save it, or keep of it


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
        uefi: the firmware that boots them, or None without UEFI.
        pace: what we know about this host's speed.
    """

    built: BuiltImage
    qemu: Qemu
    verdict: Verdict
    hardware: Hardware
    qemu_args: Callable[[MachineSpec], Sequence[str]]
    kernel: OwnKernel | None = None
    uefi: Uefi | None = None
    pace: host.Pace = field(default_factory=host.Pace, compare=False)

    @property
    def image(self) -> str:
        """The name of the image."""
        return self.built.definition.name

    @property
    def has_way_in(self) -> bool:
        """Whether somebody can log in. If not, the guest is driven by its console."""
        return self.built.definition.login.method != "none"

    @property
    def boots_directly(self) -> bool:
        """Whether QEMU boots the kernel itself, so its command line can tell the guest something."""
        return firmware_of(self.built.definition, self.hardware) == "kernel"

    def stretch(self, seconds: float) -> float:
        """A timeout for something in a guest, in seconds, on this host and accelerator.

        Args:
            seconds: the timeout on a usual host with KVM.
        """
        return self.pace.stretch(seconds, self.verdict.time_scale)

    @property
    def unsaved(self) -> str:
        """What QEMU does not save of such a guest, so its state must not be loaded; empty if nothing."""
        since = self.architecture.timers_since
        if self.verdict.accelerator != "tcg" or self.qemu.version >= since:
            return ""
        return (
            f"QEMU {self.qemu.release} does not save the timers of {self.architecture.name}. "
            f"QEMU {'.'.join(map(str, since))} does"
        )

    @property
    def architecture(self) -> Architecture:
        """The architecture of the guest."""
        return ARCHITECTURES[self.built.definition.architecture]

    def machine(
        self, name: str, public_key: str, start: Start = Start.POWER_ON, *, hostname: str = ""
    ) -> MachineSpec:
        """The machine of one guest.

        Args:
            public_key: opens the guest; as in ``authorized_keys``.
            hostname: what the guest is called inside; empty for its name.
        """
        direct, key = self.boots_directly, public_key.split()[1]
        called = f"vmsandbox.name={hostname or name}"
        append = f"{self.built.definition.append} vmsandbox.key={key} {called}"
        spec = MachineSpec(
            name=name,
            qemu=str(self.qemu.path),
            version=self.qemu.version,
            architecture=self.architecture,
            accelerator=self.verdict.accelerator,
            processor=self.verdict.processor,
            hardware=self.hardware,
            append=append if direct else "",
            start=start,
            kernel=self.built.kernel if direct else None,
            initrd=self.built.initrd if direct else None,
            uefi=self.uefi,
            tpm=has_tpm(self.built.definition, self.hardware),
            hostname=hostname,
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
            uefi=self.uefi,
            recorded=self.hardware.recorded,
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
        parts: dict[str, object] = {
            "format": FORMAT,
            "image": self.built.digest,
            "built": self.built.build_id,
            "kernel": None if self.kernel is None else self.kernel.digest,
            "argv": self.command_line(Start.CLONED),
            "disks": [self.hardware.disk, *self.hardware.disks],
            "qemu": self.qemu.build,
            "processor": "" if self.verdict.accelerator == "tcg" else host.processor(),
        }
        if self.uefi is not None:
            parts["uefi"] = self.uefi.digest
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def command_line(self, start: Start) -> list[str]:
        """QEMU's command line for any guest of this blueprint, without names, keys and descriptors."""
        spec = self.with_network("isolated").machine(self.image, "- -", start)
        fds = Descriptors(
            kernel=None if spec.kernel is None else 0,
            initrd=None if spec.initrd is None else 0,
            code=None if spec.uefi is None else 0,
            variables=None if spec.uefi is None else 0,
            tpm=0 if spec.tpm else None,
            memory=0 if start is Start.CLONED else None,
            base=None if self.built.disk is None else 0,
            modules=None if spec.modules is None else 0,
            request=0 if self.hardware.recorded else None,
            overlays=((0,),) * self._count_of_disks,
        )
        return cmdline.argv(spec, fds)


def firmware_of(definition: ImageDefinition, hardware: Hardware) -> Firmware:
    """What boots a guest: what its hardware says, or else its image."""
    return hardware.firmware or definition.firmware


def has_tpm(definition: ImageDefinition, hardware: Hardware) -> bool:
    """Whether a guest has a TPM: what its hardware says, or else its image.

    Raises:
        ConfigError: its board can have none.
    """
    wanted = definition.tpm if hardware.tpm is None else hardware.tpm
    if wanted and not ARCHITECTURES[definition.architecture].tpm:
        raise ConfigError(
            f"tpm=True cannot be used with {definition.name}: guests of {debian_name(definition.architecture)} have no TPM",
            remedy="leave tpm= out, or use an image of another architecture",
        )
    return wanted


def check_board(definition: ImageDefinition, hardware: Hardware) -> None:
    """Check that the board for an image takes this hardware.

    Raises:
        ConfigError: it does not.
    """
    its, name = ARCHITECTURES[definition.architecture], definition.name
    if its.most_cpus is not None and hardware.cpus > its.most_cpus:
        raise ConfigError(
            f"cpus={hardware.cpus} cannot be used with {name}: guests of {its.debian} have at most {its.most_cpus}",
            remedy=f"use cpus={its.most_cpus} or fewer",
        )
    if its.most_memory is not None and hardware.memory > its.most_memory:
        most = format_size(its.most_memory)
        raise ConfigError(
            f"memory={format_size(hardware.memory)!r} cannot be used with {name}: guests of {its.debian} have at "
            f"most {most}",
            remedy=f"use memory={most!r} or less",
        )
    if hardware.memory % its.memory_step:
        step = its.memory_step
        more = format_size(-(-hardware.memory // step) * step)
        raise ConfigError(
            f"memory={format_size(hardware.memory)!r} cannot be used with {name}: guests of {its.debian} take "
            f"multiples of {format_size(step)}",
            remedy=f"use memory={more!r}",
        )


def find_firmware(built: BuiltImage, hardware: Hardware) -> Uefi | None:
    """The UEFI firmware of a guest; None if something else boots it.

    Raises:
        ConfigError: the image cannot boot in this way.
        LaunchError: this machine has no such firmware.
    """
    wanted, name = firmware_of(built.definition, hardware), built.definition.name
    if wanted == "kernel":
        if built.kernel is None:
            raise ConfigError(
                f"firmware='kernel' cannot be used with {name}: the image has no kernel outside of its disk",
                remedy=f"leave firmware= out, or use firmware={built.definition.firmware!r}",
            )
        return None
    if built.disk is None:
        raise ConfigError(
            f"firmware={wanted!r} cannot be used with {name}: this image has no disk to boot from",
            remedy="leave firmware= out, or use an image whose disk has a boot loader",
        )
    its = ARCHITECTURES[built.definition.architecture]
    if wanted == "bios" and not its.has_bios:
        raise ConfigError(
            f"firmware='bios' cannot be used with {name}: guests of {its.debian} have no BIOS",
            remedy=f"use firmware={'uefi' if its.uefi_board else 'kernel'!r}",
        )
    try:
        found = firmware.boot_loaders(built.disk)
    except OSError as error:
        raise damaged(built.definition, f"{built.disk} cannot be read: {error.strerror}") from error
    if wanted not in found:
        lacks = "EFI system partition" if wanted == "uefi" else "boot loader in its first sector"
        other = "firmware='kernel'"
        if found:
            other = f"firmware={min(found)!r}"
        elif built.kernel is None:
            other = (
                "a kernel that is not on its disk ('vmsandbox images import' with --kernel and --initrd; "
                "[source] in image.toml)"
            )
        raise ConfigError(
            f"firmware={wanted!r} cannot be used with {name}: its disk has no {lacks}",
            remedy=f"use {other}, or an image whose disk boots by {wanted.upper()}",
        )
    if wanted == "bios":
        return None
    return firmware.find_uefi(
        built.definition.architecture, secure_boot=built.definition.secure_boot
    )


def trial(built: BuiltImage, cache: Path) -> Trial:
    """What proves that an accelerator runs guests of this image.

    Args:
        cache: a folder with room for what the guest writes.

    Raises:
        ConfigError: the image cannot boot.
        LaunchError: this machine lacks the firmware for it.
    """
    architecture = ARCHITECTURES[built.definition.architecture]
    if built.kernel is not None:
        return Trial(
            architecture=architecture,
            kernel=built.kernel,
            initrd=built.initrd,
            append=built.definition.append,
        )
    hardware = Hardware(memory=max(Trial.memory, built.definition.memory_min))
    uefi = find_firmware(built, hardware)
    return Trial(
        architecture=architecture,
        disk_id=built.digest,
        memory=hardware.memory,
        uefi=uefi,
        disks=lambda: Disks.open(
            base=built.disk, root_size=None, blank=(), folder=cache, uefi=uefi
        ),
    )
