"""Gives other plugins of this side what tests inside guests left for them, besides reports.

The runner's `other_plugins.py` sends it. Both files have the plugins in the same order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.inside.wire import Message, broken
from pytest_vmsandbox.plugin.in_vm.remote_reports import ReportReader, log_record

_PHASES = ("start", "setup", "call", "teardown", "finish")  # as pytest's live log calls them

# -- pytest-bdd ---------------------------------------------------------------------------------


def keep_scenario(report: pytest.TestReport, data: Any, reader: ReportReader) -> None:
    """Keep what pytest-bdd looks up for the report of a scenario."""
    bdd: Any = sys.modules.get("pytest_bdd.reporting")
    if isinstance(data, dict) and hasattr(bdd, "test_report_context_registry"):
        scenario, name = reader.value(data.get("scenario")), reader.value(data.get("name"))
        bdd.test_report_context_registry[report] = bdd.ReportContext(scenario=scenario, name=name)


# -- pytest-benchmark ---------------------------------------------------------------------------


def benchmarks_are_off(config: pytest.Config) -> bool:
    """Whether pytest-benchmark runs benchmarks without measuring them."""
    return bool(getattr(getattr(config, "_benchmarksession", None), "disabled", False))


def machine_is_wanted(config: pytest.Config) -> bool:
    """Whether pytest-benchmark saves its results, which include the machine."""
    session = getattr(config, "_benchmarksession", None)
    return any(getattr(session, name, None) for name in ("json", "save", "autosave"))


class Benchmarks:
    """Results of pytest-benchmark from guests, for its table and its files."""

    def __init__(self, config: pytest.Config) -> None:
        self._session = getattr(config, "_benchmarksession", None)
        self._machines: dict[str, dict[str, Any]] = {}  # by image

    def read(
        self, item: pytest.Item, image: str, message: Message, reader: ReportReader
    ) -> Callable[[], None]:
        """A function that adds the benchmark in a message.

        Raises:
            GuestLost: the message has no valid benchmark.
        """
        if self._session is None:
            return lambda: None
        from pytest_benchmark.stats import Metadata  # type: ignore[import-not-found]

        data: Any = reader.value(message["benchmark"])
        try:
            of = SimpleNamespace(
                **{name: data[name] for name in ("group", "param", "params", "has_error")},
                name=item.name,
                fullname=item.nodeid,
                extra_info=dict(data["extra_info"]),
                cprofile_stats=None,
            )
            made = Metadata(of, iterations=int(data["iterations"]), options=dict(data["options"]))
            for seconds in data["data"]:
                made.stats.update(float(seconds))
        except (KeyError, TypeError, ValueError) as error:
            raise broken("it sent an invalid benchmark") from error
        return partial(self._add, made, image, reader.value(message.get("machine")))

    def _add(self, made: Any, image: str, machine: Any) -> None:
        assert self._session is not None
        self._session.benchmarks.append(made)
        if isinstance(machine, dict):
            self._machines[image] = machine

    def machine(self) -> dict[str, Any] | None:
        """The machine of the benchmarks; None if no guest has sent one, or they ran on several."""
        here = self._session is not None and any(
            not isinstance(one.fixture, SimpleNamespace) for one in self._session.benchmarks
        )
        if here or len(self._machines) != 1:
            return None
        return next(iter(self._machines.values()))


# -- allure ---------------------------------------------------------------------------------------


class AllureResults:
    """Puts the files that allure writes in guests into its folder on this side.

    A guest is not trusted. Its file must be new in the folder, have a name that allure would give it,
    and refer to no file outside of the folder.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._listener = config.pluginmanager.get_plugin("allure_listener")
        self._folder = Path(config.getoption("allure_report_dir", default=None) or "").absolute()

    @property
    def are_wanted(self) -> bool:
        """Whether this run has a folder for such files."""
        return self._listener is not None

    def keep(self, message: Message, image: str, nodeid: str) -> None:
        """Write a file. The result of a test replaces the one that allure would write here.

        Raises:
            GuestLost: the message has no valid file.
        """
        name = message.get("allure")
        if self._listener is None or not isinstance(name, str) or not _is_result(name):
            raise broken("it sent a file that allure does not write", name)
        try:
            data = base64.b64decode(message.get("data", ""), validate=True)
            if name.endswith(".json"):
                data = json.dumps(_of_image(json.loads(data), image)).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise broken("it sent an invalid file of allure") from error
        with suppress(FileExistsError), (self._folder / name).open("xb") as file:
            file.write(data)
        if name.endswith("-result.json"):
            with suppress(Exception):  # another version keeps it elsewhere
                if uuid := self._listener._cache.pop(nodeid):  # noqa: SLF001  # there is no other way
                    self._listener.allure_logger.drop_test(uuid)


def _is_result(name: str) -> bool:
    return _RESULT.fullmatch(name) is not None


def _of_image(value: Any, image: str) -> Any:
    """A result that names its image. Otherwise allure would see two images as retries of one test."""
    value = _without_foreign_files(value)
    if isinstance(value, dict) and "historyId" in value:
        value["historyId"] = hashlib.md5(  # as allure makes its ids
            f"{value['historyId']}{image}".encode(), usedforsecurity=False
        ).hexdigest()
        parameters = value.get("parameters")
        value["parameters"] = [
            *(parameters if isinstance(parameters, list) else ()),
            {"name": "vm", "value": image},
        ]
    return value


def _without_foreign_files(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_foreign_files(member) for member in value]
    if not isinstance(value, dict):
        return value
    source = value.get("source")
    return {
        name: _without_foreign_files(member)
        for name, member in value.items()
        if name != "source" or (isinstance(source, str) and _is_result(source))
    }


_RESULT = re.compile(
    r"[0-9a-f-]{36}-(?:(?:result|container|globals)\.json|attachment(?:\.[\w+-]{1,16})?)", re.ASCII
)

# -- pytest's live log, and its log file ----------------------------------------------------------


class Logs:
    """Shows log records of tests inside guests in pytest's live log and log file."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugin: Any = config.pluginmanager.get_plugin("logging-plugin")

    @property
    def are_wanted(self) -> bool:
        """Whether this run has a live log, or a log file."""
        if self._plugin is None:
            return False
        stream = getattr(self._plugin.log_file_handler, "stream", None)
        has_file = getattr(stream, "name", os.devnull) != os.devnull
        return has_file or hasattr(self._plugin.log_cli_handler, "stream")

    def show(self, message: Message, reader: ReportReader) -> None:
        """Show one record.

        Raises:
            GuestLost: the message has no valid record.
        """
        if self._plugin is None:
            return
        record = log_record(message.get("logged"), reader)
        when, live = message.get("when"), self._plugin.log_cli_handler
        if when in _PHASES and when != getattr(live, "_when", None):  # else it repeats the heading
            live.set_when(when)
        for handler in (live, self._plugin.log_file_handler):
            if record.levelno >= handler.level:
                handler.handle(record)
