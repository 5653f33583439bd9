"""What runs the guests of one run on this machine: images, QEMU, its accelerator, one hypervisor."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path

from pytest_vmsandbox.cache.store import tidy
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageStore
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
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.callbacks import Callbacks
from pytest_vmsandbox.guests.engine import Engine
from pytest_vmsandbox.guests.machines import Machines
from pytest_vmsandbox.machine import accelerator, host
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.qemu import Qemu, find_qemu

_RUNNING_PER_PROCESSOR = 8  # guests; an idle one takes about 0.04 of a processor, emulated
_IDLE_SECONDS = 0.5  # before a guest may be paused
_LONGEST_LABEL = 55  # of the 63 characters a hostname may have; the rest is for the number


class Backend:
    """What the guests of one run share. Nothing is started, or held, before it is needed.

    Attributes:
        settings: of the run.
        callbacks: of the run.
        stack: ends what was started.
        catalogue: the images that there are.
        idle: the guests that somebody has.
    """

    def __init__(self, settings: Settings, callbacks: Callbacks, stack: ExitStack) -> None:
        self.settings = settings
        self.callbacks = callbacks
        self.catalogue = Catalogue(settings.image_path)
        self.idle = IdleGuests()
        self.stack = stack
        self._verdicts: dict[str, Verdict] = {}
        self._held: dict[str, BuiltImage] = {}
        self._count: Counter[str] = Counter()
        self._naming = threading.Lock()  # fillers of the pool name guests, too

    # -- what there is ----------------------------------------------------------------------------

    @property
    def cache(self) -> Path:
        """The folder for images, templates and verdicts."""
        return self.settings.cache or cache_dir()

    def require(self, image: str) -> tuple[BuiltImage, Qemu]:
        """The built image and its QEMU; `Callbacks.missing` says what a missing one does.

        Raises:
            ConfigError: there is no such image.
        """
        try:
            # First QEMU: an image is no help without it.
            qemu = find_qemu(self.catalogue.get(image).architecture)
            return self.built(image), qemu
        except (LaunchError, ImageError) as error:
            self.callbacks.missing(error)

    def built(self, image: str) -> BuiltImage:
        """The built image, kept from removal until the run ends.

        Raises:
            ConfigError: there is no such image.
            ImageError: it is not built, or its recipe has changed since.
        """
        if image not in self._held:
            built = ImageStore(self.cache).require(self.catalogue.get(image))
            self.stack.enter_context(built.hold())
            self._held[image] = built
        return self._held[image]

    def accelerator(self, image: str) -> Verdict:
        """The accelerator for guests of this image; the first time, it may have to be proven."""
        if image not in self._verdicts:
            self._verdicts[image] = verdict = self._choose(self.built(image))
            if verdict.accelerator != "tcg":  # that one was proven
                self.hypervisor.pace.took(verdict.seconds, usual=host.USUAL_PROOF)
        return self._verdicts[image]

    def _choose(self, built: BuiltImage) -> Verdict:
        host.require_loopback()  # or a guest would wait in vain to be reached
        try:
            return accelerator.choose(
                self.settings.accelerator,
                find_qemu(built.definition.architecture),
                kernel=built.kernel,
                initrd=built.initrd,
                append=built.definition.append,
                cache=self.cache,
                hypervisor=lambda: self._to_prove(built),
                say=self.callbacks.say,
                tell=self.callbacks.tell,
            )
        except ImageError:
            built.verified()  # it knows the remedy
            raise

    def _to_prove(self, built: BuiltImage) -> Hypervisor:
        """What a proof runs on; a damaged image would prove nothing, and be remembered."""
        built.verified()
        return self.hypervisor

    @property
    def images_used(self) -> list[str]:
        """The images for which there is an accelerator, since guests of them were asked for."""
        return list(self._verdicts)

    def patience(self, image: str) -> float:
        """By how much limits on guests of this image are longer than natively on a usual host."""
        return self.hypervisor.pace.stretch(1.0, self.accelerator(image).time_scale)

    def describe(self, image: str) -> str:
        """One short line on what runs guests of this image; ``vmsandbox doctor`` has the details.

        Raises:
            VMSandboxError: nothing does; its text tells why.
        """
        qemu = find_qemu(self.catalogue.get(image).architecture)
        verdict = self.accelerator(image)
        brief = re.split("[:;] ", verdict.reason)[0]
        line = f"vmsandbox: QEMU {qemu.release}, {verdict.accelerator} ({brief})"
        if verdict.time_scale != 1:
            line += f"; time-outs ×{verdict.time_scale:g}"
            line += "; see 'vmsandbox doctor'" if brief != verdict.reason else ""
        return line

    # -- what runs --------------------------------------------------------------------------------

    @cached_property
    def hypervisor(self) -> Hypervisor:
        """What all guests of this process share."""
        return self.stack.enter_context(
            Hypervisor.running(runtime=self.settings.runtime, cache=self.cache)
        )

    def clean(self) -> None:
        """Remove what killed runs have left; the first guest that is asked for does so, too."""
        _ = self.hypervisor
        with suppress(TeardownError):  # it is tried again when something of that name is made
            tidy(self.cache, self.callbacks.say)

    def own(self, folder: Path) -> None:
        """Have a folder for logs removed if this process is killed; else its maker removes it."""
        self.hypervisor.own(folder)

    def blueprint(self, image: str, hardware: Hardware) -> Blueprint:
        """What a guest is made of.

        Raises:
            ConfigError: there is no such image, or it cannot have this hardware.
        """
        self.catalogue.get(image).check(hardware)
        self._check_network(hardware)
        built, qemu = self.require(image)
        return Blueprint(
            built=built,
            qemu=qemu,
            verdict=self.accelerator(image),
            hardware=hardware,
            qemu_args=self.callbacks.qemu_args,
            pace=self.hypervisor.pace,
        )

    def engine(self, machines: Machines) -> Engine:
        """An engine over these machines; it is started when its context is entered."""
        self._check_network(machines.blueprint.hardware)
        return Engine(
            machines,
            settings=self.settings,
            hints=self.callbacks.hints,
            on_resume=self.idle.pause_some,
        )

    def _check_network(self, hardware: Hardware) -> None:
        """See that no guest reaches the network of a run that must not."""
        if self.settings.offline and hardware.network == "nat":
            raise ConfigError(
                "a guest with network='nat' reaches the network, and this run is offline",
                remedy="isolate it, or leave out --vm-offline; what was prepared before, and is the "
                "same, needs no network",
            )

    def name(self, image: str) -> str:
        """A name for a guest that is its hostname, too: in full and short, so it has no dots."""
        label = re.sub(r"[^a-z0-9-]", "-", image)[:_LONGEST_LABEL]
        with self._naming:
            self._count[label] += 1
            return f"{label}-{self._count[label]}"


class IdleGuests:
    """Pauses guests that are idle, if more run than the host's processors can bear."""

    def __init__(self) -> None:
        self._engines: list[Engine] = []

    @contextmanager
    def holding(self, engine: Engine) -> Iterator[None]:
        """Let a guest be paused while this lasts, and others for it."""
        self._engines.append(engine)
        try:
            self.pause_some()
            yield
        finally:
            self._engines.remove(engine)

    def pause_some(self) -> None:
        """Pause guests that nobody has talked to for longest, until few enough run.

        They go on when somebody asks them for something. A guest is never paused in which something
        was started that goes on, or of which a port is open.
        """
        engines = list(self._engines)
        running = len(engines) - sum(engine.resting for engine in engines)
        most = _RUNNING_PER_PROCESSOR * (os.cpu_count() or 1)
        for engine in sorted(engines, key=lambda engine: engine.idle_seconds, reverse=True):
            if running <= most or engine.idle_seconds < _IDLE_SECONDS:
                return
            with suppress(VMSandboxError):  # whoever asks it for something next is told
                engine.rest()
                running -= 1
