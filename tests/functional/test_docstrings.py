"""The examples in the docstrings of `Guest`; `tox run -e docs` runs those that need no guest."""

import doctest

import pytest

from pytest_vmsandbox.guests import guest


@pytest.mark.vm("tiny", isolation="module")
@pytest.mark.parametrize("name", ["qmp", "run", "shell"])
def test_guest(vm, name):
    (examples,) = doctest.DocTestFinder(recurse=False).find(
        getattr(guest.Guest, name), name, module=guest, extraglobs={"vm": vm}
    )
    said: list[str] = []
    doctest.DocTestRunner().run(examples, out=said.append)
    assert examples.examples
    assert "".join(said) == ""


def test_all_of_them_are_run():
    found = doctest.DocTestFinder(exclude_empty=True).find(guest)
    assert {it.name.rpartition(".")[2] for it in found if it.examples} == {"qmp", "run", "shell"}
