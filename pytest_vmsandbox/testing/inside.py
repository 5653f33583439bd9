"""Tests that run inside a guest: their protocol is carried out there, and its reports told here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from _pytest.junitxml import xml_key

from pytest_vmsandbox.core.errors import (
    INFRASTRUCTURE,
    ConfigError,
    GuestLost,
    InterpreterLost,
    TransferError,
    VMSandboxError,
)
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.testing import collection, config as options, selection
from pytest_vmsandbox.testing.measuring import Measuring

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.guests.provision import Step
    from pytest_vmsandbox.inside.install import Installed, Payload
    from pytest_vmsandbox.inside.session import Collected, GuestSession, Keeper
    from pytest_vmsandbox.inside.wire import Message
    from pytest_vmsandbox.testing.remote_reports import Reader
    from pytest_vmsandbox.testing.session import VMSession

_COLLECT_SECONDS = 60.0  # for pytest in the guest until it has collected; scaled
_MOST_LOST = 3  # waiting sessions in a row that do not wake up
_AHEAD = 8  # tests that a guest may run before the reports of one are here
_TEAR_DOWN_SECONDS = 10.0  # after Ctrl-C; scaled

Key = tuple[str, str, str]  # image, hardware, and what shares the guest


@dataclass(kw_only=True)
class Lease:
    """A guest that runs tests inside, as long as those of its key may come."""

    guest: Guest
    installed: Installed
    keeper: Keeper
    reader: Reader
    config: Mapping[str, object]
    patience: float
    stack: ExitStack
    session: GuestSession | None = None
    has_collected: bool = False
    failure: VMSandboxError | None = None  # why no session can be had here


class Inside:
    """The tests of one run that run inside guests."""

    def __init__(self, session: VMSession) -> None:
        self._session = session
        self._config = session.config
        self._leases: dict[Key, Lease] = {}
        self._failures: dict[Key, VMSandboxError] = {}
        self._prepared: Payload | None = None
        self._alone: set[str] = set()  # tests that run while no other is announced
        self._following: dict[pytest.Item, pytest.Item] = {}
        self._ids: set[str] = set()
        self._told_of: set[Key] = set()  # kinds of guests that are expected
        self._heard: set[Key] = set()  # kinds of guests whose waiting sessions were heard out
        self._measuring = Measuring.of(session.config)

    # -- the protocol of one test ------------------------------------------------------------

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Carry out a test's protocol in its guest."""
        try:
            self._run(item, nextitem)
        except KeyboardInterrupt:
            if lease := self._leases.get(collection.place_of(item)):
                self._interrupt(lease)
            raise

    def _run(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        last: pytest.TestReport | None = None
        for report in self._reports(item, nextitem):
            if report.when == "teardown":
                last = report
            else:
                self._log(item, report)
        # This side's own fixtures, of tests that ran here, may be over; and the guest.
        call = pytest.CallInfo.from_call(
            lambda: self._tear_down_here(item, nextitem), when="teardown", reraise=_RAISED
        )
        assert last is not None
        if call.excinfo is None or last.failed:
            self._log(item, last)
        if call.excinfo is not None:
            self._log(item, self._made(item, call))
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def _log(self, item: pytest.Item, report: pytest.TestReport) -> None:
        report.user_properties.append(("vm", collection.image_of(item)))
        self._session.note_report(item, report)
        item.ihook.pytest_runtest_logreport(report=report)

    def _reports(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Iterator[pytest.TestReport]:
        """The reports of a test, whatever happens: setup, call if that was reached, teardown."""
        phases = ["setup", "call", "teardown"]
        call = pytest.CallInfo.from_call(lambda: self._lease(item), when="setup", reraise=_RAISED)
        if call.excinfo is not None:
            yield self._made(item, call)
            yield self._passed(item, "teardown")
            return
        assert call.result is not None
        lease = call.result
        reports: list[pytest.TestReport] = []
        try:
            found = self._guest_id(lease, item)
            if not isinstance(found, str):
                yield found
                yield self._passed(item, "teardown")
                return
            for report in self._session_reports(lease, item, found, nextitem):
                if type(report) is pytest.TestReport:  # a subtest's is one more
                    self._check_order(phases, report)
                reports.append(report)
            if phases:
                raise self._broken(f"a test is done without {phases[0]}")
        except VMSandboxError as error:
            ahead = list(lease.session.announced) if lease.session is not None else []
            self._lose(lease, error)
            if isinstance(error, GuestLost) and ahead:
                # Any of them may have done it, while reports were on their way: one by one, then.
                self._alone.update([collection.plain_nodeid(item), *ahead])
                yield from self._reports(item, nextitem)
                return
            reports.append(self._failed(item, error, phases[0] if phases else "teardown"))
            if phases and phases[0] != "teardown":
                reports.append(self._passed(item, "teardown"))
        yield from reports

    def _check_order(self, phases: list[str], report: pytest.TestReport) -> None:
        if not phases or report.when != phases[0]:
            raise self._broken(f"a report of {report.when} where none was due")
        del phases[0]
        if report.when == "setup" and not report.passed:
            phases.remove("call")

    def _session_reports(
        self, lease: Lease, item: pytest.Item, nodeid: str, nextitem: pytest.Item | None
    ) -> Iterator[pytest.TestReport]:
        from pytest_vmsandbox.testing.remote_reports import colourless

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
                yield lease.reader.test_report(item, nodeid, message["report"])
            elif message.get("stop"):
                item.session.shouldstop = colourless(str(message["stop"]))
            elif "interrupted" in message:
                self._stop(lease, message)
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
        for _ in range(1 + _AHEAD):
            if ahead is None or (nodeid := collection.plain_nodeid(ahead)) in self._alone:
                return
            if nodeid not in session.collected.items:
                return
            if nodeid not in session.announced:
                following, more = self._next(ahead, None)
                session.announce(nodeid, following=following, more=more, marks=_marks(ahead))
            ahead = self._following.get(ahead)

    def _tell(self, lease: Lease, message: Message, nodeid: str) -> None:
        """Pass on what a session says besides."""
        from pytest_vmsandbox.testing.remote_reports import harmless, recorded_warning

        if "warning" in message:
            arguments = recorded_warning(message, lease.reader) | {"nodeid": nodeid}
            file = arguments["warning_message"].filename
            # This side has collected, too, but for some files, and has told what it saw.
            if arguments["when"] == "runtest" or file in self._collected_there():
                self._config.hook.pytest_warning_recorded.call_historic(kwargs=arguments)
        elif "junit" in message:
            self._record(message, nodeid)
        elif "output" in message:
            stream = sys.stderr if message.get("of") == 2 else sys.stdout
            encoding = getattr(stream, "encoding", None) or "utf-8"
            text = harmless(message["output"]).encode(encoding, "backslashreplace")
            stream.write(text.decode(encoding))
            stream.flush()

    def _collected_there(self) -> set[str]:
        """The paths of files that only guests collect."""
        return {str(self._config.rootpath / it) for it in self._session.unimportable}

    def _record(self, message: Message, nodeid: str) -> None:
        """Tell junit's file what a test has recorded, other than by its reports."""
        from pytest_vmsandbox.testing.remote_reports import harmless

        xml = self._config.stash.get(xml_key, None)
        name, value = harmless(message.get("name")), harmless(message.get("value"))
        if xml is None:
            return
        if message["junit"] == "property":
            xml.add_global_property(name, value)
        elif re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
            xml.node_reporter(nodeid).add_attribute(name, value)

    def _stop(self, lease: Lease, message: Message) -> NoReturn:
        """A test has raised KeyboardInterrupt, or called `pytest.exit`."""
        from pytest_vmsandbox.testing.remote_reports import colourless

        self._interrupt(lease)
        if not message.get("left"):
            raise KeyboardInterrupt
        status = message.get("status")
        pytest.exit(
            colourless(str(message["interrupted"])),
            status if isinstance(status, int) and 0 <= status < 256 else None,
        )

    def _passed(self, item: pytest.Item, phase: Any) -> pytest.TestReport:
        return self._made(item, pytest.CallInfo.from_call(lambda: None, when=phase))

    def _failed(self, item: pytest.Item, error: VMSandboxError, phase: Any) -> pytest.TestReport:
        if not getattr(error, "__notes__", None):
            for hint in self._session.hints():
                error.add_note(hint)

        def fail() -> NoReturn:
            raise error

        return self._made(item, pytest.CallInfo.from_call(fail, when=phase))

    def _made(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> pytest.TestReport:
        """A report that plugins of this side make; they count on that of the setup before others."""
        if call.when != "setup":
            self._passed(item, "setup")
        report: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
        return report

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
        session = self._lease(item).session
        assert session is not None
        return session.collected

    # -- guests -----------------------------------------------------------------------------------

    def _lease(self, item: pytest.Item) -> Lease:
        """The guest for a test, with a session that has collected."""
        key, kind = collection.place_of(item), self._kind(item)
        if kind in self._failures:
            raise self._failures[kind].with_traceback(None)  # or it grows with each test
        lease = self._leases.get(key)
        if lease is not None and not lease.guest.alive:
            self._end(key)
            lease = None
        if lease is None:
            try:
                lease = self._leases[key] = self._opened(item)
            except VMSandboxError as error:
                self._failures[kind] = error  # the next one would fail as this one
                raise
        if lease.failure is not None:
            raise lease.failure.with_traceback(None)
        if lease.session is None:
            try:
                self._start(lease)
            except GuestLost as lost:
                self._lose(lease, lost)
                if lease.has_collected:  # it was well once: a fresh one will be
                    return self._lease(item)
                self._failures[kind] = lost  # what it collects does that, and would do it again
                raise
        return lease

    def _kind(self, item: pytest.Item) -> Key:
        """The key of a test's guest, or what is the same for all tests that have one each."""
        image, hardware, shared = collection.place_of(item)
        return (image, hardware, "" if shared == item.nodeid else shared)

    def _opened(self, item: pytest.Item) -> Lease:
        """A guest for a test, running, and its session if that has been waiting there."""
        for tries in range(1, _MOST_LOST + 1):
            lease = self._open(item)
            if collection.isolation_of(item) != "test":
                return lease
            try:
                self._wake(lease, self._kind(item))
            except BaseException as error:
                lease.stack.close()
                if not isinstance(error, InterpreterLost) or tries == _MOST_LOST:
                    raise
            else:
                return lease
        raise AssertionError

    def _open(self, item: pytest.Item) -> Lease:
        """A guest for a test, with what its tests need; that is there only once for all its clones."""
        from pytest_vmsandbox.inside import install
        from pytest_vmsandbox.inside.session import Keeper
        from pytest_vmsandbox.testing.remote_reports import Reader

        image = collection.image_of(item)
        assert image is not None
        self._check_python(image)
        factory, payload = self._session.factory, self._payload(item.session)
        hardware = selection.read_marks(item.iter_markers("vm")).hardware
        patience = factory.accelerator(image).time_scale
        alone = collection.isolation_of(item) == "test"
        prepared = factory.with_step(image, install.environment_step(payload))
        if alone:
            prepared = factory.with_step(prepared, self._session_step(item, payload, patience))
            if (kind := self._kind(item)) not in self._told_of:
                self._told_of.add(kind)
                alike = [it for it in item.session.items if collection.runs_inside(it)]
                count = sum(self._kind(it) == kind for it in alike)
                workers = collection.workers(self._config)
                factory.expect(prepared, hardware, -(-count // workers))
        with ExitStack() as stack:
            guest = stack.enter_context(factory.boot(prepared, **hardware))
            if not alone:
                install.install_project(guest, payload)
            installed = install.layout(guest, payload)
            keeper = stack.enter_context(
                Keeper.attached(guest, installed.place, patience=patience, serve=not alone)
            )
            return Lease(
                guest=guest,
                installed=installed,
                keeper=keeper,
                reader=Reader(installed.tree, self._config.rootpath),
                config=self._session_config(item, installed, _own(guest)),
                patience=patience,
                stack=stack.pop_all(),
            )

    def _session_step(self, item: pytest.Item, payload: Payload, patience: float) -> Step:
        """A session that has collected, and waits in the guest until that is sealed."""
        from pytest_vmsandbox.guests.provision import Step
        from pytest_vmsandbox.inside import install
        from pytest_vmsandbox.inside.session import GuestSession, Keeper
        from pytest_vmsandbox.testing import forwarding

        def run(guest: Guest) -> dict[str, object]:
            install.install_project(guest, payload)
            installed = install.layout(guest, payload)
            config = self._session_config(item, installed, {})
            with Keeper.attached(guest, installed.place, patience=patience) as keeper:
                session, said = GuestSession.started(
                    keeper, config, timeout=_COLLECT_SECONDS * patience
                )
            return {"collected": session.collected.facts(), "said": said}

        known = self._session_config(item, install.layout(None, payload), {})
        known["fixtures"] = sorted(forwarding.fixtures(self._config))  # their values come later
        parts = [install.project_digest(payload), known]
        return Step(
            digest=hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest(),
            run=run,
            about="a test session that has collected",
            network="isolated",
        )

    def _wake(self, lease: Lease, kind: Key) -> None:
        """Take over the session that waits in a guest."""
        from pytest_vmsandbox.inside.session import GuestSession
        from pytest_vmsandbox.testing import forwarding

        facts: Any = lease.guest.facts
        lease.session, said = GuestSession.woken(
            lease.keeper,
            facts["collected"],
            environment=_own(lease.guest),
            fixtures=forwarding.fixtures(self._config),
            timeout=_COLLECT_SECONDS * lease.patience,
        )
        lease.has_collected = True
        if kind not in self._heard:  # all of them have said the same
            self._heard.add(kind)
            said = [*facts["said"], *said]
        for message in said:
            self._tell(lease, message, "")

    def _check_python(self, image: str) -> None:
        catalogue = self._session.catalogue
        if catalogue.get(image).python:
            return
        others = [name for name in catalogue.names() if catalogue.get(name).python]
        raise TransferError(
            f"{image} has no Python, so no test can run inside it",
            remedy=f"run it inside {' or '.join(others)}; tests that drive a guest, "
            f"with the fixture vm, run with {image}, too",
        )

    def _start(self, lease: Lease) -> None:
        from pytest_vmsandbox.inside.session import GuestSession

        try:
            lease.session, said = GuestSession.started(
                lease.keeper, lease.config, timeout=_COLLECT_SECONDS * lease.patience
            )
        except InterpreterLost as lost:
            lease.failure = InterpreterLost(
                f"pytest in {lease.guest.name} could not collect the tests: {lost.brief}",
                details=lost.details,
            )
            raise lease.failure from lost
        lease.has_collected = True
        for message in said:
            self._tell(lease, message, "")

    def _session_config(
        self, item: pytest.Item, installed: Installed, own: Mapping[str, str]
    ) -> dict[str, object]:
        from pytest_vmsandbox.inside.install import BASE
        from pytest_vmsandbox.testing import forwarding

        config, tree = self._config, installed.tree
        translate = forwarding.translator(config.rootpath, tree)
        kind = self._kind(item)
        files = {
            collection.plain_nodeid(it).partition("::")[0]: None
            for it in item.session.items
            if collection.is_inside(it) and self._kind(it) == kind
        }
        wanted = options.guest_plugins(config)
        where = translate(str(config.invocation_params.dir))
        return {
            "args": [
                *(f"--rootdir={tree}", "-c", f"{BASE}/session.ini", f"--confcutdir={tree}"),
                *("--disable-plugin-autoload", "-o", f"cache_dir={BASE}/cache"),
                *(word for name in wanted for word in ("-p", name)),
                *forwarding.arguments(config, translate),
                *(f"{tree}/{file}" for file in files),
            ],
            "plugins": [] if wanted else forwarding.plugins(config),
            "options": forwarding.options(config, translate),
            "fixtures": forwarding.fixtures(config),
            "path": list(installed.path),
            "programs": installed.programs,
            "cwd": where if where.startswith(tree) else tree,
            "environment": {**own, **options.guest_environment(config, os.environ)},
            "details": [file for file in files if file in self._session.unimportable],
            "measure": self._measuring and self._measuring.settings(translate),
            "tree": tree,
            "junit": xml.family if (xml := config.stash.get(xml_key, None)) else None,
            "live": config.getoption("capture") == "no",
        }

    def _payload(self, session: pytest.Session) -> Payload:
        if self._prepared is None:
            self._prepared = self._prepare(session)
        return self._prepared

    def _prepare(self, session: pytest.Session) -> Payload:
        from pytest_vmsandbox.core.paths import cache_dir
        from pytest_vmsandbox.inside.environment import Requirements
        from pytest_vmsandbox.inside.install import Payload
        from pytest_vmsandbox.inside.project import Project
        from pytest_vmsandbox.inside.tree import Tree

        config = self._config
        root = config.rootpath
        files = [it.path for it in session.items if collection.is_inside(it) and it.path.is_file()]
        outside = [file for file in files if not file.is_relative_to(root)]
        if outside:
            raise ConfigError(
                f"{outside[0]} is not below the rootdir, {root}, so it does not go to the guest",
                remedy="name a folder above all tests: --rootdir",
            )
        wanted = [str(file.relative_to(root)) for file in files]
        project = Project.of(root)
        if entries := options.requirements(config):
            requirements = Requirements.of_entries(root, entries, project.names)
        else:
            requirements = Requirements.of_host(root, project.names, say=self._session.say)
        if self._measuring is not None:
            requirements = requirements.with_one("coverage")
        return Payload(
            tree=Tree.of(
                root, more=[*options.push(config), *project.modules, *dict.fromkeys(wanted)]
            ),
            project=project,
            requirements=requirements,
            cache=cache_dir(),
            offline=options.offline(config),
            say=self._session.say,
        )

    def _lose(self, lease: Lease, error: VMSandboxError) -> None:
        """A session is over in the middle of a test; its guest goes too, unless it is well."""
        if self._measuring is not None and lease.session is not None:
            self._session.tell(
                f"coverage of tests inside {lease.guest.name} is not complete: they took their "
                "interpreter along, or their guest"
            )
        if isinstance(error, InterpreterLost):
            lease.session = None
        elif isinstance(error, INFRASTRUCTURE):
            for key, other in list(self._leases.items()):
                if other is lease:
                    with suppress(VMSandboxError):
                        self._end(key)

    def _interrupt(self, lease: Lease) -> None:
        if lease.session is not None:
            for message in lease.session.interrupt(_TEAR_DOWN_SECONDS * lease.patience):
                with suppress(VMSandboxError):  # of no interest now
                    self._tell(lease, message, "")
            lease.session = None

    def _tear_down_here(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        with ExitStack() as stack:
            key = collection.place_of(item)
            if key in self._leases and key[2] != "session":
                keep = (
                    nextitem is not None
                    and collection.is_inside(nextitem)
                    and collection.place_of(nextitem) == key
                )
                if not keep:
                    stack.callback(self._end, key)
                    if self._measuring is not None:
                        self._finish(self._leases[key])
            item.session._setupstate.teardown_exact(nextitem)  # noqa: SLF001  # there is no other way

    def _end(self, key: Key) -> None:
        lease = self._leases.pop(key)
        lease.stack.close()

    def _finish(self, lease: Lease) -> list[str]:
        """Let a session tear down what is left, and end.

        Returns:
            What went wrong, for people.
        """
        if lease.session is None or not lease.guest.alive:
            return []
        said = lease.session.finish(_COLLECT_SECONDS * lease.patience)
        if self._measuring is not None and self._prepared is not None:
            self._measuring.keep(said, self._prepared.tree, lease.guest.name)
        return [
            f"{lease.guest.name}: {printable(str(message.get('tail')))}"
            for message in said
            if message.get("exit", 0) not in range(6)
        ]

    def close(self) -> list[str]:
        """Let every session tear down what is left, and end the guests.

        Returns:
            What went wrong, for people.
        """
        problems = []
        for key, lease in list(self._leases.items()):
            try:
                problems += self._finish(lease)
            except (VMSandboxError, TimeoutError) as error:
                problems.append(str(error))
            try:
                self._end(key)
            except VMSandboxError as error:
                problems.append(str(error))
        return problems


_RAISED: tuple[type[BaseException], ...] = (pytest.exit.Exception, KeyboardInterrupt)


def _own(guest: Guest) -> dict[str, str]:
    """Variables of the environment that differ in each guest."""
    return {"VMSANDBOX_GUEST": guest.name}


def _marks(item: pytest.Item) -> list[tuple[str, str]]:
    """Marks that only this side knows of."""
    image = collection.image_of(item)
    wishes = selection.read_marks(item.iter_markers("vm"))
    why = selection.reason(wishes.xfail, image or "")
    return [] if why is None else [("xfail", why)]
