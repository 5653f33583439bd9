"""What keeps tests from running inside a guest, and is told before anything is started."""

import os
import subprocess

import pytest

from support.inside import Suite


@pytest.fixture
def suite(tmp_path_factory):
    suite = Suite(tmp_path_factory.mktemp("s"))
    suite.write("test_it.py", "def test_one(): pass\ndef test_two(): pass\n")
    return suite


@pytest.mark.parametrize("args", [(), ("-n2",)], ids=["plain", "workers"])
def test_git_refuses_the_project(suite, monkeypatch, args):
    """As it does where root runs in a checkout of another user."""
    subprocess.run(["git", "init", "-q", suite.path], check=True)
    git = suite.folder / "bin/git"
    git.parent.mkdir()
    git.write_text(
        "#!/bin/sh\necho \"fatal: detected dubious ownership in repository at '$PWD'\" >&2\nexit 128\n"
    )
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
    status, output = suite.run("--in-vm", *args)
    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert output.count("dubious ownership") == 1
    assert "git failed to list the files of" in output
    assert not suite.guests


def test_a_list_of_tests_needs_no_project(suite):
    (suite.path / "pytest.ini").write_text("[pytest]\nvm_push = nothere\n")
    status, output = suite.run("--in-vm", "--collect-only", "-q")
    assert status == 0, output
    status, output = suite.run("--in-vm")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "vm_push: there is no 'nothere'" in output


def test_packages_that_cannot_be_had_are_told_once(suite):
    """Not once for each guest that would have needed them."""
    suite.write("test_other.py", "def test_three(): pass\n")
    (suite.folder / "host_plugin.py").write_text(
        "import itertools\n"
        "from pytest_vmsandbox.core.errors import TransferError\n"
        "from pytest_vmsandbox.inside import install\n"
        "from pytest_vmsandbox.plugin import reporting\n"
        "reporting._HIDDEN += (__file__,)  # it stands in for ours\n"
        "count = itertools.count(1)\n"
        "def fail(guest, payload):\n"
        "    raise TransferError('no wheel', details=f'try {next(count)}')\n"
        "def pytest_collection_finish(session):\n"
        "    install.install_environment = fail\n"
    )
    status, output = suite.run("--in-vm", "--vm-isolation=module")
    assert status == 1
    assert "3 errors" in output
    assert output.count("try 1") == 1
    assert "try 2" not in output


@pytest.mark.parametrize("isolation", ["session", "test"])
def test_a_plugin_that_no_guest_has_is_named_with_its_key(suite, isolation):
    (suite.path / "pytest.ini").write_text("[pytest]\nvm_guest_plugins = no_such_plugin\n")
    status, output = suite.run("--in-vm", f"--vm-isolation={isolation}")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "vm_guest_plugins names no_such_plugin, but pytest in the guest cannot" in output
    assert output.count("Error importing plugin") == 1
    assert "2 errors" in output


def test_an_import_error_is_told_in_full_once(suite):
    """Each test of the file is an error all the same."""
    suite.write(
        "test_broken.py",
        "import os\nif 'PYTHONPATH' not in os.environ: import no_such_module\n"
        "def test_one(): pass\ndef test_two(): pass\n",
    )
    status, output = suite.run("--in-vm")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert output.count("ModuleNotFoundError: No module named 'no_such_module'") == 1
    assert (
        "test_broken.py could not be collected: see test_broken.py::test_one[debian-13]" in output
    )
    assert "2 passed, 2 errors" in output
