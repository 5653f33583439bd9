"""A guest that restarts by itself: calls wait for it, and it is set up again when its helper is back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from pytest_vmsandbox.core.deadline import Deadline, wall
from pytest_vmsandbox.core.errors import GuestLost, VMSandboxError
from pytest_vmsandbox.guests.reaching.helper import Helper
from pytest_vmsandbox.guests.reaching.helper_setup import HelperSetup
from pytest_vmsandbox.machine.machine import Machine

_LOOK_SECONDS = 0.05


class Restarts:
    """The restarts of a running guest that were not asked for here.

    Args:
        setup: how the guest gets its helper; None for its own.
        seconds: for a restart, until the helper is back.
        again: sets the guest up again. It is called on a thread of its own.
    """

    def __init__(
        self,
        machine: Machine,
        helper: Helper,
        setup: HelperSetup | None,
        seconds: float,
        again: Callable[[], None],
    ) -> None:
        self._machine, self._helper, self._setup = machine, helper, setup
        self._seconds = seconds
        self._again = again
        self._known = wall()  # later ones are news
        self._settlers: list[threading.Thread] = []  # the first one sets it up, the others wait
        self._one_at_a_time = threading.Lock()
        self._returns = 0
        helper.returned = self._returned

    @property
    def is_news(self) -> bool:
        """Whether the guest has restarted, and nobody has noted that."""
        last = self._stamps()[-1:]
        return any(it["seconds"] + it["microseconds"] / 1e6 > self._known for it in last)

    @property
    def resets(self) -> int:
        """How often the machine has been reset, for whatever reason."""
        return len(self._stamps())

    def _stamps(self) -> list[dict[str, int]]:
        """When the machine was reset."""
        events = self._machine.monitor.events()
        return [event["timestamp"] for event in events if event["event"] == "RESET"]

    def note(self) -> None:
        """Note all restarts so far: the guest answers, or others wait for its answer."""
        self._known = wall()

    @property
    def goes_on(self) -> bool:
        """Whether the guest restarts, or is not set up again yet."""
        return bool(self._settlers) or self.is_news

    @property
    def is_awaited(self) -> bool:
        """Whether `await_end` would wait for the guest."""
        return self._helper.is_there and self.goes_on

    @property
    def returns(self) -> int:
        """How often the helper has come back by itself."""
        return self._returns

    def is_again_since(self, returns: int) -> bool:
        """Whether the guest has restarted once more since `returns` was that, so it is set up once more."""
        return self._returns != returns or self.is_news

    def settle(self, work: Callable[[], None]) -> None:
        """Set the guest up on this thread. Calls wait for it, and it waits for others that set it up.

        An error counts only if the guest does not restart once more: it is set up again then.

        Raises:
            VMSandboxError: what `work` has raised.
        """
        self._settlers.append(threading.current_thread())
        self._settle(work)

    def await_end(self, seconds: float | None = None) -> None:
        """Wait until the guest does not restart any more. What sets it up does not wait for itself.

        A helper that no init starts again is forgotten. Without a helper, there is nothing to wait for.

        Args:
            seconds: how long to wait; None for as long as a restart may take.

        Raises:
            GuestLost: it is gone, or has not come back.
        """
        if not self._helper.is_there or threading.current_thread() in self._settlers:
            return
        if self._setup is not None and self._setup.is_by_hand and self.is_news:
            self.note()
            self._helper.close()
            return
        deadline = Deadline(self._seconds if seconds is None else seconds)
        while self.goes_on:
            self._machine.check()
            if deadline.expired:
                raise GuestLost(
                    f"the guest has restarted by itself, and has not come back within {deadline.seconds:g} s",
                    stage=self._machine.stage,
                    details=self._machine.console_lines(),
                    remedy="look at its console. If it takes so long, use vm.reboot(timeout=…)",
                )
            deadline.pause(_LOOK_SECONDS)

    def _returned(self) -> None:
        """The helper said hello again. Called on the thread that reads."""
        thread = threading.Thread(target=self._settle_again, name="vmsandbox-restart", daemon=True)
        self._settlers.append(thread)  # before it is no news: there is no moment without either
        self._returns += 1
        self.note()
        thread.start()

    def _settle_again(self) -> None:
        with suppress(VMSandboxError):  # it is noted, or the guest is gone and calls say so
            self._settle(self._again)

    def _settle(self, work: Callable[[], None]) -> None:
        try:
            with self._one_at_a_time:
                returns = self._returns
                try:
                    work()
                except VMSandboxError:
                    if not self.is_again_since(returns):
                        raise
        finally:
            self._settlers.remove(threading.current_thread())
