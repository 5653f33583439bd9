"""Guests on demand: what `vm_factory` is."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar, overload

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageStore
from pytest_vmsandbox.core.errors import (
    ConfigError,
    GuestLost,
    ImageError,
    LaunchError,
    MonitorError,
    VMSandboxError,
)
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import Hardware, Network, format_size
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.callbacks import Announcer, Callbacks
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.keys import KeyPair
from pytest_vmsandbox.guests.platform import GuestPlatform
from pytest_vmsandbox.guests.pool import Clone, Pool
from pytest_vmsandbox.guests.provision import PreparedImage, PreparedLayer, Provision, Step
from pytest_vmsandbox.guests.template_builder import (
    NoTemplateError,
    OpenTemplate,
    TemplateBuilder,
    doer,
    grow,
    template_key,
)
from pytest_vmsandbox.guests.templates import TemplateStore
from pytest_vmsandbox.machine import accelerator, host
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.pace import USUAL_PROOF, Pace
from pytest_vmsandbox.machine.qemu import Qemu, find_qemu
from pytest_vmsandbox.machine.quota import Quota

_FILLERS = 2
_MOST_LOST = 3  # clones in a row that are lost before anybody has them; then guests are booted
_RUNNING_PER_PROCESSOR = 8  # guests; an idle one takes about 0.04 of a processor, emulated
_LONGEST_LABEL = 55  # of the 63 characters a hostname may have; the rest is for the number
_IDLE_SECONDS = 0.5  # before a guest may be paused
T = TypeVar("T")
Base = str | PreparedImage | PreparedLayer | None  # what guests are made of, for users


class GuestFactory:
    """Gives out guests; pytest's fixture `vm_factory` is one.

    They are clones of templates, which it builds where there are none, or are booted where there
    can be none. Nothing is started before the first guest is asked for.
    """

    def __init__(self, settings: Settings, stack: ExitStack, callbacks: Callbacks) -> None:
        self._settings = settings
        self._stack = stack
        self._callbacks = callbacks
        self._catalogue = Catalogue(settings.image_path)
        self._hypervisor: Hypervisor | None = None
        self._key = KeyPair.generate()
        self._verdicts: dict[str, Verdict] = {}
        self._held: dict[str, BuiltImage] = {}
        self._count: dict[str, int] = {}
        self._naming = threading.Lock()  # fillers of the pool name guests, too
        self._without_clones: set[str] = set()  # keys of templates that cannot be
        self._provisioned: dict[str, PreparedImage] = {}
        self._guests: list[Guest] = []  # those that somebody has
        self._expected: dict[tuple[PreparedImage, Hardware], int] = {}  # guests that are to come
        self._pace = Pace()

    @classmethod
    @contextmanager
    def open(cls, settings: Settings, callbacks: Callbacks | None = None) -> Iterator[GuestFactory]:
        """A factory; at the end every guest of it is gone."""
        with ExitStack() as stack:
            yield cls(settings, stack, callbacks or Announcer())

    @contextmanager
    def boot(
        self, image: str | PreparedImage | PreparedLayer, **hardware: object
    ) -> Iterator[Guest]:
        """A fresh guest, running and answering; it is gone at the end.

        It is a clone of a guest that was booted once, on this machine, and saved: that takes
        milliseconds, but the first time a boot and some seconds, which people are told. Where there
        can be none it is booted, and prepared, each time. If the host or chance takes the guest away
        before anybody has it, a second one is tried.

        Args:
            image: a name of the catalogue, or what `prepare` returned. What ``prepare(None, …)``
                returned is booted on the image of the test that runs now.
            hardware: ``cpus``, ``memory``, ``disk``, ``disks``, ``network``, ``user``; sizes are
                strings with a unit. What is not given is the run's default.

        Raises:
            ConfigError: there is no such image or hardware, or no test that has an image.
            ImageError: the image is not built, or damaged.
            LaunchError: QEMU cannot be started, or this host has no room.
            BootError: the guest does not come up.
            VMSandboxError: it cannot be prepared. Whatever a preparation raises comes through.

        Example::

            with vm_factory.boot("debian-13", memory="1GiB") as guest:
                guest.run(["true"])
        """
        prepared = self._prepared(image)
        with self.lease(prepared, self.hardware(prepared.image, hardware)) as guest:
            yield guest

    @contextmanager
    def lease(
        self, image: str | PreparedImage | PreparedLayer, hardware: Hardware
    ) -> Iterator[Guest]:
        """A fresh guest, as from `boot`.

        Args:
            hardware: of the guest; `hardware` makes one.
        """
        prepared = self._prepared(image)
        blueprint = self._blueprint(prepared.image, hardware)
        with ExitStack() as stack:
            guest = self._retrying(lambda: self._started(blueprint, prepared, stack))
            self._guests.append(guest)
            stack.callback(self._guests.remove, guest)
            self._let_rest()
            self._callbacks.guest_ready(guest)
            try:
                yield guest
            except Exception:
                self._callbacks.guest_stopping(guest, True)
                raise
            else:  # an interrupted run is in a hurry, and nobody asks how its guest was
                self._callbacks.guest_stopping(guest, False)

    def _started(self, blueprint: Blueprint, prepared: PreparedImage, stack: ExitStack) -> Guest:
        """A guest, running and answering; `stack` ends it."""
        with ExitStack() as own:
            guest = self._cloned(blueprint, prepared, own)
            if guest is None:
                guest = self._booted(blueprint, prepared.steps, own)
            stack.push(own.pop_all())
            return guest

    def _retrying(self, work: Callable[[], T]) -> T:
        """Do what needs a guest, and once more if the host or chance took the guest away."""
        self._running()  # with as many descriptors as it may have
        host.require_descriptors()
        try:
            return work()
        except VMSandboxError as error:
            if not error.transient:
                raise
            self._callbacks.note_retry(error)
        return work()

    def _let_rest(self) -> None:
        """Pause guests that nobody has talked to for longest, if more run than processors can bear.

        They go on when somebody asks them for something. A guest is never paused in which something
        was started that goes on, or of which a port is open.
        """
        guests = list(self._guests)
        running = len(guests) - sum(guest.resting for guest in guests)
        most = _RUNNING_PER_PROCESSOR * (os.cpu_count() or 1)
        for guest in sorted(guests, key=lambda it: it.idle_seconds, reverse=True):
            if running <= most or guest.idle_seconds < _IDLE_SECONDS:
                return
            with suppress(VMSandboxError):  # whoever asks it for something next is told
                guest.rest()
                running -= 1

    @overload
    def prepare(
        self,
        image: str | PreparedImage,
        run: Callable[[Guest], object],
        *,
        depends_on: Sequence[str | os.PathLike[str]],
        network: Network | None = None,
    ) -> PreparedImage: ...
    @overload
    def prepare(
        self,
        image: PreparedLayer | None,
        run: Callable[[Guest], object],
        *,
        depends_on: Sequence[str | os.PathLike[str]],
        network: Network | None = None,
    ) -> PreparedLayer: ...
    def prepare(
        self,
        image: Base,
        run: Callable[[Guest], object],
        *,
        depends_on: Sequence[str | os.PathLike[str]],
        network: Network | None = None,
    ) -> PreparedImage | PreparedLayer:
        """An image with more in it, which `boot` takes.

        It is prepared now, for the run's default hardware, unless it was since something of what it
        depends on has changed, in this run or another. For other hardware, and for the images of
        other tests, that is done when the first such guest is asked for.

        Args:
            image: a name of the catalogue, or what was prepared before; None for whatever image a
                test runs on.
            run: called with a guest, prepares it. What runs in the guest then goes on in each clone.
            depends_on: texts (names, versions), and paths, whose names and content count. The code of
                `run` counts, too; what it calls, or takes from around it, does not.
            network: that the preparation needs: ``isolated`` or ``nat``; None for the run's default.
                Guests have the one that `boot` is told.

        Returns:
            What `boot`, or `prepare` once more, takes as an image.

        Raises:
            ConfigError: there is no such image or network, or it cannot depend on that.
            VMSandboxError: a guest does not come up. What `run` raises comes through, and nothing is
                kept.

        Example::

            vm_factory.prepare(
                "debian-13",
                lambda vm: vm.shell("apt-get install -y postgresql"),
                depends_on=["postgresql"],
                network="nat",
            )
        """
        about = getattr(run, "__qualname__", "prepared")
        provision = Provision(name=about, depends_on=depends_on, run=run, network=network)
        prepared = self.with_step(image, provision.step())
        if isinstance(prepared, PreparedImage) or self._callbacks.image() is not None:
            self._build_template(self._prepared(prepared))
        return prepared

    def _build_template(self, prepared: PreparedImage) -> None:
        """See that guests of the default hardware can be cloned, where any can."""
        blueprint = self._blueprint(prepared.image, self.hardware(prepared.image, {}))
        if self._may_clone(blueprint, prepared.steps):
            try:
                self._retrying(lambda: self._builder.obtain(blueprint, prepared.steps))
            except NoTemplateError as error:
                self._no_clones(blueprint, prepared.steps, error)

    @overload
    def with_step(self, image: str | PreparedImage, step: Step) -> PreparedImage: ...
    @overload
    def with_step(self, image: PreparedLayer | None, step: Step) -> PreparedLayer: ...
    @overload
    def with_step(self, image: Base, step: Step) -> PreparedImage | PreparedLayer: ...
    def with_step(self, image: Base, step: Step) -> PreparedImage | PreparedLayer:
        """Likewise, prepared when the first guest of it is asked for."""
        if image is None:
            return PreparedLayer(steps=(step,))
        if not isinstance(image, PreparedImage | PreparedLayer):
            image = self._prepared(image)
        return replace(image, steps=(*image.steps, step))

    def _prepared(self, image: str | PreparedImage | PreparedLayer) -> PreparedImage:
        """The image with what is done to all guests of it."""
        if isinstance(image, PreparedImage):
            return image
        if isinstance(image, PreparedLayer):
            below = self._prepared(self._image_of_test())
            return replace(below, steps=(*below.steps, *image.steps))
        if not isinstance(image, str):  # what a fixture returned, perhaps
            raise ConfigError(
                f"{image!r} is not an image",
                remedy="use a name of the catalogue, or what vm_factory.prepare() returned",
            )
        if image not in self._provisioned:
            steps = tuple(it.step() for it in self._callbacks.provisions(image))
            self._provisioned[image] = PreparedImage(image=image, steps=steps)
        return self._provisioned[image]

    def _image_of_test(self) -> str:
        if (image := self._callbacks.image()) is None:
            raise ConfigError(
                "what was prepared for no image in particular can be booted only while a test runs to "
                "which one of the selected images applies",
                remedy="name the image: vm_factory.prepare('debian-13', …)",
            )
        return image

    def expect(self, image: str | PreparedImage, hardware: Hardware, count: int = 1) -> None:
        """Be told that so many guests of a kind are going to be asked for.

        Raises:
            ConfigError: what is to be done to each guest of the image is invalid.
        """
        kind = self._prepared(image), hardware
        self._expected[kind] = self._expected.get(kind, 0) + count

    def await_armed(self, timeout: float) -> bool:
        """Wait until as many clones are armed as are to be kept ahead; whether they are."""
        return self._pool.await_armed(timeout)

    def _cloned(
        self, blueprint: Blueprint, prepared: PreparedImage, stack: ExitStack
    ) -> Guest | None:
        """A guest that is a clone, running; None where there can be none."""
        steps = prepared.steps
        if not self._may_clone(blueprint, steps):
            return None
        try:
            opened, clone, was_armed = self._lease(blueprint, prepared, stack)
        except (NoTemplateError, LaunchError, GuestLost, MonitorError) as error:
            if error.transient:
                raise
            self._no_clones(blueprint, steps, error)
            return None
        self._callbacks.guest_begun(clone.name)
        platform = GuestPlatform(
            blueprint,
            self._running(),
            name=clone.name,
            key=opened.key,
            disks=clone.disks,
            logs=clone.logs,
            running=clone.running,
        )
        guest = self._guest(platform, clone.name, "armed" if was_armed else "cloned")
        guest.facts = opened.template.facts
        return stack.enter_context(guest)

    def _lease(
        self, blueprint: Blueprint, prepared: PreparedImage, stack: ExitStack
    ) -> tuple[OpenTemplate, Clone, bool]:
        """A clone of a template that is what it was when it was built."""
        ahead = self._settings.clones == "armed"
        kind = prepared, blueprint.hardware
        lost = 0
        while True:
            opened = self._builder.obtain(blueprint, prepared.steps)
            count = self._expected.pop(kind, 0)
            if ahead and count:
                self._pool.expect(opened, blueprint, count)
            own = stack.enter_context(ExitStack())
            try:
                leased = own.enter_context(self._pool.lease(opened, blueprint, more=ahead))
            except VMSandboxError as error:
                failure, fault = error, opened.fault(anew=True)
                # A host with too much to do may lose one.
                if not (fault or failure.transient or isinstance(failure, GuestLost)):
                    raise
            else:
                if not (fault := opened.fault(anew=False)):
                    return opened, *leased
                failure = LaunchError("its template was damaged", details=fault)
            lost += 1
            if fault:
                own.close()
                self._expected[kind] = self._pool.forget(opened) + 1  # this one
                self._builder.drop(opened, fault)
            if lost == _MOST_LOST:
                raise LaunchError(
                    f"{lost} clones in a row were lost, the last one so: {failure.brief}",
                    details=failure.details,
                    remedy=failure.remedy,
                ) from failure

    def _may_clone(self, blueprint: Blueprint, steps: Sequence[Step]) -> bool:
        kind = template_key(blueprint, steps)
        return self._settings.clones != "never" and kind not in self._without_clones

    def _no_clones(
        self, blueprint: Blueprint, steps: Sequence[Step], error: VMSandboxError
    ) -> None:
        """Fall to the lowest rung of the ladder, and say so once."""
        self._without_clones.add(template_key(blueprint, steps))
        self._callbacks.tell(
            f"guests of {blueprint.image} are booted one by one, not cloned: {error.brief}"
        )

    def _booted(self, blueprint: Blueprint, steps: Sequence[Step], stack: ExitStack) -> Guest:
        """A guest that is booted, and then prepared."""
        name = self._name(blueprint.image)
        network = blueprint.hardware.network
        for step in steps:
            if step.network == "nat" != network:
                raise LaunchError(
                    f"{step.about} needs network='nat', and {network!r} afterwards, which only a "
                    "clone can have",
                    remedy="boot it with network='nat'",
                )
        blueprint.built.verified()
        disks = stack.enter_context(blueprint.disks(self._running().cache))
        self._callbacks.guest_begun(name)
        platform = GuestPlatform(
            blueprint,
            self._running(),
            name=name,
            key=self._key,
            disks=disks,
            logs=self._callbacks.logs(name),
        )
        guest = stack.enter_context(self._guest(platform, name, "booted"))
        grow(guest, blueprint)
        for step in steps:
            guest.spec = blueprint.with_user(doer(blueprint, step)).hardware
            guest.facts = step.run(guest) or {}
        guest.spec = blueprint.hardware
        return guest

    def _check_network(self, hardware: Hardware) -> None:
        """See that no guest reaches the network of a run that must not."""
        if self._settings.offline and hardware.network == "nat":
            raise ConfigError(
                "a guest with network='nat' reaches the network, and this run is offline",
                remedy="isolate it, or leave out --vm-offline; what was prepared before, and is the "
                "same, needs no network",
            )

    def _guest(self, platform: GuestPlatform, name: str, origin: str = "booted") -> Guest:
        blueprint = platform.blueprint
        self._check_network(blueprint.hardware)
        return Guest(
            platform,
            name=name,
            image=blueprint.image,
            spec=blueprint.hardware,
            boot_timeout=self._settings.boot_timeout,
            command_timeout=self._settings.command_timeout,
            hints=self._callbacks.hints,
            origin=origin,
            on_wake=self._let_rest,
            stretch=blueprint.stretch,
        )

    def hardware(self, image: str, arguments: Mapping[str, object]) -> Hardware:
        """The hardware of a guest of an image.

        Args:
            arguments: what differs from the run's default, as `boot` takes it.

        Raises:
            ConfigError: there is no such image or hardware.
        """
        return self._catalogue.get(image).hardware(self._settings.hardware, arguments)

    def _blueprint(self, image: str, hardware: Hardware) -> Blueprint:
        _check_hardware(self._catalogue.get(image), hardware)
        self._check_network(hardware)
        built, qemu = self.require(image)
        return Blueprint(
            built=built,
            qemu=qemu,
            verdict=self.accelerator(image),
            hardware=hardware,
            qemu_args=self._callbacks.qemu_args,
            pace=self._pace,
        )

    @cached_property
    def _builder(self) -> TemplateBuilder:
        """Made once, and ended after the pool."""
        self.clean()
        return self._stack.enter_context(
            TemplateBuilder.open(
                TemplateStore(self._cache),
                self._running(),
                guest=self._guest,
                logs=self._logs_of_prepared,
                say=self._callbacks.say,
                tell=self._callbacks.tell,
            )
        )

    def _logs_of_prepared(self, image: str) -> Path | None:
        """The folder for the logs of a guest that becomes a template: of who waits for that."""
        name = self._name(f"{image}-prepared")
        self._callbacks.guest_begun(name)
        return self._callbacks.logs(name)

    @cached_property
    def _pool(self) -> Pool:
        hypervisor = self._running()
        return self._stack.enter_context(
            Pool.running(
                hypervisor,
                Quota(hypervisor.folder),
                fillers=_FILLERS,
                name=self._name,
                logs=self._callbacks.logs,
            )
        )

    def require(self, image: str) -> tuple[BuiltImage, Qemu]:
        """The built image and its QEMU; what a missing one does is done, before anything is made ready.

        Raises:
            ConfigError: there is no such image.
        """
        try:
            qemu = find_qemu(self._catalogue.get(image).architecture)
            return self.built(image), qemu
        except (LaunchError, ImageError) as error:
            self._callbacks.missing(error)

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
            host.require_loopback()  # or a guest would wait in vain to be reached
            try:
                self._verdicts[image] = accelerator.choose(
                    self._settings.accelerator,
                    find_qemu(built.definition.architecture),
                    kernel=built.kernel,
                    initrd=built.initrd,
                    append=built.definition.append,
                    cache=self._cache,
                    hypervisor=lambda: self._to_prove(built),
                    say=self._callbacks.say,
                    tell=self._callbacks.tell,
                )
            except ImageError:
                built.verified()  # it knows the remedy
                raise
            if (verdict := self._verdicts[image]).accelerator != "tcg":  # that one was proven
                self._pace.took(verdict.seconds, usual=USUAL_PROOF)
        return self._verdicts[image]

    def patience(self, image: str) -> float:
        """By how much limits on guests of this image are longer than natively on a usual host."""
        return self._pace.stretch(1.0, self.accelerator(image).time_scale)

    def _to_prove(self, built: BuiltImage) -> Hypervisor:
        """What a proof runs on; a damaged image would prove nothing, and be remembered."""
        built.verified()
        return self._running()

    def clean(self) -> None:
        """Remove what killed runs have left; the first guest that is asked for does so, too."""
        self._running()
        TemplateStore(self._cache).sweep()

    def own(self, folder: Path) -> None:
        """Have a folder for logs removed if this process is killed; else its maker removes it."""
        self._running().own(folder)

    @property
    def images_used(self) -> list[str]:
        """The images for which there is an accelerator, since guests of them were asked for."""
        return list(self._verdicts)

    def describe(self, image: str) -> str:
        """One short line on what runs guests of this image; ``vmsandbox doctor`` has the details.

        Raises:
            VMSandboxError: nothing does; its text tells why.
        """
        qemu = find_qemu(self._catalogue.get(image).architecture)
        verdict = self.accelerator(image)
        line = f"vmsandbox: QEMU {qemu.release}, {verdict.accelerator} ({verdict.brief})"
        if verdict.time_scale != 1:
            line += f"; time-outs ×{verdict.time_scale:g}"
            line += "; see 'vmsandbox doctor'" if verdict.brief != verdict.reason else ""
        return line

    @property
    def _cache(self) -> Path:
        return self._settings.cache or cache_dir()

    def _running(self) -> Hypervisor:
        if self._hypervisor is None:
            self._hypervisor = self._stack.enter_context(
                Hypervisor.running(runtime=self._settings.runtime, cache=self._cache)
            )
        return self._hypervisor

    def _name(self, image: str) -> str:
        """A name for a guest that is its hostname, too: in full and short, so it has no dots."""
        label = re.sub(r"[^a-z0-9-]", "-", image)[:_LONGEST_LABEL]
        with self._naming:
            self._count[label] = self._count.get(label, 0) + 1
            return f"{label}-{self._count[label]}"


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
