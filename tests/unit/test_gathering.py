"""What a guest is asked about itself when a test has failed: this machine plays the guest."""

import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from pytest_vmsandbox.core.errors import CommandError, CommandResult, CommandTimeout, GuestLost
from pytest_vmsandbox.guests import gathering
from pytest_vmsandbox.guests.gathering import MOST, WHY_NOT, gathered, split


class FakeGuest:
    """Its programs run here, unless `lost` says why it is gone, or who may not run them."""

    name = "tiny-1"

    def __init__(self):
        self.lost, self.refused, self.cut, self.more, self.asked = None, (), None, b"", []
        self.engine = self
        self.helper = SimpleNamespace(ping=lambda seconds: self.asked.append("ping"))
        self.resident = SimpleNamespace(is_away=False)
        self.blueprint = SimpleNamespace(has_way_in=True, image="tiny")
        self.machine = SimpleNamespace(check=self.check, spec=SimpleNamespace(name=self.name))

    def check(self):
        if self.lost:
            raise GuestLost(self.lost)

    def stretch(self, seconds):
        return seconds

    @contextmanager
    def use(self):
        yield self

    def run(self, command, *, stdout, timeout):
        self.asked.append(command.user)
        if command.user in self.refused:
            result = CommandResult(argv=(), returncode=126, stdout="", stderr="", duration=0)
            raise CommandError(f"no {command.user}", result=result)
        said = subprocess.run(command.argv, capture_output=True, check=True).stdout + self.more
        stdout(said[: self.cut])
        if self.cut:
            raise CommandTimeout("late", seconds=timeout, stdout=b"", stderr=b"")


@pytest.fixture
def guest():
    return FakeGuest()


def test_processes_and_memory(guest):
    found = gathered(guest)
    assert WHY_NOT not in found
    assert (
        {"processes.txt", "memory.txt", "dmesg.txt"}
        <= {*found}
        <= {*("processes.txt", "memory.txt", "dmesg.txt", "journal.txt")}
    )
    assert "MemAvailable:" in found["memory.txt"]
    assert "STAT" in found["processes.txt"].splitlines()[0]
    assert "RSS" in found["processes.txt"].splitlines()[0]
    assert guest.asked == ["ping", "root"]


def test_who_may_not_become_root_says_what_he_may(guest):
    guest.refused = ("root",)
    assert "MemAvailable:" in gathered(guest)["memory.txt"]
    assert guest.asked == ["ping", "root", None]


def test_who_may_nothing(guest):
    guest.refused = ("root", None)
    assert gathered(guest) == {WHY_NOT: "no None\n"}


def test_a_guest_that_is_gone_is_not_asked(guest):
    guest.lost = "kernel panic: oh\nno"
    assert gathered(guest) == {WHY_NOT: "kernel panic: oh no\n"}
    assert guest.asked == []


def test_a_guest_without_a_way_in_is_not_asked(guest):
    guest.blueprint.has_way_in = False
    assert "there is no way into tiny" in gathered(guest)[WHY_NOT]
    assert guest.asked == []


def test_what_a_slow_guest_has_said_is_kept(guest):
    guest.cut = 60
    found = gathered(guest)
    assert "processes.txt" in found
    assert found[WHY_NOT] == "tiny-1 did not say more within 3 s\n"


def test_secrets_are_left_out(guest):
    secret = "MemAvailable"
    found = gathered(guest, [secret, "1"])
    assert secret not in str(found)
    assert "[secret]:" in found["memory.txt"]
    assert "1" in found["memory.txt"]


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("a=abcdefgh b=abcdefghijkl", "a=[secret] b=[secret]"),  # one is the beginning of the other
        ("[1.0] -KEY BEGINS-\n[1.1] -KEY ENDS-", "[1.0] [secret]\n[1.1] [secret]"),
        ("echo \x1b[1mbold", "echo [secret]"),
        ("echo bold\x07 type", "echo [secret]"),
        ("echo bold type", "echo [secret]"),
    ],
)
def test_nothing_is_left_of_a_secret(said, left):
    secret = [
        "abcdefgh",
        "abcdefghijkl",
        "-KEY BEGINS-\r\n-KEY ENDS-\n",
        "\x1b[1mbold",
        "bold\x07 type",
    ]
    assert gathering._clean(said, secret) == left


def test_a_guest_cannot_send_without_end(guest, monkeypatch):
    monkeypatch.setattr(gathering, "MOST", 1000)
    guest.more = b"x" * 20_000
    assert max(map(len, gathered(guest).values())) <= 1000


def test_only_the_end_of_a_text_and_no_part_without_the_token():
    said = b"noise\nabc a.txt\n" + b"x" * MOST + b"end\nxyz b.txt\nq\nabc b.txt\n\xff\x1b"
    parts = split(said, "abc")
    assert {name: len(text) for name, text in parts.items()} == {"a.txt": MOST, "b.txt": 2}
    assert parts["a.txt"].endswith("end\nxyz b.txt\nq")
