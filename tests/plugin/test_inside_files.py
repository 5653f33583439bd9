"""Files that tests inside guests write into the project: what comes back, and what is told.

The guest is this machine, as in `tests/differential`, with a copy of the project.
"""

import os

import pytest

from support.inside import Suite

WRITES = """
import os
from pathlib import Path

HERE = Path(__file__).parent

def write(name, text):
    file = HERE / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)

def test_one(): write("__snapshots__/one.ambr", "one")
"""


@pytest.fixture
def suite(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOCAL_COPY", "1")
    return Suite(tmp_path_factory.mktemp("s"))


def told(output):
    return [line for line in output.splitlines() if line.startswith("vmsandbox: ")]


@pytest.mark.parametrize("isolation", ["session", "module", "test"])
def test_what_is_written_comes_back(suite, isolation):
    """Also what is written at the very end; of the rest, the key is told that would bring it."""
    suite.write("test_it.py", WRITES + "def test_two(): write('sub/profile.out', 'x')\n")
    suite.write(
        "conftest.py",
        "import os\n"
        "from pathlib import Path\n"
        "def pytest_sessionfinish():\n"
        "    if 'VMSANDBOX_GUEST' in os.environ:\n"
        "        folder = Path(__file__).with_name('cassettes')\n"
        "        folder.mkdir(exist_ok=True)\n"
        "        (folder / 'a.yaml').write_text('late')\n",
    )
    status, output = suite.run("--in-vm", f"--vm-isolation={isolation}")
    assert status == 0, output
    assert (suite.path / "__snapshots__/one.ambr").read_text() == "one"
    assert (suite.path / "cassettes/a.yaml").read_text() == "late"
    assert not (suite.path / "sub").exists()
    lines = "\n".join(told(output))
    assert "brought back 2 files that tests inside guests wrote: " in lines
    assert "tests inside guests wrote 1 file that stayed there: sub/profile.out" in lines
    assert "`vm_pull = sub/profile.out`" in output
    assert ".lock" not in output  # syrupy's, between workers of xdist


def test_workers_tell_one_line_and_no_conflict_is_silent(suite):
    suite.write(
        "test_it.py",
        WRITES.replace(
            "def test_one",
            "def test_a(): write('a.out', os.environ['VMSANDBOX_GUEST'])\ndef test_one",
        ),
    )
    suite.write("test_other.py", (suite.path / "test_it.py").read_text())
    (suite.path / "pytest.ini").write_text("[pytest]\nvm_pull = *.out\n")
    # Guests of two workers have the same names; those of two modules have not.
    status, output = suite.run("--in-vm", "--vm-isolation=module")
    assert status == 0, output
    assert (suite.path / "a.out").read_text() == "debian-13-1"
    assert "wrote other content meanwhile: a.out" in output
    (suite.path / "a.out").unlink()
    (suite.path / "pytest.ini").write_text("[pytest]\n")
    status, output = suite.run("--in-vm", "-n2", "--dist=loadfile")
    assert status == 0, output
    assert output.count("tests inside guests wrote 1 file that stayed there: a.out") == 1
    assert (suite.path / "__snapshots__/one.ambr").read_text() == "one"


def test_workers_tell_of_names_that_are_no_unicode(suite):
    """With such a name, execnet would send nothing of what a worker has found, a failure included."""
    suite.write(
        "test_it.py",
        WRITES.replace(
            'write("__snapshots__/one',
            "write(os.fsdecode(b'cassettes/\\xff'), '1'); write(os.fsdecode(b'\\xfe/\\xff.log'), 'x'); write(\"__snapshots__/one",
        ),
    )
    suite.write(
        "conftest.py",
        "import os\ndef pytest_sessionfinish(session):\n"
        "    if 'VMSANDBOX_GUEST' in os.environ: session.exitstatus = 3\n",
    )
    status, output = suite.run("--in-vm", "-n1")
    assert status == 1, output
    assert "pytest in this guest ended with status 3" in output
    assert "brought back 2 files that tests inside guests wrote: __snapshots__/one.ambr, " in output
    assert "wrote 1 file that stayed there: ?/?.log" in output
    assert (suite.path / os.fsdecode(b"cassettes/\xff")).exists()


def test_a_guest_that_is_lost(suite):
    suite.write("test_it.py", WRITES + "def test_two(): pass\n")
    (suite.folder / "host_plugin.py").write_text(
        "guests = []\n"
        "def pytest_vmsandbox_guest_ready(config, guest): guests.append(guest)\n"
        "def pytest_runtest_logfinish(nodeid):\n"
        "    if 'test_one' in nodeid: guests[0].lost = 'a panic'\n"
    )
    status, output = suite.run("--in-vm", "-x")
    assert status == 1, output
    assert not (suite.path / "__snapshots__").exists()
    assert (
        "these guests were lost, and with them the files that tests wrote there: debian-13-1"
        in output
    )


@pytest.mark.parametrize("pattern", ["../x", "/etc/*", "!../x", ".git/hooks/*"])
def test_patterns_that_are_refused(suite, pattern):
    suite.write("test_it.py", "def test_it(): pass\n")
    (suite.path / "pytest.ini").write_text(f"[pytest]\nvm_pull = {pattern}\n")
    status, output = suite.run("--in-vm")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert f"vm_pull: '{pattern}' is not allowed" in output
    assert not suite.guests


SYRUPY = """
import pytest

class Options:
    @staticmethod
    def pytest_addoption(parser):
        parser.addoption("--snapshot-update", action="store_true", dest="update_snapshots")
        parser.addoption("--snapshot-warn-unused", action="store_true", dest="warn_unused_snapshots")
        {option}

class Syrupy:
    @pytest.fixture
    def snapshot(self): pass
    def pytest_sessionfinish(self, session):
        option = session.config.option
        if not getattr(option, "disable_unused_snapshots", False) and option.update_snapshots:
            (session.config.rootpath / "__snapshots__/kept.ambr").unlink()

def pytest_configure(config):
    config.pluginmanager.register(Syrupy(), "syrupy")

pytest_addoption = Options.pytest_addoption
"""
DISABLE = (
    'parser.addoption("--snapshot-disable-unused", dest="disable_unused_snapshots", default=False)'
)


def test_no_snapshot_is_removed_because_its_test_ran_inside(suite):
    """On this side, syrupy takes the snapshots of such tests for unused, and removes them."""
    suite.write("test_it.py", "def test_it(snapshot): pass\n")
    (suite.path / "__snapshots__").mkdir()
    (suite.path / "__snapshots__/kept.ambr").write_text("kept")
    suite.write("conftest.py", SYRUPY.format(option=DISABLE))
    status, output = suite.run("--in-vm", "--snapshot-update")
    assert status == 0, output
    assert (suite.path / "__snapshots__/kept.ambr").exists()
    assert "vmsandbox: syrupy does not look for unused snapshots" in output
    suite.write("conftest.py", SYRUPY.format(option="pass"))
    status, output = suite.run("--in-vm", "--snapshot-update")
    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert "this version of syrupy would remove" in output


PLACES = '''
import faulthandler
import warnings
from pathlib import Path

import pytest

def test_fixture(no_such_fixture): pass

def test_message(): pytest.fail(f"look at {__file__}")

def test_assertion(): assert Path(__file__) == 1

def test_skipped(): pytest.skip(f"without {__file__}")

def test_warning(): warnings.warn(f"in {__file__}")

def test_doctest():
    """
    >>> open("/no/such" + __file__)
    1
    """

def test_dies(): faulthandler._sigsegv()
'''


@pytest.mark.parametrize("args", [(), ("--tb=native",)], ids=["", "native"])
def test_paths_are_those_of_this_machine(suite, args):
    suite.write("test_it.py", PLACES)
    suite.write("test_bad.py", "import os\nos.environ['VMSANDBOX_GUEST']\nimport nothing\n")
    _, output = suite.run("--in-vm", "--doctest-modules", *args)
    assert "1 passed" in output or "2 passed" in output
    copy = f"{suite.folder}/local-"
    assert [line for line in output.splitlines() if copy in line] == []
    assert f"look at {suite.path}/test_it.py" in output
    assert f"without {suite.path}/test_it.py" in output
    assert f"in {suite.path}/test_it.py" in output
    assert f'File "{suite.path}/test_it.py", line 24 in test_dies' in output
    assert f"'/no/such{suite.path}/test_it.py'" in output


def test_a_clone_makes_no_summary(suite):
    """Which nobody would read; what plugins import for it took ten seconds for each test."""
    suite.write("test_it.py", "def test_it(): pass\n")
    suite.write(
        "conftest.py",
        "import os\n"
        "from pathlib import Path\n"
        "def pytest_terminal_summary():\n"
        "    if 'VMSANDBOX_GUEST' in os.environ:\n"
        "        Path(__file__).with_name('summary.snap').write_text('')\n",
    )
    (suite.path / "pytest.ini").write_text("[pytest]\nvm_pull = *.snap\n")
    status, output = suite.run("--in-vm", "--vm-isolation=test")
    assert status == 0, output
    assert not (suite.path / "summary.snap").exists()


@pytest.mark.parametrize("isolation", ["session", "test"])
def test_plugins_can_come_and_go(suite, isolation):
    """Many unregister themselves at the end; and so does ours that times a test that may run again."""
    suite.write(
        "conftest.py",
        "class Plugin:\n"
        "    def pytest_terminal_summary(self): pass\n"
        "def pytest_configure(config): config.pluginmanager.register(Plugin(), 'own')\n"
        "def pytest_unconfigure(config): config.pluginmanager.unregister(name='own')\n",
    )
    suite.write(
        "test_it.py", "import pytest\n@pytest.mark.flaky(reruns=1)\ndef test_it(): assert 0\n"
    )
    status, output = suite.run("--in-vm", f"--vm-isolation={isolation}")
    assert status == 1, output
    assert "1 failed, 1 rerun" in output
    assert "INTERNALERROR" not in output
    assert "pytest in this guest ended with status" not in output


def test_a_clone_in_which_nothing_was_written_is_not_looked_through(suite):
    """Looking costs a command in each; and what changes a file in any way is seen."""
    (suite.path / "sub").mkdir()
    (suite.path / "sub/kept.snap").write_text("1234")
    (suite.path / "pytest.ini").write_text("[pytest]\nvm_pull = *.snap\n")
    suite.write(
        "test_it.py",
        "import os, pytest\n"
        "from pathlib import Path\n"
        "FILE = Path(__file__).with_name('sub') / 'kept.snap'\n"
        "@pytest.fixture(scope='session')\n"
        "def late():\n"
        "    yield\n"
        "    FILE.with_name('late.snap').write_text('late')\n"
        "def test_nothing(): FILE.read_text()\n"
        "def test_more(): pass\n"
        "def test_late(late): pass\n"
        "def test_same_size_and_time():\n"
        "    status = FILE.stat()\n"
        "    FILE.write_text('4321')\n"
        "    os.utime(FILE, ns=(status.st_atime_ns, status.st_mtime_ns + 5_000_000_000))\n"
        "def test_gone(): FILE.unlink()\n",
    )
    (suite.folder / "host_plugin.py").write_text(
        "from pytest_vmsandbox.inside import tree_copy\n"
        "listed, changes = [], tree_copy.changes\n"
        "def counted(stream, *more):\n"
        "    listed.append(stream.__self__.name)\n"
        "    return changes(stream, *more)\n"
        "tree_copy.changes = counted\n"
        "def pytest_terminal_summary(): print('listed:', *listed)\n"
    )
    status, output = suite.run("--in-vm", "--vm-isolation=test")
    assert status == 0, output
    assert "listed: debian-13-3 debian-13-4 debian-13-5\n" in output
    assert (suite.path / "sub/late.snap").read_text() == "late"
    assert (suite.path / "sub/kept.snap").read_text() == "4321"
    assert "deleted by tests inside guests, but kept on this machine: sub/kept.snap" in output


def test_what_cannot_be_written_here_fails_the_run(suite):
    suite.write("test_it.py", WRITES.replace("one.ambr", "a"))
    (suite.folder / "host_plugin.py").write_text(
        "from pytest_vmsandbox.inside import tree_copy\n"
        "def fail(*_): raise PermissionError(13, 'Permission denied')\n"
        "tree_copy._write = fail\n"
    )
    status, output = suite.run("--in-vm")
    assert status == 1, output
    assert (
        "because the file cannot be written on this machine: __snapshots__/a (Permission denied)"
        in output
    )
