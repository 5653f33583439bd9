"""The capture of a guest's network: whole packets, one file, a limit."""

import itertools
import struct

import pytest
from hypothesis import given, strategies as st

from pytest_vmsandbox.machine import capture as capture_module
from pytest_vmsandbox.machine.capture import Capture

HEADER = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65536, 1)


def packet(data, full=None):
    return struct.pack("=IIII", 1, 2, len(data), full or len(data)) + data


PACKETS = packet(b"one") + packet(b"") + packet(b"x" * 2000, 5000)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "network.pcap", tmp_path / "note.txt"


def captured(place, *chunks):
    """Feed what one QEMU writes."""
    file, note = place
    with file.open("ab", buffering=0) as opened:
        capture = Capture(opened, note)
        for chunk in chunks:
            capture.feed(chunk)
    return file.read_bytes()


@given(st.lists(st.integers(0, len(HEADER + PACKETS)), max_size=5))
def test_chunks_may_end_anywhere(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("it")
    stream = HEADER + PACKETS
    cuts = [0, *sorted(cuts), len(stream)]
    chunks = [stream[a:b] for a, b in itertools.pairwise(cuts)]
    assert captured((folder / "a", folder / "b"), *chunks) == stream


def test_the_next_qemu_goes_on_in_the_same_file(place):
    captured(place, HEADER + PACKETS + packet(b"it was killed here")[:20])
    assert captured(place, HEADER + packet(b"two")) == HEADER + PACKETS + packet(b"two")
    assert not place[1].exists()


def test_the_limit_is_told(place, monkeypatch):
    monkeypatch.setattr(capture_module, "LIMIT", len(HEADER + PACKETS))
    assert captured(place, HEADER + PACKETS, packet(b"two"), PACKETS) == HEADER + PACKETS
    assert "is not complete: it has reached its limit" in place[1].read_text()


def test_nonsense_is_not_waited_for(place):
    assert captured(place, HEADER + packet(b"one"), b"\xff" * 100, PACKETS).endswith(b"one")
    assert "too large" in place[1].read_text()


def test_a_full_disk_is_no_error(place):
    with open("/dev/full", "ab", buffering=0) as full:
        Capture(full, place[1]).feed(HEADER + PACKETS)
    assert "cannot be written: No space left" in place[1].read_text()
