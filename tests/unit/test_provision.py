"""What a layer depends on: texts, the content of paths, and the code of the function."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.provision import Provision


def noop(guest):
    """Nothing."""


def digest(run=noop, depends_on=(), name="a layer", network=None):
    return Provision(name=name, depends_on=list(depends_on), run=run, network=network).step().digest


def test_the_same_is_the_same():
    assert digest(depends_on=["a"]) == digest(depends_on=["a"])


def other(guest):
    guest.run(["true"])


class Callable:
    def __call__(self, guest):
        guest.run(["true"])


@pytest.mark.parametrize(
    "changed",
    [
        {"run": other},
        {"run": lambda guest: guest.run(["true"])},
        {"run": lambda guest: guest.run(["false"])},
        {"run": lambda guest: [guest.run(it) for it in "ab"]},
        {"run": functools.partial(noop, 1)},
        {"run": functools.partial(noop, 2)},
        {"run": functools.partial(other, 2)},
        {"run": functools.partial(other, guest=2)},
        {"run": Callable()},
        {"depends_on": ["b"]},
        {"depends_on": ["a", "a"]},
        {"name": "another"},
        {"network": "nat"},
    ],
)
def test_each_part_counts(changed):
    found = [digest(**{"depends_on": ["a"], **it}) for it in ALL]
    assert found.count(digest(**{"depends_on": ["a"], **changed})) == 1


ALL = test_each_part_counts.pytestmark[0].args[1]


def test_the_content_of_a_path_counts(tmp_path):
    file = tmp_path / "setup.sh"
    file.write_text("one")
    first = digest(depends_on=[file])
    file.write_text("two")
    assert digest(depends_on=[file]) != first
    file.write_text("one")
    assert digest(depends_on=[file]) == first


def test_of_a_folder_all_files_count(tmp_path):
    (tmp_path / "in").mkdir()
    first = digest(depends_on=[tmp_path])
    (tmp_path / "in" / "file").write_text("x")
    second = digest(depends_on=[tmp_path])
    (tmp_path / "in" / "file").rename(tmp_path / "in" / "renamed")
    assert len({first, second, digest(depends_on=[tmp_path])}) == 3


def test_it_is_the_same_in_each_process():
    """The order of a set is not, from one interpreter to the next."""
    code = (
        "from pytest_vmsandbox.guests.provision import Provision\n"
        "run = lambda guest: guest in {'a', 'b', 'c', 'd'} or guest in (frozenset('xyz'),)\n"
        "print(Provision(name='x', depends_on=[], run=run).step().digest)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"depends_on": "postgresql"}, "is not a list"),
        ({"depends_on": [1]}, "neither a text nor a path"),
        ({"depends_on": [Path("/nowhere/at/all")]}, "cannot be read"),
        ({"network": "wifi"}, "is unknown"),
        ({"run": "apt-get"}, "cannot be called"),
    ],
)
def test_what_cannot_be_meant(changed, text):
    values = {"name": "x", "depends_on": [], "run": noop, **changed}
    with pytest.raises(ConfigError, match=text):
        Provision(**values).step()


def test_what_a_function_returns_is_no_fact():
    step = Provision(name="x", depends_on=[], run=lambda _: "something").step()
    guest: Any = None
    assert step.run(guest) is None
