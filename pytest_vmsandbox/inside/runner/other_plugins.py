"""Sends what other plugins keep besides reports. On the host, `plugin/in_vm/other_plugins.py` takes it."""

from __future__ import annotations

import binascii
import logging
import os
import sys
from typing import Any

from .apart import keep_apart
from .wire import Plain, Wire, clean

keep_apart(globals())

# -- pytest-bdd ---------------------------------------------------------------------------------


def scenario_of(report: Any) -> Any:
    """What pytest-bdd 8 and newer keep about a report. Older versions keep it on the report."""
    bdd = sys.modules.get("pytest_bdd.reporting")
    registry = getattr(bdd, "test_report_context_registry", None)
    context = registry.get(report) if registry is not None else None
    return None if context is None else {"scenario": context.scenario, "name": context.name}


# -- pytest-benchmark ---------------------------------------------------------------------------

MAX_ROUNDS = 500_000
KEPT = ("group", "param", "params", "extra_info", "iterations", "has_error")


def send_benchmarks(config: Any, wire: Wire, *, about_machine: bool) -> None:
    """Send new results of pytest-benchmark.

    Args:
        about_machine: whether the host will save the results together with the machine.
    """
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    name_of = sys.modules["pytest_benchmark.utils"].funcname
    measured, session.benchmarks[:] = list(session.benchmarks), []
    for one in measured:
        if len(one.stats.data) > MAX_ROUNDS:
            wire.note({"note": "rounds", "name": str(len(one.stats.data))})
            continue
        found: dict[str, Any] = {name: Plain().of(getattr(one, name)) for name in KEPT}
        found["data"] = one.stats.data
        found["options"] = {
            name: Plain().of(name_of(value) if callable(value) else value)
            for name, value in one.options.items()
        }
        machine = machine_of(session) if about_machine else None
        wire.note({"benchmark": clean(found), "machine": machine})


def machine_of(session: Any) -> Any:
    """pytest-benchmark's description of this machine. It takes long, so it is made once."""
    if not hasattr(session, "vmsandbox_machine"):
        session.vmsandbox_machine = Plain().of(session.get_machine_info())
    return session.vmsandbox_machine


# -- allure -------------------------------------------------------------------------------------

MAX_FILE = 12 << 20  # bytes


def send_results(folder: str | None, wire: Wire) -> None:
    """Send new files of allure, and remove them."""
    try:
        names = sorted(os.listdir(folder)) if folder else []
    except FileNotFoundError:  # allure is not installed here
        return
    for name in names:
        path = "%s/%s" % (folder, name)
        if os.stat(path).st_size > MAX_FILE:
            wire.note({"note": "result", "name": clean(name)})
        else:
            with open(path, "rb") as file:
                data = binascii.b2a_base64(file.read(), newline=False).decode()
            wire.note({"allure": clean(name), "data": data})
        os.unlink(path)


# -- pytest's live log, and its log file --------------------------------------------------------

RECORD = (
    "name", "levelno", "levelname", "pathname", "lineno", "funcName", "created", "msecs",
    "process", "processName", "thread", "threadName", "taskName", "stack_info",
)  # fmt: skip


def send_records(config: Any, wire: Wire) -> None:
    """Send the log records of tests from now on.

    We replace pytest's handler for the log file, because tests inside have none.
    """
    plugin = config.pluginmanager.get_plugin("logging-plugin")
    if plugin is None:
        return
    formatter = logging.Formatter()

    class Records(type(plugin.log_file_handler)):  # type: ignore[misc]
        def setLevel(self, level: object) -> None:  # noqa: N802  # the host checks levels
            pass

        def emit(self, record: logging.LogRecord) -> None:
            try:
                text = record.getMessage()
                trace = record.exc_info and formatter.formatException(record.exc_info)
            except Exception as error:  # the test's fault; pytest lets it fail
                text, trace = "%s (%r)" % (record.msg, error), None
            found = {name: getattr(record, name, None) for name in RECORD}
            found.update(msg=text, exc_text=trace or None)
            when = getattr(plugin.log_cli_handler, "_when", None)
            wire.say({"logged": clean(found), "when": clean(when)})
            if self.stream is not None:  # a hook has named a file
                super().emit(record)

    plugin.log_file_handler = Records(os.devnull, delay=True)


# -- pytest's junit file ------------------------------------------------------------------------


class JUnit:
    """Stands for pytest's writer of the junit file, which is on the host."""

    def __init__(self, family: str, wire: Wire) -> None:
        self.family = family
        self.wire = wire

    def add_global_property(self, name: str, value: object) -> None:
        if not isinstance(name, str):
            raise TypeError(
                "name parameter needs to be a string, but %s given" % type(name).__name__
            )
        self.wire.note(clean({"junit": "property", "name": name, "value": str(value)}))

    def node_reporter(self, report: object) -> JUnit:  # noqa: ARG002  # always the current test's
        return self

    def add_attribute(self, name: str, value: object) -> None:
        self.wire.note(clean({"junit": "attribute", "name": str(name), "value": str(value)}))
