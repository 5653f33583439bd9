"""The configuration of pytest in a guest: options, ini keys and plugins of this run.

Tests in the guest must see the same values: without ``asyncio_mode`` or ``--runslow``, some would skip
in silence. Options about selecting, ordering, reporting or ending tests stay here.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points, packages_distributions
from itertools import pairwise
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from pytest_vmsandbox.inside.distributions import HOST_ONLY, LEFT_OUT
from pytest_vmsandbox.plugin import terminal
from pytest_vmsandbox.plugin.in_vm import other_plugins
from pytest_vmsandbox.plugin.in_vm.remote_reports import RERUN, RETRIED

# Options that go by the command line, because pytest reads them before it configures itself: name →
# the argument, and the plugin that defines it.
_EARLY = {
    "assertmode": ("--assert", "assertion"),
    "capture": ("--capture", "capture"),
    "importmode": ("--import-mode", "main"),
}

# pytest's own options that apply on this side only. The guest does not know those of host-only plugins.
_OURS_OPTIONS = {
    *_EARLY, "noconftest", "pythonwarnings",
    "basetemp", "cacheclear", "cacheshow", "code_highlight", "collectonly", "color", "confcutdir",
    "continue_on_collection_errors", "debug", "deselect", "disable_plugin_autoload", "durations",
    "durations_min", "failedfirst", "file_or_dir", "help", "ignore", "ignore_glob", "inifilename",
    "junitprefix", "keepduplicates", "keyword", "last_failed_no_failures", "lf", "log_file",
    "log_file_mode", "markexpr", "max_warnings", "maxfail", "newfirst", "no_header", "no_summary",
    "override_ini", "pastebin", "plugins", "pyargs", "reportchars", "rootdir", "setuponly",
    "setupplan", "setupshow", "show_fixtures_per_test", "showfixtures", "stepwise",
    "stepwise_reset", "stepwise_skip", "strict_config", "trace", "traceconfig", "usepdb",
    "usepdb_cls", "version", "xmlpath",
    "fail_on_flaky",  # pytest-rerunfailures: how the run ends
    "loadgroup",  # only for xdist's workers
    # Options of other plugins that select tests, or write and compare reports.
    "allure_epics", "allure_features", "allure_ids", "allure_labels", "allure_report_dir",
    "allure_severities",
    "allure_stories", "clean_alluredir",
    "benchmark_autosave", "benchmark_compare", "benchmark_compare_fail", "benchmark_cprofile",
    "benchmark_cprofile_dump", "benchmark_histogram", "benchmark_json", "benchmark_save",
    "cucumber_json_path", "gherkin_terminal_reporter", "htmlpath", "json_report_file",
}  # fmt: skip
# Options of plugins that would write a report in the guest by default.
_SILENCED = {"json_report_file": None}
_OURS_INI = {
    "addopts", "cache_dir", "console_output_style", "log_file", "log_file_mode", "max_warnings",
    "minversion", "required_plugins", "strict_config", "testpaths",
}  # fmt: skip
_OURS_INI_FAMILIES = ("junit_", "vm_")
# Plugins that are never turned off in the guest: we need `reports`, and `terminalprogress` is not seen.
_OURS_PLUGINS = {"reports", "terminalprogress"}
_XDIST_VARIABLES = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID")
_OUTCOMES = {"rerunfailures": RERUN, "pytest-retry": RETRIED}
_RUN = pytest.StashKey[str]()  # pytest-xdist's id of a run without workers
_ONLY_HERE = HOST_ONLY | LEFT_OUT


def options(
    config: pytest.Config, translate: Callable[[str], str]
) -> tuple[dict[str, object], list[str]]:
    """The options of pytest, the project's conftest files and plugins: name → value.

    Args:
        translate: turns a path of the project on this machine into the guest's path.

    Returns:
        The options, and those whose value JSON cannot carry: the guest uses its default for them.
    """
    parser = getattr(config._parser, "optparser", None)  # noqa: SLF001  # pytest has no list
    found: dict[str, object] = dict(_SILENCED)
    lost = []
    for name, value in vars(config.option).items():
        if name in _OURS_OPTIONS or name.startswith("vm_"):
            continue
        try:
            found[name] = _packed(value, translate)
        except TypeError:
            if parser is not None and value is not parser.get_default(name):
                lost.append(f"{name}={value!r}")
    if other_plugins.benchmarks_are_off(config):  # xdist turns them off
        found["benchmark_disable"] = True
    return found, lost


def arguments(config: pytest.Config, translate: Callable[[str], str]) -> list[str]:
    """Arguments for pytest in the guest: options that it reads early, and plugins."""
    typed, _ = _named_plugins(config)
    args = [
        f"{flag}={getattr(config.option, name)}"
        for name, (flag, plugin) in _EARLY.items()
        if hasattr(config.option, name) and f"no:{plugin}" not in typed
    ]
    args += [f"--confcutdir={translate(str(_confcutdir(config)))}"]
    args += ["--noconftest"] if config.option.noconftest else []
    for value in config.option.pythonwarnings or ():
        args += ["-W", value]
    return [*args, *_loading(typed)]


def ini(config: pytest.Config, translate: Callable[[str], str]) -> list[tuple[list[str], object]]:
    """The ini keys that are set: their names with aliases, and their values.

    The guest gets the value that `pytest.Config.getini` returns here. A key that is not set keeps the
    guest's own default, which may depend on that machine.
    """
    parser = config._parser  # noqa: SLF001  # pytest has no list
    names = {key: [key] for key in parser._inidict}  # noqa: SLF001
    for alias, key in getattr(parser, "_ini_aliases", {}).items():  # since pytest 9.0
        names[key].append(alias)
    written = _written(config)
    rows: list[tuple[list[str], object]] = [
        (["strict_config"], False),  # pytest here has accepted the configuration
        (["addopts"], _loading(_named_plugins(config)[1])),
    ]
    for key, called in sorted(names.items()):
        if key in _OURS_INI or key.startswith(_OURS_INI_FAMILIES):
            continue
        value, (_, _, default) = config.getini(key), parser._inidict[key]  # noqa: SLF001
        if value is None and key.startswith("strict_"):  # ``strict`` sets these
            value = config.getini("strict") or None
        # Lines that plugins add do not make a key set. The guest lacks some of these plugins. It needs
        # their lines of `markers`, or it would warn about them.
        if value is not default or not written.isdisjoint(called) or key == "markers":
            with suppress(TypeError):  # a file cannot hold such a value: it is a default
                rows.append((called, _packed(value, translate)))
    return rows


def plugins(config: pytest.Config) -> list[str]:
    """Names of the plugins that are loaded here. The guest loads those that it has."""
    manager = config.pluginmanager
    names: dict[str, None] = {}
    for _, distribution in manager.list_plugin_distinfo():
        if canonicalize_name(distribution.metadata["Name"]) in _ONLY_HERE:
            continue
        for point in distribution.entry_points:
            if point.group == "pytest11" and manager.has_plugin(point.name):
                names[point.name] = None
    return list(names)


def fixtures(config: pytest.Config) -> dict[str, str | None]:
    """Values of the fixtures of host-only plugins: pytest-xdist and pytest-cov.

    They are the same in all guests of a run. A guest that measures coverage has its own fixture `cov`.
    """
    found: dict[str, str | None] = {}
    if config.pluginmanager.has_plugin("pytest_cov"):
        found.update(cov=None, no_cover=None)
    if config.pluginmanager.has_plugin("xdist"):
        worker = getattr(config, "workerinput", {})
        run = config.stash.setdefault(_RUN, uuid.uuid4().hex)
        found["worker_id"] = worker.get("workerid", "master")
        found["testrun_uid"] = worker.get("testrunuid", run)
    return found


def outcomes(config: pytest.Config) -> list[str]:
    """Further outcomes of tests that plugins of this side know."""
    manager = config.pluginmanager
    return [outcome for plugin, outcome in _OUTCOMES.items() if manager.has_plugin(plugin)]


def debugging(config: pytest.Config, folder: str) -> dict[str, object]:
    """The settings of the runner's `Debugging`. They come when a session begins or wakes up.

    Args:
        folder: of the supervisor's socket.
    """
    return {
        "stop": True,  # so that this side sees the guest as it is at the failure
        "pdb": config.getoption("usepdb", default=False),
        "pdbcls": config.getoption("usepdb_cls", default=None),
        "trace": config.getoption("trace", default=False),
        "terminal": terminal.is_there(config),
        "folder": folder,
    }


def environment() -> dict[str, str]:
    """Variables in which pytest-xdist tells this process which worker it is."""
    return {name: os.environ[name] for name in _XDIST_VARIABLES if name in os.environ}


def translator(places: Mapping[str, str]) -> Callable[[str], str]:
    """A function that turns a path of the project on this machine into the guest's path.

    Args:
        places: folders that went to the guest: path here → path there.
    """

    def translate(text: str) -> str:
        for here, there in places.items():
            if f"{text}/".startswith(f"{here}/"):
                return str(PurePosixPath(there, text[len(here) + 1 :]))
        return text

    return translate


def _confcutdir(config: pytest.Config) -> Path:
    """The folder above which pytest ignores conftest.py files; at most the project's folder."""
    given = Path(config.invocation_params.dir, config.known_args_namespace.confcutdir)
    folder = Path(os.path.normpath(given))
    return folder if folder.is_relative_to(config.rootpath) else config.rootpath


