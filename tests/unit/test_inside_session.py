"""A session in a guest that does not behave, and in one whose tests do what no test should.

The first half plays scripts to the host's side; the second runs the real runner on this machine.
"""

import json
import os
import re
import select
import signal
import sys
import tempfile
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pytest_vmsandbox.core import deadline
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import GuestLost, InterpreterLost
from pytest_vmsandbox.inside import connection, session
from pytest_vmsandbox.inside.connection import Connection, GuestPaths
from pytest_vmsandbox.inside.environment import parse_probe
from pytest_vmsandbox.inside.session import Collected, GuestSession
from pytest_vmsandbox.inside.wire import encode
from support.local import LocalGuest
from support.reports import EVIL_TEXT, JSON, KEYS, check_text

RUNNER = Path(session.__file__).with_name("runner")
ID = "test_a.py::test_a"
HOW: dict[str, Any] = {"next": None, "more": False, "marks": [], "limit": 5.0}
SILENCE = object()


# -- a connection that plays a script ----------------------------------------------------------------


class Script:
    """A process in a guest that says what it likes: bytes, messages, or nothing for a while."""

    def __init__(self, *steps, alive=True, repeat=False):
        self.steps, self.alive, self.repeat = list(steps), alive, repeat
        self.name, self.image = "hostile-1", "hostile"
        self.heard = []
        self.closed = False
        self.running = SimpleNamespace(restarts=SimpleNamespace(resets=0))

    def send(self, data, timeout):
        self.heard += map(json.loads, data.splitlines())

    def receive(self, timeout):
        if not self.steps:
            return b""
        step = self.steps[0] if self.repeat else self.steps.pop(0)
        if step is SILENCE:
            raise TimeoutError
        return step if isinstance(step, bytes) else encode(step)

    @property
    def engine(self):
        return self

    def start(self, command):
        return self

    def connect(self, path):
        return None

    def run(self, argv, **how):
        if not self.alive:
            raise GuestLost("hostile-1 has panicked", stage="kernel")
        return SimpleNamespace(stdout="")

    def close(self):
        self.closed = True

    @property
    def asked(self):
        return [it["do"] if it["do"] != "signal" else it["name"] for it in self.heard]


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    for name in ("PING_SECONDS", "ANSWER_SECONDS", "_ATTACH_SECONDS"):
        monkeypatch.setattr(connection, name, 0.2)
    monkeypatch.setattr(session, "_EXIT_SECONDS", 0.2)


def play(*steps, **how):
    script: Any = Script(*steps, **how)
    return script, GuestSession(Connection(script, script, patience=1.0))


def run(*steps, **how):
    script, talk = play(*steps, **how)
    try:
        return list(talk.run(ID, **HOW))
    finally:
        assert script.asked[0] == "run"


def test_a_guest_is_told_of_several_tests_at_once():
    """Each message wakes its supervisor."""
    names = [f"test_a.py::test_{number}" for number in range(30)]
    script, talk = play(*({"done": name} for name in names))
    sent = []
    script.send = lambda data, timeout: sent.append(len(data.splitlines()))
    how = {name: value for name, value in HOW.items() if name != "limit"}
    ahead = 0
    for number, name in enumerate(names):
        while ahead < min(number + 9, len(names)):
            talk.announce(names[ahead], **how)
            ahead += 1
        assert list(talk.run(name, **HOW)) == [{"done": name}]
    assert sum(sent) == len(names)
    assert len(sent) < len(names) / 3


def report(nodeid=ID):
    return {"report": {"nodeid": nodeid}}


def test_a_run_that_is_well_behaved():
    said = run(report(), {"output": "x"}, {"done": ID, "stop": None})
    assert [next(iter(it)) for it in said] == ["report", "output", "done"]


@pytest.mark.parametrize(
    "steps",
    [
        [b"garbage\n"],
        [b"\x00\xff\x1b[2J\n"],
        [b'{"done": "'],
        [b'{"done"', b": 1"],
        [b"[]\n"],
        [{"done": "test_a.py::another"}],
        [{"done": None}],
        [{"done": [ID]}],
        [{"exit": "x", "tail": ""}],
        [{"exit": None}],
        [{"exit": 0}],
        [],
    ],
)
def test_a_run_that_breaks_the_protocol(steps):
    with pytest.raises(GuestLost) as caught:
        run(*steps)
    check_text(str(caught.value))


