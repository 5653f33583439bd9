"""docs/plugins.md tells what the rows show."""

from pathlib import Path

from support.plugin_rows import ROWS, SUITES, table

PAGE = Path(__file__).parents[2] / "docs/plugins.md"


def test_the_table_has_the_rows():
    lines = PAGE.read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("|")] == table()


def test_each_file_of_tests_has_its_row():
    named = {SUITES / row.project / row.tests for row in ROWS}
    assert named == {*SUITES.glob("*/test_*.py")} - {SUITES / "picked/test_old.py"}
