"""Builds templates: boots a guest once, prepares it, and saves it when it is quiet."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from pytest_vmsandbox.cache import copying
from pytest_vmsandbox.cache.store import IN_USE, PRIVATE_KEY
from pytest_vmsandbox.catalogue.store import DISK, damaged
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import (
    CacheError,
    ImageError,
    LaunchError,
    MonitorError,
)
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.images import root_disk, started
from pytest_vmsandbox.guests.provision import Facts, Step
from pytest_vmsandbox.guests.reaching import helper_setup
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.reaching.helper_setup import HelperSetup
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.guests.running.plugging import refuse_left
from pytest_vmsandbox.guests.templates import (
    CONSOLE,
    MEMORY,
    STATE,
    NoTemplateError,
    Template,
    TemplateStore,
    layer_name,
)
from pytest_vmsandbox.machine import host, memory
from pytest_vmsandbox.machine.disk import Disks

_QUIET_SECONDS = 0.5  # the interval in which we measure a guest's CPU time
_QUIET_SHARE = 0.15  # of a CPU; an idle guest takes about 0.04 under emulation
_SETTLE_SECONDS = 120.0  # after which a guest is saved even if it is not quiet
_TRIES = 3  # to get a template that is not damaged, and that nobody else removes


class _StepError(Exception):
    """A step raised an error, which is the argument. The builder is not to blame."""


def template_key(blueprint: Blueprint, steps: Sequence[Step]) -> str:
    """The key of the template of guests after these steps."""
    hardware, user = blueprint.hardware, blueprint.built.definition.user
    parts: list[object] = [blueprint.digest, helper_setup.digest()]
    for step in steps:
        whose = [hardware.user] if step.personal and hardware.user != user else []
        parts.append([step.digest, step.network or hardware.network, *whose])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class OpenTemplate:
    """A template that is open in this process, for clones.

    Attributes:
        template: the template.
        about: its name for people.
        key: opens the clones.
        memory: the clones' memory, which they cannot change.
        console: what its guest has written to the console.
        lock: the descriptor of the template's lock.
        damage: what is damaged, once that is known; see `Template.damage`. It raises `ImageError` if
            the image below is damaged.
        checked: is set when the network of its first clone was checked.
        stack: closes the template.
    """

    template: Template
    about: str
    key: KeyPair
    memory: IO[bytes]
    console: str
    lock: int
    damage: Future[str]
    stack: ExitStack
    checked: threading.Event = field(default_factory=threading.Event)

    def fault(self, *, again: bool) -> str:
        """What is wrong with the template, after all of it was read; empty if nothing is.

        Args:
            again: read it again, because a clone failed.

        Raises:
            ImageError: the image below it is damaged.
        """
        if error := self.damage.exception():
            raise error.with_traceback(None)  # else it would grow with each test
        return self.damage.result() or (self.template.damage() if again else "")

    def check(self) -> None:
        """Check for known damage. It is quick enough to be called often.

        Raises:
            LaunchError: the template, or the image below it, is known to be damaged.
        """
        if self.damage.done() and (self.damage.exception() or self.damage.result()):
            raise LaunchError(f"the template of {self.about} is damaged")

    def check_current(self) -> None:
        """Check that files that were opened by name belong to this template.

        Raises:
            LaunchError: another run has removed it, and may have built it again.
        """
        with suppress(OSError):
            if os.path.samestat(os.fstat(self.lock), (self.template.folder / IN_USE).stat()):
                return
        raise LaunchError(f"another run has removed the template of {self.about}")


class TemplateBuilder:
    """Builds and opens templates, until the end of its context."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._callbacks = backend.callbacks
        self._store = TemplateStore(backend.cache)
        self._open: dict[str, OpenTemplate] = {}
        self._digests = ThreadPoolExecutor(1, thread_name_prefix="vmsandbox-digest")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._open.values():
            opened.stack.close()
        self._digests.shutdown(wait=False, cancel_futures=True)

    def obtain(self, blueprint: Blueprint, steps: Sequence[Step] = ()) -> OpenTemplate:
        """The open template of guests after `steps`. It is built if it is missing.

        Raises:
            NoTemplateError: it cannot be built.
            ImageError: the image is damaged.
            VMSandboxError: the guest does not boot, or a step failed.
        """
        if why := blueprint.unsaved:
            raise NoTemplateError(why, reason="qemu")
        key = template_key(blueprint, steps)
        if key not in self._open:
            self._open[key] = self._opened(key, blueprint, steps)
        return self._open[key]

    def drop(self, opened: OpenTemplate, fault: str) -> None:
        """Close and remove a template with a fault. It is built again when it is needed."""
        self._open.pop(opened.template.key, None)
        opened.stack.close()
        self._throw_away(opened.template, opened.about, fault)

    def _throw_away(self, template: Template, about: str, fault: str) -> None:
        if self._store.throw_away(template.key, template):
            self._tell_of_damage(about, fault)

    def _tell_of_damage(self, about: str, fault: str) -> None:
        self._callbacks.tell(f"the template of {about} was damaged ({fault}), so it is built again")

    def _opened(self, key: str, blueprint: Blueprint, steps: Sequence[Step]) -> OpenTemplate:
        about = _about(blueprint, steps)
        for _ in range(_TRIES):
            template = self._store.get(key) or self._made(key, blueprint, steps)
            with ExitStack() as stack:
                try:
                    lock = stack.enter_context(self._store.hold(template.folder))
                    damage = self._digests.submit(self._damage, template, blueprint)
                    shared = memory.for_clones(template.memory, blueprint.qemu.version)
                    return OpenTemplate(
                        template=template,
                        about=about,
                        key=KeyPair.of(template.private_key),
                        memory=stack.enter_context(shared),
                        console=template.console,
                        lock=lock,
                        damage=damage,
                        stack=stack.pop_all(),
                    )
                except (OSError, ValueError) as error:
                    if not (fault := template.damage()):
                        raise NoTemplateError(
                            f"the template of {about} cannot be opened: {error}"
                        ) from error
                    self._throw_away(template, about, fault)
        raise NoTemplateError(f"the template of {about} was damaged {_TRIES} times in a row")

    def _damage(self, template: Template, blueprint: Blueprint) -> str:
        if damage := template.damage():
            return damage
        disk = blueprint.built.verified().get(DISK, "")
        if template.disk not in ("", disk):
            name = blueprint.built.folder / DISK
            what = f"{name} has changed since a template of it was built"
            raise damaged(blueprint.built.definition, what)
        return ""

    def _made(self, key: str, blueprint: Blueprint, steps: Sequence[Step]) -> Template:
        blueprint.built.verified()
        about = _about(blueprint, steps)
        waits = f"waiting: another run is building the template of {about}"

        def fill(folder: Path, _lock: int) -> dict[str, object]:
            if why := self._store.unreadable(key):
                self._tell_of_damage(about, why)
            self._callbacks.say(
                f"preparing {about}. This is done once, and again if its inputs change"
            )
            with ExitStack() as stack:
                below = self._below(blueprint, steps[:-1], stack) if steps else None
                return self._build(folder, blueprint, steps, below)

        try:
            return self._store.make(key, fill, on_busy=lambda: self._callbacks.say(waits))
        except _StepError as failed:
            raise failed.args[0] from None
        except (CacheError, ImageError, MonitorError) as error:
            if error.transient:
                raise
            raise NoTemplateError(
                f"the template of {blueprint.image} could not be built: {error.brief}",
                details=error.details,
            ) from error

    def _below(self, blueprint: Blueprint, steps: Sequence[Step], stack: ExitStack) -> Template:
        """The undamaged template that another one is made from. `stack` holds it."""
        key, about = template_key(blueprint, steps), _about(blueprint, steps)
        for _ in range(_TRIES):
            template = self._store.get(key) or self._made(key, blueprint, steps)
            with ExitStack() as own:
                with suppress(FileNotFoundError):  # it, or its lock, is gone
                    own.enter_context(self._store.hold(template.folder))
                if not (fault := template.damage()):
                    stack.push(own.pop_all())
                    return template
            self._throw_away(template, about, fault)
        raise NoTemplateError(f"the template of {about} was damaged {_TRIES} times in a row")

    def _build(
        self, folder: Path, blueprint: Blueprint, steps: Sequence[Step], below: Template | None
    ) -> dict[str, object]:
        hypervisor, hardware = self._backend.hypervisor, blueprint.hardware
        name = below.name if below is not None else blueprint.image
        pair = KeyPair.of(below.private_key) if below else KeyPair.for_image(blueprint.built.key)
        identity = host.guest_identity(blueprint.verdict.accelerator)
        known_as = self._backend.name(f"{blueprint.image}-prepared")
        self._callbacks.guest_begun(known_as)
        with ExitStack() as stack:
            ram = stack.enter_context(memory.reserved(folder / MEMORY, hardware.memory))
            if below is not None:
                with below.memory.open("rb", buffering=0) as source:
                    copying.copy(source, ram)
            if identity is not None:  # QEMU opens the file itself, as that user
                os.fchown(ram.fileno(), identity.uid, identity.gid)
            disks = stack.enter_context(
                blueprint.disks(hypervisor.cache, below.layers if below is not None else ())
            )
            machines = Machines(
                _as_built(blueprint, steps),
                hypervisor,
                name=name,
                key=pair,
                disks=disks,
                logs=self._callbacks.logs(known_as),  # for the test that waits for the template
                memory=ram,
                state=None if below is None else stack.enter_context(below.state()),
                console="" if below is None else below.console,
                setup=self._helper_setup(blueprint, below),
            )
            facts: Facts = None
            with self._backend.engine(machines) as engine:
                guest = Guest(engine)
                if steps:
                    try:
                        facts = steps[-1].run(guest)
                        refuse_left(engine)
                    except Exception as error:
                        self._callbacks.preparation_failed(guest, known_as)
                        raise _StepError(error) from error
                else:
                    grow(guest, blueprint)
                if not engine.has_helper:
                    raise NoTemplateError(f"the helper in {engine.name} is gone", reason="silent")
                settle(guest, blueprint)
                with (folder / STATE).open("x+b", buffering=0) as state:
                    console = engine.save_devices(state)
            os.fchown(ram.fileno(), os.geteuid(), os.getegid())
            layers = _keep_layers(folder, disks, below)
        (folder / CONSOLE).write_text(console, "utf-8", "replace")
        pair.save(folder / PRIVATE_KEY)
        return {
            "image": blueprint.image,
            "name": name,
            "layers": layers,
            "disk": below.disk if below is not None else blueprint.built.verified().get(DISK, ""),
            "facts": dict(facts or {}),
            "helper": {} if machines.setup is None else machines.setup.record(),
        }

    def _helper_setup(self, blueprint: Blueprint, below: Template | None) -> HelperSetup:
        """How the guest gets a helper, if it has none of its own."""
        kept = {} if below is None else below.helper
        setup = HelperSetup.of(blueprint, self._backend.cache, kept)
        setup.strict, setup.say = True, self._callbacks.say
        return setup