def test_the_end_of_a_guest_is_told_by_its_cause():
    with pytest.raises(GuestLost, match="panicked"):
        run(b'{"half', alive=False)
    with pytest.raises(GuestLost, match="the process in .* that runs the tests is gone"):
        run(b'{"half')


def test_a_guest_that_has_restarted_is_told():
    script, session = play(b'{"half')
    script.running.restarts.resets += 1
    with pytest.raises(GuestLost, match="hostile-1 has restarted by itself") as caught:
        list(session.run(ID, **HOW))
    assert "its own guest" in caught.value.remedy


def test_what_came_before_the_end_is_told():
    seen = []
    with pytest.raises(GuestLost):
        seen.extend(play(report(), report("other"), b"")[1].run(ID, **HOW))
    talk = play(report(), b"{")[1].run(ID, **HOW)
    assert next(talk) == report()
    with pytest.raises(GuestLost):
        next(talk)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"exit": 0, "tail": "bye"}, r"ended with status 0 \(os._exit\?\)"),
        ({"exit": 3, "tail": ""}, "ended with status 3"),
        ({"exit": -9, "tail": ""}, "SIGKILL"),
        ({"exit": -12345, "tail": ""}, "signal 12345"),
        ({"exit": -(10**390), "tail": ""}, "signal 1000"),
        ({"exit": "7", "tail": {"a": 1}}, "status 7"),
        ({"exit": 1, "tail": "\x1b[2J\x1b]0;x\x07\u202e\ud800"}, "status 1"),
        ({"internal": "\x1b[2Jboom"}, "INTERNALERROR"),
    ],
)
def test_an_interpreter_that_ended(message, text):
    with pytest.raises(InterpreterLost, match=text) as caught:
        run(message)
    check_text(str(caught.value))


@pytest.mark.parametrize("unit", ["/pluggy ", '  File "/', "x", "\n", "\x1b]"])
def test_a_tail_without_an_end(unit):
    with pytest.raises(InterpreterLost) as caught:
        run({"exit": 1, "tail": '  File "' + unit * 300_000})
    assert len(str(caught.value)) < 100_000


@pytest.mark.parametrize("end", [{"exit": 1}, {"exit": 1, "tail": 3}, {"exit": []}, b"x\n", b""])
def test_a_kill_ends_whatever_comes(end):
    script, talk = play(end)
    assert talk.kill() in {"", "3"}
    assert script.asked == ["KILL"]
    assert talk.kill() == ""
    assert script.asked == ["KILL"]


def test_a_guest_that_takes_nothing():
    class Deaf(Script):
        def send(self, data, timeout):
            assert timeout < 10
            raise TimeoutError

    script: Any = Deaf()
    with pytest.raises(GuestLost, match="does not answer"):
        list(GuestSession(Connection(script, script, patience=1.0)).run(ID, **HOW))


def test_a_message_needs_no_thread():
    class Watched(Script):
        def send(self, data, timeout):
            super().send(data, timeout)
            senders.add(threading.current_thread())

    senders = set()
    script: Any = Watched(report(), {"done": ID})
    list(GuestSession(Connection(script, script, patience=1.0)).run(ID, **HOW))
    assert senders == {threading.current_thread()}


def test_silence_is_asked_about(monkeypatch):
    monkeypatch.setattr(connection, "PING_SECONDS", 0.01)
    assert run(SILENCE, {"pong": 0}, {"done": ID}) == [{"done": ID}]
    with pytest.raises(GuestLost, match="does not answer"):
        run(SILENCE, SILENCE)
    with pytest.raises(GuestLost, match="is gone"):
        run(SILENCE)


@pytest.mark.parametrize("flood", [{"pong": 0}, b'{"pong": 0}\n' * 10_000, b" "])
def test_speech_that_says_nothing_ends_in_time(flood):
    script, talk = play(flood, repeat=True)
    with pytest.raises(InterpreterLost, match=r"did not end within 0\.1 s"):
        list(talk.run(ID, **HOW | {"limit": 0.1}))
    assert script.asked == ["run", "DUMP", "KILL"]


