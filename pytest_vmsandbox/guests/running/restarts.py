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
        self._settler: threading.Thread | None = None
        helper.returned = self._returned

    @property
    def is_news(self) -> bool:
        """Whether the guest has restarted, and nobody has noted that."""
        stamps = [
            event["timestamp"]
            for event in self._machine.monitor.events()
            if event["event"] == "RESET"
        ]
        return any(it["seconds"] + it["microseconds"] / 1e6 > self._known for it in stamps[-1:])

    def note(self) -> None:
        """Note all restarts so far: the guest answers, or others wait for its answer."""
        self._known = wall()

    @property
    def goes_on(self) -> bool:
        """Whether the guest restarts, or is not set up again yet."""
        return self._settler is not None or self.is_news

    def await_end(self) -> None:
        """Wait until the guest does not restart any more. What sets it up does not wait for itself.

        A helper that no init starts again is forgotten. Without a helper, there is nothing to wait for.

        Raises:
            GuestLost: it is gone, or has not come back.
        """
        if not self._helper.is_there or self._settler is threading.current_thread():
            return
        if self._setup is not None and self._setup.is_by_hand:
            if self.is_news:
                self.note()
                self._helper.close()
            return
        deadline = Deadline(self._seconds)
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
        self.note()
        self._settler = threading.Thread(target=self._settle, name="vmsandbox-restart", daemon=True)
        self._settler.start()

    def _settle(self) -> None:
        try:
            with suppress(VMSandboxError):  # it is noted, or the guest is gone and calls say so
                self._again()
        finally:
            if self._settler is threading.current_thread():
                self._settler = None