def _about(blueprint: Blueprint, steps: Sequence[Step]) -> str:
    """The name of a template for people."""
    return f"{blueprint.image} ({steps[-1].about})" if steps else blueprint.image


def _as_built(blueprint: Blueprint, steps: Sequence[Step]) -> Blueprint:
    """The blueprint for building a template: with the network and the user of the last step."""
    if not steps:
        return blueprint.with_user(blueprint.built.definition.user)
    network = steps[-1].network
    if network is not None:
        blueprint = blueprint.with_network(network)
    return blueprint.with_user(doer(blueprint, steps[-1]))


def doer(blueprint: Blueprint, step: Step) -> str:
    """The guest's user who does a step."""
    return blueprint.hardware.user if step.personal else blueprint.built.definition.user


def settle(guest: Guest, blueprint: Blueprint) -> None:
    """Wait until a guest is quiet, so its clones are quiet, too.

    Before that, run once what every test needs, so it is in the guest's memory.

    Raises:
        BootError: its system is in emergency mode.
    """
    init = blueprint.built.definition.init
    started.await_started(guest, init)
    if init == "systemd":
        guest.run(["udevadm", "settle"], check=False, user="root")
        guest.run(["pkill", "-x", r"\(udev-worker\)"], check=False, user="root")
    for _ in range(2):
        guest.run(["true"])
        guest.shell(":")
    guest.run(["sync"], user="root")
    deadline = Deadline(_SETTLE_SECONDS)
    calm = 0
    while calm < 2 and not deadline.expired:
        before = guest.engine.processor_seconds
        deadline.pause(_QUIET_SECONDS)
        taken = guest.engine.processor_seconds - before
        calm = calm + 1 if taken < _QUIET_SHARE * _QUIET_SECONDS else 0


def grow(guest: Guest, blueprint: Blueprint) -> None:
    """Grow the root file system to a disk that is larger than the image's."""
    size = blueprint.hardware.disk
    if size is not None and size != blueprint.built.definition.disk_size:
        root_disk.grow(guest)


def _keep_layers(folder: Path, disks: Disks, below: Template | None) -> list[list[str]]:
    """Put into the folder what was written to each disk: linked lower layers, and the new layer."""
    layers = []
    for disk, files in enumerate(disks.overlays):
        names = [layer_name(disk, depth) for depth in range(len(files))]
        for depth, name in enumerate(names[:-1]):
            assert below is not None
            copying.link(below.layers[disk][depth], folder / name)
        copying.copy_to(files[-1], folder / names[-1])
        layers.append(names)
    return layers