def test_live_output_without_an_end_is_ended_in_time():
    script, talk = play({"output": "y\n" * 100, "of": 1}, repeat=True)
    seen = []
    with pytest.raises(InterpreterLost, match=r"did not end within 0\.2 s"):
        seen.extend(talk.run(ID, **HOW | {"limit": 0.2}))
    assert seen
    assert script.asked == ["run", "DUMP", "KILL"]


def test_live_output_is_no_flood(monkeypatch):
    monkeypatch.setattr(connection, "_MAX_MESSAGES", 10)
    monkeypatch.setattr(connection, "_MAX_BYTES", 1000)
    many = [{"output": "x" * 100}] * 100
    assert len(run(*many, {"done": ID})) == 101


@pytest.mark.parametrize("message", [report(), {}, {"interrupted": ""}])
def test_a_flood_of_messages(monkeypatch, message):
    monkeypatch.setattr(connection, "_MAX_MESSAGES", 1_000)
    with pytest.raises(GuestLost, match="it sent more than"):
        run(encode(message) * 100, repeat=True)


def test_a_flood_of_bytes(monkeypatch):
    monkeypatch.setattr(connection, "_MAX_BYTES", 1 << 20)
    with pytest.raises(GuestLost, match="it sent more than"):
        run({"report": "x" * 100_000}, repeat=True)


def test_each_request_has_its_own_limit(monkeypatch):
    monkeypatch.setattr(connection, "_MAX_MESSAGES", 10)
    one = [report()] * 9 + [{"done": ID}]
    talk = play(*one * 5)[1]
    for _ in range(5):
        assert len(list(talk.run(ID, **HOW))) == 10


@pytest.mark.parametrize("use", [lambda it: it.finish(0.3), lambda it: it.interrupt(0.3)])
def test_an_end_with_a_flood(monkeypatch, use):
    monkeypatch.setattr(session, "_MAX_OUTPUT", 10_000)
    script, talk = play({"output": "y" * 100}, repeat=True)
    try:
        said = use(talk)
    except InterpreterLost:
        said = []
    assert len(said) <= 60
    assert script.asked[-1] == "KILL"


def test_the_end_is_told_after_much_output(monkeypatch):
    monkeypatch.setattr(session, "_MAX_OUTPUT", 500)
    talk = play(*[{"output": "y" * 100}] * 50, {"exit": 0, "tail": ""})[1]
    assert [next(iter(it)) for it in talk.finish(1)] == ["output", "output", "exit"]


def started(*steps):
    script: Any = Script(*steps)
    return GuestSession.started(Connection(script, script, patience=1.0), {}, timeout=0.5)


def test_what_is_collected():
    talk, said = started(
        {"items": [[ID, None], ["b", {"x": 0}], ["c", None, [["c", 1, "c"], [], []]]]},
        {"failed": ["d.py", {"nodeid": "d.py"}]},
        {"output": "x"},
        {"ready": 3},
    )
    assert talk.collected.items == {ID: None, "b": {"x": 0}, "c": None}
    assert list(talk.collected.details) == ["c"]
    assert talk.collected.failed == {"d.py": {"nodeid": "d.py"}}
    assert said == [{"output": "x"}]


def woken(*steps):
    script: Any = Script(*steps)
    connection = Connection(script, script, patience=1.0)
    facts = {"items": {ID: None}, "details": {}, "failed": {}}
    return GuestSession.woken(
        connection, facts, environment={}, fixtures={}, debugging={}, timeout=0.5
    )


def test_what_had_not_left_the_guest_when_that_was_sealed():
    late = [{"output": "x", "of": 1}, {"warning": "late", "when": "collect"}]
    talk, said = woken(*late, {"awake": 32})
    assert said == late
    assert talk.collected.items == {ID: None}


@pytest.mark.parametrize("message", [{}, {"done": ID}, {"items": []}, {"ready": 1}])
def test_a_session_that_wakes_up_as_another_one(message):
    with pytest.raises(GuestLost, match="a session that was woken did not answer"):
        woken(message, {"awake": 32})


@pytest.mark.parametrize("name", ["\x1b[2J", "a\rb", "\u202ea", "\ud800", "a\x07"])
def test_a_name_that_plays_tricks_is_none(name):
    talk, _ = started({"items": [[f"{ID}[{name}]", None], [ID, None]]}, {"ready": 2})
    assert list(talk.collected.items) == [ID]


