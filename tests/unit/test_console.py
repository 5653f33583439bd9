"""What a guest writes to its console, as readers see it."""

import io
import re
import socket
import threading

import pytest
from hypothesis import given, strategies as st

from pytest_vmsandbox.machine import console as console_module
from pytest_vmsandbox.machine.console import Console


def told(*chunks):
    console = Console(None)
    for chunk in chunks:
        console.feed(chunk)
    return console


def typing(line):
    console = Console(None)
    console.line = line
    return console


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", ""),
        (b"a\r\nb\r\n", "a\nb\n"),
        (b"a\tb", "a\tb"),
        (b"\x1b[31mred\x1b[0m", "red"),
        (b"\x1b[?25l\x1b[2J\x1b[1;1Hx", "x"),
        (b"\x1b]0;title\x07x", "x"),
        (b"\x1b]8;;http://x\x1b\\x", "x"),
        (b"\x1bMx\x1b7", "x"),
        (b"\x1bcx\x1b(B\x1b#8y", "xy"),  # what firmware and tput begin and end with
        (b"a\x00\x07\x08b\x7f", "ab"),
        ("\x9b31m é €".encode(), "31m é €"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_control_sequences_are_left_out(raw, text):
    assert told(raw).text == text


@given(st.text(), st.data())
def test_chunks_may_end_anywhere(text, data):
    raw = text.encode("utf-8", "surrogatepass") + b"\xe2\x82"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=4)))
    chunks = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert told(*chunks).text == told(raw).text


@given(st.binary())
def test_anything_becomes_harmless_text(raw):
    text = told(raw).text
    assert not {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))} & set(text)


def test_a_sequence_that_is_split_is_left_out_too():
    assert told(b"a\x1b[3", b"1mb").text == "ab"


def test_invalid_utf8_that_is_split():
    assert told(b"a\xe2\x82", b"\xacb", b"\xe2", b"b").text == "a€b\ufffdb"


class TestTail:
    @pytest.mark.parametrize(
        ("n", "tail"), [(0, ""), (-1, ""), (1, "c"), (2, "b\nc"), (3, "a\nb\nc"), (9, "a\nb\nc")]
    )
    def test_last_lines(self, n, tail):
        assert told(b"a\nb\nc\n").tail(n) == tail

    def test_of_nothing(self):
        assert told().tail() == ""


class TestMemory:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(console_module, "HEAD", 100)
        monkeypatch.setattr(console_module, "TAIL", 50)

    def test_the_beginning_and_the_end_are_kept(self):
        console = told(b"begin ", *[b"x" * 7] * 100, b" end")
        text = console.text
        assert text.startswith("begin xxx")
        assert text.endswith("xxx end")
        assert len(text) < 100 + 2 * 50 + 40

    def test_a_line_says_how_much_is_left_out(self):
        console = told(*[b"0123456789"] * 100)
        before, _, after = console.text.partition("\n[")
        dropped = int(after.split(" ")[0])
        kept = len(before) + len(after.partition("]\n")[2])
        assert dropped + kept == 1000

    def test_nothing_is_left_out_below_the_limit(self):
        assert told(b"a" * 100, b"b" * 50).text == "a" * 100 + "b" * 50

    def test_one_large_chunk(self):
        assert len(told(b"x" * 100_000).text) < 300


class TestLog:
    def test_gets_the_raw_bytes(self):
        file = io.BytesIO()
        console = Console(file)
        console.feed(b"\x1b[31m\xff\r\n")
        assert file.getvalue() == b"\x1b[31m\xff\r\n"

    def test_is_limited(self, monkeypatch):
        monkeypatch.setattr(console_module, "_LOG_LIMIT", 10)
        file = io.BytesIO()
        console = Console(file)
        for _ in range(10):
            console.feed(b"12345678")
        assert len(file.getvalue()) == 16
        assert len(console.text) == 80


