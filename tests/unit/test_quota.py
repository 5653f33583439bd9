"""What runs take of this host together; another run is another folder, with or without its lock."""

import fcntl
import os
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager

import pytest

from pytest_vmsandbox.core.spec import GIB, MIB
from pytest_vmsandbox.machine import host, quota as ledger_module
from pytest_vmsandbox.machine.orphans import is_alive
from pytest_vmsandbox.machine.quota import Quota

SECONDS = 20  # more than anything here takes


class Run:
    """A run of somebody's, as far as the quota looks at it."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder = folder
        self.quota = Quota(folder)
        self.lock = (folder / ".lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def die(self):
        self.lock.close()

    @property
    def claimed(self):
        return int((self.folder / "memory").read_text())


@pytest.fixture
def run(tmp_path):
    """Makes runs."""
    runs = []

    def make():
        runs.append(Run(tmp_path / f"{len(runs)}-00000000"))
        return runs[-1]

    yield make
    for it in runs:
        it.die()


@pytest.fixture(autouse=True)
def total(monkeypatch):
    """A host with 10 GiB, so that 7 GiB may be taken by guests that nobody waits for."""
    monkeypatch.setattr(host, "total_memory", lambda: 10 * GIB)


class TestMemory:
    def test_spare_up_to_a_share(self, run):
        quota = run().quota
        assert [quota.claim(GIB, spare=True) for _ in range(9)] == [True] * 7 + [False] * 2
        quota.release(GIB)
        assert quota.claim(GIB + 1, spare=True) is False
        assert quota.claim(GIB, spare=True) is True

    def test_what_somebody_waits_for_is_never_refused(self, run):
        mine = run()
        assert mine.quota.claim(100 * GIB, spare=False)
        assert mine.claimed == 100 * GIB
        assert not mine.quota.claim(1, spare=True)

    def test_a_refused_claim_is_none(self, run):
        mine = run()
        mine.quota.claim(6 * GIB, spare=True)
        assert not mine.quota.claim(2 * GIB, spare=True)
        assert mine.claimed == 6 * GIB

    def test_is_shared_with_other_runs(self, run):
        mine, other = run(), run()
        assert other.quota.claim(5 * GIB, spare=False)
        assert mine.quota.claim(3 * GIB, spare=True) is False
        assert mine.quota.claim(2 * GIB, spare=True) is True
        assert other.quota.claim(1, spare=True) is False

    def test_claims_of_a_run_that_is_gone_count_no_more(self, run):
        mine, other = run(), run()
        assert other.quota.claim(7 * GIB, spare=False)
        assert mine.quota.claim(MIB, spare=True) is False
        other.die()  # without a word
        assert mine.quota.claim(7 * GIB, spare=True) is True

    def test_claims_of_a_process_that_was_killed(self, run, tmp_path):
        """And whose folder nobody has removed yet."""
        mine = run()
        script = f"""
            import fcntl, os, pathlib, signal
            from pytest_vmsandbox.machine.quota import Quota
            folder = pathlib.Path({str(tmp_path)!r}, "9-00000000")
            folder.mkdir()
            lock = (folder / ".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
            Quota(folder).claim({7 * GIB}, spare=False)
            print("claimed", flush=True)
            signal.pause()
        """
        lines = "\n".join(line.strip() for line in script.splitlines())
        with subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout.readline() == b"claimed\n"
                assert mine.quota.claim(MIB, spare=True) is False
            finally:
                process.kill()
        assert mine.quota.claim(7 * GIB, spare=True) is True

    def test_a_run_without_claims_or_with_a_broken_file(self, run):
        mine, other, third = run(), run(), run()
        (other.folder / "memory").write_text("")
        (third.folder / "memory").write_text("many")
        assert mine.quota.claim(7 * GIB, spare=True)

    def test_asking_takes_no_run_for_dead(self, run):
        mine, other = run(), run()
        other.quota.claim(MIB, spare=True)
        for _ in range(3):
            mine.quota.claim(MIB, spare=True)
        assert is_alive(other.folder)

    def test_many_at_once_get_no_more_than_there_is(self, run):
        runs = [run() for _ in range(4)]
        got = []

        def claim(it):
            got.extend(it for _ in range(10) if it.quota.claim(GIB // 2, spare=True))

        threads = [threading.Thread(target=claim, args=(it,)) for it in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert len(got) == 14
        assert sum(it.claimed for it in set(got)) == 7 * GIB


class TestProcessors:
    @pytest.fixture(autouse=True)
    def two(self, monkeypatch):
        monkeypatch.setattr(os, "cpu_count", lambda: 2)

    @contextmanager
    def taking(self, quota):
        """A thread that takes a processor, and the event of its having one; gone at the end."""
        has_it, enough = threading.Event(), threading.Event()

        def take():
            with quota.processor():
                has_it.set()
                enough.wait(SECONDS)

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield has_it
        finally:
            enough.set()
            thread.join(SECONDS)
            assert not thread.is_alive()

    def test_are_as_many_as_the_host_has(self, run):
        """Whoever comes when all are taken waits, also from another run."""
        mine, other = run(), run()
        with ExitStack() as others:
            with mine.quota.processor(), other.quota.processor():
                third = others.enter_context(self.taking(other.quota))
                assert not third.wait(0.1)
            assert third.wait(SECONDS)

    def test_one_that_is_given_back_is_taken_at_once(self, run):
        mine = run()
        for _ in range(5):
            with mine.quota.processor(), self.taking(mine.quota) as second:
                assert second.wait(SECONDS)

    @pytest.mark.parametrize("error", [KeyError("mine"), BlockingIOError("no further process")])
    def test_an_error_passes_through(self, run, error):
        """Also one that is like that of a processor that is taken."""
        mine = run()
        with pytest.raises(type(error)) as caught, mine.quota.processor():
            raise error
        assert caught.value is error
        with mine.quota.processor(), mine.quota.processor():
            pass

    def test_a_host_that_does_not_tell(self, run, monkeypatch):
        monkeypatch.setattr(os, "cpu_count", lambda: None)
        mine = run()
        with ExitStack() as others:
            with mine.quota.processor():
                second = others.enter_context(self.taking(mine.quota))
                assert not second.wait(0.05)
            assert second.wait(SECONDS)

    def test_claims_do_not_wait_for_them(self, run):
        mine = run()
        with mine.quota.processor(), mine.quota.processor():
            assert mine.quota.claim(MIB, spare=True)


def test_the_share_leaves_something():
    assert 0.5 <= ledger_module._SHARE < 1