@pytest.mark.parametrize(
    "message",
    [
        {"items": 3},
        {"items": None},
        {"items": "abc"},
        {"items": [3]},
        {"items": [[]]},
        {"items": {"a": 1}},
        {"items": [["a", None], 3]},
        {"failed": "x"},
        {"failed": []},
        {"failed": ["x", None]},
        {"failed": ["x", {}]},
        {"failed": ["x", "why"]},
        {"failed": 3},
        {"exit": 4},
    ],
)
def test_items_that_are_none(message):
    with pytest.raises(GuestLost) as caught:
        started(message, {"ready": 1})
    check_text(str(caught.value))


def test_too_many_items(monkeypatch):
    monkeypatch.setattr(session, "_MAX_ITEMS", 10)
    with pytest.raises(GuestLost, match="more than 10 tests"):
        started({"items": [[str(n), None] for n in range(11)]})


def test_a_keeper_that_does_not_greet():
    place = GuestPaths(python="python3", runner="/r", folder="/f")
    for steps in (
        [SILENCE] * 3,
        [{"pong": 0}, SILENCE, SILENCE],
        [{"ready": 1}],
        [b"login:\n"],
        [],
    ):
        script: Any = Script(*steps)
        with pytest.raises(GuestLost), Connection.attached(script, place):
            raise AssertionError
        assert script.closed


EVENTS = st.sampled_from(
    ["report", "done", "exit", "tail", "output", "items", "failed", "internal", "ready"]
)
ANYTHING = st.lists(
    st.binary(max_size=30)
    | st.dictionaries(EVENTS | KEYS, JSON | EVIL_TEXT, max_size=3).map(encode),
    max_size=6,
)


@settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
@given(ANYTHING, st.sampled_from(["start", "run", "finish", "interrupt", "kill"]))
def test_whatever_is_said(steps, what):
    script, talk = play(*steps)
    use = {
        "start": lambda: GuestSession.started(
            Connection(script, script, patience=1.0), {}, timeout=1
        ),
        "run": lambda: list(talk.run(ID, **HOW)),
        "finish": lambda: talk.finish(1),
        "interrupt": lambda: talk.interrupt(1),
        "kill": talk.kill,
    }[what]
    try:
        use()
    except (GuestLost, InterpreterLost) as error:
        check_text(str(error))


@settings(deadline=None, max_examples=50)
@given(st.text() | JSON.map(json.dumps))
def test_what_probe_prints(text):
    with pytest.raises(GuestLost):
        parse_probe(text)


# -- the real runner -----------------------------------------------------------------------------


DEBUGGING = dict.fromkeys(("stop", "pdb", "pdbcls", "trace", "terminal"), False)


class Folder:
    """A folder of tests, and a connection on this machine."""

    def __init__(self, folder, source, conftest=""):
        self.guest: Any = LocalGuest()
        self.folder = folder
        (folder / "test_it.py").write_text(textwrap.dedent(source))
        (folder / "pytest.ini").write_text("[pytest]\n")
        if conftest:
            (folder / "conftest.py").write_text(textwrap.dedent(conftest))
        self.place = GuestPaths(python=sys.executable, runner=str(RUNNER), folder=f"{folder}/k")
        self.pids = set()

    @contextmanager
    def connection(self):
        with Connection.attached(self.guest, self.place) as connection:
            if not self.pids:
                self.pids.add(self.keeper_pid())
            yield connection

    def keeper_pid(self):
        (pid,) = (
            int(it.name)
            for it in Path("/proc").glob("[0-9]*")
            if f"\0serve\0{self.folder}/k\0".encode() in _read(it / "cmdline")
        )
        return pid

    def config(self, *args, live=False, **debugging):
        return {
            "args": [
                *("--rootdir", str(self.folder), "-c", str(self.folder / "pytest.ini")),
                *("--disable-plugin-autoload", "-p", "no:cacheprovider", *args),
                *(() if live else ("--capture=fd",)),
                str(self.folder / "test_it.py"),
            ],
            "plugins": [],
            "options": {},
            "ini": [],
            "path": [],
            "programs": os.defpath,
            "cwd": str(self.folder),
            "environment": {"PYTHONDONTWRITEBYTECODE": "1"},
            "details": [],
            "fixtures": {},
            "live": live,
            "debugging": DEBUGGING | {"folder": self.place.folder} | debugging,
        }

    def start(self, connection, *args, **how):
        talk, _ = GuestSession.started(connection, self.config(*args, **how), timeout=20)
        return talk

    def close(self):
        """End all that was started here: keepers, sessions, and what those have left behind."""
        mine = f"{self.folder}/".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            if mine in _read(entry / "cmdline"):
                with _gone_is_fine():
                    fd = os.pidfd_open(int(entry.name))
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    assert select.select([fd], [], [], 5)[0]
                    os.close(fd)


