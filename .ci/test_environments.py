"""Which environments of tox have failed: a table of theirs, as a test for each.

Only some of them end with a summary of pytest's. Somebody who reads the last one of a whole run must not
miss that another environment has failed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

RESULTS: dict[str, Any] = json.loads(Path(os.environ["TOX_RESULTS"]).read_text())["testenvs"]


@pytest.mark.parametrize("name", [name for name, found in RESULTS.items() if found.get("result")])
def test_environment(name: str) -> None:
    assert RESULTS[name]["result"]["success"], f"run it alone: tox run -e {name}"
