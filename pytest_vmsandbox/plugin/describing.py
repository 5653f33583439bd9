"""Tells the command ``vmsandbox`` about a project: its rootdir and its images, as pytest sees them.

`cli/project.py` starts pytest with this plugin. Without ``--collect-only``, pytest answers and ends before
it collects tests. All of pytest's ways to configure a project count: files, options, ``PYTEST_ADDOPTS``,
and our hook.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.plugin import config as options
from pytest_vmsandbox.plugin.plan import plan_of
from pytest_vmsandbox.plugin.run import Run

_OPTION = "--vm-answer"
_ANSWER = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, metavar="FILE", help="write the answer to this file")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Answer what the configuration says. Without the option there is no question."""
    if not config.getoption(_OPTION):
        return None
    try:
        selection = Run(config).selection  # pytest has not run `pytest_configure`
        if isinstance(selection, ConfigError):
            raise selection
        answer: dict[str, Any] = {"images": selection[0]}
    except ConfigError as error:
        answer = {"error": [error.brief, error.details, error.remedy]}
    answer["rootdir"] = str(config.rootpath)
    answer["image_path"] = [str(path.absolute()) for path in options.image_path(config)]
    config.stash[_ANSWER] = answer
    _write(config)
    return None if config.getoption("collectonly") and "error" not in answer else 0


def pytest_collection_finish(session: pytest.Session) -> None:
    """Add the images of the tests, which their markers can name."""
    if (answer := session.config.stash.get(_ANSWER, None)) is not None:
        of_tests = (plan_of(item).image for item in session.items)
        answer["images"] = list(dict.fromkeys(filter(None, (*answer["images"], *of_tests))))
        _write(session.config)


def _write(config: pytest.Config) -> None:
    answer = json.dumps(config.stash[_ANSWER])
    Path(config.getoption(_OPTION)).write_text(answer, encoding="utf-8")