@contextmanager
def _gone_is_fine():
    try:
        yield
    except ProcessLookupError:
        pass


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture
def inside(monkeypatch):
    for name in ("PING_SECONDS", "ANSWER_SECONDS", "_ATTACH_SECONDS"):
        monkeypatch.setattr(connection, name, 10)
    monkeypatch.setattr(session, "_EXIT_SECONDS", 10)
    places = []
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:

        def make(source, **more):
            places.append(Folder(Path(folder), source, **more))
            return places[-1]

        yield make
        for place in places:
            place.close()


def ids(talk):
    return list(talk.collected.items)


def outcomes(messages):
    return [(it["report"]["when"], it["report"]["outcome"]) for it in messages if "report" in it]


def until(true):
    """Whether it becomes true in time."""
    deadline = Deadline(5)
    while not true() and not deadline.expired:
        deadline.pause(0.02)
    return true()


ALL = [("setup", "passed"), ("call", "passed"), ("teardown", "passed")]


def all_of(talk, nodeid, **how):
    """What is told of a test until the interpreter is lost, and the error."""
    said = []
    try:
        said.extend(talk.run(nodeid, **HOW | {"limit": 20.0, "more": True} | how))
    except InterpreterLost as error:
        return outcomes(said), error
    return outcomes(said), None


