"""A real guest: some plugins of docs/plugins.md, in one run."""

import pytest

from support.plugin_rows import IMAGE, ROWS, Lab, differences, shown

# They bring little to install, and show each way on which something comes from a guest: more reports of
# a test, attributes of reports, fixtures of plugins, files.
HERE = {
    *("pytest-html", "pytest-json-report", "pytest-metadata", "pytest-mock"),
    *("pytest-regressions", "pytest-rerunfailures"),
}
SOME = [row for row in ROWS if row.plugin in HERE]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The project's folders after a run by plain pytest here, and one inside a guest."""
    lab = Lab(tmp_path_factory.mktemp("lab"), SOME)
    return (
        lab.run("together", "plain", "-p", "no:vmsandbox"),
        lab.run("together", "real", "--in-vm", f"--vm={IMAGE}"),
    )


@pytest.mark.parametrize("row", SOME, ids=lambda row: row.plugin)
def test_as_in_plain_pytest(runs, row):
    plain, real = runs
    assert differences(shown(row, real), shown(row, plain)) == []
    assert (real / "status").read_text() == (plain / "status").read_text()
