"""The guests that tests run inside: how they are had, with a session each, and how they end."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.junitxml import xml_key

from pytest_vmsandbox.core.errors import (
    INFRASTRUCTURE,
    CacheError,
    ConfigError,
    GuestLost,
    InterpreterLost,
    TransferError,
    VMSandboxError,
)
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.plugin import beside, config as options, plan as plans, pulling
from pytest_vmsandbox.plugin.hooks import end_run
from pytest_vmsandbox.plugin.measuring import Measuring
from pytest_vmsandbox.plugin.plan import Place, Plan, plan_of

if TYPE_CHECKING:
    from pytest_vmsandbox.core.spec import Hardware
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.guests.provision import PreparedImage, Step
    from pytest_vmsandbox.inside.install import Installed, Payload
    from pytest_vmsandbox.inside.session import GuestSession, Keeper
    from pytest_vmsandbox.inside.wire import Message
    from pytest_vmsandbox.plugin.remote_reports import Reader
    from pytest_vmsandbox.plugin.session import VMSession

_COLLECT_SECONDS = 60.0  # for pytest in the guest until it has collected; scaled
_MOST_LOST = 3  # waiting sessions in a row that do not wake up
_MOST_UNLUCKY = 3  # tests in a row whose guests, also the fresh ones, the host or chance took away
_TEAR_DOWN_SECONDS = 10.0  # after Ctrl-C; scaled

_NO_MODULE = re.compile(r"No module named '(\w+)")


@dataclass(kw_only=True)
class Lease:
    """A guest that runs tests inside, as long as those of its key may come.

    Attributes:
        tree: the project's folder in the guest.
        is_untouched: whether its session says that nothing was written there.
    """

    guest: Guest
    tree: str
    keeper: Keeper
    reader: Reader
    config: Mapping[str, object]
    patience: float
    stack: ExitStack
    session: GuestSession | None = None
    has_collected: bool = False
    has_failed: bool = False  # a test in it
    is_untouched: bool = False


class Leases:
    """The guests of one run that tests run inside.

    Args:
        tell: is told what a session says before it runs tests, and when it is interrupted.
    """

    def __init__(self, session: VMSession, *, tell: Callable[[Lease, Message], None]) -> None:
        self._session = session
        self._config = session.config
        self._tell = tell
        self._leases: dict[Place, Lease] = {}
        self._failures: dict[Place, VMSandboxError] = {}
        # By image and hardware.
        self._unfit: dict[tuple[str, Hardware], TransferError | CacheError] = {}
        self._unlucky: dict[Place, int] = {}
        self._prepared: Payload | None = None
        self._told_of: set[Place] = set()  # kinds of guests that are expected
        self._heard: set[Place] = set()  # kinds of guests whose waiting sessions were heard out
        self._finished_badly: set[Place] = set()  # kinds of guests, of which one session ended so
        self._measuring = Measuring.of(session.config)

    # -- having one ---------------------------------------------------------------------------

    def lease(self, item: pytest.Item) -> Lease:
        """The guest for a test, with a session that has collected.

        If the host or chance takes the guest away meanwhile, a fresh one is tried, once.

        Raises:
            VMSandboxError: there can be none.
        """
        kind = plan_of(item).kind
        if kind in self._failures:
            raise self._failures[kind].with_traceback(None)  # or it grows with each test
        try:
            lease = self._ready_or_retried(item)
        except VMSandboxError as error:
            self._unlucky[kind] = self._unlucky.get(kind, 0) + 1
            if not error.transient or self._unlucky[kind] == _MOST_UNLUCKY:
                self._failures[kind] = error  # the next one would fail as this one
            raise
        self._unlucky.pop(kind, None)
        return lease

    def _ready_or_retried(self, item: pytest.Item) -> Lease:
        try:
            return self._ready(item)
        except VMSandboxError as error:
            if not error.transient:
                raise
            self._session.note_retry(error, item)
        return self._ready(item)

    def _ready(self, item: pytest.Item) -> Lease:
        """The guest for a test, with a session that has collected; it is there, or is opened."""
        key = plan_of(item).place
        lease = self._leases.get(key)
        if lease is not None and (loss := lease.guest.engine.loss) is not None:
            self._note_loss(lease)
            self._end(key)
            lease = None
            if loss.transient:  # the test may have run in it, ahead of its reports
                self._session.note_retry(loss, item)
            else:
                self._tell_problems([f"between two tests: {loss.brief}"])
        if lease is None:
            lease = self._leases[key] = self._opened(item)
        self._session.note_use(lease.guest)
        if lease.session is None:
            try:
                self._start(lease)
            except (GuestLost, InterpreterLost) as error:
                self._abandon(lease, error)
                if not lease.has_collected:  # what it collects does that, and would do it again
                    raise
                return self._ready(item)  # it was well once: a fresh one will be
        return lease

    def _opened(self, item: pytest.Item) -> Lease:
        """A guest for a test, running, and its session if that has been waiting there."""
        for tries in range(1, _MOST_LOST + 1):
            lease = self._open(item)
            if plan_of(item).isolation != "test":
                return lease
            try:
                self._wake(lease, plan_of(item).kind)
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
        from pytest_vmsandbox.plugin import guest_config
        from pytest_vmsandbox.plugin.remote_reports import Reader

        plan = plan_of(item)
        image = plan.image
        self._check_python(image)
        factory = self._session.factory
        factory.backend.require(image)
        payload = self._payload(item.session)
        patience = factory.backend.patience(image)
        alone = plan_of(item).isolation == "test"
        prepared = factory.with_step(image, install.environment_step(payload))
        if alone:
            prepared = factory.with_step(prepared, self._session_step(item, payload, patience))
            if (kind := plan.kind) not in self._told_of:
                self._told_of.add(kind)
                found = (plans.find(other) for other in item.session.items)
                count = sum(
                    1 for other in found if other and other.runs_inside and other.kind == kind
                )
                share = -(-count // options.workers(self._config))
                factory.expect(prepared, plan.hardware, share)
        with ExitStack() as stack:
            guest = stack.enter_context(self._booted(plan, prepared))
            if not alone:
                install.install_project(guest, payload)
            installed = install.layout(guest, payload)
            keeper = stack.enter_context(
                Keeper.attached(guest, installed.place, patience=patience, serve=not alone)
            )
            return Lease(
                guest=guest,
                tree=installed.tree,
                keeper=keeper,
                reader=Reader(
                    installed.tree,
                    self._config.rootpath,
                    installed.outside,
                    outcomes=guest_config.outcomes(self._config),
                ),
                config=self._session_config(item, installed, _own(guest)),
                patience=patience,
                stack=stack.pop_all(),
            )

    @contextmanager
    def _booted(self, plan: Plan, prepared: PreparedImage) -> Iterator[Guest]:
        """A guest with the layers of tests inside; one that could not have them is not tried again.

        Raises:
            VMSandboxError: there is none.
        """
        kind = plan.image, plan.hardware
        if kind in self._unfit:
            raise self._unfit[kind].with_traceback(None)
        with ExitStack() as stack:
            try:
                guest = stack.enter_context(self._session.factory.lease(prepared, plan.hardware))
            except (TransferError, CacheError) as error:
                self._unfit[kind] = error
                raise
            with stack:
                yield guest

    def _session_step(self, item: pytest.Item, payload: Payload, patience: float) -> Step:
        """A session that has collected, and waits in the guest until that is sealed."""
        from pytest_vmsandbox.guests.provision import Step
        from pytest_vmsandbox.inside import install
        from pytest_vmsandbox.inside.session import GuestSession, Keeper, RunEnded
        from pytest_vmsandbox.plugin import guest_config

        def run(guest: Guest) -> dict[str, object]:
            install.install_project(guest, payload)
            installed = install.layout(guest, payload)
            config = self._session_config(item, installed, {})
            with Keeper.attached(guest, installed.place, patience=patience) as keeper:
                try:
                    session, said = GuestSession.started(
                        keeper, config, timeout=_COLLECT_SECONDS * patience
                    )
                except RunEnded as end:
                    end_run(end.message)
            return {"collected": session.collected.facts(), "said": said}

        known = self._session_config(item, install.layout(None, payload), {})
        known["fixtures"] = sorted(guest_config.fixtures(self._config))  # their values come later
        parts = [install.project_digest(payload), known]
        return Step(
            digest=hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest(),
            run=run,
            about="a test session that has collected",
            network="isolated",
            personal=True,
        )

    def _wake(self, lease: Lease, kind: Place) -> None:
        """Take over the session that waits in a guest."""
        from pytest_vmsandbox.inside.session import GuestSession
        from pytest_vmsandbox.plugin import guest_config

        facts: Any = lease.guest.engine.facts
        lease.session, said = GuestSession.woken(
            lease.keeper,
            facts["collected"],
            environment=_own(lease.guest),
            fixtures=guest_config.fixtures(self._config),
            timeout=_COLLECT_SECONDS * lease.patience,
        )
        lease.has_collected = True
        if kind not in self._heard:  # all of them have said the same
            self._heard.add(kind)
            said = [*facts["said"], *said]
        for message in said:
            self._tell(lease, message)

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
        from pytest_vmsandbox.inside.session import GuestSession, RunEnded

        try:
            lease.session, said = GuestSession.started(
                lease.keeper, lease.config, timeout=_COLLECT_SECONDS * lease.patience
            )
        except RunEnded as end:
            end_run(end.message)
        except InterpreterLost as lost:
            raise InterpreterLost(
                f"pytest in {lease.guest.name} could not collect the tests: {lost.brief}",
                details=lease.reader.text(lost.details),
                remedy=self.hint(lost.details),
            ) from lost
        for message in said:
            self._tell(lease, message)
        lease.has_collected = True

    def hint(self, text: str) -> str:
        """What to do about an error of Python: a module that is here, but not in the guest, or nothing."""
        from pytest_vmsandbox.inside import distributions, project, requirements

        for name in _NO_MODULE.findall(text):
            if (folder := project.foreign_folder(name, self._config.rootpath)) is not None:
                path = os.path.relpath(folder, self._config.rootpath)
                return (
                    f"{name} is in {folder} here. That folder is on sys.path, but outside of the "
                    f"rootdir, so no guest gets it. To send it, write `vm_push = {path}` in the ini file"
                )
            if names := distributions.providers(name):
                return (
                    f"{name} is installed here, by {' and '.join(names)}, but not in the guest: "
                    f"it was left out, or {requirements.SETTING} does not name it"
                )
        return ""

    # -- what goes there ----------------------------------------------------------------------

    def _session_config(
        self, item: pytest.Item, installed: Installed, own: Mapping[str, str]
    ) -> dict[str, object]:
        from pytest_vmsandbox.inside.install import BASE
        from pytest_vmsandbox.plugin import guest_config

        config, tree = self._config, installed.tree
        translate = guest_config.translator({str(config.rootpath): tree, **installed.outside})
        kind = plan_of(item).kind
        found = (plans.find(other) for other in item.session.items)
        files = {plan.file: None for plan in found if plan and plan.is_inside and plan.kind == kind}
        wanted = options.guest_plugins(config)
        for name in guest_config.only_here(config):
            self._session.tell(
                f"the plugin {name} stays on this side: it is neither in the project nor installed"
            )
        if lost := guest_config.lost_options(config):
            self._tell_problems(
                [
                    f"options that no guest can be told, so it has its defaults there: {', '.join(lost)}"
                ]
            )
        where = translate(str(config.invocation_params.dir))
        results = f"{BASE}/allure" if beside.AllureResults(config).are_wanted else None
        return {
            "args": [
                *(f"--rootdir={tree}", "-c", f"{BASE}/session.ini"),
                "--disable-plugin-autoload",
                *(word for name in wanted for word in ("-p", name)),
                *guest_config.arguments(config, translate),
                *(f"{tree}/{file}" for file in files),
            ],
            "plugins": [] if wanted else guest_config.plugins(config),
            "options": {**guest_config.options(config, translate), "allure_report_dir": results},
            "ini": [(["cache_dir"], f"{BASE}/cache"), *guest_config.ini(config, translate)],
            "fixtures": guest_config.fixtures(config),
            "path": list(installed.path),
            "programs": installed.programs,
            "cwd": where if where.startswith(tree) else tree,
            "environment": {**own, **options.guest_environment(config, os.environ)},
            "outcomes": guest_config.outcomes(config),
            "alone": plan_of(item).isolation == "test",
            "details": [file for file in files if file in self._session.unimportable],
            "measure": self._measuring and self._measuring.settings(translate),
            "tree": tree,
            "logs": beside.Logs(config).are_wanted,
            "allure": results,
            "machine": beside.machine_is_wanted(config),
            "junit": xml.family if (xml := config.stash.get(xml_key, None)) else None,
            "live": config.getoption("capture", default="no") == "no",
        }

    def _payload(self, session: pytest.Session) -> Payload:
        if self._prepared is None:
            self._prepared = self._prepare(session)
        return self._prepared

    def _prepare(self, session: pytest.Session) -> Payload:
        from pytest_vmsandbox.inside.install import Payload

        config = self._config
        root = config.rootpath
        files = [it.path for it in session.items if plans.is_inside(it) and it.path.is_file()]
        outside = [file for file in files if not file.is_relative_to(root)]
        if outside:
            raise ConfigError(
                f"{outside[0]} is not below the rootdir, {root}, so it does not go to the guest",
                remedy="name a folder above all tests: --rootdir",
            )
        wanted = [str(file.relative_to(root)) for file in files]
        payload = Payload.of(
            root,
            entries=options.requirements(config),
            more=[*options.push(config), *dict.fromkeys(wanted)],
            offline=options.offline(config),
            say=self._session.say,
            tell=self._session.tell,
        )
        more = [] if self._measuring is None else ["coverage"]
        if options.requirements(config) and any(
            plan.is_rerun for plan in filter(None, map(plans.find, session.items))
        ):
            more.append("pytest-rerunfailures")
        for name in more:
            payload = replace(payload, requirements=payload.requirements.with_one(name))
        return payload

    # -- the end of one -----------------------------------------------------------------------

    def lose(self, lease: Lease, error: VMSandboxError) -> None:
        """A session is over in the middle of a test; its guest goes too, unless it is well."""
        error.details = lease.reader.text(error.details)
        if self._measuring is not None and lease.session is not None:
            self._session.tell(
                f"coverage of tests inside {lease.guest.name} is not complete: they took their "
                "interpreter along, or their guest"
            )
        if isinstance(error, InterpreterLost):
            lease.session = None
        elif isinstance(error, INFRASTRUCTURE):
            self._abandon(lease, error)

    def _abandon(self, lease: Lease, error: VMSandboxError) -> None:
        """End a guest because of an error."""
        self._leases = {key: other for key, other in self._leases.items() if other is not lease}
        self._note_loss(lease)
        try:
            with lease.stack:
                raise error  # through its use
        except Exception as raised:  # noqa: BLE001  # a user's hook may raise anything
            if raised is not error:
                self._tell_problems([f"while {lease.guest.name} was ended: {raised!r}"])

    def interrupt(self, item: pytest.Item) -> None:
        """Let the session of a test tear all down, as after Ctrl-C, if there is one."""
        lease = self._leases.get(plan_of(item).place)
        if lease is not None and lease.session is not None:
            for message in lease.session.interrupt(_TEAR_DOWN_SECONDS * lease.patience):
                with suppress(VMSandboxError):  # of no interest now
                    self._tell(lease, message)
            lease.session = None

    @contextmanager
    def ending(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        """While this side's fixtures are torn down; then the guest ends, unless the next test needs it."""
        with ExitStack() as stack:
            key = plan_of(item).place
            if key in self._leases and key[2] != "session":
                following = None if nextitem is None else plans.find(nextitem)
                keep = following is not None and following.is_inside and following.place == key
                if not keep:
                    stack.callback(self._end, key)
                    self._wind_up(item, self._leases[key])
            yield

    def end(self, item: pytest.Item) -> None:
        """End the guest of a test: the next attempt at it has a fresh one."""
        key = plan_of(item).place
        self._wind_up(item, self._leases[key])
        self._end(key)

    def _wind_up(self, item: pytest.Item, lease: Lease) -> None:
        """Let a session end, and take what it has left.

        Of guests that have one test each, only the first is told whose session ended badly.
        """
        problems = self._finish(lease)
        kind = plan_of(item).kind
        if problems and kind not in self._finished_badly:
            self._finished_badly.add(kind)
            self._tell_problems(problems)
        self._tell_problems(self._bring_back(lease))

    def _tell_problems(self, problems: list[str]) -> None:
        """Tell what went wrong that is no test's error: the run is not green."""
        for problem in problems:
            self._session.failed = True
            self._session.tell(problem)

    def _end(self, key: Place) -> None:
        lease = self._leases.pop(key)
        lease.stack.close()

    def _finish(self, lease: Lease) -> list[str]:
        """Let a session tear down what is left, and end.

        Returns:
            What went wrong, for people.
        """
        if lease.session is None:
            return []
        if (loss := lease.guest.engine.loss) is not None:
            return [f"after the last test in it: {loss.brief}"]
        said = lease.session.finish(_COLLECT_SECONDS * lease.patience)
        lease.is_untouched = any("untouched" in message for message in said)
        if self._measuring is not None and self._prepared is not None:
            self._measuring.keep(said, self._prepared.tree, lease.guest.name)
        for message in said:
            if "allure" in message:  # of fixtures that the session's end has torn down
                self._tell(lease, message)

        def tail(message: Message) -> str:
            return lease.reader.text(printable(str(message.get("tail", ""))))

        has_failed = lease.has_failed or lease.session.collected.has_errors
        allowed = {0, 1} if has_failed else {0, 5}  # as pytest ends: 5 is «no tests»
        return [
            f"{lease.guest.name}: {tail(message)}\n  its pytest ended with status "
            f"{message['exit']}, which no test there has caused: a conftest.py or a plugin has"
            for message in said
            if "exit" in message and message["exit"] not in allowed
        ]

    def _bring_back(self, lease: Lease) -> list[str]:
        """Bring back what tests have written into the project in a guest whose session is over.

        Returns:
            What went wrong, for people.
        """
        if self._prepared is None or not lease.has_collected or lease.is_untouched:
            return []
        if lease.guest.engine.loss is not None:
            self._note_loss(lease)
            return []
        try:
            found = pulling.bring_back(self._session, lease, self._prepared.tree)
        except VMSandboxError as error:
            return [f"what tests wrote in {lease.guest.name} does not come back: {error}"]
        for outcome, paths in found.items():
            pulling.note(self._session.pulled, outcome.value, paths)
        return []

    def _note_loss(self, lease: Lease) -> None:
        if self._prepared is not None and lease.has_collected:
            pulling.note(self._session.pulled, pulling.LOST, [lease.guest.name])

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
            problems += self._bring_back(lease)
            try:
                self._end(key)
            except Exception as error:  # noqa: BLE001  # a user's hook may raise anything
                problems.append(str(error) if isinstance(error, VMSandboxError) else repr(error))
        return problems


def _own(guest: Guest) -> dict[str, str]:
    """Variables of the environment that differ between guests, or between workers."""
    from pytest_vmsandbox.plugin import guest_config

    return {**guest_config.environment(), "VMSANDBOX_GUEST": guest.name}
