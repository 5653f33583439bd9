"""The names that users import."""

import subprocess
import sys

import pytest_vmsandbox


def test_they_are_shown_before_they_are_used():
    assert set(pytest_vmsandbox.__all__) <= set(dir(pytest_vmsandbox))


def test_each_is_there():
    for name in pytest_vmsandbox.__all__:
        assert getattr(pytest_vmsandbox, name).__name__ == name


def test_a_guest_factory_does_not_wait_for_paramiko():
    # It takes as long to import as all the rest together, and most guests have a helper.
    code = "import sys, pytest_vmsandbox as v; v.GuestFactory, v.Guest; print('paramiko' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