@pytest.mark.parametrize(
    ("line", "brief", "detail"),
    [
        ("os._exit(0)", r"status 0 \(os._exit\?\)", ""),
        ("os._exit(3)", "status 3", ""),
        ("print('last', flush=True); os.write(2, b'words'); os._exit(3)", "status 3", ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL", ""),
        ("os.killpg(0, signal.SIGKILL)", "SIGKILL", ""),
        ("os.killpg(0, signal.SIGTERM)", "SIGTERM", ""),
        ("ctypes.string_at(0)", "SIGSEGV", "line 6 in test_ends"),
        ("os.abort()", "SIGABRT", "line 6 in test_ends"),
        ("os.closerange(0, 256); os.kill(os.getpid(), 9)", "SIGKILL", ""),
    ],
)
def test_a_test_that_ends_its_interpreter(inside, line, brief, detail):
    place = inside(
        f"""\
        import ctypes, os, signal


        def test_ends():
            # here
            {line}


        def test_next():
            pass
        """
    )
    with place.connection() as connection:
        talk = place.start(connection)
        one, two = ids(talk)
        said, error = all_of(talk, one, next=two)
        assert said == [("setup", "passed")]
        assert re.search(brief, str(error))
        assert detail in str(error)
        again = place.start(connection)  # another interpreter
        assert all_of(again, two) == (ALL, None)
        assert again.finish(10)[-1]["exit"] == 0


def test_a_test_that_closes_all_descriptors(inside):
    """What tells of it has a descriptor that is out of the way."""
    place = inside(
        """\
        import os

        def test_it():
            os.closerange(0, 256)
        """
    )
    with place.connection() as connection:
        talk = place.start(connection)
        failed = [ALL[0], ("call", "failed"), ("teardown", "failed")]  # pytest's capture is gone
        assert all_of(talk, *ids(talk)) == (failed, None)


@pytest.mark.parametrize("live", [False, True])
def test_a_test_that_hangs_is_shown_where(inside, live):
    place = inside(
        """\
        import time

        def test_hangs():
            time.sleep(0.01)
            time.sleep(1000)  # here
        """
    )
    with place.connection() as connection:
        talk = place.start(connection, *(["--capture=no"] if live else []), live=live)
        said, error = all_of(talk, *ids(talk), limit=0.6)
        assert said == [("setup", "passed")]
        assert re.search(r"did not end within 0\.6 s, and its interpreter was killed", str(error))
        assert "line 5 in test_hangs" in str(error)
        assert str(error).count("in test_hangs") == 1


@pytest.mark.parametrize(
    ("line", "how", "text", "status"),
    [
        ("raise KeyboardInterrupt('x')", "key", "x", 2),
        ("pytest.exit('enough', 7)", "left", "enough", 7),
    ],
)
def test_a_test_that_ends_the_run(inside, line, how, text, status):
    place = inside(
        f"""\
        import time

        import pytest

        @pytest.fixture(scope="module")
        def shared():
            yield
            time.sleep(0.3)
            open("torn down", "w").close()

        def test_it(shared):
            {line}
        """
    )
    with place.connection() as connection:
        talk = place.start(connection)
        for message in talk.run(*ids(talk), **HOW):
            if "interrupted" in message:
                break
        else:
            pytest.fail("it does not tell")
        assert (message["how"], message["interrupted"]) == (how, text)
        assert talk.interrupt(10)[-1]["exit"] == status
    assert (place.folder / "torn down").exists()


def test_a_test_whose_child_goes_on(inside):
    place = inside(
        """\
        import os

        def test_forks():
            if os.fork() == 0:
                open(f"child {os.getpid()}", "w").close()

        def test_next():
            open("next", "a").write(f"{os.getpid()}\\n")

        def test_last():
            pass
        """
    )
    with place.connection() as connection:
        talk = place.start(connection)
        one, two, three = ids(talk)
        assert all_of(talk, one, next=two) == (ALL, None)
        assert until(lambda: list(place.folder.glob("child *")))
        (found,) = place.folder.glob("child *")
        child = int(found.name.split()[1])
        assert all_of(talk, two, next=three) == (ALL, None)
        assert all_of(talk, three) == (ALL, None)
        assert talk.finish(10)[-1]["exit"] == 0
    (pid,) = (place.folder / "next").read_text().split()
    assert int(pid) != child
    assert until(lambda: not Path(f"/proc/{child}").exists())


def test_a_test_whose_grandchild_holds_all_open(inside):
    """The end of the interpreter is told although its descriptors live on."""
    place = inside(
        """\
        import os, time

        def test_forks():
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(5)
        """
    )
    with place.connection() as connection:
        talk = place.start(connection)
        _, error = all_of(talk, *ids(talk))
        assert re.search("status 5", str(error))


@pytest.mark.parametrize(
    ("args", "conftest", "status", "text"),
    [
        (["--no-such-option"], "", 4, "unrecognized arguments: --no-such-option"),
        ([], "raise ValueError('conftest is broken')", 4, "conftest is broken"),
        ([], "import os; os._exit(9)", 9, ""),
        (["-p", "no_such_plugin"], "", "(4|70)", "no_such_plugin"),
    ],
)
def test_a_session_that_does_not_start(inside, args, conftest, status, text):
    place = inside("def test_it(): pass", conftest=conftest)
    with place.connection() as connection:
        with pytest.raises(InterpreterLost, match=f"ended with status {status}") as caught:
            place.start(connection, *args)
        assert text in str(caught.value)


def test_a_test_file_that_cannot_be_imported(inside):
    place = inside("import no_such_module")
    with place.connection() as connection:
        talk = place.start(connection)
        assert not talk.collected.items
        assert "no_such_module" in json.dumps(talk.collected.failed["test_it.py"])


@pytest.mark.parametrize("capture", ["fd", "no"])
def test_a_flood_of_output_that_is_not_wanted(inside, capture):
    place = inside(
        """\
        import os

        def test_it(capfd):
            with capfd.disabled():
                for _ in range(300):
                    os.write(1, b"x" * 100_000)
                os.write(2, b"the end")
            os._exit(3)
        """
    )
    with place.connection() as connection:
        talk = place.start(connection, f"--capture={capture}")
        _, error = all_of(talk, *ids(talk))
        assert "the end" in str(error)
        assert len(str(error)) < 20_000


def test_a_report_that_is_too_large_is_cut(inside):
    place = inside(
        """\
        def test_it(record_property):
            record_property("big", 10**500)
            record_property("bigger", 10**5000)
            for _ in range(40):
                print("ü" * 1_000_000)
            raise ValueError("x" * 1_000_000)
        """
    )
    with place.connection() as connection:
        talk = place.start(connection)
        said, error = all_of(talk, *ids(talk))
        assert error is None
        assert said == [ALL[0], ("call", "failed"), ALL[2]]


def test_attached_again(inside):
    """A connection outlives who talks to it, and so does its session."""
    place = inside("def test_a(): pass\ndef test_b(): pass")
    with place.connection() as connection:
        talk = place.start(connection)
        one, two = ids(talk)
        assert all_of(talk, one, next=two) == (ALL, None)
        connection.say({"do": "ping", "n": 1})
    with place.connection() as connection:
        talk = GuestSession(connection)
        assert all_of(talk, two) == (ALL, None)
    with place.connection() as connection:
        assert GuestSession(connection).finish(10)[-1]["exit"] == 0


def test_what_was_said_to_nobody_is_told_later(inside):
    place = inside(
        """\
        import os, time

        def test_a():
            open("begun", "w").close()
            while not os.path.exists("go"):
                time.sleep(0.01)

        def test_b():
            open("over", "w").close()
            os._exit(3)
        """
    )
    with place.connection() as connection:
        talk = place.start(connection)
        one, two = ids(talk)
        for nodeid, following in ((one, two), (two, None)):
            connection.say(
                {"do": "run", "id": nodeid, "next": following, "more": True, "marks": []}
            )
        assert until((place.folder / "begun").exists)
        connection._ping()  # all that was sent has arrived
    for _ in range(3):  # whoever attaches is greeted first
        with place.connection() as connection:
            pass
    (place.folder / "go").touch()
    assert until((place.folder / "over").exists)
    with place.connection() as connection:
        talk = GuestSession(connection)
        said = list(talk.interrupt(10))
    assert said[-1]["exit"] == 3
    assert [it["done"] for it in said if "done" in it] == [one]
    assert outcomes(said)[-2:] == [ALL[2], ALL[0]]


def test_a_session_that_is_replaced(inside):
    place = inside("import time\ndef test_a(): time.sleep(1000)")
    with place.connection() as connection:
        talk = place.start(connection)
        connection.say({"do": "run", "id": ids(talk)[0], "next": None, "more": True, "marks": []})
        again = place.start(connection)
        assert again.finish(10)[-1]["exit"] == 0


def test_nobody_is_left_to_talk_to(inside):
    place = inside(
        """\
        import os, signal

        def test_it():
            os.kill(int(os.environ["KEEPER"]), signal.SIGKILL)
            os._exit(1)
        """
    )
    with place.connection() as connection:
        config = place.config()
        config["environment"]["KEEPER"] = str(*place.pids)
        talk, _ = GuestSession.started(connection, config, timeout=20)
        with pytest.raises(GuestLost, match="the process in .* that runs the tests is gone"):
            list(talk.run(ids(talk)[0], **HOW))


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([], False),
        ([{"outcome": "skipped"}], False),
        ([{"outcome": "skipped"}, {"outcome": "failed"}], True),
        ([{"more": 1}, {"outcome": ["failed"]}], False),
    ],
)
def test_a_file_that_is_skipped_is_no_error(reports, expected):
    """So it is no reason for the status with which the guest's pytest ends."""
    failed = {f"test_{number}.py": report for number, report in enumerate(reports)}
    assert Collected(failed=failed).has_errors is expected


