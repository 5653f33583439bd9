"""The plugins of docs/plugins.md, inside a guest that this machine plays, against plain pytest."""

import os
from pathlib import Path

import pytest

from support import fidelity
from support.plugin_rows import REFUSED, ROWS, Lab, differences, shown

SUPPORT = Path(fidelity.__file__).parent


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """One for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    return Lab((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "lab")


def inside(lab, row):
    """A guest has a copy of the project, as a real one has."""
    return lab.run(
        row.project,
        "inside",
        *("-p", "vmsandbox_local", "--in-vm"),
        PYTHONPATH=f"{SUPPORT.parent}:{SUPPORT}",
        VMSANDBOX_CACHE=str(lab.folder / "c"),
        VMSANDBOX_RUNTIME=str(lab.folder / "r"),
        LOCAL_COPY="1",
    )


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.verdict != REFUSED], ids=lambda it: it.plugin
)
def test_as_in_plain_pytest(lab, row):
    plain = lab.run(row.project, "plain", "-p", "no:vmsandbox")
    expected = shown(row, plain)
    assert expected["cases"]
    assert row.output is None or len(expected["output"]) > 1
    there = inside(lab, row)
    assert differences(shown(row, there), expected) == []
    assert (there / "status").read_text() == (plain / "status").read_text()


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.verdict == REFUSED], ids=lambda it: it.plugin
)
def test_refused(lab, row):
    there = inside(lab, row)
    assert (there / "status").read_text() == str(int(pytest.ExitCode.USAGE_ERROR))
    screen = (there / "screen").read_text()
    assert row.refusal in screen
    assert "Remedy:" in screen
