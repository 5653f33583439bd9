"""What happens where a test inside fails: its guest is kept, and a debugger is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.inside import debugging
from pytest_vmsandbox.inside.wire import broken
from pytest_vmsandbox.plugin import config as options, terminal
from pytest_vmsandbox.plugin.in_vm.remote_reports import PHASES, colourless

if TYPE_CHECKING:
    import pytest

    from pytest_vmsandbox.plugin.in_vm.provisioning import Lease
    from pytest_vmsandbox.plugin.run import Run

_MAX_ERROR = 500  # characters
_MAX_STOPS = 1_000  # of one test. Their time does not count, so a guest could stop for ever


class Debuggers:
    """Answers sessions in guests that have stopped."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stops = 0  # of the current test
        self._is_kept = False  # whether the current test has a kept guest

    def begin(self, item: pytest.Item) -> None:
        """A test begins."""
        self._stops = 0
        self._begin_attempt(item)

    def stopped(self, item: pytest.Item, about: object, lease: Lease) -> bool:
        """Handle a session that has stopped at a failure, and waits.

        Returns:
            Whether it opens its debugger now, which shows the failure.

        Raises:
            GuestLost: the guest is gone, or its message is invalid.
        """
        assert lease.session is not None
        phase = about.get("phase") if isinstance(about, dict) else None
        if not isinstance(about, dict) or phase not in PHASES:
            raise broken("it stopped in an unknown phase", about)
        self._count()
        stands = about.get("stands") is True
        if about.get("first") is True:  # of an attempt at the test; the last attempt counts
            self._begin_attempt(item)
            self.keep(item, str(phase), str(about.get("error")), lease, stands=stands)
        wanted = self._run.config.getoption("usepdb", default=False)
        if wanted and stands and terminal.is_there(self._run.config):
            lease.session.debug()
            return True
        lease.session.go_on()
        return False

    def _begin_attempt(self, item: pytest.Item) -> None:
        self._is_kept = False
        self._run.begin_attempt()
        self._run.keeping.begin(item)

    def _count(self) -> None:
        self._stops += 1
        if self._stops > _MAX_STOPS:
            raise broken(f"it stopped more than {_MAX_STOPS:,} times in one test")

    def keep(
        self, item: pytest.Item, phase: str, error: str, lease: Lease, *, stands: bool = False
    ) -> None:
        """Keep the guest of a test that fails.

        Args:
            error: about the failure, in a line.
            stands: whether an interpreter waits there.
        """
        self._is_kept = True
        about = self._about(lease)
        self._run.at_failure(item, phase, colourless(error)[:_MAX_ERROR], stands=stands, **about)

    def passed(self, item: pytest.Item, lease: Lease) -> None:
        """Keep the guest of a test that has passed, if guests of all tests are kept."""
        self._run.keeping.passed(item, **self._about(lease))

    def _about(self, lease: Lease) -> dict[str, Any]:
        return {
            "guest": lease.guest.name,
            "folder": lease.tree,
            "python": lease.place.python,
            "environment": tuple(options.guest_environment(self._run.config)),
        }

    def lost(self, item: pytest.Item, phase: str, error: VMSandboxError, lease: Lease) -> None:
        """Keep the guest of a test whose interpreter ended, or that is broken itself."""
        if not self._is_kept:
            self.keep(item, phase, error.brief, lease)

    def lend(self, lease: Lease, number: object) -> None:
        """Lend our terminal to a session, until it gives it back.

        Raises:
            GuestLost: the guest is gone.
            KeyboardInterrupt: this process got SIGINT meanwhile.
        """
        assert lease.session is not None
        self._count()
        config = self._run.config
        if terminal.is_there(config):
            if not any(config.getoption(name, default=False) for name in ("usepdb", "trace")):
                name = lease.guest.name
                self._run.say(f"{name} wants to debug: what follows is written by that guest")
            with terminal.uncaptured(config):
                try:
                    debugging.check_client()
                    debugging.lend_terminal(lease.guest, lease.place)
                except VMSandboxError as error:
                    self._run.tell(f"no debugger was opened in {lease.guest.name}: {error}")
        lease.session.take_back(number)