class TestWaitFor:
    def test_finds_what_is_there(self):
        match = told(b"boot\r\nlogin: ").wait_for(r"^(log)in", timeout=0)
        assert match[1] == "log"

    def test_finds_what_comes(self):
        console = Console(None)
        asked = threading.Event()

        def feed():
            asked.wait(5)
            for word in (b"one ", b"tw", b"o\n"):
                console.feed(word)

        thread = threading.Thread(target=feed)
        thread.start()
        asked.set()
        assert console.wait_for("two$", timeout=5)
        thread.join()

    def test_times_out_with_the_last_lines(self):
        with pytest.raises(TimeoutError, match=r"'never' did not appear on the console in 0\.01 s"):
            told(b"last words\n").wait_for("never", timeout=0.01)

    def test_a_bad_pattern_is_told(self):
        with pytest.raises(re.error):
            told().wait_for("(", timeout=0)


def test_a_full_disk_costs_the_log_and_not_the_text():
    with open("/dev/full", "wb", buffering=0) as log:
        console = Console(log)
        console.feed(b"one\n")
        console.feed(b"two\n")
    assert console.text == console.this_boot == "one\ntwo\n"


def test_what_is_read_between_chunks_is_the_same():
    console = Console(None)
    for number in range(3):
        console.feed(b"%d" % number)
        assert console.text == console.this_boot == "012"[: number + 1]
    console.begin_boot()
    console.feed(b"3")
    assert (console.text, console.this_boot) == ("0123", "3")


class TestPeople:
    def test_one_follows_from_where_the_text_ends(self):
        console, seen = told(b"boot\r\n"), []
        with console.following(seen.append) as before:
            console.feed(b"\x1b[1mmore\r\n")
        console.feed(b"later")
        assert (before, seen) == ("boot\n", [b"\x1b[1mmore\r\n"])

    def test_one_types(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            typing(ours).type(b"ls\r", 5)
            assert theirs.recv(9) == b"ls\r"

    def test_one_types_and_nobody_reads(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            with pytest.raises(TimeoutError, match="took no input"):
                typing(ours).type(bytes(1 << 20), 0.01)

    def test_one_types_where_nobody_can(self):
        with pytest.raises(OSError, match="takes no input"):
            Console(None).type(b"x", 1)


class TestBefore:
    """A guest that goes on from a saved state: what was on its console before."""

    BOOT = (
        "Linux version 6\r\n\x1b[31mvmsandbox: ssh\n---[ end Kernel panic - not syncing: no ]---\n"
    )

    @pytest.fixture
    def clone(self):
        return Console(None, self.BOOT)

    def test_is_part_of_the_text(self, clone):
        clone.feed(b"mine\n")
        assert clone.text.startswith("Linux version 6\nvmsandbox: ssh\n")
        assert clone.text.endswith("mine\n")
        assert clone.tail(1) == "mine"

    def test_is_not_waited_for(self, clone):
        with pytest.raises(TimeoutError):
            clone.wait_for("vmsandbox: ssh", timeout=0)
        clone.feed(b"again vmsandbox: ssh\n")
        assert clone.wait_for("^.*vmsandbox: ssh", timeout=0)[0] == "again vmsandbox: ssh"

    def test_does_not_look_like_something_that_happens_now(self, clone):
        assert not clone.ends_with("Kernel panic")
        assert (clone.own, clone.this_boot, clone.size) == ("", "", 0)

    def test_is_kept_with_the_next_state(self, clone):
        clone.feed(b"a step\n")
        assert Console(None, clone.saved).text == clone.text

    def test_is_bounded_when_it_is_kept(self, clone, monkeypatch):
        monkeypatch.setattr(console_module, "_BEFORE", 100)
        clone.feed(b"x" * 1000 + b"the end\n")
        kept = Console(None, clone.saved)
        assert kept.text.startswith("Linux version 6")
        assert "characters left out]" in kept.text
        assert kept.text.endswith("the end\n")
        assert len(kept.text) < 160
