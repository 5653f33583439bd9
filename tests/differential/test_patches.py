"""Tests that patch or damage what they share with pytest, and with what tells of them.

They end as in plain pytest. The guest is this machine, as in `tests/differential`.
"""

import pkgutil
import subprocess
import sys

import pytest

from support import vmsandbox_verdicts as verdicts
from support.inside import Suite

ARGS = ("-p", "no:cacheprovider", "--disable-plugin-autoload")
GOOD = ["setup passed", "call passed", "teardown passed", verdicts.ENDED]
# All of their names are patched, so whatever comes into use is among them.
HOLDERS = [
    *("builtins", "os", "io", "sys", "time", "threading", "select", "signal", "random", "copy"),
    *("socket", "socket.socket", "json", "json.encoder", "json.decoder", "json.scanner"),
    *("json.JSONEncoder", "json.JSONDecoder", "linecache", "dataclasses"),
]
MOST = 100  # names in one file
FUNCTION_WIDE = """
import pkgutil

import pytest


class Raises:
    def fail(self, *args, **kwargs):
        raise RuntimeError("patched")

    __call__ = __getattr__ = __getitem__ = __setitem__ = __delitem__ = __contains__ = fail
    __iter__ = __len__ = __bool__ = __eq__ = __hash__ = __str__ = __index__ = __fspath__ = fail


def patch(monkeypatch, name):
    holder, _, attribute = name.partition(":")
    monkeypatch.setattr(pkgutil.resolve_name(holder), attribute, Raises())


@pytest.fixture(params=NAMES)
def function_wide(request, monkeypatch):
    patch(monkeypatch, request.param)


def test_function(function_wide): pass
"""
MODULE_WIDE = """

@pytest.fixture(params=NAMES, scope="module")
def module_wide(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch, request.param)
        yield


def test_module(module_wide): pass

def test_module_again(module_wide): pass
"""
NEXT = """

def test_next(): pass
"""
# What a test leaves behind.
DEEDS = [
    "os.environ.clear()",
    "os.closerange(3, 256)",
    "os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())",
    "os.umask(0o777)",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
    "sys.setrecursionlimit(200)",
    "sys.settrace(lambda *args: None); threading.settrace(lambda *args: None)",
    "sys.modules.clear()",
    "sys.stdout = sys.stderr = None",
    "sys.stdout.close()",
    "builtins.open = None; linecache.clearcache()",
    "warnings.showwarning = warnings.formatwarning = None",
    "socket.setdefaulttimeout(1e-9)",
    "locale.setlocale(locale.LC_ALL, 'C'); random.seed(1); gc.disable()",
    "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]",
]
DEED = """
import builtins, gc, linecache, locale, os, random, resource, signal, socket, sys, tempfile, threading
import warnings


def test_deed():
    {}


def test_warns():
    warnings.warn("a warning")
    print("text")


def test_fails():
    assert [1] == [2]
"""
APART = """
import multiprocessing
import sys


def square(n):
    return n * n


def test_main():
    assert sys.modules["__main__"].__spec__.name == "pytest.__main__"


def test_spawn():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(square, [2]) == [4]
"""
STAND_INS = """
import sys
import types

sys.modules["numpy"] = None
sys.modules["ssl"] = types.ModuleType("ssl")


def test_it(): pass
"""


class Sides:
    """Both ways to run the same files, and how their tests end."""

    def __init__(self, folder, monkeypatch):
        self.suite = Suite(folder)
        self.monkeypatch = monkeypatch
        self.files = []

    def write(self, sources):
        self.files = []
        for number, source in enumerate(sources):
            self.files.append(f"test_{number:03}.py")
            self.suite.write(self.files[-1], source)

    def plain(self, *args):
        record = self.record()
        subprocess.run(
            [sys.executable, verdicts.__file__, *ARGS, *args, "--", *self.files],
            cwd=self.suite.path, check=True, timeout=300,
        )  # fmt: skip
        return verdicts.read(record.read_text())

    def inside(self, *args):
        record = self.record()
        plugins = ("-p", "pytest_vmsandbox.plugin", "-p", "vmsandbox_verdicts")
        _, output = self.suite.run("--in-vm", *ARGS, *plugins, *args, *self.files, timeout=300)
        print(output)
        return verdicts.read(record.read_text(), "debian-13")

    def record(self):
        record = self.suite.folder / "verdicts"
        record.unlink(missing_ok=True)
        self.monkeypatch.setenv("VERDICTS", str(record))
        return record


@pytest.fixture
def sides(tmp_path_factory, monkeypatch):
    return Sides(tmp_path_factory.mktemp("s"), monkeypatch)


def groups():
    """Names that are patched, those of a file each."""
    for holder in HOLDERS:
        names = [name for name in dir(pkgutil.resolve_name(holder)) if name[:2] != "__"]
        for start in range(0, len(names), MOST):
            yield [f"{holder}:{name}" for name in names[start : start + MOST]]


def source(names, *parts):
    return "".join([f"NAMES = {names}\n", *parts])


def name_of(test):
    return test.partition("[")[2].rstrip("]")


def has_ended(verdict):
    return verdict[-1:] == [verdicts.ENDED]


def differences(plain, inside):
    """The tests that do not end as in plain pytest; one that ends that has to fail."""
    found = {}
    for test, verdict in plain.items():
        got = inside.get(test, [])
        if got != verdict if has_ended(verdict) else not any("failed" in it for it in got):
            found[test] = f"{verdict} in plain pytest, {got} inside"
    return found


def test_each_name_that_can_be_patched(sides):
    sides.write(source(names, FUNCTION_WIDE, MODULE_WIDE) for names in groups())
    plain = sides.plain("-x")  # what comes after a failure has another process
    bad = {name_of(test) for test, verdict in plain.items() if verdict != GOOD}
    worst = {
        name_of(test)
        for test, verdict in plain.items()
        if "::test_function" in test and not has_ended(verdict)
    }
    assert worst
    assert bad - worst

    good = [[name for name in names if name not in bad] for names in groups()]
    sides.write(source(names, FUNCTION_WIDE, MODULE_WIDE) for names in good)
    expected = {test: verdict for test, verdict in plain.items() if name_of(test) not in bad}
    assert differences(expected, sides.inside()) == {}

    sides.write(
        source([name], FUNCTION_WIDE, "" if name in worst else MODULE_WIDE, NEXT)
        for name in sorted(bad)
    )
    assert differences(sides.plain(), sides.inside("--vm-isolation=module")) == {}


@pytest.mark.parametrize("capture", ["fd", "sys"])
def test_what_tests_leave_behind(sides, capture):
    sides.write(DEED.format(deed) for deed in DEEDS)
    plain = sides.plain(f"--capture={capture}")
    inside = sides.inside(f"--capture={capture}", "--vm-isolation=module")
    assert differences(plain, inside) == {}


def test_it_is_not_among_the_modules(sides):
    """Some tools patch all that are there."""
    sides.write([APART])
    assert list(sides.inside().values()) == [GOOD, GOOD]


def test_clones_of_a_session_whose_modules_are_stand_ins(sides):
    sides.write([STAND_INS])
    assert list(sides.inside("--vm-isolation=test").values()) == [GOOD]
