"""Clones of sealed guests, armed ahead of demand: what a test waits for is a few milliseconds.

A clone maps its template's memory and shares it until it writes. To arm it is to wake it, to run a
program in it, and to pause it again: under emulation, the first program in a clone takes ten times
as long as the next ones, since all code is translated anew.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import LaunchError, VMSandboxError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.core.transport import Command
from pytest_vmsandbox.guests import waking
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.engine import check_network, helper_of
from pytest_vmsandbox.guests.sealing import Sealed
from pytest_vmsandbox.guests.waking import Awake
from pytest_vmsandbox.machine.cmdline import Start
from pytest_vmsandbox.machine.disk import Disks
from pytest_vmsandbox.machine.hypervisor import Hypervisor
from pytest_vmsandbox.machine.quota import Quota

CLAIM = 128 * MIB  # of the host's memory, for a clone
_DEPTH = 3  # clones that are kept ahead for each kind of guest, where so many are expected
_HEAD_START_SECONDS = 0.03  # that a clone has the processors to itself, if more are armed
_IDLE_SECONDS = 60.0  # after which clones that nobody took are given up
_EXERCISE = Command(argv=("true",))
_EXERCISE_SECONDS = 60.0
_STOP_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Clone:
    """A guest that was cloned, and nobody has used.

    Attributes:
        is_armed: whether a program has run in it, and it is paused; else it runs.
        name: the guest's.
        awake: its machine.
        disks: its own.
        logs: the folder for its logs, or None.
        stack: ends all of it.
    """

    is_armed: bool
    name: str
    awake: Awake
    disks: Disks
    logs: Path | None
    stack: ExitStack


@dataclass(kw_only=True)
class _Shelf:
    """The armed clones of one template.

    Attributes:
        expected: how many more are going to be asked for, as far as is known.
        leased: how many were.
        arming: how many are under way.
        failure: why none can be armed.
        last: when the last one was taken.
        head_start: of who has taken it.
        is_forgotten: the template is not to be used any more.
    """

    sealed: Sealed
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
    """Arms clones ahead of demand.

    Args:
        fillers: threads that do so.
        name: gives a name for a guest of an image.
        logs: gives the folder for its logs, or None.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        quota: Quota,
        *,
        fillers: int,
        name: Callable[[str], str],
        logs: Callable[[str], Path | None],
    ) -> None:
        self._hypervisor = hypervisor
        self._ledger = quota
        self._name = name
        self._logs = logs
        self._shelves: dict[tuple[str, str], _Shelf] = {}  # by template and network
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._fill, name="vmsandbox-filler", daemon=True)
            for _ in range(fillers)
        ]

    @classmethod
    @contextmanager
    def running(
        cls,
        hypervisor: Hypervisor,
        quota: Quota,
        *,
        fillers: int,
        name: Callable[[str], str],
        logs: Callable[[str], Path | None],
    ) -> Iterator[Pool]:
        """A pool that fills itself; at the end all clones that nobody took are gone."""
        pool = cls(hypervisor, quota, fillers=fillers, name=name, logs=logs)
        try:
            yield pool
        finally:
            pool._stop()

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_STOP_SECONDS)
        for shelf in self._shelves.values():
            self._empty(shelf)

    def expect(self, sealed: Sealed, blueprint: Blueprint, count: int) -> None:
        """Be told that so many more clones of a template are going to be asked for."""
        with self._changed:
            shelf = self._shelf(sealed, blueprint)
            shelf.expected += count
            shelf.last = Deadline(_IDLE_SECONDS)
            self._start()

    @contextmanager
    def lease(
        self, sealed: Sealed, blueprint: Blueprint, *, more: bool
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
        clone, was_armed = self._take(sealed, blueprint, more=more)
        try:
            with clone.stack:
                if clone.is_armed:
                    waking.resume(clone.awake.machine, clone.awake.helper)
                yield clone, was_armed
        finally:
            self._ledger.release(CLAIM)

    def await_armed(self, timeout: float) -> bool:
        """Wait until as many clones are armed as are to be kept ahead; whether they are."""
        with self._changed:
            return self._changed.wait_for(
                lambda: (
                    self._wanting() is None and not any(it.arming for it in self._shelves.values())
                ),
                timeout,
            )

    def forget(self, sealed: Sealed) -> int:
        """Give up what was cloned from a template.

        Returns:
            How many more clones were expected.
        """
        expected = 0
        with self._changed:
            for kind in [kind for kind in self._shelves if kind[0] == sealed.template.key]:
                shelf = self._shelves.pop(kind)
                shelf.is_forgotten = True
                expected += shelf.expected
                self._empty(shelf)
        return expected

    def _start(self) -> None:
        """Let the fillers look for something to do; the condition is held."""
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
        self._changed.notify_all()

    def _take(self, sealed: Sealed, blueprint: Blueprint, *, more: bool) -> tuple[Clone, bool]:
        with self._changed:
            shelf = self._shelf(sealed, blueprint)
            if more:
                shelf.leased += 1
                self._start()
            shelf.expected = max(0, shelf.expected - 1)
            shelf.last = Deadline(_IDLE_SECONDS)
            shelf.head_start = Deadline(_HEAD_START_SECONDS)
            was_armed = bool(shelf.armed)
            while shelf.arming and not shelf.armed and shelf.failure is None:
                self._changed.wait()
            if (clone := self._pick(shelf)) is not None:
                self._changed.notify_all()
                return clone, was_armed
            shelf.failure = None
            self._changed.notify_all()
        self._ledger.claim(CLAIM, spare=False)
        try:
            return self._clone(sealed, blueprint, arm=False), False
        except BaseException:
            self._ledger.release(CLAIM)
            raise

    def _pick(self, shelf: _Shelf) -> Clone | None:
        """An armed clone that is still there; the condition is held."""
        while shelf.armed:
            clone = shelf.armed.popleft()
            if clone.awake.machine.ended() is None:
                return clone
            self._give_up(clone)  # something has killed its QEMU
        return None

    def _shelf(self, sealed: Sealed, blueprint: Blueprint) -> _Shelf:
        kind = sealed.template.key, blueprint.hardware.network
        if kind not in self._shelves:
            self._shelves[kind] = _Shelf(sealed=sealed, blueprint=blueprint)
        return self._shelves[kind]

    # -- filling ------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """What a filler does."""
        while True:
            with self._changed:
                shelf = self._wanting()
                while not self._stopped and (shelf is None or shelf.pause):
                    self._changed.wait(_IDLE_SECONDS / 4 if shelf is None else shelf.pause)
                    self._shrink()
                    shelf = self._wanting()
                if self._stopped:
                    return
                assert shelf is not None
                shelf.arming += 1
            clone: Clone | None = None
            failure: VMSandboxError | None = None
            claimed = False
            try:
                claimed = self._ledger.claim(CLAIM, spare=True)
                if claimed:
                    with self._ledger.processor():
                        clone = self._clone(shelf.sealed, shelf.blueprint, arm=True)
                else:
                    failure = LaunchError("there is no room for a further clone")
            except VMSandboxError as error:
                failure = error
            except Exception as error:  # noqa: BLE001  # else a filler would die without a word
                failure = LaunchError(f"a clone could not be armed: {error!r}")
            with self._changed:
                shelf.arming -= 1
                shelf.failure = failure
                if clone is not None:
                    shelf.armed.append(clone)
                elif claimed:
                    self._ledger.release(CLAIM)
                if shelf.is_forgotten:  # meanwhile
                    self._empty(shelf)
                self._changed.notify_all()

    def _wanting(self) -> _Shelf | None:
        """The shelf that wants a clone most, or None; the condition is held."""
        best, need = None, 0
        for shelf in self._shelves.values():
            ahead = min(_DEPTH, shelf.expected) or (1 if shelf.leased > 1 else 0)
            missing = ahead - len(shelf.armed) - shelf.arming
            if missing > need and shelf.failure is None and not shelf.last.expired:
                best, need = shelf, missing
        return best

    def _shrink(self) -> None:
        """Give up clones that nobody takes; the condition is held."""
        for shelf in self._shelves.values():
            if shelf.last.expired:
                self._empty(shelf)

    def _empty(self, shelf: _Shelf) -> None:
        while shelf.armed:
            self._give_up(shelf.armed.popleft())

    def _give_up(self, clone: Clone) -> None:
        clone.stack.close()
        self._ledger.release(CLAIM)

    def _clone(self, sealed: Sealed, blueprint: Blueprint, *, arm: bool) -> Clone:
        """A clone of a template.

        Args:
            arm: whether it is armed; else it runs.

        Raises:
            VMSandboxError: it cannot be made, or something in it cannot be put right.
        """
        template = sealed.template
        name = self._name(blueprint.image)
        spec = blueprint.machine(name, sealed.key.public, Start.CLONED)
        logs = self._logs(name)
        with ExitStack() as stack:
            try:
                state = template.state()
                stack.callback(state.close)
                disks = stack.enter_context(
                    blueprint.disks(self._hypervisor.cache, template.layers)
                )
            except OSError as error:
                raise LaunchError(
                    f"the template of {blueprint.image} cannot be read: {error}"
                ) from error
            sealed.check_current()
            own = ExitStack()
            machine = own.enter_context(
                blueprint.running(
                    self._hypervisor,
                    spec,
                    disks=disks,
                    logs=logs,
                    memory=sealed.memory,
                    state=state,
                )
            )
            stack.push(own)
            state.close()  # it is loaded

            def check() -> None:
                machine.check()
                sealed.check()  # a clone of a damaged template may not answer for minutes

            helper = helper_of(machine, blueprint, check)
            waking.wake(machine, helper)
            if not sealed.checked.is_set():
                check_network(machine, blueprint, check)
                sealed.checked.set()
            is_systemd = blueprint.built.definition.init == "systemd"
            waking.name(helper, name, in_files=is_systemd)
            if arm:
                process = helper.start(_EXERCISE)
                limit = blueprint.stretch(_EXERCISE_SECONDS)
                process.communicate(None, _ignore, _ignore, limit)
                process.close()
                machine.pause()
            return Clone(
                is_armed=arm,
                name=name,
                awake=Awake(machine=machine, helper=helper, stack=own),
                disks=disks,
                logs=logs,
                stack=stack.pop_all(),
            )


def _ignore(_: bytes) -> None:
    """Output that nobody wants."""
