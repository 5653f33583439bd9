"""Guests for tests inside: each gets an environment, the project, and a session."""

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

from pytest_vmsandbox.core.errors import ConfigError, InterpreterLost, TransferError
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.provision import PreparedImage, Step
from pytest_vmsandbox.inside import distributions, install, project, requirements
from pytest_vmsandbox.inside.connection import Connection
from pytest_vmsandbox.inside.install import Installed, Payload
from pytest_vmsandbox.inside.session import GuestSession, RunEnded
from pytest_vmsandbox.inside.wire import Message
from pytest_vmsandbox.plugin import config as options
from pytest_vmsandbox.plugin.in_vm import guest_config, other_plugins
from pytest_vmsandbox.plugin.in_vm.hooks import end_run
from pytest_vmsandbox.plugin.in_vm.measuring import Measuring
from pytest_vmsandbox.plugin.in_vm.remote_reports import ReportReader
from pytest_vmsandbox.plugin.plan import Place, Plan, alike, plan_of
from pytest_vmsandbox.plugin.run import Run

COLLECT_SECONDS = 60.0  # for pytest in the guest until it has collected; scaled
_NO_PLUGIN = re.compile(r'Error importing plugin "([\w.-]+)"')
_NO_MODULE = re.compile(r"No module named '(\w+)")


