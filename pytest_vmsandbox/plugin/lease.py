"""A guest that runs tests inside, with the session that runs them there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vmsandbox.core.errors import ConfigError, InterpreterLost
from pytest_vmsandbox.inside import distributions, project, requirements
from pytest_vmsandbox.inside.connection import Connection
from pytest_vmsandbox.inside.install import Payload
from pytest_vmsandbox.inside.session import GuestSession, RunEnded
from pytest_vmsandbox.inside.wire import Message
from pytest_vmsandbox.plugin.hooks import end_run
from pytest_vmsandbox.plugin.remote_reports import Reader

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.guest import Guest

COLLECT_SECONDS = 60.0  # for pytest in the guest until it has collected; scaled
_NO_PLUGIN = re.compile(r'Error importing plugin "([\w.-]+)"')
_NO_MODULE = re.compile(r"No module named '(\w+)")


@dataclass(kw_only=True)
class Lease:
    """A guest that runs tests inside, as long as those of its place may come.

    Attributes:
        payload: what went there.
        tree: the project's folder in the guest.
        has_collected: whether a session there has, and what it said was heard out.
        has_failed: whether a test there has.
        is_untouched: whether its session says that nothing was written there.
    """

    guest: Guest
    payload: Payload
    tree: str
    connection: Connection
    reader: Reader
    config: Mapping[str, object]
    patience: float
    stack: ExitStack
    session: GuestSession | None = None
    has_collected: bool = False
    has_failed: bool = False
    is_untouched: bool = False

    def start(self, root: Path) -> list[Message]:
        """Start a session and let it collect; what it said besides.

        Args:
            root: the rootdir.

        Raises:
            InterpreterLost: it could not collect.
            GuestLost: the guest is gone.
        """
        try:
            self.session, said = started(self.connection, self.config, self.patience)
        except InterpreterLost as lost:
            raise InterpreterLost(
                f"pytest in {self.guest.name} could not collect the tests: {lost.brief}",
                details=self.reader.text(lost.details),
                remedy=remedy(root, lost.details),
            ) from lost
        return said


def started(
    connection: Connection, config: Mapping[str, object], patience: float
) -> tuple[GuestSession, list[Message]]:
    """A session that has collected, and what it said besides; the run ends if it says so.

    Raises:
        ConfigError: the guest has no such plugin.
        InterpreterLost: it could not collect.
        GuestLost: the guest is gone.
    """
    try:
        return GuestSession.started(connection, config, timeout=COLLECT_SECONDS * patience)
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
