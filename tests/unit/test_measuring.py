"""Coverage that a guest tells of: what is taken of it, and what is not."""

from types import SimpleNamespace

import pytest
from coverage import Coverage, CoverageData

from pytest_vmsandbox.inside.tree import Tree, TreeEntry
from pytest_vmsandbox.plugin.in_vm.measuring import Measuring


@pytest.fixture
def keep(tmp_path):
    """Keep messages; what is then in the files that pytest-cov combines."""

    def do(*said, branch=False):
        cov = Coverage(data_file=tmp_path / "data", config_file=False, branch=branch)
        entries = {
            "a.py": TreeEntry(kind="file"),
            "sub": TreeEntry(kind="dir"),
            "link.py": TreeEntry(kind="link"),
        }
        measuring = Measuring(SimpleNamespace(cov=cov, topdir=str(tmp_path)))
        measuring.keep(said, Tree(tmp_path, entries), "tiny-1")
        found = {}
        for file in tmp_path.glob("data.vm-tiny-1.*"):
            data = CoverageData(str(file))
            data.read()
            for name in data.measured_files():
                found[name] = sorted(getattr(data, "arcs" if branch else "lines")(name))
            data.close()
        return {name.removeprefix(f"{tmp_path}/"): lines for name, lines in found.items()}

    return do


def test_lines(keep):
    assert keep({"covered": "a.py", "lines": [3, 1]}, {"exit": 0}) == {"a.py": [1, 3]}


def test_arcs(keep):
    said = {"covered": "a.py", "arcs": [[1, 2], [2, -1], [-1, 1]]}
    assert keep(said, branch=True) == {"a.py": [(-1, 1), (1, 2), (2, -1)]}


@pytest.mark.parametrize(
    "name", ["b.py", "../a.py", "/etc/passwd", "sub", "link.py", "", None, ["a.py"], {}]
)
def test_files_that_did_not_go_there(keep, name):
    assert keep({"covered": name, "lines": [1]}) == {}


@pytest.mark.parametrize(
    "lines", [None, 1, "12", {}, {"1": 1}], ids=["null", "number", "text", "empty", "object"]
)
def test_no_list(keep, lines):
    assert keep({"covered": "a.py", "lines": lines}, {"covered": "a.py"}) == {}


def test_what_is_no_line(keep):
    odd = [0, -1, 1 << 70, True, 1.5, "1", None, [1], {}]
    assert keep({"covered": "a.py", "lines": [*odd, 7]}) == {"a.py": [7]}


def test_what_is_no_arc(keep):
    odd = [1, "12", [1], [1, 2, 3], [0, 1], [True, 1], [1, 1 << 70], [1, "2"], {}, None]
    said = {"covered": "a.py", "arcs": [*odd, [1, 2]]}
    assert keep(said, branch=True) == {"a.py": [(1, 2)]}


def test_the_other_kind(keep):
    assert keep({"covered": "a.py", "arcs": [[1, 2]]}) == {}


def test_settings(tmp_path):
    cov = Coverage(config_file=False, branch=True, source=["/p/src", "pkg"], omit=["*/x.py"])
    settings = Measuring(SimpleNamespace(cov=cov, topdir="/p")).settings(
        lambda it: it.replace("/p/", "/there/")
    )
    assert settings["branch"] == "True"
    assert settings["source"] == ["/there/src", "pkg"]
    assert settings["omit"] == ["*/x.py"]
    assert "data_file" not in settings