# -- where a test fails ------------------------------------------------------------------------------

FAILS = """\
import pytest, unittest

@pytest.fixture
def bad_setup():
    raise ValueError("in setup")

@pytest.fixture
def bad_end():
    yield
    raise ValueError("in teardown\\nand more")

def test_setup(bad_setup): pass

def test_call(bad_end):
    assert not 42

def test_teardown(bad_end): pass

@pytest.mark.xfail(strict=True)
def test_strict(): pass

@pytest.mark.xfail
def test_expected(): raise ValueError

def test_skipped(): pytest.skip()

class TestParts(unittest.TestCase):
    def test_it(self):
        for number in range(4):
            with self.subTest(number=number):
                assert not number % 2, f"part {number}"

def test_passes(): pass
"""
STOPS = [
    ("test_setup", "setup", "ValueError: in setup", True),
    ("test_call", "call", "assert not 42", True),
    ("test_teardown", "teardown", "ValueError: in teardown", True),
    ("test_strict", "call", "[XPASS(strict)]", False),
    ("TestParts::test_it", "call", "AssertionError: part 1", True),
]


def test_a_session_stops_at_the_first_failure_of_each_test(inside):
    """Reports come before or after it, and tests that were announced meanwhile run."""
    place = inside(FAILS)
    with place.connection() as connection:
        talk = place.start(connection, stop=True)
        names = ids(talk)
        for name, following in zip(names, [*names[1:], None], strict=True):
            talk.announce(name, next=following, more=True, marks=[])
        stops, seen = [], []
        for name in names:
            for message in talk.run(name, limit=20):
                seen.append(message)
                if "stopped" in message:
                    stop = message["stopped"]
                    assert stop["first"]
                    stops.append(
                        (name.partition("::")[2], stop["phase"], stop["error"], stop["stands"])
                    )
                    talk.go_on()
        assert stops == [row for row in STOPS if row[0] in str(names)]
        with_stops = outcomes(seen)
        plain = place.start(connection)
        seen = [
            message for name in names for message in plain.run(name, next=None, more=True, limit=20)
        ]
        assert outcomes(seen) == with_stops
        assert not any("stopped" in message for message in seen)


