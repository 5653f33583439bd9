"""Stops a session where a test fails, and opens pytest's debugger there."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator
from typing import Any

import pytest
from _pytest.config import create_terminal_writer
from _pytest.debugging import PdbInvoke, PdbTrace, pytestPDB
from _pytest.runner import check_interactive_exception

from .apart import SHARED, keep_apart
from .serialize import text_of
from .signals import HeldSignals, HeldTimer
from .terminal import NoTerminal, Terminal
from .wire import Wire, clean

keep_apart(globals())

MAX_ERROR = 500  # characters of the line about a failure
LACKING = (
    "%s needs a terminal. Run pytest at a terminal, not with its output in a file or a pipe, and without "
    "pytest-xdist. To look into a failure later, keep its guest: pytest --vm-keep=failed, then vmsandbox "
    "enter --pdb"
)
NOT_NOW = "%s works in a guest only while a test runs there. Put it into a test, or run pytest without --in-vm"


class Debugging:
    """The plugin that stops at failures, and that gives pytest's debugger a terminal.

    For a failure it sends ``{"stopped": {"phase": …, "error": …, "first": …, "stands": …}}`` and waits
    for ``go on`` or ``debug``. For a terminal it sends ``{"terminal": N}``, and the host starts `terminal.lend`.

    Args:
        settings: ``stop`` (at the first failure of each attempt at a test), ``pdb`` (at each),
            ``pdbcls`` and ``trace`` as pytest has them, ``terminal`` (whether the host has one), and
            ``folder``, see `Terminal`.
    """

    def __init__(self, wire: Wire, config: pytest.Config) -> None:
        self.wire = wire
        self.config = config
        self.settings: dict[str, Any] = {}
        self.terminal: Terminal | None = None
        self.is_running = False  # whether a test runs
        self.writer: Any = None  # of the terminal reporter, if it is lent the terminal
        self.late: BaseException | None = None  # raised for a signal while the session stood
        self.lend: Any = pytestPDB._init_pdb  # noqa: SLF001  # all ways into the debugger lead through it
        vars_of: Any = pytestPDB
        vars_of._init_pdb = self.open  # noqa: SLF001

    def begin(self, settings: dict[str, Any]) -> None:
        """The host says how to debug."""
        self.settings = settings
        self.terminal = Terminal(settings["folder"], self.wire)
        option = self.config.option
        if hasattr(option, "usepdb"):  # else pytest's debugging is off
            option.usepdb, option.trace = settings["pdb"], settings["trace"]
            option.usepdb_cls = tuple(settings["pdbcls"]) if settings["pdbcls"] else None
            if settings["trace"]:
                self.config.pluginmanager.register(PdbTrace())
        if settings["pdb"] or settings["stop"]:
            self.config.pluginmanager.register(Failures(self))

    def run(self, item: pytest.Item) -> None:
        """A test begins."""
        self.is_running, self.late = True, None
        runner: Any = getattr(item, "runner", None)  # of doctests
        if self.settings.get("pdb") and hasattr(runner, "continue_on_failure"):
            runner.continue_on_failure = False

    def end(self) -> None:
        """A test ends."""
        self.close()
        self.is_running = False

    # -- at a failure -------------------------------------------------------------------------

    def stop(self, phase: str, error: str, *, first: bool, stands: bool) -> bool:
        """Wait until the host lets the test go on. Returns whether to debug here."""
        if os.getpid() != self.wire.owner:  # a test has forked, and this is its child
            return False
        line = clean(error.partition("\n")[0]).strip()[:MAX_ERROR]
        about = {"phase": phase, "error": line, "first": first, "stands": stands}
        faulthandler.cancel_dump_traceback_later()  # as pytest does, a little later
        signals = HeldSignals()
        with signals:
            self.wire.say({"stopped": about})
            answer = self.wire.hear("go on", "debug")
        if (raised := signals.deliver()) is not None:
            if phase == "teardown":  # the last that belongs to this test
                raise raised
            self.late = self.late or raised
        return answer is not None and answer["do"] == "debug"

    def debug(self, node: pytest.Item, call: Any, report: Any) -> None:
        """Open pytest's post-mortem debugger."""
        try:
            self.take()
        except NoTerminal:
            return
        try:
            invoke: Any = PdbInvoke()
            invoke.pytest_exception_interact(node, call, report)
        finally:
            self.close()

    # -- the terminal ---------------------------------------------------------------------------

    def open(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A debugger of pytest, which has the terminal. It takes the place of pytest's own function."""
        __tracebackhide__ = True
        if pytestPDB._config is not self.config:  # noqa: SLF001  # of another pytest in this process
            return self.lend(method, *args, **kwargs)
        self.check("breakpoint()" if method == "set_trace" else "the debugger")
        self.take()
        debugger: Any = self.lend(method, *args, **kwargs)
        set_up = debugger.setup

        def setup(*frame: Any) -> Any:
            self.take()  # after ``continue``, at the next breakpoint
            return set_up(*frame)

        debugger.setup = setup
        return debugger

    def check(self, what: str) -> None:
        """Check that a debugger can be opened now."""
        __tracebackhide__ = True
        if self.terminal is not None and self.terminal.lender is not None:
            return
        if not self.is_running or os.getpid() != self.wire.owner:
            raise NoTerminal(NOT_NOW % what)
        if self.terminal is None or not self.settings["terminal"]:
            raise NoTerminal(LACKING % what)

    def take(self) -> None:
        """Let this process, and pytest's reporter, have the terminal."""
        assert self.terminal is not None
        if self.terminal.lender is not None:
            return
        self.terminal.ask()
        manager = self.config.pluginmanager
        if (capture := manager.get_plugin("capturemanager")) is not None:
            capture.suspend(in_=True)
        self.terminal.put()
        if (reporter := manager.get_plugin("terminalreporter")) is not None:
            self.writer = reporter._tw  # noqa: SLF001
            reporter._tw = create_terminal_writer(self.config, SHARED["sys"].stdout)  # noqa: SLF001

    def close(self) -> None:
        """Give the terminal back, if we have it."""
        if self.terminal is None or self.terminal.lender is None:
            return
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and self.writer is not None:
            reporter._tw = self.writer  # noqa: SLF001
        self.terminal.release()

    def pytest_leave_pdb(self) -> None:
        self.close()


class Failures:
    """The plugin that sees failures. It is loaded only if the session has to stop there."""

    def __init__(self, debugging: Debugging) -> None:
        self.debugging = debugging
        self.always = debugging.settings["pdb"]
        self.is_first = True  # whether this attempt at a test has not failed yet

    @pytest.hookimpl(tryfirst=True, wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
        """Stop for what failed without an exception: it has passed, and should not have."""
        if call.when == "setup":
            self.is_first = True  # another attempt at the test
        report = yield
        if self.is_first and report.failed and not check_interactive_exception(call, report):
            self.is_first = False
            why = report.longrepr
            error = why if isinstance(why, str) else text_of(why)
            with HeldTimer():
                self.debugging.stop(report.when, error, first=True, stands=False)
        return report

    @pytest.hookimpl(trylast=True)  # no wrapper: it would be in the traceback of each teardown
    def pytest_runtest_teardown(self) -> None:
        """An error of a signal that came while the session stood is one of the teardown."""
        late, self.debugging.late = self.debugging.late, None
        if late is not None:
            raise late

    @pytest.hookimpl(tryfirst=True)
    def pytest_exception_interact(
        self, node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any], report: Any
    ) -> None:
        if not isinstance(node, pytest.Item) or not (self.always or self.is_first):
            return
        first, self.is_first = self.is_first, False
        assert call.excinfo is not None
        try:
            error = call.excinfo.exconly(tryshort=True)
        except Exception:  # of its own, or the test has patched something
            error = call.excinfo.typename
        with HeldTimer():
            if self.debugging.stop(str(call.when), error, first=first, stands=True):
                self.debugging.debug(node, call, report)
