"""How a guest that gets on is told from one that hangs."""

import os
import shutil
import subprocess

from pytest_vmsandbox.machine.progress import (
    guest_time,
    parse_guest_time,
    time_waited,
)


def test_the_field_of_the_guest():
    fields = " ".join(str(number) for number in range(4, 53))  # as proc(5) numbers them
    assert parse_guest_time(f"17 (qemu) S {fields}\n") == 43
    assert parse_guest_time(f"17 (a) b (c) R {fields}\n") == 43


def test_a_process_without_guests(tmp_path):
    program = tmp_path / "a) R 1 ("
    shutil.copy(shutil.which("sleep") or "", program)
    with subprocess.Popen([program, "60"]) as process:
        try:
            assert guest_time(process.pid) == 0
            assert 0.0 <= time_waited(process.pid) < 60
        finally:
            process.kill()
    assert guest_time(process.pid) is None
    assert time_waited(process.pid) == 0.0


def test_waiting_is_counted():
    """This process has waited for a processor since it runs, if only for microseconds."""
    assert time_waited(os.getpid()) > 0.0
