"""Guests on demand: what `vm_factory` is."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageStore
from pytest_vmsandbox.core.errors import ConfigError, ImageError, LaunchError, VMSandboxError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import Hardware, format_size
from pytest_vmsandbox.guests import ssh
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.machine import accelerator
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.cmdline import MachineSpec
from pytest_vmsandbox.machine.disk import Disks
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.qemu import Qemu, find_qemu

KEY, KNOWN_HOSTS = "key", "known_hosts"  # in the run's folder, for `Guest.ssh_command`
_SSH_PORT = 22
_CONNECT_SECONDS = 20.0
_UNANNOUNCED_SECONDS = 0.5
_RESIZE_SECONDS = 60.0


def _raise(error: VMSandboxError) -> NoReturn:
    raise error


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the caller adds to guests and to their errors.

    Attributes:
        logs: the folder for a guest's logs, by the guest's name; None for no logs.
        hints: lines for an error of a guest: where the artifacts are, how to reproduce it.
        say: told of long waits, for people.
        missing: called when QEMU or an image is missing; raises what is to be raised.
        qemu_args: further arguments for QEMU.
        ready: called when a guest answers.
        stopping: called before a guest is ended, with whether an error passes through its use.
    """

    logs: Callable[[str], Path | None] = lambda _: None
    hints: Callable[[], Sequence[str]] = lambda: ()
    say: Callable[[str], None] = lambda _: None
    missing: Callable[[VMSandboxError], NoReturn] = _raise
    qemu_args: Callable[[MachineSpec], Sequence[str]] = lambda _: ()
    ready: Callable[[Guest], None] = lambda _: None
    stopping: Callable[[Guest, bool], None] = lambda _guest, _failed: None


class GuestFactory:
    """Boots guests; pytest's fixture `vm_factory` is one.

    Nothing is started before the first guest is asked for.
    """

    def __init__(self, settings: Settings, stack: ExitStack, surroundings: Surroundings) -> None:
        self._settings = settings
        self._stack = stack
        self._surroundings = surroundings
        self._catalogue = Catalogue(settings.image_path)
        self._hypervisor: Hypervisor | None = None
        self._key = ssh.KeyPair.generate()
        self._verdicts: dict[str, Verdict] = {}
        self._held: dict[str, BuiltImage] = {}
        self._count: dict[str, int] = {}

    @classmethod
    @contextmanager
    def open(
        cls, settings: Settings, surroundings: Surroundings | None = None
    ) -> Iterator[GuestFactory]:
        """A factory; at the end every guest of it is gone."""
        with ExitStack() as stack:
            yield cls(settings, stack, surroundings or Surroundings())

    @contextmanager
    def boot(self, image: str, **hardware: object) -> Iterator[Guest]:
        """A fresh guest, running and answering; it is gone at the end.

        Args:
            image: a name of the catalogue.
            hardware: ``cpus``, ``memory``, ``disk``, ``disks``, ``network``, ``user``; sizes are
                strings with a unit. What is not given is the run's default.

        Raises:
            ConfigError: there is no such image or hardware.
            ImageError: the image is not built.
            LaunchError: QEMU cannot be started.
            BootError: the guest does not come up.

        Example::

            with vm_factory.boot("debian-13", memory="1GiB") as guest:
                guest.run(["true"])
        """
        spec = self._settings.hardware.changed(hardware)
        definition = self._catalogue.get(image)
        _check_hardware(definition, spec)
        try:
            qemu = find_qemu(definition.architecture)
            built = self.built(image)
        except (LaunchError, ImageError) as error:
            self._surroundings.missing(error)
        hypervisor = self._running()
        verdict = self.accelerator(image)
        name = self._name(image)
        with Disks.open(
            base=built.disk,
            root_size=spec.disk,
            blank=spec.disks,
            folder=hypervisor.cache,
        ) as disks:
            platform = _Platform(
                hypervisor=hypervisor,
                built=built,
                qemu=qemu,
                verdict=verdict,
                name=name,
                hardware=spec,
                disks=disks,
                key=self._key,
                logs=self._surroundings.logs(name),
                qemu_args=self._surroundings.qemu_args,
            )
            guest = Guest(
                platform,
                name=name,
                image=image,
                spec=spec,
                boot_timeout=self._settings.boot_timeout * verdict.time_scale,
                command_timeout=self._settings.command_timeout * verdict.time_scale,
                hints=self._surroundings.hints,
            )
            with guest:
                _grow(guest, definition)
                self._surroundings.ready(guest)
                try:
                    yield guest
                except Exception:
                    self._surroundings.stopping(guest, True)
                    raise
                else:  # an interrupted run is in a hurry, and nobody asks how its guest was
                    self._surroundings.stopping(guest, False)

    def built(self, image: str) -> BuiltImage:
        """The built image, kept from removal until this factory is closed.

        Raises:
            ConfigError: there is no such image.
            ImageError: it is not built, or its recipe has changed since.
        """
        if image not in self._held:
            built = ImageStore(self._cache).require(self._catalogue.get(image))
            self._stack.enter_context(built.hold())
            self._held[image] = built
        return self._held[image]

    def accelerator(self, image: str) -> Verdict:
        """The accelerator for guests of this image; the first time, it may have to be proven."""
        if image not in self._verdicts:
            built = self.built(image)
            self._verdicts[image] = accelerator.choose(
                self._settings.accelerator,
                find_qemu(built.definition.architecture),
                kernel=built.kernel,
                initrd=built.initrd,
                append=built.definition.append,
                cache=self._cache,
                hypervisor=self._running,
                say=self._surroundings.say,
            )
        return self._verdicts[image]

    @property
    def images_used(self) -> list[str]:
        """The images for which there is an accelerator, since guests of them were asked for."""
        return list(self._verdicts)

    def describe(self, image: str) -> str:
        """One line on what runs guests of this image.

        Raises:
            VMSandboxError: nothing does; its text tells why.
        """
        qemu = find_qemu(self._catalogue.get(image).architecture)
        verdict = self.accelerator(image)
        scale = f"; time-outs ×{verdict.time_scale:g}" if verdict.time_scale != 1 else ""
        return f"vmsandbox: QEMU {qemu.release}, {verdict.accelerator} ({verdict.reason}){scale}"

    @property
    def _cache(self) -> Path:
        return self._settings.cache or cache_dir()

    def _running(self) -> Hypervisor:
        if self._hypervisor is None:
            self._hypervisor = self._stack.enter_context(
                Hypervisor.running(runtime=self._settings.runtime, cache=self._cache)
            )
            self._key.save(self._hypervisor.folder / KEY)
            (self._hypervisor.folder / KNOWN_HOSTS).touch()
        return self._hypervisor

    def _name(self, image: str) -> str:
        self._count[image] = self._count.get(image, 0) + 1
        return f"{image}.{self._count[image]}"


