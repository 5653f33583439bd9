"""Tells the command ``vmsandbox`` about a project: its rootdir and its images, as pytest sees them.

`cli/project.py` starts pytest with this plugin. pytest then answers and ends before it collects tests.
So all of pytest's ways to configure a project count: files, options, ``PYTEST_ADDOPTS``, and our hook.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.plugin import config as options
from pytest_vmsandbox.plugin.run import Run

_OPTION = "--vm-answer"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, metavar="FILE", help="write the answer to this file")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Write the answer. Without the option there is no question."""
    if not (file := config.getoption(_OPTION)):
        return None
    try:
        selection = Run(config).selection  # pytest has not run `pytest_configure`
        if isinstance(selection, ConfigError):
            raise selection
        answer: dict[str, object] = {"images": selection[0]}
    except ConfigError as error:
        answer = {"error": [error.brief, error.details, error.remedy]}
    answer["rootdir"] = str(config.rootpath)
    answer["image_path"] = [str(path.absolute()) for path in options.image_path(config)]
    Path(file).write_text(json.dumps(answer), encoding="utf-8")
    return 0
