"""Recorded runs: the count of a saved machine, what is compared, and which recording is meant."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pytest_vmsandbox.core.errors import ConfigError, GuestLost, LaunchError
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.replay.run import CONSOLE, REPORT, RecordedRun, difference
from pytest_vmsandbox.guests.replay.store import Recorded, RecordedStore
from pytest_vmsandbox.inside import recorded_connection
from pytest_vmsandbox.machine.counting import from_zero

COUNT = b"\x05\x0ctimer/icount" + struct.pack(">I", 1)


class TestCounting:
    def test_time_of_instructions_is_added_to_the_clock(self):
        state = b"before" + COUNT + struct.pack(">qq", 500, 1000) + b"after"
        assert from_zero(state) == b"before" + COUNT + struct.pack(">qq", 500 + 8000, 0) + b"after"

    @pytest.mark.parametrize("state", [b"no count", 2 * (COUNT + bytes(16))])
    def test_a_state_without_one_count_is_refused(self, state):
        with pytest.raises(LaunchError, match="count of instructions"):
            from_zero(state)


class TestDifference:
    @pytest.mark.parametrize(
        ("name", "other", "expected"),
        [(REPORT, b"abX", "report, byte 2 of 3"), (CONSOLE, b"ab", "console, byte 2 of 3"),
         (CONSOLE, b"abc", "")],
    )  # fmt: skip
    def test_tells_the_first_byte(self, tmp_path, name, other, expected):
        for folder in (first := tmp_path / "1", second := tmp_path / "2"):
            folder.mkdir()
            for file in (REPORT, CONSOLE):
                (folder / file).write_bytes(b"abc")
        (second / name).write_bytes(other)
        assert difference(first, second) == expected


class TestFinding:
    @pytest.fixture
    def store(self, tmp_path, monkeypatch):
        every = [
            Recorded(
                folder=tmp_path / str(number),
                record={"nodeid": nodeid, "rootdir": rootdir, "image": "debian-13", "saved_at": 1},
            )
            for number, (nodeid, rootdir) in enumerate(
                [("a/test_x.py::test_1[debian-13]", "/p"), ("test_y.py::test_1[debian-13]", "/p"),
                 ("test_x.py::test_1[debian-13]", "/q")]
            )
        ]  # fmt: skip
        monkeypatch.setattr(RecordedStore, "all", lambda _: every)
        return RecordedStore(tmp_path)

    @pytest.mark.parametrize("asked", ["a/test_x.py::test_1[debian-13]", "test_x.py::test_1"])
    def test_finds_it_in_its_project(self, store, asked):
        assert store.find(asked, store.project(Path("/p/a")))[0].nodeid.startswith("a/test_x.py")

    def test_several_or_none_are_refused(self, store):
        here = Path("/p")
        with pytest.raises(ConfigError, match="one of 2 tests with a recorded run"):
            store.find("test_1", here)
        with pytest.raises(ConfigError, match="no run of 'test_2' was recorded") as raised:
            store.find("test_2", here)
        assert "--vm-record" in raised.value.remedy


class FakeRun:
    """A recorded run whose guest says what it is given, then nothing."""

    guest = SimpleNamespace(name="one")

    def __init__(self, *said):
        self.said = list(said)

    def request(self, head, lines):
        self.lines = lines

    def begin(self):
        pass

    def receive(self, _timeout):
        if not self.said:
            raise TimeoutError
        return self.said.pop(0)


class TestConnection:
    @pytest.fixture
    def opened(self, monkeypatch):
        for name in ("PING_SECONDS", "ANSWER_SECONDS"):
            monkeypatch.setattr(recorded_connection, name, 0.0)

        def opened(*said):
            connection = recorded_connection.RecordedConnection(
                cast("RecordedRun", FakeRun(*said)), patience=1.0
            )
            assert connection.hear(1.0) == {"awake": 0}
            return connection

        return opened

    def test_a_guest_that_reports_nothing_any_more_is_lost(self, opened):
        connection = opened(b'{"pong": 0}\n', b'{"call": true}\n')
        assert connection.hear(60.0) == {"call": True}
        with pytest.raises(GuestLost, match="does not answer any more"):
            connection.hear(60.0)

    def test_a_guest_whose_supervisor_is_gone_is_lost_at_once(self, opened):
        connection = opened(b'{"call": true}\n{"gone": true}\n')
        with pytest.raises(GuestLost, match="that runs the tests is gone"):
            connection.hear(60.0)

    def test_it_is_given_up_instead_of_interrupted(self, opened):
        connection = opened()
        connection.signal("DUMP")
        for name in ("INT", "KILL"):
            with pytest.raises(GuestLost, match="cannot be interrupted"):
                connection.signal(name)


class TestLog:
    @pytest.mark.parametrize("said", ["", "qemu-system-x86_64: replay write error"])
    def test_one_that_is_not_complete_is_not_kept(self, tmp_path, said):
        engine = SimpleNamespace(running=SimpleNamespace(machine=SimpleNamespace()))
        guest = cast("Guest", SimpleNamespace(engine=engine, name="one"))
        run = RecordedRun(guest, tmp_path / "run")
        engine.running.machine.process = SimpleNamespace(stderr_tail=said)
        if not said:
            run.check_log()
            return
        with pytest.raises(GuestLost, match="could not write the log of one") as raised:
            run.check_log()
        assert str(tmp_path) in raised.value.remedy


@pytest.mark.parametrize("said", ["QEMU: Terminated via GDBstub\n", ""])
def test_a_replay_that_a_debugger_has_killed(tmp_path, said):
    """QEMU ends with status 0 then, as at the end of the log."""
    process = SimpleNamespace(stderr_tail=said, wait=lambda _: 0)
    engine = SimpleNamespace(running=SimpleNamespace(machine=SimpleNamespace(process=process)))
    run = RecordedRun(cast("Any", SimpleNamespace(engine=engine)), tmp_path)
    assert run.await_end(0)
    assert run.was_killed == bool(said)
