"""Tests that run inside a guest: their protocol is carried out there, and its reports told here."""

from __future__ import annotations

import faulthandler
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from _pytest.junitxml import xml_key

from pytest_vmsandbox.core.errors import (
    GuestLost,
    InterpreterLost,
    TransferError,
    VMSandboxError,
    add_hints,
)
from pytest_vmsandbox.testing import collection, config as options, selection
from pytest_vmsandbox.testing.hooks import ENDING, Hooks, end_run
from pytest_vmsandbox.testing.leases import Key, Lease, Leases
from pytest_vmsandbox.testing.reporting import RETRIED, report_without_plugins

if TYPE_CHECKING:
    from pytest_vmsandbox.inside.session import Collected
    from pytest_vmsandbox.inside.wire import Message
    from pytest_vmsandbox.testing.session import VMSession

_Record = tuple[str, str, str]  # for junit's file: what it is, name and value
_AHEAD = 8  # tests that a guest may run before the reports of one are here


class Inside:
    """The tests of one run that run inside guests."""

    def __init__(self, session: VMSession) -> None:
        self._session = session
        self._config = session.config
        self._hooks = Hooks(session)
        self._leases = Leases(session, tell=self._tell)
        self._alone: set[str] = set()  # tests that run while no other is announced
        self._retried: set[str] = set()  # tests whose guest something else took away
        self._following: dict[pytest.Item, pytest.Item] = {}
        self._ids: set[str] = set()

    # -- the protocol of one test ------------------------------------------------------------

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Carry out a test's protocol in its guest."""
        self._leave_limit_to_guest()
        try:
            self._run(item, nextitem)
        except KeyboardInterrupt:
            self._leases.interrupt(item)
            raise

    def _leave_limit_to_guest(self) -> None:
        """Stop pytest's ``faulthandler_timeout`` here: the guest has it, and booting is no part of it."""
        known = self._config.pluginmanager.has_plugin("faulthandler")
        if known and self._config.getini("faulthandler_timeout"):
            faulthandler.cancel_dump_traceback_later()

    def _run(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        names: dict[str, Any] = {"nodeid": item.nodeid, "location": item.location}
        self._hooks.notify(item.ihook.pytest_runtest_logstart, **names)
        last: pytest.TestReport | None = None
        for report in self._reports(item, nextitem):
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
        report.user_properties.append(("vm", collection.image_of(item)))
        for name, value in item.user_properties:  # what this side has noted
            if name == RETRIED and (name, value) not in report.user_properties:
                report.user_properties.append((name, value))
        self._session.note_report(item, report)
        self._hooks.notify(item.ihook.pytest_runtest_logreport, report=report)

    def _reports(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Iterator[pytest.TestReport]:
        """The reports of a test, whatever happens: setup, call if that was reached, teardown."""
        phases = ["setup", "call", "teardown"]
        call = pytest.CallInfo.from_call(
            lambda: self._leases.lease(item), when="setup", reraise=ENDING
        )
        if call.excinfo is not None:
            if isinstance(call.excinfo.value, GuestLost | InterpreterLost):
                add_hints(call.excinfo.value, self._session.hints)
            yield self._made(item, call)
            yield self._passed(item, "teardown")
            return
        assert call.result is not None
        lease = call.result
        reports: list[pytest.TestReport] = []
        records: list[_Record] = []
        try:
            found = self._guest_id(lease, item)
            if not isinstance(found, str):
                lease.has_failed |= found.failed
                yield found
                yield self._passed(item, "teardown")
                return
            for report, is_subtest in self._session_reports(lease, item, found, nextitem, records):
                if not is_subtest:  # which is one more
                    self._check_order(phases, report)
                reports.append(report)
            if phases:
                raise self._broken(f"a test is done without {phases[0]}")
        except ENDING:  # what the test has told before counts
            self._keep(lease, item, reports, records)
            yield from reports
            raise
        except VMSandboxError as error:
            ahead = list(lease.session.announced) if lease.session is not None else []
            self._leases.lose(lease, error)
            has_failed = any(report.failed for report in reports)
            if isinstance(error, GuestLost) and not has_failed:
                if self._runs_again(item, error, ahead):
                    yield from self._reports(item, nextitem)
                    return
            elif ahead:
                self._alone.update(ahead)
            reports.append(self._failed(item, error, phases[0] if phases else "teardown"))
            if phases and phases[0] != "teardown":
                reports.append(self._passed(item, "teardown"))
        self._keep(lease, item, reports, records)
        yield from reports

    def _keep(
        self,
        lease: Lease,
        item: pytest.Item,
        reports: list[pytest.TestReport],
        records: list[_Record],
    ) -> None:
        """Note what a test has left, which counts from now on: it does not run again."""
        lease.has_failed |= any(report.failed for report in reports)
        for record in records:
            self._record(*record, item.nodeid)

    def _runs_again(self, item: pytest.Item, error: GuestLost, ahead: list[str]) -> bool:
        """Whether a test is run in a fresh guest, since it may not be the one that lost the former."""
        nodeid = collection.plain_nodeid(item)
        if error.transient:  # none of these tests is at fault
            if item.nodeid in self._retried:
                return False
            self._retried.add(item.nodeid)
            self._session.note_retry(error, item)
            return True
        if ahead:  # any of them may have done it, while reports were on their way: one by one, then
            self._alone.update([nodeid, *ahead])
            self._session.failed = True  # it may not happen again, and it has happened
            self._session.tell(
                f"{error.brief}\n  One of these tests has done it. They run again, one by one: "
                f"{', '.join([nodeid, *ahead])}"
            )
        return bool(ahead)

    def _check_order(self, phases: list[str], report: pytest.TestReport) -> None:
        if not phases or report.when != phases[0]:
            raise self._broken(f"a report of {report.when} where none was due")
        del phases[0]
        if report.when == "setup" and not report.passed:
            phases.remove("call")

    def _session_reports(
        self,
        lease: Lease,
        item: pytest.Item,
        nodeid: str,
        nextitem: pytest.Item | None,
        records: list[_Record],
    ) -> Iterator[tuple[pytest.TestReport, bool]]:
        """The reports that come, and whether each is a subtest's; what is for junit goes to `records`."""
        from pytest_vmsandbox.testing.remote_reports import colourless, harmless

        assert lease.session is not None
        following, more = self._next(item, nextitem)
        self._announce(lease, item)
        for message in lease.session.run(
            nodeid,
            following=following,
            more=more,
            marks=_marks(item),
            limit=self._limit(item, lease),
        ):
            if "report" in message:
                report = lease.reader.test_report(item, nodeid, message["report"])
                yield report, lease.reader.is_subtest(message["report"])
            elif message.get("stop"):
                how = "shouldfail" if message.get("fail") else "shouldstop"
                setattr(item.session, how, colourless(str(message["stop"])))
            elif "junit" in message:
                kind, name, value = (message.get(key) for key in ("junit", "name", "value"))
                records.append((str(kind), harmless(name), harmless(value)))
            elif "interrupted" in message:
                self._stop(item, message)
            else:
                self._tell(lease, message, item.nodeid)

    def _announce(self, lease: Lease, item: pytest.Item) -> None:
        """Let the guest go on with what comes next, while the reports are on their way here.

        Not where a result could end the run: then nothing may be run too much.
        """
        option = self._config.option
        if option.maxfail or getattr(option, "stepwise", False) or self._is_worker:
            return
        session = lease.session
        assert session is not None
        ahead: pytest.Item | None = item
        for place in range(1 + _AHEAD):
            if ahead is None or (nodeid := collection.plain_nodeid(ahead)) in self._alone:
                return
            if nodeid not in session.collected.items:
                return
            if place >= len(session.announced):  # not by name: a test may be there twice
                following, more = self._next(ahead, None)
                session.announce(nodeid, following=following, more=more, marks=_marks(ahead))
            ahead = self._following.get(ahead)

    def _tell(self, lease: Lease, message: Message, nodeid: str = "") -> None:
        """Pass on what a session says besides."""
        from pytest_vmsandbox.testing.remote_reports import harmless, recorded_warning

        if "warning" in message:
            arguments = recorded_warning(message, lease.reader) | {"nodeid": nodeid}
            file = arguments["warning_message"].filename
            # This side has collected, too, but for some files, and has told what it saw.
            if arguments["when"] == "runtest" or file in self._collected_there():
                self._hooks.notify(self._config.hook.pytest_warning_recorded, **arguments)
        elif "output" in message:
            stream = sys.stderr if message.get("of") == 2 else sys.stdout
            encoding = getattr(stream, "encoding", None) or "utf-8"
            text = harmless(message["output"]).encode(encoding, "backslashreplace")
            stream.write(text.decode(encoding))
            stream.flush()

    def _collected_there(self) -> set[str]:
        """The paths of files that only guests collect."""
        return {str(self._config.rootpath / it) for it in self._session.unimportable}

    def _record(self, kind: str, name: str, value: str, nodeid: str) -> None:
        """Tell junit's file what a test has recorded, other than by its reports."""
        xml = self._config.stash.get(xml_key, None)
        if xml is None:
            return
        if kind == "property":
            xml.add_global_property(name, value)
        elif re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
            xml.node_reporter(nodeid).add_attribute(name, value)

    def _stop(self, item: pytest.Item, message: Message) -> NoReturn:
        """Something in the guest has ended the run: a test, or a hook."""
        self._leases.interrupt(item)
        end_run(message)

    def _tear_down_here(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        with self._leases.ending(item, nextitem):
            item.session._setupstate.teardown_exact(nextitem)  # noqa: SLF001  # there is no other way

    def _passed(self, item: pytest.Item, phase: Any) -> pytest.TestReport:
        return self._made(item, pytest.CallInfo.from_call(lambda: None, when=phase))

    def _failed(self, item: pytest.Item, error: VMSandboxError, phase: Any) -> pytest.TestReport:
        add_hints(error, self._session.hints)

        def fail() -> NoReturn:
            raise error

        return self._made(item, pytest.CallInfo.from_call(fail, when=phase))

    def _made(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> pytest.TestReport:
        """A report that plugins of this side make; they count on that of the setup before others."""
        if call.when != "setup":
            self._passed(item, "setup")
        return self._hooks.make_report(item, call, lambda: report_without_plugins(item, call))

    def _broken(self, why: str) -> GuestLost:
        from pytest_vmsandbox.inside.wire import broken

        return broken(why)

    def _limit(self, item: pytest.Item, lease: Lease) -> float:
        wishes = selection.read_marks(item.iter_markers("vm"))
        given = (item.stash.get(collection.LIMIT, None), wishes.test_timeout)
        of_test = [seconds for seconds in given if seconds is not None]
        if of_test:
            return min(of_test)
        return options.test_timeout(self._config) * lease.patience

    # -- which item that is in the guest --------------------------------------------------------

    def _guest_id(self, lease: Lease, item: pytest.Item) -> str | pytest.TestReport:
        """What the guest calls a test; or the report of why it has none."""
        assert lease.session is not None
        found = lease.session.collected
        nodeid = collection.plain_nodeid(item)
        if nodeid in found.items:
            return nodeid
        file = nodeid.partition("::")[0]
        parents = [file, *(str(it) for it in Path(file).parents), ""]
        for parent in parents:
            if parent in found.failed or (parent and f"{parent}/__init__.py" in found.failed):
                failed = found.failed.get(parent) or found.failed[f"{parent}/__init__.py"]
                return self._not_collected(item, lease.reader.collect_failure(failed))
        if (indices := collection.plain_indices(item)) is not None:
            base = nodeid.partition("[")[0]
            for other, theirs in found.items.items():
                if theirs == indices and other.partition("[")[0] == base:
                    if other in self._ids_here(item.session):  # it is another test: the sets differ
                        break
                    self._session.tell(
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
            self._ids.update(map(collection.plain_nodeid, session.items))
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

    def _next(self, item: pytest.Item, nextitem: pytest.Item | None) -> tuple[str | None, bool]:
        """The next test of the same session, and whether there may be any."""
        if self._is_worker:  # of xdist: more may come, nobody knows
            if (
                nextitem is not None
                and collection.is_inside(nextitem)
                and collection.place_of(nextitem) == collection.place_of(item)
            ):
                return collection.plain_nodeid(nextitem), True
            return None, collection.place_of(item)[2] == "session" and nextitem is not None
        if not self._following:
            last: dict[Key, pytest.Item] = {}
            for it in reversed(item.session.items):
                if collection.runs_inside(it):
                    key = collection.place_of(it)
                    if key in last:
                        self._following[it] = last[key]
                    last[key] = it
        following = self._following.get(item)
        return (
            None if following is None else collection.plain_nodeid(following),
            following is not None,
        )

    @property
    def _is_worker(self) -> bool:
        return hasattr(self._config, "workerinput")

    def collected(self, item: pytest.Item) -> Collected:
        """What the session for a test has found.

        Raises:
            VMSandboxError: there can be none.
        """
        session = self._leases.lease(item).session
        assert session is not None
        return session.collected

    def close(self) -> list[str]:
        """Let every session tear down what is left, and end the guests.

        Returns:
            What went wrong, for people.
        """
        return self._leases.close()


def _marks(item: pytest.Item) -> list[tuple[str, str]]:
    """Marks that only this side knows of."""
    image = collection.image_of(item)
    wishes = selection.read_marks(item.iter_markers("vm"))
    why = selection.reason(wishes.xfail, image or "")
    return [] if why is None else [("xfail", why)]
