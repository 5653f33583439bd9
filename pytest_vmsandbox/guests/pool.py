"""Clones of templates: whether a guest can be one, and which; armed ahead of demand.

What a test waits for is a few milliseconds.

A clone maps its template's memory and shares it until it writes. To arm it is to wake it, to run a
program in it, and to pause it again: under emulation, the first program in a clone takes ten times
as long as the next ones, since all code is translated anew.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import GuestLost, LaunchError, MonitorError, VMSandboxError
from pytest_vmsandbox.core.spec import MIB, Hardware
from pytest_vmsandbox.guests import resume
from pytest_vmsandbox.guests.access import refusal
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.commands import Command
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.helper import Helper
from pytest_vmsandbox.guests.machines import Machines, Running, check_network
from pytest_vmsandbox.guests.provision import PreparedImage, Step
from pytest_vmsandbox.guests.template_builder import (
    NoTemplateError,
    OpenTemplate,
    TemplateBuilder,
    template_key,
)
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.quota import Quota

CLAIM = 128 * MIB  # of the host's memory, for a clone
_DEPTH = 3  # clones that are kept ahead for each kind of guest, where so many are expected
_HEAD_START_SECONDS = 0.03  # that a clone has the processors to itself, if more are armed
_IDLE_SECONDS = 60.0  # after which clones that nobody took are given up
_EXERCISE = Command(argv=("true",))
_EXERCISE_SECONDS = 60.0
_UNUSED_PORT = 1  # nobody listens there
_REFUSAL_SECONDS = 2.0
_STOP_SECONDS = 30.0
_MOST_LOST = 3  # clones in a row that are lost before anybody has them; then guests are booted


@dataclass(frozen=True, kw_only=True)
class Clone:
    """A guest that was cloned, and nobody has used.

    Attributes:
        is_armed: whether a program has run in it, and it is paused; else it runs.
        machines: its own; they have switched it on.
        running: its machine now.
        helper: the one in it.
        stack: ends all of it.
    """

    is_armed: bool
    machines: Machines
    running: Running
    helper: Helper
    stack: ExitStack


@dataclass(kw_only=True)
class _Kind:
    """Clones that could stand in for each other: of one template, on one network.

    Attributes:
        expected: how many more are going to be asked for, as far as is known.
        leased: how many were.
        arming: how many are under way.
        failure: why none can be armed.
        last: when the last one was taken.
        head_start: of who has taken it.
        is_forgotten: the template is not to be used any more.
    """

    opened: OpenTemplate
    blueprint: Blueprint
    armed: deque[Clone] = field(default_factory=deque)
    expected: int = 0
    leased: int = 0
    arming: int = 0
    failure: VMSandboxError | None = None
    last: Deadline = field(default_factory=lambda: Deadline(_IDLE_SECONDS))
    head_start: Deadline = field(default_factory=lambda: Deadline(0))
    is_forgotten: bool = False

    @property
    def pause(self) -> float:
        """Seconds until a further clone should be armed."""
        return self.head_start.remaining() if self.armed else 0.0


class Pool:
    """Arms clones ahead of demand; at the end of its context all that nobody took are gone.

    Args:
        fillers: threads that do so.
    """

    def __init__(self, backend: Backend, quota: Quota, fillers: int = 2) -> None:
        self._backend = backend
        self._quota = quota
        self._kinds: dict[tuple[str, str], _Kind] = {}  # by template and network
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._fill, name="vmsandbox-filler", daemon=True)
            for _ in range(fillers)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_STOP_SECONDS)
        for kind in self._kinds.values():
            self._empty(kind)

    def expect(self, opened: OpenTemplate, blueprint: Blueprint, count: int) -> None:
        """Be told that so many more clones of a template are going to be asked for."""
        with self._changed:
            kind = self._kind(opened, blueprint)
            kind.expected += count
            kind.last = Deadline(_IDLE_SECONDS)
            self._start()

    @contextmanager
    def lease(
        self, opened: OpenTemplate, blueprint: Blueprint, *, more: bool
    ) -> Iterator[tuple[Clone, bool]]:
        """A clone of a template, running; it is gone at the end.

        Args:
            more: whether it may be taken for a sign that more will be asked for.
            blueprint: of the clone. It differs from the template's at most in what only this side
                knows of, such as the network.

        Yields:
            The clone, and whether it had been armed before it was asked for.

        Raises:
            VMSandboxError: none can be made.
        """
        clone, was_armed = self._take(opened, blueprint, more=more)
        try:
            with clone.stack:
                if clone.is_armed:
                    resume.from_pause(clone.running.machine, clone.helper)
                yield clone, was_armed
        finally:
            self._quota.release(CLAIM)

    def await_armed(self, timeout: float) -> bool:
        """Wait until as many clones are armed as are to be kept ahead; whether they are."""

        def all_armed() -> bool:
            under_way = any(kind.arming for kind in self._kinds.values())
            return self._wanting() is None and not under_way

        with self._changed:
            return self._changed.wait_for(all_armed, timeout)

    def forget(self, opened: OpenTemplate) -> int:
        """Give up what was cloned from a template.

        Returns:
            How many more clones were expected.
        """
        expected = 0
        with self._changed:
            for key in [key for key in self._kinds if key[0] == opened.template.key]:
                kind = self._kinds.pop(key)
                kind.is_forgotten = True
                expected += kind.expected
                self._empty(kind)
        return expected

    def _start(self) -> None:
        """Let the fillers look for something to do; the condition is held."""
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
        self._changed.notify_all()

    def _take(
        self, opened: OpenTemplate, blueprint: Blueprint, *, more: bool
    ) -> tuple[Clone, bool]:
        with self._changed:
            kind = self._kind(opened, blueprint)
            if more:
                kind.leased += 1
                self._start()
            kind.expected = max(0, kind.expected - 1)
            kind.last = Deadline(_IDLE_SECONDS)
            kind.head_start = Deadline(_HEAD_START_SECONDS)
            was_armed = bool(kind.armed)
            while kind.arming and not kind.armed and kind.failure is None:
                self._changed.wait()
            if (clone := self._pick(kind)) is not None:
                self._changed.notify_all()
                return clone, was_armed
            kind.failure = None
            self._changed.notify_all()
        return self._made(opened, blueprint, arm=False), False

    def _made(self, opened: OpenTemplate, blueprint: Blueprint, *, arm: bool) -> Clone:
        """A clone whose memory is claimed."""
        if not self._quota.claim(CLAIM, spare=arm):
            raise LaunchError("there is no room for a further clone")
        try:
            with self._quota.processor() if arm else nullcontext():
                return self._clone(opened, blueprint, arm=arm)
        except BaseException:
            self._quota.release(CLAIM)
            raise

    def _pick(self, kind: _Kind) -> Clone | None:
        """An armed clone that is still there; the condition is held."""
        while kind.armed:
            clone = kind.armed.popleft()
            if clone.running.machine.ended() is None:
                return clone
            self._give_up(clone)  # something has killed its QEMU
        return None

    def _kind(self, opened: OpenTemplate, blueprint: Blueprint) -> _Kind:
        key = opened.template.key, blueprint.hardware.network
        return self._kinds.setdefault(key, _Kind(opened=opened, blueprint=blueprint))

    # -- filling ------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """What a filler does."""
        while True:
            with self._changed:
                kind = self._wanting()
                while not self._stopped and (kind is None or kind.pause):
                    self._changed.wait(_IDLE_SECONDS / 4 if kind is None else kind.pause)
                    self._shrink()
                    kind = self._wanting()
                if self._stopped:
                    return
                assert kind is not None
                kind.arming += 1
            clone, failure = self._armed(kind)
            with self._changed:
                kind.arming -= 1
                kind.failure = failure
                if clone is not None:
                    kind.armed.append(clone)
                if kind.is_forgotten:  # meanwhile
                    self._empty(kind)
                self._changed.notify_all()

    def _armed(self, kind: _Kind) -> tuple[Clone | None, VMSandboxError | None]:
        """An armed clone; or why there is none."""
        try:
            return self._made(kind.opened, kind.blueprint, arm=True), None
        except VMSandboxError as error:
            return None, error
        except Exception as error:  # noqa: BLE001  # else a filler would die without a word
            return None, LaunchError(f"a clone could not be armed: {error!r}")

    def _wanting(self) -> _Kind | None:
        """The kind that wants a clone most, or None; the condition is held."""
        best, need = None, 0
        for kind in self._kinds.values():
            ahead = min(_DEPTH, kind.expected) or (1 if kind.leased > 1 else 0)
            missing = ahead - len(kind.armed) - kind.arming
            if missing > need and kind.failure is None and not kind.last.expired:
                best, need = kind, missing
        return best

    def _shrink(self) -> None:
        """Give up clones that nobody takes; the condition is held."""
        for kind in self._kinds.values():
            if kind.last.expired:
                self._empty(kind)

    def _empty(self, kind: _Kind) -> None:
        while kind.armed:
            self._give_up(kind.armed.popleft())

    def _give_up(self, clone: Clone) -> None:
        clone.stack.close()
        self._quota.release(CLAIM)

    def _clone(self, opened: OpenTemplate, blueprint: Blueprint, *, arm: bool) -> Clone:
        """A clone of a template.

        Args:
            arm: whether it is armed; else it runs.

        Raises:
            VMSandboxError: it cannot be made, or something in it cannot be put right.
        """
        hypervisor, template = self._backend.hypervisor, opened.template
        name = self._backend.name(blueprint.image)
        logs = self._backend.callbacks.logs(name)
        with ExitStack() as stack:
            try:
                state = stack.enter_context(template.state())
                disks = stack.enter_context(blueprint.disks(hypervisor.cache, template.layers))
            except OSError as error:
                raise LaunchError(
                    f"the template of {blueprint.image} cannot be read: {error}"
                ) from error
            opened.check_current()
            machines = Machines(
                blueprint, hypervisor, name=name, key=opened.key, disks=disks, logs=logs
            )
            # A clone of a damaged template may not answer for minutes.
            running = machines.clone(opened.memory, state, opened.check)
            stack.push(running.stack)
            state.close()  # it is loaded
            helper = _put_right(running, opened, blueprint)
            if arm:
                _arm(running.machine, helper, blueprint)
            return Clone(
                is_armed=arm,
                machines=machines,
                running=running,
                helper=helper,
                stack=stack.pop_all(),
            )


def _put_right(running: Running, opened: OpenTemplate, blueprint: Blueprint) -> Helper:
    """Give a clone what is its own, and see that the first one is reached through its network.

    Its kernel refuses a connection at once. Its SSH server takes 0.25 s to greet where it is emulated,
    so that is waited for only where nothing is refused, as by a firewall.

    Returns:
        Its helper.

    Raises:
        GuestLost: it is not reached, or something in it cannot be put right.
    """
    machine, helper = running.machine, running.helper
    if helper is None:
        raise GuestLost(f"the helper in {machine.spec.name} is gone", stage="command")
    if not opened.checked.is_set():

        def check() -> None:
            machine.check()
            opened.check()

        if not refusal(machine.forward(_UNUSED_PORT), _REFUSAL_SECONDS):
            check_network(machine, blueprint, check)
        opened.checked.set()
    is_systemd = blueprint.built.definition.init == "systemd"
    resume.rename(helper, machine.spec.name, in_files=is_systemd)
    return helper


def _arm(machine: Machine, helper: Helper, blueprint: Blueprint) -> None:
    """Run a program in a clone, and pause it."""
    process = helper.start(_EXERCISE)
    process.communicate(None, _ignore, _ignore, blueprint.stretch(_EXERCISE_SECONDS))
    process.close()
    machine.pause()


def _ignore(_: bytes) -> None:
    """Output that nobody wants."""


class Clones:
    """The clones of one run. Guests of a kind that cannot be cloned have to be booted."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._impossible: set[str] = set()  # keys of templates that cannot be
        self._expected: Counter[tuple[PreparedImage, Hardware]] = Counter()

    def expect(self, prepared: PreparedImage, hardware: Hardware, count: int) -> None:
        """Be told that so many guests of a kind are going to be asked for."""
        self._expected[prepared, hardware] += count

    def build_template(self, blueprint: Blueprint, steps: Sequence[Step]) -> None:
        """See that guests can be cloned, where any can."""
        if self._may_clone(blueprint, steps):
            try:
                self._builder.obtain(blueprint, steps)
            except NoTemplateError as error:
                self._fall_back(blueprint, steps, error)

    def guest(
        self, blueprint: Blueprint, prepared: PreparedImage, stack: ExitStack
    ) -> Guest | None:
        """A guest that is a clone, running; None where it has to be booted.

        Args:
            stack: ends it.

        Raises:
            VMSandboxError: the host or chance took it away, or it cannot be prepared.
        """
        if not self._may_clone(blueprint, prepared.steps):
            return None
        try:
            opened, clone, was_armed = self._lease(blueprint, prepared, stack)
        except (LaunchError, GuestLost, MonitorError) as error:
            if error.transient:
                raise
            self._fall_back(blueprint, prepared.steps, error)
            return None
        self._backend.callbacks.guest_begun(clone.machines.name)
        engine = self._backend.engine(clone.machines)
        engine.spec = blueprint.hardware  # its user may be another one
        engine.origin = "armed" if was_armed else "cloned"
        engine.facts = opened.template.facts
        return Guest(stack.enter_context(engine))

    def _lease(
        self, blueprint: Blueprint, prepared: PreparedImage, stack: ExitStack
    ) -> tuple[OpenTemplate, Clone, bool]:
        """A clone of a template that is what it was when it was built."""
        ahead = self._backend.settings.clones == "armed"
        kind = prepared, blueprint.hardware
        lost: list[VMSandboxError] = []
        while len(lost) < _MOST_LOST:
            opened = self._builder.obtain(blueprint, prepared.steps)
            count = self._expected.pop(kind, 0)
            if ahead and count:
                self.pool.expect(opened, blueprint, count)
            own = stack.enter_context(ExitStack())
            try:
                leased = own.enter_context(self.pool.lease(opened, blueprint, more=ahead))
            except VMSandboxError as error:
                failure, fault = error, opened.fault(anew=True)
                # A host with too much to do may lose one.
                if not (fault or failure.transient or isinstance(failure, GuestLost)):
                    raise
            else:
                if not (fault := opened.fault(anew=False)):
                    return opened, *leased
                failure = LaunchError("its template was damaged", details=fault)
            lost.append(failure)
            if fault:
                own.close()
                self._expected[kind] = self.pool.forget(opened) + 1  # this one
                self._builder.drop(opened, fault)
        raise LaunchError(
            f"{len(lost)} clones in a row were lost, the last one so: {lost[-1].brief}",
            details=lost[-1].details,
            remedy=lost[-1].remedy,
        ) from lost[-1]

    def _may_clone(self, blueprint: Blueprint, steps: Sequence[Step]) -> bool:
        is_possible = template_key(blueprint, steps) not in self._impossible
        return self._backend.settings.clones != "never" and is_possible

    def _fall_back(
        self, blueprint: Blueprint, steps: Sequence[Step], error: VMSandboxError
    ) -> None:
        """Let guests of a kind be booted from now on, and say so once."""
        self._impossible.add(template_key(blueprint, steps))
        self._backend.callbacks.tell(
            f"guests of {blueprint.image} are booted one by one, not cloned: {error.brief}"
        )

    @cached_property
    def _builder(self) -> TemplateBuilder:
        """Made once, and ended after the pool."""
        self._backend.clean()
        return self._backend.stack.enter_context(TemplateBuilder(self._backend))

    @cached_property
    def pool(self) -> Pool:
        """Arms clones ahead of demand."""
        quota = Quota(self._backend.hypervisor.folder)
        return self._backend.stack.enter_context(Pool(self._backend, quota))
