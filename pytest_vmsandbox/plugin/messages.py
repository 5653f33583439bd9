"""What sessions in guests say beside reports, for plugins and people of this side."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial

import pytest
from _pytest.junitxml import xml_key

from pytest_vmsandbox.inside.wire import Message
from pytest_vmsandbox.plugin import beside
from pytest_vmsandbox.plugin.hooks import Hooks
from pytest_vmsandbox.plugin.provisioning import Lease
from pytest_vmsandbox.plugin.remote_reports import harmless, recorded_warning
from pytest_vmsandbox.plugin.run import Run

Record = Callable[[], None]  # tells a plugin of this side what a test has left for it


class Messages:
    """Passes on what sessions in guests say."""

    def __init__(self, run: Run, hooks: Hooks) -> None:
        self._run = run
        self._hooks = hooks
        self._logs = beside.Logs(run.config)
        self._allure = beside.AllureResults(run.config)
        self.benchmarks = beside.Benchmarks(run.config)

    def tell(self, lease: Lease, message: Message, nodeid: str = "") -> None:
        """Pass on a message at once.

        Raises:
            GuestLost: it is not well-formed.
        """
        if "warning" in message:
            arguments = recorded_warning(message, lease.reader) | {"nodeid": nodeid}
            # This side has collected, too, but for some files, and has told what it saw.
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
            about, is_problem = beside.note(message, nodeid)
            self._run.failed |= is_problem
            self._run.tell(about)

    def record(self, lease: Lease, item: pytest.Item, message: Message) -> Record | None:
        """How to tell a plugin what a message has for it; None for another message.

        Raises:
            GuestLost: it is not well-formed.
        """
        if "junit" in message:
            name, value = harmless(message.get("name")), harmless(message.get("value"))
            return partial(self._to_junit, str(message["junit"]), name, value, item.nodeid)
        if "benchmark" in message:
            return self.benchmarks.read(item, lease.guest.image, message, lease.reader)
        return None

    def _to_junit(self, kind: str, name: str, value: str, nodeid: str) -> None:
        """Tell junit's file what a test has recorded, other than by its reports."""
        xml = self._run.config.stash.get(xml_key, None)
        if xml is None:
            return
        if kind == "property":
            xml.add_global_property(name, value)
        elif re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
            xml.node_reporter(nodeid).add_attribute(name, value)