@dataclass(kw_only=True)
class Lease:
    """A guest that runs tests inside, as long as those of its place may come.

    Attributes:
        payload: what went there.
        tree: the project's folder in the guest.
        said: what its session has said that was not passed on yet.
        has_collected: whether a session there has, and what it said was heard out.
        has_failed: whether a test there has.
        is_untouched: whether its session says that nothing was written there.
    """

    guest: Guest
    payload: Payload
    tree: str
    connection: Connection
    reader: ReportReader
    config: Mapping[str, object]
    stack: ExitStack
    session: GuestSession | None = None
    said: list[Message] = field(default_factory=list)
    has_collected: bool = False
    has_failed: bool = False
    is_untouched: bool = False

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
    """A session that has collected, and what it said besides; the run ends if it says so.

    Raises:
        ConfigError: the guest has no such plugin.
        InterpreterLost: it could not collect.
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
            f"vm_guest_plugins names {found[1]}, which pytest in the guest cannot import",
            details=lost.details,
            remedy="correct the name. If it is a distribution's, name that in vm_requirements",
        ) from None


class Provisioner:
    """Makes guests ready for tests inside.

    Environment and, where each test has a guest of its own, session are layers: they are made once
    for all clones.
    """

    def __init__(self, run: Run, session: pytest.Session) -> None:
        self._run = run
        self._config = run.config
        self._session = session
        self._expected: set[Place] = set()  # kinds of guests of which the factory knows
        self._heard: set[Place] = set()  # kinds of guests whose waiting sessions were heard out

    def open(self, plan: Plan) -> Lease:
        """A guest for a test; where it has one of its own, its session has collected already.

        Raises:
            VMSandboxError: there can be none.
        """
        self._check_python(plan.image)
        factory = self._run.factory
        factory.backend.require(plan.image)
        payload = self._payload
        patience = factory.backend.patience(plan.image)
        alone = plan.isolation == "test"
        image = factory.with_step(plan.image, install.environment_step(payload))
        if alone:
            image = factory.with_step(image, self._session_step(plan))
            self._expect(plan, image)
        with ExitStack() as stack:
            guest = stack.enter_context(factory.lease(image, plan.hardware))
            if not alone:
                install.install_project(guest, payload)
            installed = install.layout(guest, payload)
            connection = stack.enter_context(
                Connection.attached(guest, installed.place, patience=patience, serve=not alone)
            )
            lease = Lease(
                guest=guest,
                payload=payload,
                tree=installed.tree,
                connection=connection,
                reader=ReportReader(
                    installed.tree,
                    self._config.rootpath,
                    installed.outside,
                    outcomes=guest_config.outcomes(self._config),
                ),
                config=self._session_config(plan, installed, _own(guest)),
                stack=stack,
            )
            if alone:
                self._resume(lease, plan.kind)
            lease.stack = stack.pop_all()
            return lease

    def _check_python(self, image: str) -> None:
        catalogue = self._run.catalogue
        if not catalogue.get(image).python:
            others = [name for name in catalogue.names() if catalogue.get(name).python]
            raise TransferError(
                f"{image} has no Python, so no test can run inside it",
                remedy=f"run it inside {' or '.join(others)}; tests that drive a guest, "
                f"with the fixture vm, run with {image}, too",
            )

    @cached_property
    def _payload(self) -> Payload:
        """What goes to each guest of this run; what cannot go is told."""
        config = self._config
        root = config.rootpath
        for name in guest_config.only_here(config):
            self._run.tell(
                f"the plugin {name} stays on this side: it is neither in the project nor installed"
            )
        if lost := guest_config.options(config, str)[1]:
            self._run.tell_problem(
                f"options that no guest can be told, so it has its defaults there: {', '.join(lost)}"
            )
        tests = [item for item in self._session.items if plan_of(item).is_inside]
        files = dict.fromkeys(item.path for item in tests if item.path.is_file())
        for file in files:
            if not file.is_relative_to(root):
                raise ConfigError(
                    f"{file} is not below the rootdir, {root}, so it does not go to the guest",
                    remedy="name a folder above all tests: --rootdir",
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
        """Tell the factory, once, how many guests of a kind are to come."""
        if plan.kind not in self._expected:
            self._expected.add(plan.kind)
            count = sum(each.runs_inside for each in alike(self._session.items, plan))
            self._run.factory.expect(image, plan.hardware, options.share(self._config, count))

    def _session_step(self, plan: Plan) -> Step:
        """A session that has collected, and waits in the guest until that becomes a template."""
        payload = self._payload

        def collect(guest: Guest) -> dict[str, object]:
            install.install_project(guest, payload)
            installed = install.layout(guest, payload)
            config = self._session_config(plan, installed, {})
            patience = self._run.factory.backend.patience(plan.image)
            with Connection.attached(guest, installed.place, patience=patience) as connection:
                found, said = started(connection, config)
            return {"collected": vars(found.collected), "said": said}

        known = self._session_config(plan, install.layout(None, payload), {})
        known["fixtures"] = sorted(guest_config.fixtures(self._config))  # their values come later
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
        """What a session in a guest is told; see `run` in the runner's `process.py`.

        Args:
            plan: of one of its tests: it has those that belong into the same kind of guest.
            own: variables that differ between guests.
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

    def _resume(self, lease: Lease, kind: Place) -> None:
        """Take over the session that waits in a clone."""
        facts: Any = lease.guest.engine.facts
        try:
            lease.session, lease.said = GuestSession.woken(
                lease.connection,
                facts["collected"],
                environment=_own(lease.guest),
                fixtures=guest_config.fixtures(self._config),
                timeout=COLLECT_SECONDS * lease.connection.patience,
            )
        except InterpreterLost as error:
            error.transient = True  # it was well when it became a template
            raise
        if kind not in self._heard:  # all of them have said the same
            self._heard.add(kind)
            lease.said[:0] = facts["said"]


def _own(guest: Guest) -> dict[str, str]:
    """Variables of the environment that differ between guests, or between workers."""
    return {**guest_config.environment(), "VMSANDBOX_GUEST": guest.name}


def remedy(root: Path, text: str) -> str:
    """What to do about an error of Python: a module that is here, but not in the guest; or nothing.

    Args:
        root: the rootdir.
    """
    for name in _NO_MODULE.findall(text):
        if (folder := project.foreign_folder(name, root)) is not None:
            path = os.path.relpath(folder, root)
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
