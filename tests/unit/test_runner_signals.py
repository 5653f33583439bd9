"""What a test has set up to interrupt itself is held back while its session stands at a failure."""

import os
import signal
import threading

import pytest

from pytest_vmsandbox.inside.runner.signals import HeldSignals, HeldTimer


@pytest.fixture
def handled():
    """Notes SIGUSR1, SIGUSR2 (whose handler then raises) and SIGALRM."""
    came = []

    def note(number, frame):
        assert frame is None or frame.f_code
        came.append(number)
        if number == signal.SIGUSR2:
            raise TimeoutError

    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
    before = {number: signal.signal(number, note) for number in numbers}
    yield came
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_wait_until_they_are_delivered(handled):
    other = threading.Event()  # another thread, which no mask of this one shields
    thread = threading.Thread(target=other.wait)
    thread.start()
    held = HeldSignals()
    with held:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert handled == []
    other.set()
    thread.join()
    assert isinstance(held.deliver(), TimeoutError)
    assert sorted(handled) == [signal.SIGUSR1, signal.SIGUSR2]
    signal.raise_signal(signal.SIGUSR1)
    assert handled[2:] == [signal.SIGUSR1]


def test_ctrl_c_ends_a_session_that_stands():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), HeldSignals():
        signal.raise_signal(signal.SIGINT)


def test_the_timer_goes_on_where_it_was(handled):
    signal.setitimer(signal.ITIMER_REAL, 1000, 7)
    with HeldTimer():
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < left <= 1000.1
    assert interval == pytest.approx(7)


def test_no_timer_is_started(handled):
    with HeldTimer():
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
