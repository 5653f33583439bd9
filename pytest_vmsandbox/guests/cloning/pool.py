"""Arms clones ahead of demand, so a test waits only a few milliseconds."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, Self

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import LaunchError, VMSandboxError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.cloning.making import Clone
from pytest_vmsandbox.guests.cloning.template_builder import OpenTemplate
from pytest_vmsandbox.guests.running import resume
from pytest_vmsandbox.machine.quota import Quota

CLAIM = 128 * MIB  # of the host's memory, for a clone
_DEPTH = 3  # armed clones for each kind of guest, if that many are expected
_HEAD_START_SECONDS = 0.03  # in which a leased clone has the CPUs to itself, if more are armed
IDLE_SECONDS = 60.0  # after which unused clones are ended
_STOP_SECONDS = 30.0


@dataclass(kw_only=True)
class _Kind:
    """Interchangeable clones: of one template, on one network.

    Attributes:
        expected: how many more will be asked for, as far as we know.
        leased: how many were leased.
        arming: how many are being armed.
        failure: why none can be armed.
        last: when the last one was leased.
        head_start: of the last leased clone.
        is_forgotten: whether the template must not be used any more.
    """

    opened: OpenTemplate
    blueprint: Blueprint
    armed: deque[Clone] = field(default_factory=deque)
    expected: int = 0
    leased: int = 0
    arming: int = 0
    failure: VMSandboxError | None = None
    last: Deadline = field(default_factory=lambda: Deadline(IDLE_SECONDS))
    head_start: Deadline = field(default_factory=lambda: Deadline(0))
    is_forgotten: bool = False

    @property
    def pause(self) -> float:
        """Seconds until another clone should be armed."""
        return self.head_start.remaining() if self.armed else 0.0


class MakeClone(Protocol):
    """Makes a clone of a template, armed or running."""

    def __call__(self, opened: OpenTemplate, blueprint: Blueprint, *, arm: bool) -> Clone: ...


class Pool:
    """Arms clones ahead of demand. At the end of its context, unused clones are ended.

    Args:
        clone: makes a clone; see `cloning.cloned`.
        fillers: the number of threads that arm clones.
    """

    def __init__(self, clone: MakeClone, quota: Quota, fillers: int = 2) -> None:
        self._clone = clone
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
        """Note that `count` more clones of a template will be asked for."""
        with self._changed:
            kind = self._kind(opened, blueprint)
            kind.expected += count
            kind.last = Deadline(IDLE_SECONDS)
            self._start()

    @contextmanager
    def lease(
        self, opened: OpenTemplate, blueprint: Blueprint, *, more: bool
    ) -> Iterator[tuple[Clone, bool]]:
        """A running clone of a template. It is ended at the end.

        Args:
            more: whether this lease means that more may follow.
            blueprint: of the clone. It may differ from the template's only in what the guest does not
                know, such as the network.

        Yields:
            The clone, and whether it was armed before this call.

        Raises:
            VMSandboxError: no clone can be made.
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
        """Wait until as many clones are armed as wanted. Returns whether they are."""

        def all_armed() -> bool:
            under_way = any(kind.arming for kind in self._kinds.values())
            return self._wanting() is None and not under_way

        with self._changed:
            return self._changed.wait_for(all_armed, timeout)

    def forget(self, opened: OpenTemplate) -> int:
        """End the unused clones of a template.

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
        """Wake the fillers. The condition is held."""
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
            kind.last = Deadline(IDLE_SECONDS)
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
        self._quota.require(CLAIM, spare=arm)
        try:
            with self._quota.processor() if arm else nullcontext():
                return self._clone(opened, blueprint, arm=arm)
        except BaseException:
            self._quota.release(CLAIM)
            raise

    def _pick(self, kind: _Kind) -> Clone | None:
        """An armed clone whose QEMU still runs. The condition is held."""
        while kind.armed:
            is_over = kind.armed[0].running.machine.ended() is not None  # Ctrl-C may end this call
            clone = kind.armed.popleft()
            if not is_over:
                return clone
            self._give_up(clone)  # something has killed its QEMU
        return None

    def _kind(self, opened: OpenTemplate, blueprint: Blueprint) -> _Kind:
        key = opened.template.key, blueprint.hardware.network
        return self._kinds.setdefault(key, _Kind(opened=opened, blueprint=blueprint))

    # -- filling ------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Arm clones. Runs in each filler."""
        while True:
            with self._changed:
                kind = self._wanting()
                while not self._stopped and (kind is None or kind.pause):
                    self._changed.wait(IDLE_SECONDS / 4 if kind is None else kind.pause)
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
        """An armed clone, or the error."""
        try:
            return self._made(kind.opened, kind.blueprint, arm=True), None
        except VMSandboxError as error:
            return None, error
        except Exception as error:  # noqa: BLE001  # else a filler would end silently
            return None, LaunchError(f"a clone could not be armed: {error!r}")

    def _wanting(self) -> _Kind | None:
        """The kind that needs a clone most, or None. The condition is held."""
        best, need = None, 0
        for kind in self._kinds.values():
            ahead = min(_DEPTH, kind.expected) or (1 if kind.leased > 1 else 0)
            missing = ahead - len(kind.armed) - kind.arming
            if missing > need and kind.failure is None and not kind.last.expired:
                best, need = kind, missing
        return best

    def _shrink(self) -> None:
        """End clones of kinds that are not in use any more. The condition is held."""
        for kind in self._kinds.values():
            if kind.last.expired:
                self._empty(kind)

    def _empty(self, kind: _Kind) -> None:
        while kind.armed:
            self._give_up(kind.armed.popleft())

    def _give_up(self, clone: Clone) -> None:
        clone.stack.close()
        self._quota.release(CLAIM)