def test_a_debugger_stops_at_each_failure(inside):
    place = inside(FAILS)
    with place.connection() as connection:
        talk = place.start(connection, "-k", "test_call", pdb=True)
        stops = []
        for message in talk.run(*ids(talk), **HOW | {"limit": 20}):
            if "stopped" in message:
                stops.append((message["stopped"]["phase"], message["stopped"]["first"]))
                talk.go_on()
        assert stops == [("call", True), ("teardown", False)]


@pytest.mark.parametrize("message", [{"stopped": {}}, {"terminal": 1}])
def test_time_does_not_count_while_a_session_waits(monkeypatch, message):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(deadline, "time", clock)
    script, talk = play({"call": True}, message, {"call": False}, {"done": ID})
    for said in talk.run(ID, **HOW | {"limit": 10.0, "call_limit": 5.0}):
        if said == message:
            clock.now += 1_000
    assert script.asked == ["run"]


def test_an_interpreter_that_hangs_is_shown_before_it_is_killed():
    script, talk = play(*[SILENCE] * 9, {"exit": -9, "tail": ""})
    shown = []
    with pytest.raises(InterpreterLost):
        list(
            talk.run(
                ID,
                if_stuck=lambda text: shown.append((text, script.asked[:])),
                **HOW | {"limit": 0},
            )
        )
    assert shown == [("the test did not end within 0 s", ["run", "DUMP"])]


@pytest.mark.parametrize(
    ("line", "where", "text"),
    [
        ("breakpoint()", "call", r"breakpoint\(\) needs a terminal.*vmsandbox enter --pdb"),
        ("import pdb; pdb.set_trace()", "call", r"breakpoint\(\) needs a terminal"),
        ("if not os.fork(): breakpoint()", "child", "only while a test runs there"),
    ],
)
def test_a_breakpoint_without_a_terminal_is_an_error(inside, line, where, text):
    place = inside(f"""\
        import os

        def test_it():
            try:
                {line}
            except RuntimeError as error:
                open({where!r}, "w").write(str(error))
                raise
        """)
    with place.connection() as connection:
        talk = place.start(connection)
        list(talk.run(*ids(talk), **HOW | {"limit": 20}))
    assert until((place.folder / where).exists)
    assert until(lambda: re.search(text, (place.folder / where).read_text()))


def test_a_terminal_that_does_not_come_is_an_error(inside):
    place = inside("def test_it(): breakpoint()")
    with place.connection() as connection:
        talk = place.start(connection, terminal=True)
        said = []
        for message in talk.run(*ids(talk), **HOW | {"limit": 20}):
            said.append(message)
            if "terminal" in message:
                talk.take_back(message["terminal"] - 1)  # of an earlier one
                talk.take_back(message["terminal"])
        assert outcomes(said) == [ALL[0], ("call", "failed"), ALL[2]]
        assert "could not open a terminal" in str(said)