def _named_plugins(config: pytest.Config) -> tuple[list[str], list[str]]:
    """The plugins that the user wants loaded, or left out (``no:NAME``).

    Returns:
        Those of the command line, and all others. pytest leaves out the former so early that their
        options do not exist. It leaves out the latter later.
    """
    stay = {*_host_only(), *_OURS_PLUGINS, *only_here(config)}
    if hasattr(config, "workerinput"):
        stay.add("terminal")  # workers of xdist have no terminal
    words = config.invocation_params.args
    typed = {word[2:] for word in map(str, words) if word.startswith("-p")}
    typed.update(str(name) for word, name in pairwise(words) if word == "-p")
    found: tuple[list[str], list[str]] = ([], [])
    for name in _asked_for(config):
        bare = name.removeprefix("no:")
        if bare not in stay and not bare.startswith("vmsandbox"):
            found[name not in typed].append(name)
    return found


def only_here(config: pytest.Config) -> list[str]:
    """The plugins that the user names and that no guest can have, for instance an editor's.

    They are neither in the project, nor installed, nor pytest's. Ours do not count.
    """
    found = []
    for name in dict.fromkeys(_asked_for(config)):
        plugin = config.pluginmanager.get_plugin(name)
        file = getattr(plugin, "__file__", None)
        if name.startswith("vmsandbox") or not file or Path(file).is_relative_to(config.rootpath):
            continue
        if getattr(plugin, "__name__", "").partition(".")[0] not in _installed():
            found.append(name)
    return found