def _check_hardware(definition: ImageDefinition, spec: Hardware) -> None:
    if spec.memory < definition.memory_min:
        raise ConfigError(
            f"{format_size(spec.memory)} of memory is too little for {definition.name}",
            remedy=f"it needs at least {format_size(definition.memory_min)}",
        )
    if spec.disk is not None and definition.disk_size is None:
        raise ConfigError(
            f"{definition.name} has no disk of its own",
            remedy="a test can add blank ones: disks=['1GiB']",
        )
    if spec.disk is not None and spec.disk < (definition.disk_size or 0):
        raise ConfigError(
            f"a disk of {format_size(spec.disk)} is smaller than the image's",
            remedy=f"{definition.name} has {format_size(definition.disk_size or 0)}",
        )


def _grow(guest: Guest, definition: ImageDefinition) -> None:
    """Let the root file system use all of a disk that is larger than the image's."""
    if guest.spec.disk is not None and guest.spec.disk != definition.disk_size:
        guest.run(["resize2fs", "/dev/vda"], user="root", timeout=_RESIZE_SECONDS)


@dataclass(frozen=True, kw_only=True)
class _Platform:
    """What one guest is made of; see `Platform`."""

    hypervisor: Hypervisor
    built: BuiltImage
    qemu: Qemu
    verdict: Verdict
    name: str
    hardware: Hardware
    disks: Disks
    key: ssh.KeyPair
    logs: Path | None
    qemu_args: Callable[[MachineSpec], Sequence[str]]

    def machine(self) -> Any:
        spec = MachineSpec(
            name=self.name,
            qemu=str(self.qemu.path),
            version=self.qemu.version,
            accelerator=self.verdict.accelerator,
            processor=self.verdict.processor,
            hardware=self.hardware,
            append=" ".join(
                [
                    self.built.definition.append,
                    f"vmsandbox.key={self.key.public.split()[1]}",
                    f"vmsandbox.name={self.name.replace('_', '-')}",
                ]
            ),
        )
        return Machine.running(
            self.hypervisor.launcher,
            self.hypervisor.loop,
            spec,
            kernel=self.built.kernel,
            initrd=self.built.initrd,
            disks=self.disks,
            logs=self.logs,
            more_args=self.qemu_args(spec),
        )

    def transport(self, machine: Machine, user: str) -> ssh.SSHTransport:
        return ssh.SSHTransport(
            lambda: ssh.Endpoint(
                address=machine.forward(_SSH_PORT),
                user=user,
                key=self.key,
                host_key=self.built.host_key,
            ),
            check=machine.check,
            connect_timeout=_CONNECT_SECONDS * self.verdict.time_scale,
            time_scale=self.verdict.time_scale,
        )

    def answers(self, machine: Machine, timeout: float) -> bool:
        # A connection made before the guest's network is up waits for a retransmission, so the
        # console is asked first. An image that does not announce its server is just tried.
        announced = machine.wait_for_ssh(timeout)
        try:
            address = machine.forward(_SSH_PORT)
        except VMSandboxError:
            return False  # the caller looks at why
        return ssh.greeting(address, timeout if announced else _UNANNOUNCED_SECONDS)

    def ssh_command(self, machine: Machine, user: str) -> str:
        host, port = machine.forward(_SSH_PORT)
        known = self.hypervisor.folder / KNOWN_HOSTS
        with known.open("a") as file:
            file.write(f"{self.name} {self.built.host_key}\n")
        options = {
            "HostKeyAlias": self.name,
            "UserKnownHostsFile": str(known),
            "GlobalKnownHostsFile": "/dev/null",
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
        }
        return shlex.join(
            [
                "ssh",
                *("-F", "none", "-i", str(self.hypervisor.folder / KEY), "-p", str(port)),
                *(part for name, value in options.items() for part in ("-o", f"{name}={value}")),
                f"{user}@{host}",
            ]
        )
