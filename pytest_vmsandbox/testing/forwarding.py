"""What pytest in a guest is told of this run: options, ini keys, plugins.

The guest's run has to see what this one would: a lost ``asyncio_mode`` or ``--runslow`` makes tests
skip in silence. What is about selecting, ordering, reporting or ending tests stays here.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from pytest_vmsandbox.inside.environment import LEFT_OUT

# Told by arguments of pytest's command line, since pytest reads them before it configures itself.
_EARLY = {"assertmode", "capture", "importmode", "noconftest", "pythonwarnings"}

# pytest's own that are this side's affair. What host-only plugins have is not known in the guest.
_OURS_OPTIONS = _EARLY | {
    "basetemp", "cacheclear", "cacheshow", "code_highlight", "collectonly", "color", "confcutdir",
    "continue_on_collection_errors", "debug", "deselect", "disable_plugin_autoload", "durations",
    "durations_min", "failedfirst", "file_or_dir", "help", "ignore", "ignore_glob", "inifilename",
    "junitprefix", "keepduplicates", "keyword", "last_failed_no_failures", "lf", "log_file",
    "log_file_mode", "markexpr", "maxfail", "newfirst", "no_header", "no_summary", "override_ini",
    "pastebin", "plugins", "pyargs", "reportchars", "rootdir", "setuponly", "setupplan", "setupshow",
    "show_fixtures_per_test", "showfixtures", "stepwise", "stepwise_reset", "stepwise_skip",
    "strict_config", "strict_markers", "strict", "trace", "traceconfig", "usepdb", "usepdb_cls",
    "version", "xmlpath",
    "loadgroup",  # of xdist's workers alone
}  # fmt: skip
_OURS_INI = {
    "addopts", "cache_dir", "minversion", "required_plugins", "strict", "strict_config",
    "strict_markers", "strict_parametrization_ids", "testpaths",
}  # fmt: skip
_OURS_INI_FAMILIES = ("junit_", "log_file", "vm_")
_OURS_PLUGINS = ("vmsandbox", "pytest_vmsandbox", "xdist", "terminal")  # as `-p` names them


def options(config: pytest.Config, translate: Callable[[str], str]) -> dict[str, object]:
    """The options that pytest's core, the project's conftest files and plugins have: name → value.

    Args:
        translate: from a path of this machine to the guest's, where it is one of the project.
    """
    found = {}
    for name, value in vars(config.option).items():
        if name not in _OURS_OPTIONS and not name.startswith("vm_") and _is_plain(value):
            found[name] = _translated(value, translate)
    return found


def arguments(config: pytest.Config, translate: Callable[[str], str]) -> list[str]:
    """Arguments for pytest in the guest: ini keys, and the options that are read early."""
    option = config.option
    args = [f"--capture={option.capture}", f"--import-mode={option.importmode}"]
    args += [f"--assert={option.assertmode}"]
    args += ["--noconftest"] if option.noconftest else []
    for value in option.pythonwarnings or ():
        args += ["-W", value]
    # Keys of plugins that stay here; after the others, so that it counts more than `-W error`.
    args += ["-W", "ignore:Unknown config option:pytest.PytestConfigWarning"]
    for name, text in sorted(ini(config, translate).items()):
        args += ["-o", f"{name}={text}"]
    for name in option.plugins or ():
        if not _is_ours(name.removeprefix("no:")):
            args += ["-p", name]
    return args


def ini(config: pytest.Config, translate: Callable[[str], str]) -> dict[str, str]:
    """The ini keys that are set, as texts that mean the same in the guest."""
    set_here = getattr(config, "_inicfg", None)  # `inicfg` until pytest 9.0
    if set_here is None:
        set_here = config.inicfg  # type: ignore[deprecated]
    overridden = [it.partition("=")[0] for it in config.getoption("override_ini") or ()]
    known = config._parser._inidict  # noqa: SLF001  # pytest has no list
    texts = {}
    for name in {*set_here, *overridden, "markers"}:
        if name not in known or name in _OURS_INI or name.startswith(_OURS_INI_FAMILIES):
            continue
        value = config.getini(name)
        if value is not None:
            lines = "linelist" in repr(known[name][1])  # a type, or several
            texts[name] = _text(value, translate, lines=lines)
    return texts


def plugins(config: pytest.Config) -> list[str]:
    """Names of the plugins that are loaded here, and by the guest as far as it has them."""
    manager = config.pluginmanager
    names: dict[str, None] = {}
    for _, distribution in manager.list_plugin_distinfo():
        if _canonical(distribution.metadata["Name"]) in LEFT_OUT:
            continue
        for point in distribution.entry_points:
            if point.group == "pytest11" and manager.has_plugin(point.name):
                names[point.name] = None
    return list(names)


def fixtures(config: pytest.Config) -> dict[str, str]:
    """Values of fixtures that a host-only plugin has: those of pytest-xdist."""
    if not config.pluginmanager.has_plugin("xdist"):
        return {}
    worker = getattr(config, "workerinput", {})
    return {
        "worker_id": worker.get("workerid", "master"),
        "testrun_uid": worker.get("testrunuid", uuid.uuid4().hex),
    }


def translator(root: Path, there: str) -> Callable[[str], str]:
    """From a path of this machine to the guest's, where it is one of the project.

    Args:
        root: the project's folder here.
        there: the project's folder in the guest.
    """

    def translate(text: str) -> str:
        if text == str(root):
            return there
        if text.startswith(f"{root}/"):
            return str(PurePosixPath(there, text.removeprefix(f"{root}/")))
        return text

    return translate


def _is_ours(plugin: str) -> bool:
    return f"pytest-{_canonical(plugin)}" in LEFT_OUT or plugin.startswith(_OURS_PLUGINS)


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _translated(value: Any, translate: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return translate(value)
    if isinstance(value, list | tuple):
        return [_translated(it, translate) for it in value]
    return value


def _text(value: Any, translate: Callable[[str], str], *, lines: bool) -> str:
    """An ini value, which pytest has read, as it would be written."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        words = [translate(str(it)) for it in value]
        return "\n".join(words) if lines else shlex.join(words)
    return str(value)