def _asked_for(config: pytest.Config) -> list[str]:
    """The plugins, or ``no:NAME``, from the command line and from the environment."""
    of_environment = os.environ.get("PYTEST_PLUGINS", "").split(",")
    return [name for name in (*config.option.plugins, *of_environment) if name]


@cache  # reading what is installed takes long, and each guest asks
def _host_only() -> frozenset[str]:
    """The names of host-only plugins: of their entry points and of their modules."""
    return frozenset(
        name
        for point in entry_points(group="pytest11")
        if point.dist is not None and canonicalize_name(point.dist.name) in _ONLY_HERE
        for name in (point.name, point.module)
    )


@cache  # likewise
def _installed() -> frozenset[str]:
    """The names of installed top-level modules and packages."""
    return frozenset({"_pytest", "pytest", *packages_distributions()})


def _loading(plugins: Iterable[str]) -> list[str]:
    return [word for name in plugins for word in ("-p", name)]


def _written(config: pytest.Config) -> set[str]:
    """The names of ini keys, or their aliases, in the ini file and on the command line."""
    in_file = getattr(config, "_inicfg", None)  # `inicfg` until pytest 9.0
    if in_file is None:
        in_file = config.inicfg  # type: ignore[deprecated]
    return {*in_file, *(text.partition("=")[0] for text in config.option.override_ini or ())}


def _packed(value: Any, translate: Callable[[str], str]) -> Any:
    """A value in a form that JSON can carry; the runner's `unpacked` restores it.

    Raises:
        TypeError: JSON cannot carry it.
    """
    # Compare types: a member of an enumeration may also be a `str`, and its identity matters.
    if type(value) is str:
        return translate(value)
    if value is None or type(value) in {bool, int, float}:
        return value
    if isinstance(value, list):
        return [_packed(member, translate) for member in value]
    if type(value) is tuple:
        return {"tuple": [_packed(member, translate) for member in value]}
    if isinstance(value, os.PathLike):
        kind = "path" if isinstance(value, PurePath) else "py.path"
        return {kind: translate(os.fspath(value))}
    raise TypeError
