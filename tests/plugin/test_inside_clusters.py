"""Tests inside one machine of a cluster: which machines they have, and what becomes of these.

The machines are this one, as in `tests/differential`.
"""

import pytest

from support.inside import Suite


@pytest.fixture
def suite(tmp_path_factory):
    return Suite(tmp_path_factory.mktemp("s"))


def write(suite, more, tests):
    suite.write(
        "test_it.py",
        "import os\nimport pytest\n\n"
        "def form(cluster):\n    print('form is called with', *cluster)\n\n"
        "TWO = {'db1': 'debian-12', 'db2': 'debian-13'}\n"
        f"pytestmark = [pytest.mark.vm_cluster(TWO{more})]\n\n"
        f"def name(): return os.environ['VMSANDBOX_GUEST']\n\n{tests}",
    )


INSIDE = """
@pytest.mark.in_vm
def test_one():
    assert name() == "db2-2"

@pytest.mark.in_vm
class TestIt:
    @pytest.mark.parametrize("n", [7])
    def test_two(self, n):
        assert name() == {two!r}

def test_outside(vm_cluster):
    assert [*vm_cluster] == ["db1", "db2"]
"""


def test_each_test_has_a_cluster_of_its_own(suite):
    """Whatever --vm says. The same marker is good for tests from outside."""
    write(suite, ", inside='db2'", INSIDE.format(two="db2-4"))
    status, output = suite.run("-v", "--vm=debian-12", "--vm-isolation=session")
    assert status == 0, output
    assert suite.guests == ["db1-1", "db2-2", "db1-3", "db2-4", "db1-5", "db2-6"]
    assert "test_it.py::TestIt::test_two[debian-13-7] PASSED" in output


@pytest.mark.parametrize("isolation", ["module", "session"])
def test_they_share_one_if_they_want_to(suite, isolation):
    tests = f"pytestmark.append(pytest.mark.vm('debian-12', isolation={isolation!r}, memory='1GiB'))\n{INSIDE}"
    write(suite, ", inside='db2'", tests.format(two="db2-2"))
    status, output = suite.run()
    assert status == 0, output
    assert suite.guests == ["db1-1", "db2-2", "db1-3", "db2-4"]
    assert output.count("images, hardware and networks in the marker vm of") == 2
    assert output.count("images, hardware and networks, isolation in the marker vm of") == 1


def test_without_a_machine_the_marker_is_for_tests_from_outside(suite):
    """--in-vm does not let a test have a cluster for which it has not asked."""
    write(suite, "", "def test_one():\n    assert name() == 'debian-13-1'\n")
    status, output = suite.run("--in-vm")
    assert status == 0, output
    assert suite.guests == ["debian-13-1"]


def test_formed(suite):
    """Each test is collected again where a cluster cannot be sealed with its session."""
    tests = "@pytest.mark.parametrize('n', range(2))\ndef test_one(n): assert name().startswith('db1-')\n"
    write(suite, ", inside='db1', form=form", tests)
    status, output = suite.run("--in-vm", "-s")
    assert status == 0, output
    assert output.count("form is called with db1 db2") == 2
    assert (
        "each test inside the cluster of db1, db2 is collected again: this machine cannot" in output
    )


LOSES = """
machines, note = [], pytest_vmsandbox_guest_ready

def pytest_vmsandbox_guest_ready(config, guest):
    machines.append(guest)
    note(config, guest)

def pytest_warning_recorded(warning_message):  # a test inside has begun
    first = machines[0]
    if "lose" in str(warning_message.message):
        first.lost, first.transient = f"{first.name} has lost its mind", TRANSIENT
"""


@pytest.mark.parametrize("transient", [False, True])
def test_another_machine_that_is_lost(suite, transient):
    """The test is no success. If this host is to blame, it runs again in a fresh cluster."""
    with (suite.folder / "host_plugin.py").open("a") as file:
        file.write(LOSES.replace("TRANSIENT", str(transient)))
    write(
        suite,
        ", inside='db2'",
        "import warnings\n\ndef test_one():\n    warnings.warn('lose it')\n\ndef test_two(): pass\n",
    )
    status, output = suite.run("--in-vm", f"--vm-artifacts={suite.folder / 'kept'}")
    assert "db1-1 has lost its mind" in output
    if transient:
        assert status == 0, output
        assert "retried in a fresh guest (test_it.py::test_one[debian-13])" in output
        assert suite.guests == ["db1-1", "db2-2", "db1-3", "db2-4", "db1-5", "db2-6"]
    else:
        assert status == 1, output
        assert "2 passed" in output
        assert "1 error" in output
        assert suite.guests == ["db1-1", "db2-2", "db1-3", "db2-4"]
        (folder,) = (suite.folder / "kept").iterdir()
        assert sorted(path.name for path in folder.iterdir()) == ["db1-1", "db2-2"]


def test_only_the_guest_can_import_it(suite):
    there = "if 'VMSANDBOX_GUEST' not in os.environ: raise ImportError\n"
    write(suite, ", inside='db1'", f"{there}def test_one(): pass\n")
    status, output = suite.run("--in-vm")
    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert "only the guest can import test_it.py, so nobody here can read its marker" in output
