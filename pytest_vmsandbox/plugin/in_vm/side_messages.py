"""Passes on what sessions in guests say besides reports: to plugins, and to people."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial

import pytest
from _pytest.junitxml import xml_key

from pytest_vmsandbox.inside.wire import Message, broken
from pytest_vmsandbox.plugin.in_vm import other_plugins
from pytest_vmsandbox.plugin.in_vm.hooks import Hooks
from pytest_vmsandbox.plugin.in_vm.provisioning import Lease
from pytest_vmsandbox.plugin.in_vm.remote_reports import colourless, harmless, recorded_warning
from pytest_vmsandbox.plugin.run import Run

Record = Callable[[], None]  # gives a plugin of this side what a test has left for it

_MAX_NAME = 200  # characters of a name in a note

# Notes of a guest, for people.
_NOTES = {
    "attribute kind": (
        "a hook gives reports the attribute {name}, which does not come back from guests: JSON cannot "
        "carry its value"
    ),
    "attribute size": (
        "{nodeid}: the attribute {name} of a report does not come back from the guest, because it is "
        "too large. Limits: 6 MiB and 100 attributes for a report, 100,000 values and 20 levels for an "
        "attribute"
    ),
    "attribute texts": (
        "a hook gives reports the attribute {name} with values that JSON cannot carry: they come back "
        "from guests as texts"
    ),
    "renamed": (
        "a hook in the guest renames reports, here {nodeid} to {name}. On this side they keep the name "
        "of their test"
    ),
    "outcome": (
        "{nodeid}: a plugin in the guest reports the outcome {name}. No plugin on this side knows it, so "
        "that report is left out"
    ),
    "twice": (
        "{nodeid}: its {name} was reported twice in the guest. Only the first report counts\n"
        "  Look for a plugin or a conftest.py that calls pytest_runtest_logreport itself"
    ),
    "properties": (
        "{nodeid}: it has {name} user properties, and some of them are lost. A guest sends at most "
        "10,000 properties, and 4 MiB together with the test's output"
    ),
    "result": (
        "{nodeid}: allure's file {name} does not come back from the guest, because it has more than 12 MiB"
    ),
    "rounds": (
        "{nodeid}: its benchmark is lost, because it has {name} rounds. A guest sends at most 500,000: "
        "lower --benchmark-max-time, or raise --benchmark-min-time"
    ),
}
_PROBLEMS = {"twice", "properties", "rounds", "result"}  # a result is lost, so the run fails


class SideMessages:
    """Passes on what sessions in guests say."""

    def __init__(self, run: Run, hooks: Hooks) -> None:
        self._run = run
        self._hooks = hooks
        self._logs = other_plugins.Logs(run.config)
        self._allure = other_plugins.AllureResults(run.config)
        self.benchmarks = other_plugins.Benchmarks(run.config)

    def tell(self, lease: Lease, message: Message, nodeid: str = "") -> None:
        """Pass on a message at once.

        Raises:
            GuestLost: the message is invalid.
        """
        if "warning" in message:
            arguments = recorded_warning(message, lease.reader) | {"nodeid": nodeid}
            # This side has collected most files itself, and has shown their warnings.
            only_there = {str(self._run.config.rootpath / file) for file in self._run.unimportable}
            is_of_test = arguments["when"] == "runtest"
            if is_of_test or arguments["warning_message"].filename in only_there:
                self._hooks.notify(self._run.config.hook.pytest_warning_recorded, **arguments)
        elif "output" in message:
            stream = sys.stderr if message.get("of") == 2 else sys.stdout
            encoding = getattr(stream, "encoding", None) or "utf-8"
            text = harmless(message["output"]).encode(encoding, "backslashreplace")
            stream.write(text.decode(encoding))
            stream.flush()
        elif "logged" in message:
            self._logs.show(message, lease.reader)
        elif "allure" in message:
            self._allure.keep(message, lease.guest.image, nodeid)
        elif "note" in message:
            about, is_problem = _note(message, nodeid)
            self._run.failed |= is_problem
            self._run.tell(about)

    def record(self, lease: Lease, item: pytest.Item, message: Message) -> Record | None:
        """A function that gives a plugin the content of a message; None for other messages.

        Raises:
            GuestLost: the message is invalid.
        """
        if "junit" in message:
            name, value = harmless(message.get("name")), harmless(message.get("value"))
            return partial(self._to_junit, str(message["junit"]), name, value, item.nodeid)
        if "benchmark" in message:
            return self.benchmarks.read(item, lease.guest.image, message, lease.reader)
        return None

    def _to_junit(self, kind: str, name: str, value: str, nodeid: str) -> None:
        """Write to junit's file what a test has recorded besides its reports."""
        xml = self._run.config.stash.get(xml_key, None)
        if xml is None:
            return
        if kind == "property":
            xml.add_global_property(name, value)
        elif re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
            xml.node_reporter(nodeid).add_attribute(name, value)


def _note(message: Message, nodeid: str) -> tuple[str, bool]:
    """The text of a guest's note, and whether it is a problem that fails the run.

    Raises:
        GuestLost: the note is unknown.
    """
    kind = " ".join(str(message[field]) for field in ("note", "why") if field in message)
    if kind not in _NOTES:
        raise broken("it sent an unknown kind of note", message)
    name = colourless(message.get("name"))[:_MAX_NAME]
    return _NOTES[kind].format(nodeid=nodeid, name=name), kind in _PROBLEMS
