"""Tests that run inside a guest: their protocol is carried out there, and its reports told here."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_vmsandbox.core.errors import (
    GuestLost,
    InterpreterLost,
    TransferError,
    VMSandboxError,
    add_hints,
)
from pytest_vmsandbox.inside.wire import broken
from pytest_vmsandbox.plugin import beside, config as options, plan as plans
from pytest_vmsandbox.plugin.attempt import Attempt
from pytest_vmsandbox.plugin.hooks import ENDING, Hooks, end_run
from pytest_vmsandbox.plugin.lease import Lease, remedy
from pytest_vmsandbox.plugin.leases import Leases
from pytest_vmsandbox.plugin.messages import Messages, Record
from pytest_vmsandbox.plugin.plan import plan_of
from pytest_vmsandbox.plugin.remote_reports import colourless
from pytest_vmsandbox.plugin.reporting import FAILED, RETRIED
from pytest_vmsandbox.plugin.schedule import Schedule

if TYPE_CHECKING:
    from pytest_vmsandbox.inside.session import Collected
    from pytest_vmsandbox.plugin.run import Run

_MOST_ATTEMPTS = 1_000  # at a test, each in a guest of its own


class Inside:
    """The tests of one run that run inside guests."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._config = run.config
        self._hooks = Hooks(run)
        self._messages = Messages(run, self._hooks)
        self.leases = Leases(run, self._messages)
        self._schedule = Schedule(run.config)
        self.benchmarks = self._messages.benchmarks
        self._retried: set[str] = set()  # tests whose guest something else took away
        self._ids: set[str] = set()
        # Image and file: the first test that cannot run since that cannot be collected.
        self._uncollected: dict[tuple[str, str], str] = {}

    # -- the protocol of one test ------------------------------------------------------------

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Carry out a test's protocol in its guest."""
        self._leave_limit_to_guest()
        try:
            self._carry_out(item, nextitem)
        except KeyboardInterrupt:
            self.leases.interrupt(item)
            raise

    def _leave_limit_to_guest(self) -> None:
        """Stop pytest's ``faulthandler_timeout`` here: the guest has it, and booting is no part of it."""
        known = self._config.pluginmanager.has_plugin("faulthandler")
        if known and self._config.getini("faulthandler_timeout"):
            faulthandler.cancel_dump_traceback_later()

    def _carry_out(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        names: dict[str, Any] = {"nodeid": item.nodeid, "location": item.location}
        self._hooks.notify(item.ihook.pytest_runtest_logstart, **names)
        last: pytest.TestReport | None = None
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
        # This side's own fixtures, of tests that ran here, may be over; and the guest.
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
        report.user_properties.append(("vm", plan_of(item).image))
        if report.failed and (hint := remedy(self._config.rootpath, report.longreprtext)):
            report.sections.append(("vmsandbox", hint))
        for name, value in item.user_properties:  # what this side has noted
            if name == RETRIED and (name, value) not in report.user_properties:
                report.user_properties.append((name, value))
        report.vm_inside = True  # type: ignore[attr-defined]  # travels with it
        if report.failed:
            item.stash[FAILED] = True
        if hasattr(report, "rerun"):  # pytest-rerunfailures looks for it at the end of the run
            item.execution_count = report.rerun + 1  # type: ignore[attr-defined]
        self._hooks.notify(item.ihook.pytest_runtest_logreport, report=report)

    def _attempts(
        self, item: pytest.Item, nextitem: pytest.Item | None, attempt: int = 0
    ) -> Iterator[list[pytest.TestReport]]:
        """The reports of each attempt at a test, whatever happens: setup, call if that was reached, teardown.

        Args:
            attempt: how many there were, in guests of their own.
        """
        call = pytest.CallInfo.from_call(
            lambda: self.leases.lease(item), when="setup", reraise=ENDING
        )
        if call.excinfo is not None:
            if isinstance(call.excinfo.value, GuestLost | InterpreterLost):
                add_hints(call.excinfo.value, self._run.hints)
            yield [self._made(item, call), self._passed(item, "teardown")]
            return
        assert call.result is not None
        lease = call.result
        attempts = [Attempt()]
        records: list[Record] = []
        try:
            found = self._guest_id(lease, item)
            if not isinstance(found, str):
                lease.has_failed |= found.failed
                yield [found, self._passed(item, "teardown")]
                return
            self._hear(lease, item, found, nextitem, attempt, attempts, records)
            self._check_end(item, attempt, attempts[-1])
        except ENDING:  # what the test has told before counts
            self._keep(lease, attempts, records)
            yield from (each.reports for each in attempts)
            raise
        except VMSandboxError as error:
            ahead = list(lease.session.announced) if lease.session is not None else []
            self.leases.lose(lease, error)
            if isinstance(error, GuestLost) and not any(each.has_failed for each in attempts):
                if self._runs_again(item, error, ahead):
                    yield from self._attempts(item, nextitem, attempt)
                    return
            elif ahead:
                self._schedule.alone.update(ahead)
            attempts[-1].fail(partial(self._failed, item, error), partial(self._passed, item))
        self._keep(lease, attempts, records)
        yield from (each.reports for each in attempts)
        if attempts[-1].is_rerun:
            self.leases.end(item)
            yield from self._attempts(item, nextitem, attempt + 1)

    def _check_end(self, item: pytest.Item, attempt: int, last: Attempt) -> None:
        """Look whether a test may be done after an attempt."""
        if not last.is_rerun:
            if lacking := [*last.missing, *last.due]:
                raise broken(f"a test is done without {lacking[0]}")
        elif plan_of(item).isolation != "test" or attempt == _MOST_ATTEMPTS:
            raise broken("a test is done that was to run again")

    def _keep(self, lease: Lease, attempts: list[Attempt], records: list[Record]) -> None:
        """Note what a test has left, which counts from now on: it is not lost with its guest."""
        lease.has_failed |= any(each.has_failed for each in attempts)
        for record in records:
            record()

    def _runs_again(self, item: pytest.Item, error: GuestLost, ahead: list[str]) -> bool:
        """Whether a test is run in a fresh guest, since it may not be the one that lost the former."""
        nodeid = plan_of(item).plain
        if error.transient:  # none of these tests is at fault
            if item.nodeid in self._retried:
                return False
            self._retried.add(item.nodeid)
            self._run.note_retry(error, item)
            return True
        if ahead:  # any of them may have done it, while reports were on their way: one by one, then
            self._schedule.alone.update([nodeid, *ahead])
            self._run.failed = True  # it may not happen again, and it has happened
            self._run.tell(
                f"{error.brief}\n  One of these tests has done it. They run again, one by one: "
                f"{', '.join([nodeid, *ahead])}"
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
        """Let a test run: its reports go to `attempts`, what is for others to `records`."""
        assert lease.session is not None
        plan = plan_of(item)
        following, more = self._schedule.next(item, nextitem)
        if not attempt:
            self._announce(lease, item)
        for message in lease.session.run(
            nodeid,
            following=following,
            more=more,
            marks=_marks(item),
            limit=plan.timeout or options.test_timeout(self._config) * lease.patience,
            timed=self._is_timed(item),
            call_limit=self._call_limit(item),
            attempt=attempt,
        ):
            if "report" in message:
                data = message["report"]
                report = lease.reader.test_report(item, nodeid, data)
                beside.keep_scenario(report, data.get("scenario"), lease.reader)
                attempts[-1].add(report, is_subtest=lease.reader.is_subtest(data))
            elif "call" in message:
                attempts[-1].has_called = True
            elif "again" in message:
                attempts.append(Attempt())
            elif message.get("stop"):
                how = "shouldfail" if message.get("fail") else "shouldstop"
                setattr(item.session, how, colourless(str(message["stop"])))
            elif (record := self._messages.record(lease, item, message)) is not None:
                records.append(record)
            elif "interrupted" in message:
                self.leases.interrupt(item)
                end_run(message)
            else:
                self._messages.tell(lease, message, item.nodeid)

    def _announce(self, lease: Lease, item: pytest.Item) -> None:
        """Let the guest go on with what comes next, while the reports are on their way here."""
        session = lease.session
        assert session is not None
        for place, ahead in enumerate(self._schedule.ahead(item)):
            plain = plan_of(ahead).plain
            if plain not in session.collected.items:
                return
            if place >= len(session.announced):  # not by name: a test may be there twice
                following, more = self._schedule.next(ahead)
                timed = self._is_timed(ahead)
                session.announce(
                    plain, following=following, more=more, marks=_marks(ahead), timed=timed
                )

    def _tear_down_here(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        with self.leases.ending(item, nextitem):
            item.session._setupstate.teardown_exact(nextitem)  # noqa: SLF001  # there is no other way

    def _passed(self, item: pytest.Item, phase: Any) -> pytest.TestReport:
        return self._made(item, pytest.CallInfo.from_call(lambda: None, when=phase))

    def _failed(self, item: pytest.Item, error: VMSandboxError, phase: Any) -> pytest.TestReport:
        add_hints(error, self._run.hints)

        def fail() -> NoReturn:
            raise error

        return self._made(item, pytest.CallInfo.from_call(fail, when=phase))

    def _made(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> pytest.TestReport:
        """A report that plugins of this side make; they count on that of the setup before others."""
        if call.when != "setup":
            self._passed(item, "setup")
        return self._hooks.make_report(item, call)

    def _is_timed(self, item: pytest.Item) -> bool:
        """Whether a guest is to tell when a test's function begins and ends.

        pytest-rerunfailures holds back reports until an attempt is over.
        """
        return plan_of(item).is_rerun or self._call_limit(item) is not None

    def _call_limit(self, item: pytest.Item) -> float | None:
        """How long a test's function may take, in seconds; pytest-timeout tells it where that would run."""
        manager = self._config.pluginmanager
        if (timeout := manager.get_plugin("timeout")) is not None:
            others = [plugin for plugin in manager.get_plugins() if plugin is not timeout]
            manager.subset_hook_caller("pytest_runtest_call", others)(item=item)
        return plan_of(item).call_timeout

    # -- which item that is in the guest --------------------------------------------------------

    def _guest_id(self, lease: Lease, item: pytest.Item) -> str | pytest.TestReport:
        """What the guest calls a test; or the report of why it has none."""
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
                    return self._not_collected(item, failure)
        if plan.indices is not None:
            base = nodeid.partition("[")[0]
            for other, theirs in found.items.items():
                if theirs == plan.indices and other.partition("[")[0] == base:
                    if other in self._ids_here(item.session):  # it is another test: the sets differ
                        break
                    self._run.tell(
                        f"{nodeid} is {other} in {lease.guest.image}: the ids of its parameters "
                        "differ between the two Pythons"
                    )
                    return other
        raise TransferError(
            f"pytest in {lease.guest.name} has not collected {nodeid}",
            remedy="it is there on this machine, so something decides otherwise in the guest: "
            "a conftest.py, a plugin that is not installed there (vm_requirements), the system",
        )

    def _ids_here(self, session: pytest.Session) -> set[str]:
        """What the tests of this side are called where they have no parameter for an image."""
        if not self._ids:
            self._ids.update(map(plans.plain_nodeid, session.items))
        return self._ids

    def _not_collected(self, item: pytest.Item, longrepr: Any) -> pytest.TestReport:
        skipped = isinstance(longrepr, tuple)
        return pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords=dict.fromkeys(item.keywords, 1),
            outcome="skipped" if skipped else "failed",
            longrepr=longrepr,
            when="setup",
        )

    def collected(self, item: pytest.Item) -> Collected:
        """What the session for a test has found.

        Raises:
            VMSandboxError: there can be none.
        """
        session = self.leases.lease(item).session
        assert session is not None
        return session.collected


def _marks(item: pytest.Item) -> list[tuple[str, str]]:
    """Marks that only this side knows of."""
    why = plan_of(item).xfail
    return [] if why is None else [("xfail", why)]
