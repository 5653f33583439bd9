"""What the guests of one run share: images, QEMU, the accelerator and one hypervisor."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_vmsandbox.cache.store import tidy
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.lock import Lock
from pytest_vmsandbox.catalogue.store import BuiltImage, DamagedImageError, ImageStore
from pytest_vmsandbox.core.errors import (
    ConfigError,
    ImageError,
    LaunchError,
    TeardownError,
    VMSandboxError,
)
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.blueprint import Blueprint, check_board, find_firmware, has_tpm, trial
from pytest_vmsandbox.guests.callbacks import Callbacks
from pytest_vmsandbox.guests.kernels import KernelStore
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.machine import accelerator, host
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.qemu import Qemu, find_qemu
from pytest_vmsandbox.machine.quota import Quota
from pytest_vmsandbox.machine.tpm import find_swtpm

_RUNNING_PER_PROCESSOR = 8  # guests; an idle, emulated one takes about 0.04 of a CPU
_IDLE_SECONDS = 0.5  # before a guest may be paused
_LONGEST_LABEL = 55  # of the 63 characters of a hostname; the rest is for the number


class Backend:
    """What the guests of one run share. Everything is started on demand.

    Attributes:
        settings: of the run.
        callbacks: of the run.
        stack: ends what was started.
        catalogue: the images.
        idle: the guests that are leased.
        fork: makes guests that go on from a running one, as `forking.forked` does; None while an image is made.
    """

    def __init__(self, settings: Settings, callbacks: Callbacks, stack: ExitStack) -> None:
        self.settings = settings
        self.callbacks = callbacks
        self.catalogue = Catalogue(settings.image_path, settings.cache)
        self.idle = IdleGuests()
        self.fork: Callable[[Engine, int], Any] | None = None
        self.stack = stack
        self._verdicts: dict[str, Verdict] = {}
        self._held: dict[str, BuiltImage] = {}
        self._count: Counter[str] = Counter()
        self._naming = threading.Lock()  # threads of the pool also name guests

    # -- what there is ----------------------------------------------------------------------------

    @property
    def cache(self) -> Path:
        """The folder for images, templates and verdicts."""
        return self.settings.cache or cache_dir()

    def require(self, image: str) -> tuple[BuiltImage, Qemu]:
        """The built image and its QEMU. If one is missing, `Callbacks.missing` decides.

        Raises:
            ConfigError: there is no such image.
            DamagedImageError: the image is there, but damaged. A run must not pass over that.
        """
        try:
            # QEMU first: without it, an image does not help.
            qemu = find_qemu(self.catalogue.get(image).architecture)
            return self.built(image), qemu
        except DamagedImageError:
            raise
        except (LaunchError, ImageError) as error:
            self.callbacks.missing(error)

    def built(self, image: str) -> BuiltImage:
        """The built image, kept from removal until the run ends.

        Raises:
            ConfigError: there is no such image, or the lock file cannot be read.
            ImageError: it is not built, or its definition has changed since.
            LockError: it is not the one in the lock file.
        """
        if image not in self._held:
            definition = self.catalogue.get(image)
            if self._lock is not None:  # first: a build would not help
                self._lock.check_definition(definition)
            built = ImageStore(self.cache).require(definition)
            self.stack.enter_context(built.hold())
            self._check_lock(built)
            self._held[image] = built
        return self._held[image]

    @cached_property
    def _lock(self) -> Lock | None:
        file = self.settings.lock
        return None if file is None else Lock.read(file)

    def _check_lock(self, built: BuiltImage) -> None:
        """Check that an image is the one in the lock file, and report packages that may drift."""
        if self._lock is None:
            return
        drift = [difference.what for difference in self._lock.check(built)]
        if count := drift.count("packages"):
            name = built.definition.name
            self.callbacks.tell(
                f"the lock allows {name} to have other packages: {count} differ. "
                f"'vmsandbox images verify {name}' lists them"
            )

    def accelerator(self, image: str) -> Verdict:
        """The accelerator for guests of this image. The first time, it may need a proof."""
        if image not in self._verdicts:
            self._accelerator(self.built(image))
        return self._verdicts[image]

    def _accelerator(self, built: BuiltImage) -> Verdict:
        verdict = self._verdicts[built.definition.name] = self._choose(built)
        if verdict.accelerator != "tcg":  # there was a proof
            self.hypervisor.pace.took(verdict.seconds, usual=host.USUAL_PROOF)
        return verdict

    def verdict_of(self, built: BuiltImage, wanted: str = "") -> Verdict:
        """The accelerator for guests of an image that the catalogue need not have.

        Args:
            wanted: which one; empty for that of the run.

        Raises:
            LaunchError: there is no such accelerator here.
        """
        return self._choose(built, wanted)

    def _choose(self, built: BuiltImage, wanted: str = "") -> Verdict:
        host.require_loopback()  # without it, we cannot reach guests
        if built.kernel is None:  # a kernel of another image proves it sooner
            for other in self._with_kernel(built.definition.architecture):
                with suppress(ImageError):  # it is damaged, or being removed
                    return self._choose(other, wanted)
        try:
            return accelerator.choose(
                wanted or self.settings.accelerator,
                find_qemu(built.definition.architecture),
                trial(built, self.cache),
                cache=self.cache,
                hypervisor=lambda: self._to_prove(built),
                say=self.callbacks.say,
                tell=self.callbacks.tell,
            )
        except ImageError:
            built.verified()  # its error has the remedy
            raise

    def _with_kernel(self, architecture: str) -> list[BuiltImage]:
        """The built images whose kernel QEMU boots directly; the smallest one first."""
        images = ImageStore(self.cache).all()
        suitable = (
            image
            for image in images
            if image.kernel is not None and image.definition.architecture == architecture
        )
        return sorted(suitable, key=lambda image: image.size_on_disk)

    def _to_prove(self, built: BuiltImage) -> Hypervisor:
        """The hypervisor for a proof. A damaged image would make a wrong verdict, which is cached."""
        built.verified()
        return self.hypervisor

    @property
    def images_used(self) -> list[str]:
        """The images whose guests were asked for."""
        return list(self._verdicts)

    def patience(self, image: str) -> float:
        """The factor for timeouts of guests of this image, compared to a usual host with KVM."""
        return self.hypervisor.pace.stretch(1.0, self.accelerator(image).time_scale)

    def describe(self, image: str) -> str:
        """One short line about QEMU and the accelerator. ``vmsandbox doctor`` has the details.

        Raises:
            VMSandboxError: guests of this image cannot run.
        """
        qemu = find_qemu(self.catalogue.get(image).architecture)
        verdict = self.accelerator(image)
        brief = re.split("[:;] ", verdict.reason)[0]
        line = f"vmsandbox: QEMU {qemu.release}, {verdict.accelerator} ({brief})"
        if verdict.time_scale != 1:
            line += f"; timeouts ×{verdict.time_scale:g}"
            line += "; see 'vmsandbox doctor'" if brief != verdict.reason else ""
        return line

    # -- what runs --------------------------------------------------------------------------------

    @cached_property
    def hypervisor(self) -> Hypervisor:
        """What all guests of this process share."""
        return self.stack.enter_context(
            Hypervisor.running(runtime=self.settings.runtime, cache=self.cache)
        )

    @cached_property
    def quota(self) -> Quota:
        """What guests may take of this host's memory."""
        return Quota(self.hypervisor.folder)

    @cached_property
    def kernels(self) -> KernelStore:
        """The kernels that users bring."""
        return KernelStore(self.cache, self.callbacks, self.stack)

    def clean(self) -> None:
        """Remove what killed runs have left."""
        _ = self.hypervisor  # which removes their folders
        with suppress(TeardownError):  # it is tried again when something with that name is made
            tidy(self.cache, self.callbacks.say)

    def own(self, folder: Path) -> None:
        """Have a folder for logs removed if this process is killed. Otherwise its maker removes it."""
        self.hypervisor.own(folder)

    def blueprint(self, image: str, hardware: Hardware) -> Blueprint:
        """The blueprint of a guest.

        Raises:
            ConfigError: there is no such image, or it cannot have this hardware.
        """
        self.catalogue.get(image).check(hardware)
        self._check_network(hardware)
        built, qemu = self.require(image)
        return self._blueprint(built, qemu, self.accelerator(image), hardware)

    def blueprint_of(self, built: BuiltImage, hardware: Hardware) -> Blueprint:
        """The blueprint of a guest of an image that the catalogue need not have."""
        self._check_network(hardware)
        qemu = find_qemu(built.definition.architecture)
        return self._blueprint(built, qemu, self._accelerator(built), hardware)

    def _blueprint(
        self, built: BuiltImage, qemu: Qemu, verdict: Verdict, hardware: Hardware
    ) -> Blueprint:
        check_board(built.definition, hardware)
        kernel = None
        if hardware.kernel is not None:
            kernel = self.kernels.get(hardware.kernel, built, hardware.firmware)
        try:
            uefi = find_firmware(built, hardware)
            if has_tpm(built.definition, hardware):
                find_swtpm()
        except LaunchError as error:
            self.callbacks.missing(error)
        return Blueprint(
            built=built,
            kernel=kernel,
            qemu=qemu,
            verdict=verdict,
            hardware=hardware,
            qemu_args=self.callbacks.qemu_args,
            uefi=uefi,
            pace=self.hypervisor.pace,
        )

    def engine(self, machines: Machines) -> Engine:
        """An engine for these machines. It starts when you enter its context."""
        self._check_network(machines.blueprint.hardware)
        return Engine(
            machines,
            settings=self.settings,
            hints=lambda: [*machines.faults.hints(), *self.callbacks.hints()],
            on_resume=self.idle.pause_some,
            on_restore=self.callbacks.guest_restoring,
            fork=self.fork,
        )

    def _check_network(self, hardware: Hardware) -> None:
        """Refuse a guest that could reach the network, if the run is offline."""
        if self.settings.offline and hardware.network != "isolated":
            raise ConfigError(
                f"network={hardware.network!r} is not allowed, because this run is offline (--vm-offline)",
                remedy="use network='isolated', or leave out --vm-offline. A preparation with "
                "that network works offline if it was made before and has not changed",
            )

    def name(self, image: str) -> str:
        """A name for a guest. It is also the hostname, so it has no dots."""
        label = re.sub(r"[^a-z0-9-]", "-", image)[:_LONGEST_LABEL]
        with self._naming:
            self._count[label] += 1
            return f"{label}-{self._count[label]}"


class IdleGuests:
    """Pauses idle guests if more guests run than the host's CPUs can handle."""

    def __init__(self) -> None:
        self._engines: list[Engine] = []

    @contextmanager
    def holding(self, engine: Engine) -> Iterator[None]:
        """While this lasts, the guest may be paused, and others may be paused for it."""
        self._engines.append(engine)
        try:
            self.pause_some()
            yield
        finally:
            self._engines.remove(engine)

    def pause_some(self) -> None:
        """Pause the guests that were unused for longest, until few enough run.

        A paused guest goes on when it is used. A guest is never paused while something that was started
        in it goes on, or while one of its ports is forwarded.
        """
        engines = list(self._engines)
        running = len(engines) - sum(engine.resting for engine in engines)
        most = _RUNNING_PER_PROCESSOR * (os.cpu_count() or 1)
        for engine in sorted(engines, key=lambda engine: engine.idle_seconds, reverse=True):
            if running <= most or engine.idle_seconds < _IDLE_SECONDS:
                return
            with suppress(VMSandboxError):  # the next use of the guest reports it
                engine.rest()
                running -= 1
