"""Runs the protocol of tests inside guests, and passes their reports to pytest here."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Generator, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.core.errors import (
    GuestLost,
    InterpreterLost,
    TransferError,
    VMSandboxError,
    add_hints,
)
from pytest_vmsandbox.inside.session import Collected, GuestSession, How
from pytest_vmsandbox.inside.wire import broken
from pytest_vmsandbox.plugin import config as options, noise, plan as plans
from pytest_vmsandbox.plugin.in_vm import other_plugins
from pytest_vmsandbox.plugin.in_vm.debugging import Debuggers
from pytest_vmsandbox.plugin.in_vm.hooks import ENDING, Hooks, end_run
from pytest_vmsandbox.plugin.in_vm.leases import Leases
from pytest_vmsandbox.plugin.in_vm.provisioning import Lease, remedy
from pytest_vmsandbox.plugin.in_vm.remote_reports import PHASES, RERUN, colourless
from pytest_vmsandbox.plugin.in_vm.side_messages import Record, SideMessages
from pytest_vmsandbox.plugin.plan import Place, plan_of
from pytest_vmsandbox.plugin.reporting import FAILED, RETRIED, bare_report
from pytest_vmsandbox.plugin.run import Run

_AHEAD = 8  # tests that a guest may run before we have the reports of the first
_MOST_ATTEMPTS = 1_000  # of one test, each in a guest of its own


class Inside:
    """Runs the tests inside guests. It is registered as a plugin if a run has such tests."""

    def __init__(self, run: Run, session: pytest.Session) -> None:
        self._run = run
        self._hooks = Hooks(run)
        self._messages = SideMessages(run, self._hooks)
        self.leases = Leases(run, session, self._messages)
        self._schedule = Schedule(session)
        self._debuggers = Debuggers(run)
        self._retried: set[str] = set()  # tests that lost a guest to the host or chance
        self._ids: set[str] = set()  # ids of this side's tests, without the image
        # Image and file → the first test that cannot run because that file cannot be collected.
        self._uncollected: dict[tuple[str, str], str] = {}

    def collected(self, item: pytest.Item) -> Collected:
        """What the session for a test has collected.

        Raises:
            VMSandboxError: no guest can be made ready.
        """
        session = self.leases.lease(item).session
        assert session is not None
        return session.collected

    @pytest.hookimpl(wrapper=True, trylast=True)  # pytest-cov combines after it
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        try:
            return (yield)
        finally:
            if self._run.config.pluginmanager.has_plugin("_cov"):
                self.leases.close()  # guests tell what they have measured

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any] | None:
        """The machine that benchmarks ran on: the guest, if they ran in one."""
        return self._messages.benchmarks.machine()

    # -- the protocol of one test ------------------------------------------------------------

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Run a test's protocol in its guest."""
        known = self._run.config.pluginmanager.has_plugin("faulthandler")
        if known and self._run.config.getini("faulthandler_timeout"):
            # The guest has this timeout. Booting does not count.
            faulthandler.cancel_dump_traceback_later()
        try:
            self._carry_out(item, nextitem)
        except KeyboardInterrupt:
            self.leases.interrupt(item)
            raise

    def _carry_out(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        names: dict[str, Any] = {"nodeid": item.nodeid, "location": item.location}
        self._hooks.notify(item.ihook.pytest_runtest_logstart, **names)
        last: pytest.TestReport | None = None
        try:
            for number, reports in enumerate(self._attempts(item, nextitem)):
                if number:
                    if last is not None:
                        self._log(item, last)
                    self._hooks.notify(item.ihook.pytest_runtest_logfinish, **names)
                    self._hooks.notify(item.ihook.pytest_runtest_logstart, **names)
                last = None
                for report in reports:
                    if report.when == "teardown":
                        last = report
                    else:
                        self._log(item, report)
        except ENDING:  # the run ends after the report, such as in a debugger
            if last is not None and last.failed:
                self._log(item, last)
            raise
        if last is not None and last.failed:
            self._note_failure(item, last)
        # Fixtures of this side, used by tests that ran here, may end now; and so may the guest.
        call = pytest.CallInfo.from_call(
            lambda: self._tear_down_here(item, nextitem), when="teardown", reraise=ENDING
        )
        assert last is not None
        if call.excinfo is None or last.failed:
            self._log(item, last)
        if call.excinfo is not None:
            self._log(item, self._made(item, call))
        self._hooks.notify(item.ihook.pytest_runtest_logfinish, **names)

    def _log(self, item: pytest.Item, report: pytest.TestReport) -> None:
        if report.failed and (hint := remedy(self._run.config.rootpath, report.longreprtext)):
            report.sections.append(("vmsandbox", hint))
        for name, value in item.user_properties:  # added on this side
            if name == RETRIED and (name, value) not in report.user_properties:
                report.user_properties.append((name, value))
        report.vm_inside = True  # type: ignore[attr-defined]  # travels with it
        if report.failed:
            item.stash[FAILED] = True
            self._note_failure(item, report)
        self._run.show(item, report)
        if hasattr(report, "rerun"):  # pytest-rerunfailures looks for it at the end of the run
            item.execution_count = report.rerun + 1  # type: ignore[attr-defined]
        self._hooks.notify(item.ihook.pytest_runtest_logreport, report=report)

    def _note_failure(self, item: pytest.Item, report: pytest.TestReport) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = report.longreprtext if crash is None else str(crash.message)
        lines = text.strip().splitlines() or [""]
        self._run.at_failure(item, report.when, lines[-1 if crash is None else 0])

    def _attempts(
        self, item: pytest.Item, nextitem: pytest.Item | None, attempt: int = 0
    ) -> Iterator[list[pytest.TestReport]]:
        """The reports of each attempt at a test: setup, call if it was reached, and always teardown.

        Args:
            attempt: the number of earlier attempts in guests of their own.
        """
        self._debuggers.begin(item)
        call = pytest.CallInfo.from_call(
            lambda: self.leases.lease(item), when="setup", reraise=ENDING
        )
        if call.excinfo is not None:
            if isinstance(call.excinfo.value, GuestLost | InterpreterLost):
                add_hints(call.excinfo.value, self._run.hints)
            yield [self._made(item, call), self._report(item, "teardown")]
            return
        assert call.result is not None
        lease = call.result
        attempts = [Attempt()]
        records: list[Record] = []
        try:
            found = self._guest_id(lease, item)
            if not isinstance(found, str):
                lease.has_failed |= found.failed
                yield [found, self._report(item, "teardown")]
                return
            with noise.during(item):
                self._hear(lease, item, found, nextitem, attempt, attempts, records)
            if not attempts[-1].is_rerun:
                attempts[-1].check()
            elif plan_of(item).isolation != "test" or attempt == _MOST_ATTEMPTS:
                raise broken("a test ended although it had to run again")
        except ENDING:  # the reports so far count
            self._keep(lease, attempts, records)
            yield from (each.reports for each in attempts)
            raise
        except VMSandboxError as error:
            ahead = list(lease.session.announced) if lease.session is not None else []
            runs_again = False
            if isinstance(error, GuestLost) and not any(each.has_failed for each in attempts):
                runs_again = self._runs_again(item, error, ahead)
            elif ahead:
                self._schedule.alone.update(ahead)
            if not runs_again:
                self._debuggers.lost(item, attempts[-1].phase, error, lease)
            self.leases.lose(lease, error)
            if runs_again:
                yield from self._attempts(item, nextitem, attempt)
                return
            attempts[-1].fail(error, partial(self._report, item))
        self._keep(lease, attempts, records)
        if not attempts[-1].is_rerun and not attempts[-1].has_failed:
            self._debuggers.passed(item, lease)
        yield from (each.reports for each in attempts)
        if attempts[-1].is_rerun:
            with self.leases.ending(item, None):  # the next attempt has a fresh guest
                pass
            yield from self._attempts(item, nextitem, attempt + 1)

    def _keep(self, lease: Lease, attempts: list[Attempt], records: list[Record]) -> None:
        """Keep the results of a test. From now on they are not lost with its guest."""
        lease.has_failed |= any(each.has_failed for each in attempts)
        failures = [it.longreprtext for each in attempts for it in each.reports if it.failed]
        lease.failure = "\n".join(failures)
        for record in records:
            record()

    def _runs_again(self, item: pytest.Item, error: GuestLost, ahead: list[str]) -> bool:
        """Whether to run a test again in a fresh guest, because another test may have lost the guest."""
        nodeid = plan_of(item).plain
        if error.transient:  # no test caused it
            if item.nodeid in self._retried:
                return False
            self._retried.add(item.nodeid)
            self._run.note_retry(error, item)
            return True
        if ahead:  # any of them may have caused it while reports were on their way
            self._schedule.alone.update([nodeid, *ahead])
            self._run.failed = True  # it may not happen again, but it has happened
            self._run.tell(
                f"{error.brief}\n  One of these tests caused it. They run again one by one, in fresh "
                f"guests, to find out which: {', '.join([nodeid, *ahead])}"
            )
        return bool(ahead)

    def _hear(
        self,
        lease: Lease,
        item: pytest.Item,
        nodeid: str,
        nextitem: pytest.Item | None,
        attempt: int,
        attempts: list[Attempt],
        records: list[Record],
    ) -> None:
        """Run a test. Its reports go to `attempts`, data for other plugins to `records`."""
        assert lease.session is not None
        how = self._how(item, nextitem, attempt)
        if not attempt:
            self._announce(lease.session, item)
        patience = lease.connection.patience
        limit = plan_of(item).timeout or options.test_timeout(self._run.config) * patience
        limits: dict[str, Any] = {"limit": limit, "call_limit": self._call_limit(item)}

        def stuck(error: str) -> None:
            self._debuggers.keep(item, attempts[-1].phase, error, lease)

        for message in lease.session.run(nodeid, if_stuck=stuck, **limits, **how):
            if "report" in message:
                data = message["report"]
                report = lease.reader.test_report(item, nodeid, data)
                other_plugins.keep_scenario(report, data.get("scenario"), lease.reader)
                attempts[-1].add(report, is_subtest=lease.reader.is_subtest(data))
            elif "call" in message:
                attempts[-1].has_called = True
            elif "again" in message:
                attempts.append(Attempt())
                self._run.begin_attempt()
            elif message.get("stop"):
                name = "shouldfail" if message.get("fail") else "shouldstop"
                setattr(item.session, name, colourless(str(message["stop"])))
            elif "stopped" in message:
                if self._debuggers.stopped(item, message["stopped"], lease):
                    attempts[-1].show()
            elif "terminal" in message:
                self._debuggers.lend(lease, message["terminal"])
            elif (record := self._messages.record(lease, item, message)) is not None:
                records.append(record)
            elif "interrupted" in message:
                self.leases.interrupt(item)
                end_run(message)
            else:
                self._messages.tell(lease, message, item.nodeid)
        if (loss := lease.loss_of_others) is not None:  # whatever the test has made of that
            raise loss

    def _announce(self, session: GuestSession, item: pytest.Item) -> None:
        """Let the guest go on with the next tests, while reports are on their way here."""
        for place, ahead in enumerate(self._schedule.ahead(item)):
            plain = plan_of(ahead).plain
            if plain not in session.collected.items:
                return
            if place >= len(session.announced):  # compare numbers: a test may be there twice
                session.announce(plain, **self._how(ahead))

    def _how(self, item: pytest.Item, nextitem: pytest.Item | None = None, attempt: int = 0) -> How:
        """How a session has to run a test."""
        following, more = self._schedule.next(item, nextitem)
        plan = plan_of(item)
        return {
            "next": following,
            "more": more,
            "marks": [] if plan.xfail is None else [("xfail", plan.xfail)],
            # pytest-rerunfailures holds back reports until an attempt is over.
            "timed": plan.is_rerun or self._call_limit(item) is not None,
            "attempt": attempt,
        }

    def _tear_down_here(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        with self.leases.ending(item, nextitem):
            item.session._setupstate.teardown_exact(nextitem)  # noqa: SLF001  # there is no other way

    def _report(
        self, item: pytest.Item, phase: Any, error: VMSandboxError | None = None
    ) -> pytest.TestReport:
        """The report of a phase that passed, or failed with `error`."""

        def happen() -> None:
            if error is not None:
                add_hints(error, self._run.hints)
                raise error

        return self._made(item, pytest.CallInfo.from_call(happen, when=phase))

    def _made(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> pytest.TestReport:
        """A report made by the plugins of this side. They expect the setup's report before others."""
        if call.when != "setup":
            self._report(item, "setup")
        return self._hooks.make_report(item, call)

    def _call_limit(self, item: pytest.Item) -> float | None:
        """The timeout of a test's function, in seconds. pytest-timeout sets it when the call begins."""
        manager = self._run.config.pluginmanager
        if (timeout := manager.get_plugin("timeout")) is not None:
            others = [plugin for plugin in manager.get_plugins() if plugin is not timeout]
            manager.subset_hook_caller("pytest_runtest_call", others)(item=item)
        return plan_of(item).call_timeout

    # -- which item that is in the guest --------------------------------------------------------

    def _guest_id(self, lease: Lease, item: pytest.Item) -> str | pytest.TestReport:
        """The id of a test in the guest; or a report, if the guest could not collect it."""
        assert lease.session is not None
        found = lease.session.collected
        plan = plan_of(item)
        nodeid = plan.plain
        if nodeid in found.items:
            return nodeid
        for parent in (plan.file, *map(str, Path(plan.file).parents), ""):
            for place in (parent, f"{parent}/__init__.py"):
                if place in found.failed:
                    failure = lease.reader.collect_failure(found.failed[place])
                    first = self._uncollected.setdefault((lease.guest.image, place), item.nodeid)
                    if first != item.nodeid and not isinstance(failure, tuple):
                        failure = f"{place or plan.file} could not be collected: see {first}"
                    outcome = "skipped" if isinstance(failure, tuple) else "failed"
                    return bare_report(item, "setup", outcome, failure)
        if plan.indices is not None:
            base = nodeid.partition("[")[0]
            for other, theirs in found.items.items():
                if theirs == plan.indices and other.partition("[")[0] == base:
                    if not self._ids:
                        self._ids.update(map(plans.plain_nodeid, item.session.items))
                    if other in self._ids:  # it is another test: the sets differ
                        break
                    self._run.tell(
                        f"{nodeid} is called {other} in {lease.guest.image}, because the ids of its "
                        "parameters differ between the two Pythons"
                    )
                    return other
        raise TransferError(
            f"pytest in {lease.guest.name} has not collected {nodeid}, but pytest on this machine has",
            remedy="look for a difference in the guest: a condition on the system in the test file or a "
            "conftest.py, or a plugin that is not installed there (vm_requirements)",
        )


class Schedule:
    """Knows which test comes after another in the same guest.

    Attributes:
        alone: ids, without the image, of tests that must run while no other test is announced.
    """

    def __init__(self, session: pytest.Session) -> None:
        option = session.config.option
        self._session = session
        self.alone: set[str] = set()
        # A result can end the run. Then no further test may have run. Nor if each guest is kept as it is.
        keeps_all = options.keep(session.config) == "all"
        self._waits = option.maxfail or getattr(option, "stepwise", False) or keeps_all

    def next(
        self, item: pytest.Item, nextitem: pytest.Item | None = None
    ) -> tuple[str | None, bool]:
        """The id of the next test in the same guest, and whether there may be one.

        Args:
            nextitem: the test that pytest runs next.
        """
        plan = plan_of(item)
        if self._is_known:
            nextitem = self._following.get(item)
        if nextitem is not None and plan.shares_with(nextitem):
            return plan_of(nextitem).plain, True
        return None, plan.isolation == "session" and nextitem is not None

    @cached_property
    def _is_known(self) -> bool:
        """Whether it is known what is to come.

        Workers of xdist do not know it. Of an item that some hook has put there several times, it is not
        known which time it is.
        """
        items = self._session.items
        return not hasattr(self._session.config, "workerinput") and len({*items}) == len(items)

    @cached_property
    def _following(self) -> dict[pytest.Item, pytest.Item]:
        """Test → the next test in the same guest."""
        last: dict[Place, pytest.Item] = {}
        following = {}
        for item in reversed(self._session.items):
            if plan_of(item).runs_inside:
                place = plan_of(item).place
                if place in last:
                    following[item] = last[place]
                last[place] = item
        return following

    def ahead(self, item: pytest.Item) -> Iterator[pytest.Item]:
        """The test, and the following tests that may run while its reports are on their way here."""
        following = item if self._is_known and not self._waits else None
        for _ in range(1 + _AHEAD):
            if following is None or plan_of(following).plain in self.alone:
                return
            yield following
            following = self._following.get(following)


class Attempt:
    """One attempt at a test. Plugins such as pytest-rerunfailures and flaky may make several.

    Attributes:
        due: the phases whose reports are still to come.
        missing: the phases whose reports were left out.
        has_called: whether the test's function has begun.
    """

    def __init__(self) -> None:
        self.has_called = False
        self.due = list(PHASES)
        self.missing: list[str] = []
        self._reports: list[tuple[pytest.TestReport, bool]] = []
        self._is_lost = False

    @property
    def is_rerun(self) -> bool:
        """Whether another attempt follows."""
        return not self._is_lost and any(report.outcome == RERUN for report, _ in self._reports)

    @property
    def has_failed(self) -> bool:
        """Whether the test has failed in this attempt."""
        return any(report.failed for report in self.reports)

    @property
    def reports(self) -> list[pytest.TestReport]:
        """The reports. Those of subtests count for the last attempt only."""
        is_rerun = self.is_rerun
        return [report for report, is_subtest in self._reports if not (is_subtest and is_rerun)]

    @property
    def phase(self) -> str:
        """The phase that is due, or missing."""
        return [*self.missing, *self.due, "teardown"][0]

    def add(self, report: pytest.TestReport, *, is_subtest: bool = False) -> None:
        """Add the report of a phase or a subtest.

        Raises:
            GuestLost: the phase is not due.
        """
        if not is_subtest:
            if report.when not in self.due:
                raise broken(f"an unexpected report of {report.when}")
            while (phase := self.due.pop(0)) != report.when:  # correct if another attempt follows
                self.missing.append(phase)
            if report.when == "setup" and not report.passed:
                self.due = ["teardown"]
        self._reports.append((report, is_subtest))

    def show(self) -> None:
        """Note that a debugger shows the last report. pytest does not show it again then."""
        if self._reports:
            self._reports[-1][0]._pdbshown = True  # type: ignore[attr-defined]  # noqa: SLF001

    def check(self) -> None:
        """Check that all reports are here.

        Raises:
            GuestLost: one is missing.
        """
        if lacking := [*self.missing, *self.due]:
            raise broken(f"a test ended without a report of {lacking[0]}")

    def fail(self, error: VMSandboxError, report: Callable[..., pytest.TestReport]) -> None:
        """Let the phase that is due, or missing, fail with an error.

        Args:
            report: makes the report of a phase that passed, or failed with an error.
        """
        if self.has_called and self.due[:1] == ["setup"]:  # its report was held back
            self.add(report("setup"))
        phase = self.phase
        if self.missing:
            before = PHASES[: PHASES.index(phase)]
            self._reports = [pair for pair in self._reports if pair[0].when in before]
        self._reports.append((report(phase, error), False))
        if phase != "teardown":
            self._reports.append((report("teardown"), False))
        self.due, self.missing = [], []
        self._is_lost = True
