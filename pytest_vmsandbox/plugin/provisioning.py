"""Guests for tests inside: each gets an environment, the project, and a session."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmsandbox.core.errors import ConfigError, InterpreterLost, TransferError
from pytest_vmsandbox.guests.provision import PreparedImage, Step
from pytest_vmsandbox.inside import install
from pytest_vmsandbox.inside.connection import Connection
from pytest_vmsandbox.inside.install import Payload
from pytest_vmsandbox.inside.session import GuestSession
from pytest_vmsandbox.plugin import config as options, guest_config
from pytest_vmsandbox.plugin.lease import COLLECT_SECONDS, Lease, started
from pytest_vmsandbox.plugin.measuring import Measuring
from pytest_vmsandbox.plugin.plan import Place, Plan, alike, plan_of
from pytest_vmsandbox.plugin.remote_reports import Reader
from pytest_vmsandbox.plugin.session_config import session_config

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.inside.wire import Message
    from pytest_vmsandbox.plugin.run import Run

_MOST_LOST = 3  # waiting sessions in a row that do not resume


class Provisioner:
    """Makes guests ready for tests inside.

    Environment and, where each test has a guest of its own, session are layers: they are made once
    for all clones.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._config = run.config
        self._payload: Payload | None = None
        self._expected: set[Place] = set()  # kinds of guests of which the factory knows
        self._heard: set[Place] = set()  # kinds of guests whose waiting sessions were heard out

    def open(self, session: pytest.Session, plan: Plan) -> tuple[Lease, list[Message]]:
        """A guest for a test; where it has one of its own, its session has collected already.

        Returns:
            The lease, and what the session said besides.

        Raises:
            VMSandboxError: there can be none.
        """
        for tries in range(1, _MOST_LOST + 1):
            lease = self._open(session, plan)
            if plan.isolation != "test":
                return lease, []
            try:
                return lease, self._resume(lease, plan.kind)
            except BaseException as error:
                lease.stack.close()
                if not isinstance(error, InterpreterLost) or tries == _MOST_LOST:
                    raise
        raise AssertionError

    def _open(self, session: pytest.Session, plan: Plan) -> Lease:
        """A guest with what its tests need, and a connection to start sessions with."""
        self._check_python(plan.image)
        factory = self._run.factory
        factory.backend.require(plan.image)
        if self._payload is None:
            self._payload = self._prepared(session)
        payload = self._payload
        patience = factory.backend.patience(plan.image)
        alone = plan.isolation == "test"
        image = factory.with_step(plan.image, install.environment_step(payload))
        if alone:
            step = self._session_step(session, plan, payload, patience)
            image = factory.with_step(image, step)
            self._expect(session, plan, image)
        with ExitStack() as stack:
            guest = stack.enter_context(factory.lease(image, plan.hardware))
            if not alone:
                install.install_project(guest, payload)
            installed = install.layout(guest, payload)
            connection = stack.enter_context(
                Connection.attached(guest, installed.place, patience=patience, serve=not alone)
            )
            return Lease(
                guest=guest,
                payload=payload,
                tree=installed.tree,
                connection=connection,
                reader=Reader(
                    installed.tree,
                    self._config.rootpath,
                    installed.outside,
                    outcomes=guest_config.outcomes(self._config),
                ),
                config=session_config(self._run, session, plan, installed, _own(guest)),
                patience=patience,
                stack=stack.pop_all(),
            )

    def _check_python(self, image: str) -> None:
        catalogue = self._run.catalogue
        if catalogue.get(image).python:
            return
        others = [name for name in catalogue.names() if catalogue.get(name).python]
        raise TransferError(
            f"{image} has no Python, so no test can run inside it",
            remedy=f"run it inside {' or '.join(others)}; tests that drive a guest, "
            f"with the fixture vm, run with {image}, too",
        )

    def _prepared(self, session: pytest.Session) -> Payload:
        """What goes to each guest of this run."""
        config = self._config
        root = config.rootpath
        files = [
            item.path for item in session.items if plan_of(item).is_inside and item.path.is_file()
        ]
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
            say=self._run.say,
            tell=self._run.tell,
        )
        more = [] if Measuring.of(config) is None else ["coverage"]
        if options.requirements(config) and any(plan_of(item).is_rerun for item in session.items):
            more.append("pytest-rerunfailures")
        for name in more:
            payload = replace(payload, requirements=payload.requirements.with_one(name))
        return payload

    def _expect(self, session: pytest.Session, plan: Plan, image: PreparedImage) -> None:
        """Tell the factory, once, how many guests of a kind are to come."""
        if plan.kind not in self._expected:
            self._expected.add(plan.kind)
            count = sum(each.runs_inside for each in alike(session.items, plan))
            share = -(-count // options.workers(self._config))
            self._run.factory.expect(image, plan.hardware, share)

    def _session_step(
        self, session: pytest.Session, plan: Plan, payload: Payload, patience: float
    ) -> Step:
        """A session that has collected, and waits in the guest until that becomes a template."""

        def collect(guest: Guest) -> dict[str, object]:
            install.install_project(guest, payload)
            installed = install.layout(guest, payload)
            config = session_config(self._run, session, plan, installed, {})
            with Connection.attached(guest, installed.place, patience=patience) as connection:
                found, said = started(connection, config, patience)
            return {"collected": vars(found.collected), "said": said}

        known = session_config(self._run, session, plan, install.layout(None, payload), {})
        known["fixtures"] = sorted(guest_config.fixtures(self._config))  # their values come later
        parts = [install.project_digest(payload), known]
        return Step(
            digest=hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest(),
            run=collect,
            about="a test session that has collected",
            network="isolated",
            personal=True,
        )

    def _resume(self, lease: Lease, kind: Place) -> list[Message]:
        """Take over the session that waits in a clone; what it said besides."""
        facts: Any = lease.guest.engine.facts
        lease.session, said = GuestSession.woken(
            lease.connection,
            facts["collected"],
            environment=_own(lease.guest),
            fixtures=guest_config.fixtures(self._config),
            timeout=COLLECT_SECONDS * lease.patience,
        )
        if kind in self._heard:  # all of them have said the same
            return said
        self._heard.add(kind)
        return [*facts["said"], *said]


def _own(guest: Guest) -> dict[str, str]:
    """Variables of the environment that differ between guests, or between workers."""
    return {**guest_config.environment(), "VMSANDBOX_GUEST": guest.name}
