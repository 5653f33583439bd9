"""Makes guests on demand. The fixture `vm_factory` is a `GuestFactory`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import overload

from pytest_vmsandbox.core import spec
from pytest_vmsandbox.core.errors import ConfigError, LaunchError, VMSandboxError
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.callbacks import Announcer, Callbacks
from pytest_vmsandbox.guests.cloning.clones import Clones
from pytest_vmsandbox.guests.cloning.forking import forked
from pytest_vmsandbox.guests.cloning.template_builder import OpenTemplate, doer, grow
from pytest_vmsandbox.guests.clusters.declaration import Base
from pytest_vmsandbox.guests.clusters.making import MakesClusters
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.leasing import leased, retried
from pytest_vmsandbox.guests.networks.joining import joined
from pytest_vmsandbox.guests.networks.making import Networks
from pytest_vmsandbox.guests.networks.network import Network
from pytest_vmsandbox.guests.networks.subnets import Addressing
from pytest_vmsandbox.guests.provision import PreparedImage, PreparedLayer, Provision, Step
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.replay.run import BeforeRun, RecordedRun, check_recordable
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.guests.running.plugging import refuse_left


class GuestFactory(MakesClusters):
    """Makes guests. The fixture `vm_factory` is one.

    Guests are clones of templates. It builds a template if there is none, and boots guests where there
    can be no clones. Nothing starts before you ask for the first guest.

    Attributes:
        backend: what runs the guests. Not part of the public interface: it changes without notice.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        backend.fork = partial(forked, backend)
        self._clones = Clones(backend)
        self.networks = Networks(backend)
        self._provisioned: dict[str, PreparedImage] = {}
        self._key = KeyPair.generate()  # opens booted guests; clones have the key of their template

    @classmethod
    @contextmanager
    def open(cls, settings: Settings, callbacks: Callbacks | None = None) -> Iterator[GuestFactory]:
        """A factory; at the end every guest of it is gone."""
        with ExitStack() as stack:
            yield cls(Backend(settings, callbacks or Announcer(), stack))

    @contextmanager
    def boot(self, image: Base, *, networks: object = (), **hardware: object) -> Iterator[Guest]:
        """A context manager: a fresh guest, which runs and answers. It is gone at the end.

        The guest is a clone of a template, made in milliseconds. The first time, the template is built:
        a guest boots, is prepared and is saved, and a line on the terminal says so. Where there can be no
        clones, each guest is booted and prepared. If the host or chance takes the guest away before you
        have it, a second one is tried.

        Args:
            image: a name of the catalogue, or what `prepare` returned. What ``prepare(None, …)``
                returned is booted on the image of the test that runs now.
            networks: what `network` has returned. The guest joins these networks. Its cards come in the
                order in which the networks are given. A mapping may give it an
                address on each: ``{lan: "10.1.0.7"}``.
            hardware: ``cpus``, ``memory``, ``disk``, ``disks``, ``network``, ``user``, ``kernel``, as in
                the marker ``vm``. What you leave out is the run's default.

        Raises:
            ConfigError: there is no such image or hardware, or no test that has an image.
            ImageError: the image is not built, or is damaged.
            LaunchError: QEMU cannot be started, or this host has no room.
            BootError: the guest does not come up.
            VMSandboxError: the guest cannot be prepared. What a preparation raises is passed on.

        Example::

            with vm_factory.boot("debian-13", memory="1GiB") as guest:
                guest.run(["true"])
        """
        prepared = self._prepared(image)
        asked = self.hardware(prepared.image, hardware)
        with self.lease(prepared, asked, networks=networks) as guest:
            yield guest

    @contextmanager
    def lease(
        self, image: Base, hardware: Hardware, *, hostname: str = "", networks: object = ()
    ) -> Iterator[Guest]:
        """A fresh guest, as from `boot`.

        Args:
            hardware: of the guest; `hardware` makes one.
            hostname: of the guest; empty for its name, which is unique.
            networks: that it joins.

        Raises:
            GuestLost: at the end: the disk of this machine was full or failed, whatever the guest and
                the block made of that.
        """
        with ExitStack() as stack:
            guest = self._fresh(image, hardware, hostname, stack)
            stack.enter_context(joined(guest, networks))
            yield stack.enter_context(leased(self.backend, guest))

    def make_ready(self, image: Base, arguments: Mapping[str, object]) -> None:
        """Build what guests are cloned from, if they can be cloned.

        Args:
            arguments: the hardware, as `boot` takes it.
        """
        prepared = self._prepared(image)
        self._build_template(prepared, self.hardware(prepared.image, arguments))

    def made_of(
        self, image: Base, arguments: Mapping[str, object]
    ) -> tuple[Blueprint, Sequence[Step]]:
        """What guests are made of, and their preparations.

        Args:
            arguments: the hardware, as `boot` takes it.
        """
        prepared = self._prepared(image)
        hardware = self.hardware(prepared.image, arguments)
        return self.backend.blueprint(prepared.image, hardware), prepared.steps

    def started(
        self, image: Base, arguments: Mapping[str, object], hostname: str, stack: ExitStack
    ) -> Guest:
        """A fresh guest, running and answering, which `stack` ends. Tests get it by `leasing.leased`.

        Args:
            arguments: the hardware, as `boot` takes it.
        """
        prepared = self._prepared(image)
        return self._fresh(prepared, self.hardware(prepared.image, arguments), hostname, stack)

    def _fresh(self, image: Base, hardware: Hardware, hostname: str, stack: ExitStack) -> Guest:
        prepared = self._prepared(image)
        blueprint = self.backend.blueprint(prepared.image, hardware)
        return retried(self.backend, lambda: self._started(blueprint, prepared, stack, hostname))

    def _started(
        self, blueprint: Blueprint, prepared: PreparedImage, stack: ExitStack, hostname: str
    ) -> Guest:
        """A guest, running and answering; `stack` ends it."""
        with ExitStack() as own:
            guest = self._clones.guest(blueprint, prepared, own, hostname)
            if guest is None:
                guest = self._booted(blueprint, prepared.steps, own, hostname)
            stack.push(own.pop_all())
            return guest

    @overload
    def prepare(
        self,
        image: str | PreparedImage,
        run: Callable[[Guest], object],
        *,
        depends_on: Sequence[str | os.PathLike[str]],
        network: spec.NetworkArgument | None = None,
    ) -> PreparedImage: ...
    @overload
    def prepare(
        self,
        image: PreparedLayer | None,
        run: Callable[[Guest], object],
        *,
        depends_on: Sequence[str | os.PathLike[str]],
        network: spec.NetworkArgument | None = None,
    ) -> PreparedLayer: ...
    def prepare(
        self,
        image: Base | None,
        run: Callable[[Guest], object],
        *,
        depends_on: Sequence[str | os.PathLike[str]],
        network: spec.NetworkArgument | None = None,
    ) -> PreparedImage | PreparedLayer:
        """Make an image with more in it, for `boot`. ``run`` is called once, and again if its inputs change.

        The image is prepared now, for the run's default hardware, unless this run or an earlier one has
        done so. For other hardware, and for the images of other tests, it is prepared when the first such
        guest is asked for. What ``run`` leaves running goes on running in every guest of the image.

        The preparation lies in the cache and in all of its guests: put no secret into it.

        Args:
            image: a name of the catalogue, or what an earlier `prepare` returned; None for whatever image
                a test runs on.
            run: called with a guest, which it prepares. The guest's user is the image's.
            depends_on: the inputs: texts (names, versions), and paths (`pathlib.Path`) of files and
                folders, whose names and content count. ``__pycache__`` does not count. The code of
                ``run`` counts by itself, with the arguments that `functools.partial` holds. What it
                calls and the variables around it do not count: name them here.
            network: what the preparation needs: ``isolated``, ``nat``, or a list of hosts and ports; None
                for the run's default. It does not affect guests booted from the image: pass ``network=`` to `boot` for those.

        Returns:
            What `boot` and `prepare` take as an image.

        Raises:
            ConfigError: there is no such image or network, or ``depends_on`` is invalid.
            VMSandboxError: a guest does not come up. What ``run`` raises is passed on, and nothing is
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
        step = Provision(name=about, depends_on=depends_on, run=run, network=network).step()
        if image is not None and not isinstance(image, PreparedLayer):
            prepared = self.with_step(image, step)
            self._build_template(prepared)
            return prepared
        layer = PreparedLayer(steps=(*(image.steps if image else ()), step))
        if self.backend.callbacks.image() is not None:
            self._build_template(self._prepared(layer))
        return layer

    def network(
        self,
        name: str,
        *,
        ipv4: str | None = None,
        ipv6: str | None = None,
        addresses: Addressing = "fixed",
        seed: int = 1,
    ) -> Network:
        """Make a private network, which guests join with ``boot(…, networks=[…])``.

        It reaches nothing but these guests, and nobody else can reach it. The first one starts the switch
        of the run, a process that carries all frames.

        Args:
            name: guests have names such as ``db1.lan`` on it. Several networks may have the same name, but
                not for one guest.
            ipv4, ipv6: subnets, such as ``10.1.0.0/24`` and ``fd00:1::/64``; None for ones that no other
                network of this run has.
            addresses: ``fixed``: each guest gets the lowest free address when it joins. ``dhcp``: the guest's
                system asks for that address.
            seed: of all chance on this network.

        Returns:
            A `Network`. It is also a context manager, and is gone with the run at the latest.

        Raises:
            ConfigError: an argument is invalid.
            LaunchError: the switch cannot be started.

        Example::

            lan = vm_factory.network("lan")
            with (
                vm_factory.boot("tiny", networks=[lan]) as a,
                vm_factory.boot("tiny", networks=[lan]) as b,
            ):
                a.run(["ping", "-c1", lan.name_of(b)])
        """
        return self.networks.make(name, ipv4, ipv6, addresses, seed)

    def _build_template(self, prepared: PreparedImage, hardware: Hardware | None = None) -> None:
        """Build the template, if guests can be cloned.

        Args:
            hardware: of the guests; None for the default.
        """
        hardware = hardware or self.hardware(prepared.image, {})
        blueprint = self.backend.blueprint(prepared.image, hardware)
        retried(self.backend, lambda: self._clones.build_template(blueprint, prepared.steps))

    def with_step(self, image: str | PreparedImage, step: Step) -> PreparedImage:
        """The image with one more step, done when the first such guest is asked for."""
        prepared = self._prepared(image)
        return replace(prepared, steps=(*prepared.steps, step))

    def _prepared(self, image: Base) -> PreparedImage:
        """The image with the preparations for all guests of it."""
        if isinstance(image, PreparedImage):
            return image
        if isinstance(image, PreparedLayer):
            if (of_test := self.backend.callbacks.image()) is None:
                raise ConfigError(
                    "vm_factory.prepare(None, …) works only while a test runs to which a selected image "
                    "applies",
                    remedy="name the image: vm_factory.prepare('debian-13', …)",
                )
            below = self._prepared(of_test)
            return replace(below, steps=(*below.steps, *image.steps))
        if not isinstance(image, str):  # what a fixture returned, perhaps
            raise ConfigError(
                f"{image!r} is not an image",
                remedy="use the name of an image ('vmsandbox images list' shows them), or what "
                "vm_factory.prepare() returned",
            )
        image = self.backend.catalogue.name_of(image)
        if image not in self._provisioned:
            steps = tuple(
                provision.step() for provision in self.backend.callbacks.provisions(image)
            )
            self._provisioned[image] = PreparedImage(image=image, steps=steps)
        return self._provisioned[image]

    def recorded(
        self, image: PreparedImage, hardware: Hardware, folder: Path, stack: ExitStack
    ) -> tuple[RecordedRun, OpenTemplate, str]:
        """A guest whose run is recorded, its template, and the digest of all that the run depends on.

        Args:
            folder: for the recording.
            stack: ends the guest.

        Raises:
            ConfigError: such guests cannot be recorded.
            VMSandboxError: there is no such guest.
        """
        blueprint = self.backend.blueprint(image.image, hardware)
        check_recordable(blueprint)
        opened = self._clones.opened(blueprint, image.steps)
        with opened.template.state() as state:
            before = BeforeRun(
                memory=opened.memory, state=state, layers=opened.template.layers, key=opened.key
            )
            name = self.backend.name(blueprint.image)
            run = RecordedRun.started(
                self.backend, blueprint, before, folder, name=name, mode="record", stack=stack
            )
        return run, opened, blueprint.digest

    def expect(self, image: str | PreparedImage, hardware: Hardware, count: int = 1) -> None:
        """Note that `count` guests of a kind will be asked for.

        Raises:
            ConfigError: a preparation for all guests of the image is invalid.
        """
        self._clones.expect(self._prepared(image), hardware, count)

    def await_armed(self, timeout: float) -> bool:
        """Wait until the pool of armed clones is full. Returns whether it is."""
        return self._clones.pool.await_armed(timeout)

    def why_booted(self, image: str) -> VMSandboxError | None:
        """Why guests of an image are booted, as far as that is known; None if they are cloned."""
        return self._clones.refusals.get(image)

    def _booted(
        self, blueprint: Blueprint, steps: Sequence[Step], stack: ExitStack, hostname: str
    ) -> Guest:
        """A guest that is booted, and then prepared."""
        backend, network = self.backend, blueprint.hardware.network
        for step in steps:
            if step.network not in (None, "isolated", network) and network != "nat":
                raise LaunchError(
                    f"the preparation {step.about!r} needs network={step.network!r}, but the guest has "
                    f"{network!r}. "
                    "Only clones can have another network than their preparation, and guests cannot be "
                    "cloned here",
                    remedy=f"boot the guest with network={step.network!r}",
                )
        blueprint.built.verified()
        name = backend.name(hostname or blueprint.image)
        disks = stack.enter_context(blueprint.disks(backend.cache))
        backend.callbacks.guest_begun(name)
        machines = Machines(
            blueprint,
            backend.hypervisor,
            name=name,
            key=self._key if (own := blueprint.built.key) is None else KeyPair.for_image(own),
            disks=disks,
            logs=backend.callbacks.logs(name),
            captures=backend.settings.captures,
            hostname=hostname,
        )
        engine = stack.enter_context(backend.engine(machines))
        guest = Guest(engine)
        grow(guest, blueprint)
        for step in steps:
            engine.spec = blueprint.with_user(doer(blueprint, step)).hardware
            try:
                engine.facts = step.run(guest) or {}
                refuse_left(engine)
            except Exception:
                backend.callbacks.preparation_failed(guest, name)
                raise
        engine.spec = blueprint.hardware
        return guest

    def hardware(self, image: str, arguments: Mapping[str, object]) -> Hardware:
        """The hardware of a guest of an image.

        Args:
            arguments: what differs from the run's default, as `boot` takes it.

        Raises:
            ConfigError: there is no such image or hardware.
        """
        defaults = self.backend.settings.hardware
        if "kernel" not in arguments:
            kernel = self.backend.callbacks.kernel(defaults.kernel)
            defaults = replace(defaults, kernel=kernel)
        return self.backend.catalogue.get(image).hardware(defaults, arguments)
