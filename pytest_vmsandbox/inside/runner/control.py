"""Lets the host control a pytest session: which items it runs, and its options and ini keys."""

from __future__ import annotations

import os
import pathlib
import random
import sys
import types
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from _pytest._io import TerminalWriter

from .apart import aside, keep_apart
from .debugging import Debugging
from .other_plugins import JUnit, send_benchmarks, send_records, send_results
from .reporter import Calls, InAnotherGuest, Reporter
from .serialize import serialized
from .wire import Wire, clean

keep_apart(globals())

PIECE = 500  # collected items in one message


class Pause(pytest.Item):
    """Stands for an unknown next item. It needs only the session's fixtures."""

    def runtest(self) -> None:
        raise NotImplementedError


class Control:
    """The plugin by which the host controls a pytest session.

    It sends ``{"failed": [node id, report]}`` for what could not be collected; ``{"items": […]}``, each
    ``[node id, parameters' indices]``; ``{"ready": N}``. For each item that it runs, it sends reports and
    ``{"done": ID, "stop": reason or null}``. If the item is ``timed``, ``{"call": true}`` and
    ``{"call": false}`` come around its function. ``{"again": true}`` begins another attempt at it. At the
    end of a woken session, ``{"untouched": true}`` says that nothing in ``tree`` has changed.

    Args:
        settings: see `process.run`.
    """

    def __init__(self, settings: dict[str, Any], wire: Wire) -> None:
        self.settings = settings
        self.wire = wire
        self.reporter = Reporter(
            wire, settings.get("outcomes", []), alone=settings.get("alone", False)
        )
        self.items: dict[str, pytest.Item] = {}
        self.awake = False  # whether the guest was cloned while this session waited in it
        self.debugging: Any = None

    # -- setting up ---------------------------------------------------------------------------

    def pytest_addhooks(self, pluginmanager: pytest.PytestPluginManager) -> None:
        """Set ini keys in the first hook, before pytest reads its first key."""
        let_ini_keys_be(pluginmanager.get_plugin("pytestconfig"), self.settings["ini"])
        # Hooks of host-only plugins are unknown here. The host has checked them.
        vars(pluginmanager)["check_pending"] = lambda: None

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self, early_config: pytest.Config) -> None:
        set_options(early_config.known_args_namespace, self.settings["options"])

    @pytest.hookimpl(tryfirst=True, wrapper=True)
    def pytest_cmdline_parse(self) -> Generator[None, Any, Any]:
        """Set the options right after pytest has read its own, before any other hook uses them."""
        config = yield
        set_options(config.option, self.settings["options"])
        return config

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        self.debugging = Debugging(self.wire, config)
        config.pluginmanager.register(self.debugging)
        if self.settings.get("junit"):
            from _pytest.junitxml import xml_key

            junit: Any = JUnit(self.settings["junit"], self.wire)
            config.stash[xml_key] = junit
            config.pluginmanager.register(junit)  # or pytest cannot unregister it

    @pytest.hookimpl(tryfirst=True, wrapper=True)
    def pytest_sessionstart(self, session: pytest.Session) -> Iterator[None]:
        yield
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:  # plugins need it, but nobody reads its output
            nowhere = open(aside(os.open(os.devnull, os.O_WRONLY)), "w", encoding="utf-8")
            reporter._tw = TerminalWriter(nowhere)  # noqa: SLF001

    @pytest.hookimpl(trylast=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.wire.note({"failed": clean([report.nodeid, serialized(report)])})

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        rows = []
        detailed = set(self.settings["details"])
        for item in session.items:
            self.items[item.nodeid] = item
            spec = getattr(item, "callspec", None)
            row: list[Any] = [item.nodeid, dict(spec.indices) if spec is not None else None]
            if item.nodeid.partition("::")[0] in detailed:
                marks = [mark.name for mark in item.iter_markers()]
                row.append([list(item.location), sorted(map(str, item.keywords)), marks])
            rows.append(row)
        for start in range(0, len(rows), PIECE):
            self.wire.note({"items": clean(rows[start : start + PIECE])})
        if self.settings.get("logs"):
            send_records(session.config, self.wire)

    # -- running ------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.pause = Pause.from_parent(session, name="vmsandbox-pause")
        if self.settings.get("debugging"):
            self.debugging.begin(self.settings["debugging"])
        self.wire.say({"ready": len(session.items)})  # after pytest's warnings
        while True:
            message = self.wire.hear()
            if message is None or message["do"] == "finish":
                return True
            if message["do"] == "wake":
                self.wake(session.config, message)
            elif message["do"] == "run" and self.run(session, message):
                return True

    def wake(self, config: pytest.Config, message: dict[str, Any]) -> None:
        """The guest was cloned while the session waited: make this session different from others."""
        self.awake = True
        seed = bytes.fromhex(message["seed"])
        random.seed(seed)
        modules: dict[str, Any] = sys.modules
        try:
            if "numpy" in modules:
                modules["numpy"].random.seed(list(seed))
            if "ssl" in modules:
                modules["ssl"].RAND_add(seed, len(seed))
        except Exception:  # noqa: S110  # tests may have put something else there
            pass
        os.environ.update(message["environment"])
        self.settings["fixtures"].update(message["fixtures"])
        if message.get("debugging"):
            self.debugging.begin(message["debugging"])
        # Nobody reads the summary, and plugins import modules for it, which takes longer than a test. It
        # must stay a hook, or pluggy could not unregister plugins.
        name, manager = "pytest_terminal_summary", config.pluginmanager
        vars(config.hook)[name] = manager.subset_hook_caller(name, manager.get_plugins())
        self.wire.say({"awake": len(seed)})

    def run(self, session: pytest.Session, message: dict[str, Any]) -> bool:
        """Run an item. Returns whether the run must end."""
        nodeid, config = message["id"], session.config
        item = self.items[nodeid]
        item._report_sections.clear()  # noqa: SLF001  # the host may run an item twice
        self.reporter.begin(nodeid)
        self.debugging.run(item)
        for name, reason in message.get("marks", ()):
            item.add_marker(getattr(pytest.mark, name)(reason=reason))
        if attempt := message.get("attempt", 0):  # earlier attempts were in other guests
            database: Any = config.failures_db  # type: ignore[attr-defined]
            database.get_test_failures = lambda _: attempt
        calls = Calls(self.wire) if message.get("timed") else None
        if calls is not None:
            config.pluginmanager.register(calls)
        try:
            config.hook.pytest_runtest_protocol(item=item, nextitem=self.next(message))
        except InAnotherGuest:
            pass
        finally:
            self.debugging.end()
            if calls is not None:
                config.pluginmanager.unregister(calls)
        send_benchmarks(config, self.wire, about_machine=self.settings.get("machine", False))
        send_results(self.settings.get("allure"), self.wire)
        stop = session.shouldfail or session.shouldstop
        reason = str(stop) if stop else None
        self.wire.say({"done": nodeid, "stop": reason, "fail": bool(session.shouldfail)})
        return bool(stop)

    def next(self, message: dict[str, Any]) -> pytest.Item | None:
        """The next item, whose fixtures must stay."""
        if message["next"] in self.items:
            return self.items[message["next"]]
        return self.pause if message["more"] else None

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        send_results(self.settings.get("allure"), self.wire)


def set_options(option: Any, wanted: dict[str, Any]) -> None:
    """Set those options that exist here."""
    for name, value in wanted.items():
        if hasattr(option, name):
            setattr(option, name, unpacked(value))


def let_ini_keys_be(config: Any, rows: list[tuple[list[str], Any]]) -> None:
    """Let ini keys have the host's values, if the keys exist here.

    Args:
        rows: the names of a key, and its value.
    """
    values: dict[str, Any] = {}
    for names, packed in rows:
        # All names share one object, because `addinivalue_line` changes it.
        values.update(dict.fromkeys(names, unpacked(packed)))
    read = config.getini

    def getini(name: str) -> Any:
        own = read(name)  # raises if the key is unknown here
        return values.get(name, own)

    config.getini = getini


def unpacked(value: Any) -> Any:
    """The value of an option or an ini key. In JSON, paths and tuples are objects with one member."""
    if isinstance(value, list):
        return [unpacked(member) for member in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(unpacked(value["tuple"]))
    if "py.path" in value:
        import py  # type: ignore[import-untyped]

        return py.path.local(value["py.path"])
    return pathlib.Path(value["path"])


def installed_plugins(names: list[str]) -> list[str]:
    """Those of the wanted plugins that are installed here."""
    from importlib.metadata import distributions

    there = {
        point.name
        for distribution in distributions()
        for point in distribution.entry_points
        if point.group == "pytest11"
    }
    return [name for name in names if name in there]


def fixtures_of(values: dict[str, object]) -> types.ModuleType:
    """A plugin with session fixtures that have values of the host."""

    def fixture_of(name: str) -> object:
        return pytest.fixture(scope="session", name=name)(lambda: values[name])

    module = types.ModuleType("vmsandbox_fixtures")
    for name in values:
        setattr(module, name, fixture_of(name))
    return module
