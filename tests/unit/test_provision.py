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


def test_bytecode_in_a_folder_does_not_count(tmp_path):
    (tmp_path / "module.py").write_text("x = 1")
    first = digest(depends_on=[tmp_path])
    (tmp_path / "in" / "__pycache__").mkdir(parents=True)
    (tmp_path / "in" / "__pycache__" / "module.pyc").write_bytes(b"x")
    assert digest(depends_on=[tmp_path]) == first


class Settings:
    def __init__(self, **values):
        self.__dict__.update(values)

    def changed(self):
        self.__dict__.clear()


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x

    def changed(self):
        self.x = None


def with_values(*values):
    return digest(run=functools.partial(noop, *values))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Settings(port=x),
        Slotted,
        lambda x: {"b": {x}, "a": [Settings(inner=Slotted(x))]},
        lambda x: other if x == 1 else noop,
        lambda x: functools.partial(other, x),
        lambda x: Settings(x=x).changed if x == 1 else Slotted(x).changed,
    ],
)
def test_the_arguments_of_a_partial_count_by_what_they_are(make):
    """Not by where they lie in memory."""
    kept = [make(1), make(1), make(2)]
    first, same, changed = map(with_values, kept)
    assert first == same
    assert first != changed


def test_an_argument_that_holds_itself():
    def ring():
        found = Settings()
        vars(found)["itself"] = [found]
        return found

    assert with_values(ring()) == with_values(ring())


def test_it_is_the_same_in_each_process():
    """The order of a set is not, from one interpreter to the next, nor an address."""
    code = (
        "import functools\n"
        "from pathlib import Path\n"
        "class Settings: pass\n"
        "def install(guest, *more): pass\n"
        "waste = [object() for _ in range(len(__import__('os').environ['PYTHONHASHSEED']) * 997)]\n"
        "more = [Settings(), install, {'b', 'a'}, {Path('x'): Settings()}, Settings, len, object()]\n"
        "from pytest_vmsandbox.guests.provision import Provision\n"
        "run = lambda guest: guest in {'a', 'b', 'c', 'd'} or guest in (frozenset('xyz'),)\n"
        "print(Provision(name='x', depends_on=[], run=run).step().digest)\n"
        "run = functools.partial(install, *more)\n"
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
        for seed in ("1", "23", "456")
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
