"""Makes guests ready for tests inside: each gets an environment, the project and a session."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from _pytest.junitxml import xml_key

from pytest_vmsandbox.catalogue.definition import PYTHON_FLOOR
from pytest_vmsandbox.core.errors import ConfigError, GuestLost, InterpreterLost, TransferError
from pytest_vmsandbox.core.settings import DEFAULT_IMAGE
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.provision import PreparedImage, Step
from pytest_vmsandbox.inside import distributions, install, project, requirements
from pytest_vmsandbox.inside.connection import Connection, GuestPaths
from pytest_vmsandbox.inside.install import Installed, Payload
from pytest_vmsandbox.inside.recorded_connection import RecordedConnection
from pytest_vmsandbox.inside.session import GuestSession, RunEnded
from pytest_vmsandbox.inside.wire import Message
from pytest_vmsandbox.plugin import config as options
from pytest_vmsandbox.plugin.in_vm import guest_config, other_plugins
from pytest_vmsandbox.plugin.in_vm.clustered import Clustered, Facts
from pytest_vmsandbox.plugin.in_vm.hooks import end_run
from pytest_vmsandbox.plugin.in_vm.measuring import Measuring
from pytest_vmsandbox.plugin.in_vm.recording import Keeper
from pytest_vmsandbox.plugin.in_vm.remote_reports import ReportReader
from pytest_vmsandbox.plugin.plan import Place, Plan, alike, plan_of
from pytest_vmsandbox.plugin.run import Run, leased

_SUGGESTED = 3  # images
_RECORDING = 4.0  # by how much a test takes longer while it is recorded
COLLECT_SECONDS = 60.0  # for pytest in the guest to collect; longer on a slow host
_NO_PLUGIN = re.compile(r'Error importing plugin "([\w.-]+)"')
_NO_MODULE = re.compile(r"No module named '(\w+)")


@dataclass(kw_only=True)
class Lease:
    """A guest that runs tests inside. It stays while tests of its place may come.

    Attributes:
        payload: what was sent to the guest.
        tree: the project's folder in the guest.
        place: of the interpreter and the runner.
        said: messages of its session that were not passed on yet.
        has_collected: whether a session there has collected, and its messages were passed on.
        has_failed: whether a test there has failed.
        failure: how the last one did, as pytest shows it; empty if it passed.
        is_untouched: whether its session says that no file was written there.
        is_recorded: whether its run is recorded. Then nothing else can be done in the guest.
        others: the other machines of its cluster, if it is one.
    """

    guest: Guest
    payload: Payload
    tree: str
    place: GuestPaths
    connection: Connection
    reader: ReportReader
    config: Mapping[str, object]
    stack: ExitStack
    session: GuestSession | None = None
    said: list[Message] = field(default_factory=list)
    has_collected: bool = False
    has_failed: bool = False
    failure: str = ""
    is_untouched: bool = False
    is_recorded: bool = False
    others: tuple[Guest, ...] = ()

    @property
    def guests(self) -> tuple[Guest, ...]:
        """The guest, and the other machines of its cluster."""
        return (self.guest, *self.others)

    @property
    def loss(self) -> GuestLost | None:
        """Why the guest, or another machine of its cluster, is gone; None if all are there."""
        return self.guest.engine.loss or self.loss_of_others

    @property
    def loss_of_others(self) -> GuestLost | None:
        """Why another machine of its cluster is gone. One that a hook has switched off is not."""
        losses = (other.engine.loss for other in self.others if other.engine.is_on)
        return next(filter(None, losses), None)

    def start(self, root: Path) -> None:
        """Start a session and let it collect.

        Args:
            root: the rootdir.

        Raises:
            InterpreterLost: it could not collect.
            GuestLost: the guest is gone.
        """
        try:
            self.session, self.said = started(self.connection, self.config)
        except InterpreterLost as lost:
            raise InterpreterLost(
                f"pytest in {self.guest.name} could not collect the tests: {lost.brief}",
                details=self.reader.text(lost.details),
                remedy=remedy(root, lost.details),
            ) from lost


def started(
    connection: Connection, config: Mapping[str, object]
) -> tuple[GuestSession, list[Message]]:
    """A session that has collected, and its other messages. If it ends the run, the run ends here.

    Raises:
        ConfigError: the guest does not have a plugin that `vm_guest_plugins` names.
        InterpreterLost: the session could not collect.
        GuestLost: the guest is gone.
    """
    try:
        timeout = COLLECT_SECONDS * connection.patience
        return GuestSession.started(connection, config, timeout=timeout)
    except RunEnded as end:
        end_run(*end.args)
    except InterpreterLost as lost:
        found = _NO_PLUGIN.search(lost.details)
        if found is None or found[1] not in str(config["wanted"]):
            raise
        raise ConfigError(
            f"vm_guest_plugins names {found[1]}, but pytest in the guest cannot import it",
            details=lost.details,
            remedy="correct the name, or add the plugin's package to vm_requirements",
        ) from None


class Provisioner:
    """Makes guests ready for tests inside.

    The environment is a layer of the template, so it is made once for all clones. So is the session, if
    each test has a guest of its own.
    """

    def __init__(self, run: Run, session: pytest.Session) -> None:
        self._run = run
        self._config = run.config
        self._session = session
        self._expected: set[Place] = set()  # kinds of guests that the factory knows about
        self._heard: set[Place] = set()  # kinds of guests whose session's messages were passed on

    def open(self, plan: Plan) -> Lease:
        """A guest for a test. If the test has a guest of its own, the session has already collected.

        Raises:
            VMSandboxError: no guest can be made ready.
        """
        self._check_python(plan.image)
        factory = self._run.factory
        factory.backend.require(plan.image)
        payload = self._payload
        if plan.hardware.recorded:
            image = factory.with_step(plan.image, install.environment_step(payload))
            return self._recorded(plan, factory.with_step(image, self._session_step(plan)), payload)
        patience = factory.backend.patience(plan.image)
        alone = plan.isolation == "test"
        with ExitStack() as stack:
            guest, others, facts = self._guests(plan, stack)
            if not alone:
                install.install_project(guest, payload)
            connection = stack.enter_context(
                Connection.attached(
                    guest,
                    install.layout(guest, payload).place,
                    patience=patience,
                    serve=not alone,
                )
            )
            lease = self._lease(plan, connection, payload, stack)
            lease.others = others
            if alone:
                self._resume(lease, plan.kind, facts)
            lease.stack = stack.pop_all()
            return lease

    def _guests(self, plan: Plan, stack: ExitStack) -> tuple[Guest, tuple[Guest, ...], Facts]:
        """The guest for a test, the other machines of its cluster, and what its session has collected.

        Args:
            stack: ends them.
        """
        factory, mark = self._run.factory, plan.cluster
        image = factory.with_step(plan.image, install.environment_step(self._payload))
        session = self._session_step(plan) if plan.isolation == "test" else None
        with_session = image if session is None else factory.with_step(image, session)
        if session is not None and (mark is None or mark.form is None):
            self._expect(plan, with_session)
        if mark is None:
            guest = stack.enter_context(leased(factory, with_session, plan))
            return guest, (), guest.engine.facts
        for machine in mark.machines.values():
            factory.backend.require(str(machine.image))
        cluster, facts = stack.enter_context(
            self._clustered.opened(
                mark, image, plan.kind, session, more=lambda: self._count(plan) > 1
            )
        )
        inside = cluster[str(mark.inside)]
        return inside, tuple(it for it in cluster.values() if it is not inside), facts

    def _lease(
        self, plan: Plan, connection: Connection, payload: Payload, stack: ExitStack
    ) -> Lease:
        guest = connection.guest
        installed = install.layout(guest, payload)
        return Lease(
            guest=guest,
            payload=payload,
            tree=installed.tree,
            place=installed.place,
            connection=connection,
            reader=ReportReader(
                installed.tree,
                self._config.rootpath,
                installed.outside,
                outcomes=guest_config.outcomes(self._config),
            ),
            config={
                **self._session_config(plan, installed, _own(guest)),
                "debugging": self._debugging(installed.place),
            },
            stack=stack,
            is_recorded=plan.hardware.recorded,
        )

    def _recorded(self, plan: Plan, image: PreparedImage, payload: Payload) -> Lease:
        """A guest whose run is recorded. The recording is kept if the test fails."""
        factory = self._run.factory
        patience = _RECORDING * factory.backend.patience(plan.image)
        with ExitStack() as stack:
            recording = stack.enter_context(
                Keeper.recording(self._run, factory, image, plan.hardware)
            )
            connection = RecordedConnection(recording.run, patience=patience)
            lease = self._lease(plan, connection, payload, stack)
            recording.failure = lambda: lease.failure
            self._resume(lease, plan.kind, recording.opened.template.facts)
            lease.stack = stack.pop_all()
            return lease

    def _check_python(self, image: str) -> None:
        catalogue = self._run.catalogue
        definition = catalogue.get(image)
        if definition.in_vm:
            return
        version, floor = definition.python_version, ".".join(map(str, PYTHON_FLOOR))
        old = f"Python {version}, but they need {floor} or newer"
        # The default image comes first, then the user's own, which are the last of the catalogue.
        others = [
            name
            for name, other in reversed([*catalogue.valid(foreign=True)])
            if other.in_vm and other.architecture == definition.architecture
        ]
        best = sorted(others, key=lambda name: name.partition("_")[0] != DEFAULT_IMAGE)
        suggestion = f"run them inside {' or '.join(best[:_SUGGESTED])}. " if best else ""
        raise TransferError(
            f"tests cannot run inside {image}: this image has "
            f"{old if definition.python else 'no Python'}",
            remedy=f"{suggestion}Tests that drive a guest by the fixture vm work with {image}, too",
        )

    @cached_property
    def _clustered(self) -> Clustered:
        return Clustered(self._run.factory, self._run.tell)

    @cached_property
    def _payload(self) -> Payload:
        """What goes to each guest of this run. What cannot go there is reported."""
        config = self._config
        root = config.rootpath
        for name in guest_config.only_here(config):
            self._run.tell(
                f"the plugin {name} is not loaded in guests: it is neither in the project nor installed"
            )
        if lost := guest_config.options(config, str)[1]:
            self._run.tell_problem(
                "these options have their default values in guests, because their values cannot be sent "
                f"as JSON: {', '.join(lost)}"
            )
        tests = [item for item in self._session.items if plan_of(item).is_inside]
        files = dict.fromkeys(item.path for item in tests if item.path.is_file())
        for file in files:
            if not file.is_relative_to(root):
                raise ConfigError(
                    f"{file} is not below pytest's rootdir {root}, so it cannot be sent to the guest",
                    remedy="set --rootdir to a folder that contains all tests",
                )
        wanted = [str(file.relative_to(root)) for file in files]
        listed = options.entries(config, "vm_requirements")
        payload = Payload.of(
            root,
            entries=listed,
            more=[*options.entries(config, "vm_push"), *wanted],
            offline=options.offline(config),
            say=self._run.say,
            tell=self._run.tell,
        )
        more = [] if Measuring.of(config) is None else ["coverage"]
        if listed and any(plan_of(item).is_rerun for item in tests):
            more.append("pytest-rerunfailures")
        for name in more:
            payload = replace(payload, requirements=payload.requirements.with_one(name))
        return payload

    def _expect(self, plan: Plan, image: PreparedImage) -> None:
        """Tell the factory, once, how many guests of a kind the tests will need."""
        if plan.kind not in self._expected:
            self._expected.add(plan.kind)
            self._run.factory.expect(image, plan.hardware, self._count(plan))

    def _count(self, plan: Plan) -> int:
        """How many tests run here inside guests of a kind."""
        count = sum(each.runs_inside for each in alike(self._session.items, plan))
        return options.share(self._config, count)

    def _session_step(self, plan: Plan) -> Step:
        """A layer with a session that has collected, and waits until the guest becomes a template."""
        payload = self._payload

        def collect(guest: Guest) -> dict[str, object]:
            install.install_project(guest, payload)
            installed = install.layout(guest, payload)
            config = self._session_config(plan, installed, {})
            patience = self._run.factory.backend.patience(plan.image)
            with Connection.attached(guest, installed.place, patience=patience) as connection:
                found, said = started(connection, config)
            if plan.hardware.recorded:
                install.await_request(guest, installed.place)
            return {"collected": vars(found.collected), "said": said}

        known = self._session_config(plan, install.layout(None, payload), {})
        known["fixtures"] = sorted(
            guest_config.fixtures(self._config)
        )  # names only: values come later
        parts = [install.project_digest(payload), known]
        return Step(
            digest=hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest(),
            run=collect,
            about="a test session that has collected",
            network="isolated",
            personal=True,
        )

    def _session_config(
        self, plan: Plan, installed: Installed, own: Mapping[str, str]
    ) -> dict[str, object]:
        """The configuration of a session in a guest; see `run` in the runner's `process.py`.

        Args:
            plan: of one of its tests. The session has all tests that belong inside this kind of guest.
            own: environment variables that differ between guests.
        """
        config, tree = self._config, installed.tree
        translate = guest_config.translator({str(config.rootpath): tree, **installed.outside})
        files = list(dict.fromkeys(each.file for each in alike(self._session.items, plan)))
        where = translate(str(config.invocation_params.dir))
        results = (
            f"{install.BASE}/allure" if other_plugins.AllureResults(config).are_wanted else None
        )
        measuring = Measuring.of(config)
        xml = config.stash.get(xml_key, None)
        return {
            "args": [
                *(f"--rootdir={tree}", "-c", f"{install.BASE}/session.ini"),
                "--disable-plugin-autoload",
                *guest_config.arguments(config, translate),
                *(f"{tree}/{file}" for file in files),
            ],
            "wanted": options.entries(config, "vm_guest_plugins"),
            "plugins": guest_config.plugins(config),
            "options": {**guest_config.options(config, translate)[0], "allure_report_dir": results},
            "ini": [(["cache_dir"], f"{install.BASE}/cache"), *guest_config.ini(config, translate)],
            "fixtures": guest_config.fixtures(config),
            "path": list(installed.path),
            "programs": installed.programs,
            "cwd": where if where.startswith(tree) else tree,
            "environment": {**own, **options.guest_environment(config)},
            "outcomes": guest_config.outcomes(config),
            "alone": plan.isolation == "test",
            "details": [file for file in files if file in self._run.unimportable],
            "measure": measuring and measuring.settings(translate),
            "tree": tree,
            "logs": other_plugins.Logs(config).are_wanted,
            "allure": results,
            "machine": other_plugins.machine_is_wanted(config),
            "junit": xml.family if xml else None,
            "live": config.getoption("capture", default="no") == "no",
        }

    def _debugging(self, place: GuestPaths) -> dict[str, object]:
        return guest_config.debugging(self._config, place.folder)

    def _resume(self, lease: Lease, kind: Place, facts: Any) -> None:
        """Take over the session that waits in a clone.

        Args:
            facts: of the clone's template.
        """
        try:
            lease.session, lease.said = GuestSession.woken(
                lease.connection,
                facts["collected"],
                environment=_own(lease.guest),
                fixtures=guest_config.fixtures(self._config),
                debugging={} if lease.is_recorded else self._debugging(lease.place),
                timeout=COLLECT_SECONDS * lease.connection.patience,
            )
        except InterpreterLost as error:
            error.transient = True  # it worked when it became a template
            raise
        if kind not in self._heard:  # all clones have said the same
            self._heard.add(kind)
            lease.said[:0] = facts["said"]


def _own(guest: Guest) -> dict[str, str]:
    """Environment variables that differ between guests, or between workers."""
    return {**guest_config.environment(), "VMSANDBOX_GUEST": guest.name}


def remedy(root: Path, text: str) -> str:
    """A remedy for a missing module that exists on this machine; empty for other errors.

    Args:
        root: pytest's rootdir.
        text: the error's text.
    """
    for name in _NO_MODULE.findall(text):
        if (folder := project.foreign_folder(name, root)) is not None:
            path = os.path.relpath(folder, root)
            return (
                f"on this machine, {name} is in {folder}. That folder is on sys.path but outside of the "
                f"rootdir, so it is not sent to guests. To send it, add `vm_push = {path}` to the ini file"
            )
        if names := distributions.providers(name):
            return (
                f"on this machine, {name} is installed by {' and '.join(names)}, but it is not installed in "
                f"the guest. If your ini file has {requirements.SETTING}, add it there. Otherwise the "
                "output of this run says why it was left out"
            )
    return ""
