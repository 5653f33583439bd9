"""Checks of crash points: what is sent to the guest, what comes back, and what is told of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox import CrashPointError, CrashPoints, CrashReport
from pytest_vmsandbox.core.errors import INFRASTRUCTURE, CommandResult, ConfigError
from pytest_vmsandbox.guests.crash import checker, crash_points, freeing, mounts, resident
from pytest_vmsandbox.guests.crash.conversation import NO_END, Verdict, judged
from pytest_vmsandbox.guests.crash.log import Entry
from pytest_vmsandbox.guests.crash.mounts import Mount, Place
from pytest_vmsandbox.guests.crash.report import writes_of
from pytest_vmsandbox.guests.crash.searching import Search, smallest
from pytest_vmsandbox.guests.crash.states import History, Mark, State

NOTHING = Place()
FACTOR = 7


def good(folder: Path, acknowledged: list[str]) -> None:
    import os.path

    def inner(text: str) -> str:
        return text.upper()

    names = {inner(it) for it in acknowledged}
    assert os.path.exists(folder), names


def needs_a_global(folder, acknowledged):
    assert len(acknowledged) < FACTOR


def needs_an_import(folder, acknowledged):
    json.loads("[]")


def one_argument(folder):
    pass


def generator(folder, acknowledged):
    yield folder


@dataclass
class Called:
    def __call__(self, folder, acknowledged):
        pass


def decorator(function):
    return function


@decorator
def decorated(folder, acknowledged):
    pass


def closure():
    wanted = 3

    def check(folder, acknowledged):
        assert len(acknowledged) == wanted

    return check


class TestFunctions:
    def test_a_source_that_stands_alone_is_taken(self):
        source, file, first = checker.source_of(good)
        assert source.startswith("def good(folder: Path")
        assert Path(file) == Path(__file__)
        assert Path(__file__).read_text("utf-8").splitlines()[first - 1] == source.splitlines()[0]

    @pytest.mark.parametrize(
        ("check", "why"),
        [
            (needs_a_global, "names from outside: FACTOR"),
            (needs_an_import, "names from outside: json"),
            (one_argument, "two arguments"),
            (generator, "generator"),
            (Called(), "plain function"),
            (lambda folder, acknowledged: None, "plain function"),
            (len, "plain function"),
            (decorated, "decorator"),
            (closure(), "the function around it: wanted"),
        ],
    )
    def test_others_are_refused(self, check, why):
        with pytest.raises(ConfigError, match=why) as caught:
            checker.program(check, NOTHING)
        assert caught.value.remedy

    def test_the_remedy_for_a_name_from_outside(self):
        with pytest.raises(ConfigError) as caught:
            checker.source_of(needs_an_import)
        assert "import json inside the function" in caught.value.remedy

    @pytest.mark.parametrize("check", ["test -e file", [], 5])
    def test_what_is_neither_a_function_nor_words(self, check):
        with pytest.raises(ConfigError, match="neither a function nor") as caught:
            checker.program(check, NOTHING)
        assert "/bin/sh" in caught.value.remedy

    def test_a_program_cannot_get_endless_values(self):
        values = ["x" * 1000] * 200
        assert checker.line(values, is_python=True).endswith(b"\n")
        with pytest.raises(ConfigError, match="200 values"):
            checker.line(values, is_python=False)


class TestMounts:
    TABLE = (
        "26 1 254:0 / / rw,noatime shared:1 - ext4 /dev/vda rw\n"
        "40 26 254:16 / /mnt/a\\040b rw,nosuid shared:9 - ext4 /dev/vdb rw,errors=remount-ro\n"
        "41 40 0:30 / /mnt/a\\040b/tmp rw - tmpfs tmpfs rw\n"
        "42 26 254:16 /sub /srv rw - ext4 /dev/vdb rw,errors=remount-ro\n"
        "43 26 254:17 / /boot rw - vfat /dev/vdb1 rw\n"
        "nonsense\n"
    )

    def test_what_is_mounted_from_a_disk(self):
        place = mounts._place(("/dev/vdb", "/dev/vdb1"), self.TABLE)
        assert place.mounts == (
            Mount("/dev/vdb", "/mnt/a b", "ext4", ("rw", "nosuid", "errors=remount-ro")),
            Mount("/dev/vdb1", "/boot", "vfat", ("rw",)),
        )
        assert place.folders == ("/boot", "/srv", "/mnt/a b/tmp", "/mnt/a b")
        assert place.folder == "/mnt/a b"
        assert not place.is_root

    def test_a_disk_that_is_not_mounted(self):
        place = mounts._place(("/dev/vdc",), self.TABLE)
        assert (place.mounts, place.folder) == ((), "/dev/vdc")

    def test_the_disk_that_the_guest_runs_from(self):
        assert mounts._place(("/dev/vda",), self.TABLE).is_root


class TestVerdicts:
    @pytest.mark.parametrize(
        ("word", "status", "text", "kind"),
        [
            ("broken", 0, "AssertionError: 12 of 0x1f\nmore", "AssertionError: N of N"),
            ("broken", 0, "AssertionError: [1, 2, 3] there", "AssertionError: [N] there"),
            ("broken", 3, "torn: 17", "status 3: torn: N"),
            ("broken", 3, "", "status 3"),
            ("broken", 0, "", "broken"),
            ("unmountable", 0, "mount: no", "the file system cannot be mounted"),
            ("busy", 0, "", "the file system cannot be unmounted after the check"),
        ],
    )
    def test_kinds(self, word, status, text, kind):
        assert judged(word, status, text).kind == kind

    def test_a_check_that_cannot_run_is_no_verdict(self):
        with pytest.raises(ConfigError, match="cannot run") as caught:
            judged("refused", 0, "SyntaxError: x")
        assert "SyntaxError" in caught.value.details


def entries(*kinds):
    return [
        Entry(
            number, kind, 0 if kind == "flush" else number * 4096, 0 if kind == "flush" else 8192, 0
        )
        for number, kind in enumerate(kinds)
    ]


class Bench:
    """Says of each state what a function says."""

    def __init__(self, say):
        self.say, self.seen = say, []

    def verdict(self, state, acknowledged):
        self.seen.append(state)
        return Verdict(kind=self.say(state, acknowledged), reason="why")


def search(history, say, chosen):
    bench = Bench(say)
    return Search(disk="disk0", history=history, bench=bench, chosen=iter(chosen), tries=60)


class TestSearch:
    HISTORY = History(
        entries("write", "write", "flush", "write", "write", "flush", "write"),
        [Mark(3, "one"), Mark(6, "two")],
    )

    def test_nothing_breaks(self):
        report = search(self.HISTORY, lambda *_: "", [State(1), State(4)]).run()
        assert (report.states, report.broken, report.failures) == (2, 0, ())
        assert str(report).startswith("0 of 2 states")

    def test_each_kind_is_told_with_its_smallest_state(self):
        def say(state, acknowledged):
            return "lost" if 3 in state.lost else "torn" if state.torn else ""

        chosen = [
            State(5, frozenset({3, 4})),
            State(5, frozenset({4})),
            State(5, frozenset({3})),
            State(7, torn=frozenset({(6, 0)})),
        ]
        report = search(self.HISTORY, say, chosen).run()
        assert (report.states, report.broken) == (4, 3)
        lost, torn = report.failures
        assert (lost.kind, lost.count, lost.state) == ("lost", 2, "4-3")
        assert lost.acknowledged == ("one",)
        assert lost.writes == ("2 flush", "3 write at 12288, 8KiB: LOST")
        assert (torn.kind, torn.count, torn.state) == ("torn", 1, "7-6.0")
        assert torn.writes[-1].endswith("torn, without 0 of 2 pieces of 4096 bytes")
        assert 'with cuts.state("4-3") as folder' in str(report)

    @pytest.mark.parametrize(("point", "when"), [(0, "before the recording"), (7, "all writes")])
    def test_a_check_that_fails_without_a_power_cut(self, point, when):
        def say(state, _):
            return "wrong" if state == State(point) else ""

        with pytest.raises(CrashPointError, match=when) as caught:
            search(self.HISTORY, say, [State(1)]).run()
        assert caught.value.report is None

    def test_what_is_promised_before_the_first_write_is_a_power_cuts_fault(self):
        history = History(entries("write", "flush"), [Mark(0, "too early")])

        def say(state, acknowledged):
            return "lost" if acknowledged and state.point == 0 else ""

        (lost,) = search(history, say, [State(0)]).run().failures
        assert (lost.kind, lost.state, lost.acknowledged) == ("lost", "0", ("too early",))

    def test_a_check_that_is_not_steady_accuses_nobody(self):
        answers = iter(["", "", "lost"])

        with pytest.raises(CrashPointError, match="not steady"):
            search(self.HISTORY, lambda *_: next(answers, ""), [State(1)]).run()

    def test_a_check_that_does_not_end_is_not_asked_for_ever(self):
        seen = []

        def say(state, _):
            seen.append(state)
            return "" if state.point == 0 or len(seen) < 3 else NO_END

        history = History(entries(*["write"] * 100))
        report = search(history, say, [State(point) for point in range(50, 99)]).run()
        assert (report.states, report.broken) == (5, 5)
        assert len(seen) == 2 + 5 + 1 + 3  # without a power cut, the states, again, smaller ones

    def test_few_tries_make_a_state_smaller(self):
        history = History(entries(*["write"] * 200))
        state = State(200, frozenset(range(0, 200, 2)))
        tries = []

        def look(candidate):
            tries.append(candidate)
            return Verdict(kind="")

        assert smallest(history, state, Verdict(kind="x"), look, 7)[0] == state
        assert len(tries) == len(set(tries)) == 7

    def test_many_writes_are_shown_around_those_that_are_lost(self):
        history = History(entries(*["write"] * 200))
        lines = writes_of(history, State(200, frozenset({100})))
        assert lines[0] == "… 99 more"
        assert [line for line in lines if "LOST" in line] == ["100 write at 409600, 8KiB: LOST"]
        assert len(lines) < 10


def test_the_failure_is_the_fault_of_the_program_under_test():
    assert issubclass(CrashPointError, AssertionError)
    assert not issubclass(CrashPointError, INFRASTRUCTURE)


def ask(check, lines, tmp_path):
    """Run a check here as it runs in a guest, for a disk that is not mounted."""
    program = checker.program(check, Place(folder=str(tmp_path)))
    argv = list(program.command.argv)
    if program.is_python:
        argv[0] = sys.executable
    data = program.opening + b"".join(
        checker.line(line, is_python=program.is_python) for line in lines
    )
    done = subprocess.run(argv, input=data, capture_output=True, timeout=60, check=True)
    answers, rest = [], done.stdout
    while rest:
        head, _, rest = rest.partition(b"\n")
        word, size = head.split()
        answers.append((word.decode(), rest[: int(size)].decode()))
        rest = rest[int(size) :]
    return answers


def talkative(folder, acknowledged):
    import os
    import sys

    print("a line")
    if acknowledged == ["much"]:
        print("x" * 100_000)
        assert not acknowledged, "y" * 100_000
    elif acknowledged == ["ends"]:
        os._exit(3)
    elif acknowledged == ["signal"]:
        os.kill(os.getpid(), 9)
    elif acknowledged == ["exit"]:
        sys.exit("no")
    else:
        assert acknowledged == ["fine"]


def returns(folder, acknowledged):
    return acknowledged == ["fine"]


class TestResident:
    def test_a_function_that_returns_a_value_is_refused(self, tmp_path):
        _, (word, text) = ask(returns, [["lost"]], tmp_path)
        assert (word, text) == ("refused", "it returned False, and not None: use assert")
        with pytest.raises(ConfigError, match="it returned False"):
            judged(word, 0, text)

    def test_functions(self, tmp_path):
        words = [["fine"], ["much"], ["ends"], ["signal"], ["exit"], [], ["fine"]]
        ready, *answers = ask(talkative, words, tmp_path)
        assert ready == ("ready", "")
        assert [word for word, _ in answers] == ["ok", *["broken"] * 5, "ok"]
        assert all(len(text) <= checker.LIMIT for _, text in answers)
        assert answers[2][1].startswith("the check ended its Python with status 3")
        assert answers[3][1].startswith("the check was ended by signal 9")
        assert answers[4][1].startswith("SystemExit: no")
        first, *more = answers[5][1].splitlines()
        assert first == 'AssertionError: assert acknowledged == ["fine"]'
        assert "It printed:\na line" in answers[5][1]
        assert __file__ in more[0]

    def test_what_has_the_disk_after_a_check_is_sent_away(self, tmp_path, monkeypatch):
        device, said = tmp_path / "device", tmp_path / "said"
        device.touch()
        look: Any = object.__new__(resident.Resident)
        functions = f"leave() {{ :; }}\nexpel() {{ echo $* >>{said}; }}\n"
        look.plan = {"devices": [str(device)], "functions": functions}
        real, needed = os.open, 2

        def opened(path, flags, *more):
            has_it = not said.exists() or len(said.read_text().splitlines()) < needed
            if path == str(device) and flags & os.O_EXCL and has_it:
                raise OSError(errno.EBUSY, "busy")
            return real(path, flags, *more)

        monkeypatch.setattr(os, "open", opened)
        assert look.freed()
        assert said.read_text() == f"{device}\n" * needed
        needed = 9
        monkeypatch.setattr(resident, "BUSY_SECONDS", -1.0)
        assert not look.freed()

    def test_programs(self, tmp_path):
        # Nothing is left of the output's file. /dev/shm is memory of this host.
        script = 'test ! -e /dev/shm/vmsandbox-check.$PPID || exit 9; case $VMSANDBOX_ACKNOWLEDGED in *no*) echo "bad $VMSANDBOX_FOLDER"; exit 3 ;; esac; cat'
        answers = ask(["/bin/sh", "-c", script], [["yes"], ["no"], ["yes"]], tmp_path)
        assert answers == [
            ("ready", ""),
            ("ok", ""),
            ("broken-3", f"bad {tmp_path}\n"),
            ("ok", ""),
        ]


class Subtests:
    """Notes what subtests raise, as pytest's fixture does."""

    def __init__(self):
        self.raised = []

    @contextmanager
    def test(self, msg=None):
        try:
            yield
        except CrashPointError as error:
            self.raised.append((msg, error))


class TestFailures:
    LOST = (State(5, frozenset({4})),)

    def report(self):
        def say(state, _):
            return "lost" if state.lost else "torn" if state.torn else ""

        chosen = [State(5, frozenset({4})), State(7, torn=frozenset({(6, 0)}))]
        return search(TestSearch.HISTORY, say, chosen).run()

    def test_all_are_one_error(self):
        report = self.report()
        with pytest.raises(CrashPointError) as caught:
            crash_points._raise_failures(report, None)
        assert caught.value.report is report
        assert "1 broke: lost" in str(caught.value)
        assert "1 broke: torn" in str(caught.value)

    def test_a_check_that_does_not_end_is_the_one_to_mend(self):
        report = search(
            TestSearch.HISTORY, lambda state, _: NO_END if state.lost else "", self.LOST
        )
        with pytest.raises(CrashPointError) as caught:
            crash_points._raise_failures(report.run(), None)
        assert "let the check end" in caught.value.remedy

    def test_each_is_a_subtest(self):
        subtests = Subtests()
        crash_points._raise_failures(self.report(), subtests)
        assert [msg for msg, _ in subtests.raised] == ["lost", "torn"]
        assert "torn" not in subtests.raised[0][1].details


class Here:
    """Runs scripts on this host, and has one disk."""

    name = "guest"

    def __init__(self, answer=None):
        self.answer = answer
        self.machines = SimpleNamespace(
            disk_names=lambda: ["disk0"], faults=SimpleNamespace(shows_states=False)
        )

    def run(self, command):
        out, err, status = self.answer, b"", 0
        if out is None:
            done = subprocess.run(command.argv, capture_output=True, check=False)
            out, err, status = done.stdout, done.stderr, done.returncode
        return CommandResult(
            argv=command.argv, returncode=status, stdout=out, stderr=err, duration=0
        )

    def stretch(self, seconds):
        return seconds

    def explained(self):
        return nullcontext()


def engine(answer=None) -> Any:
    return Here(answer)


def namespace(**names: object) -> Any:
    return SimpleNamespace(**names)


class TestFreeing:
    def test_a_disk_that_is_gone(self):
        with pytest.raises(ConfigError, match=r"'disk1' is gone.*snapshot\(\)"):
            freeing.release(engine(), "disk1", Place(("/dev/vdb",)))

    def test_a_disk_with_another_name(self):
        with pytest.raises(ConfigError, match="was /dev/vdb .* and is /dev/vdc now"):
            freeing.release(engine(b"/dev/vdc\n\n"), "disk0", Place(("/dev/vdb",)))

    @pytest.mark.parametrize("folder", ["/mnt/a b", "/mnt/tab\there", "/mnt/back\\040slash"])
    def test_folders_with_odd_names(self, folder):
        assert mounts._plain(mounts.escaped(folder)) == folder
        assert not set(mounts.escaped(folder)) & set(" \t\n")

    def test_what_uses_files_is_killed(self, tmp_path):
        folder = tmp_path / "a b"
        folder.mkdir()
        others = tmp_path / "a b c"
        others.mkdir()
        inside, outside = (
            subprocess.Popen(["sleep", "1000"], cwd=place) for place in (folder, others)
        )
        script = f'{freeing.FUNCTIONS}leave "$@"'
        try:
            subprocess.run(["/bin/sh", "-c", script, "sh", folder], check=True)
            assert inside.wait(60) == -signal.SIGKILL
            assert outside.poll() is None
        finally:
            for process in (inside, outside):
                process.kill()
                process.wait()

    def test_a_guest_that_sees_another_state_is_an_error(self, tmp_path):
        before = bytes(range(256)) * 512
        device = tmp_path / "device"
        device.write_bytes(before)
        history = History(entries("write", "flush", "write"))
        place = Place((str(device),))
        with (tmp_path / "base").open("w+b", buffering=0) as base:
            base.write(before)
            builder = namespace(file=base, history=history)
            freeing.compare(engine(), place, ":", builder, State(3))
            base.seek(2 * 4096 + 8191)  # the last byte of the last write
            base.write(b"x")
            with pytest.raises(ConfigError, match="does not see the state 3"):
                freeing.compare(engine(), place, ":", builder, State(3))

    def test_places_far_away_are_compared(self):
        history = History([Entry(number, "write", number << 20, 4096, 0) for number in range(99)])
        samples = freeing._samples(namespace(history=history))
        assert samples[0] == (0, 16)
        assert samples[-1] == (98 << 8, 1)
        assert len(samples) < 20


class TestNested:
    def test_what_is_nested_is_refused(self, tmp_path):
        cuts = crash_points.CrashPoints(engine(), "disk0", 0)
        cuts._recorder, cuts._place = namespace(), NOTHING
        with cuts._opened():
            for use in (
                lambda: cuts.check(["true"]),
                lambda: cuts.check(["true"], boot=True),
                lambda: cuts.write_state("0", tmp_path / "disk.raw"),
                lambda: cuts.state("0").__enter__(),
                crash_points.CrashPoints(cuts._engine, "disk0", 0).__enter__,
            ):
                with pytest.raises(ConfigError, match="used already"):
                    use()
        with cuts._opened():  # that has ended
            pass


def test_a_check_that_passes_warns_of_what_it_left_out(monkeypatch):
    def checked(report, **options):
        monkeypatch.setattr(CrashPoints, "_mounted", lambda *_: report)
        engine: Any = SimpleNamespace(explained=nullcontext, stretch=float)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert CrashPoints(engine, "disk0", 0).check(["true"], **options) is report
        return [str(it.message) for it in caught]

    report = CrashReport(
        disk="disk0", requests=900, states=600, broken=0, failures=(), seconds=1.0,
        boundaries=400, untried=250,
    )  # fmt: skip
    (text,) = checked(report)
    assert text.startswith(
        "250 of 400 flushes and promises on disk0 were not tried: pass states=2400"
    )
    assert checked(report, states=600) == []  # somebody has chosen that
    assert checked(replace(report, untried=0)) == []


class TestArguments:
    @pytest.fixture
    def cuts(self, tmp_path):
        guest = engine()
        guest.machines.hypervisor = namespace(cache=tmp_path)
        cuts = crash_points.CrashPoints(guest, "disk0", 0)
        history = History([Entry(0, "flush")])
        cuts._place = NOTHING
        with (tmp_path / "base").open("w+b", buffering=0) as base:
            cuts._recorder = namespace(history=history, base=base, log=base)
            yield cuts

    @pytest.mark.parametrize(
        "wanted", [{"seed": "x"}, {"states": 0}, {"timeout": 0}, {"subtests": 5}], ids=str
    )
    def test_what_is_invalid(self, cuts, wanted):
        with pytest.raises(ConfigError, match=next(iter(wanted))):
            cuts.check(good, **wanted)

    @pytest.mark.parametrize(("tear", "size"), [(512, 512), ("1KiB", 1024), ("4KiB", 4096)])
    def test_what_a_disk_writes_as_a_whole(self, tear, size):
        assert crash_points._tear(tear) == size

    @pytest.mark.parametrize("tear", [0, 100, True, "0.1KiB", "512B", None])
    def test_what_no_disk_writes(self, tear):
        with pytest.raises(ConfigError, match="tear="):
            crash_points._tear(tear)

    def test_a_long_name_of_a_state_is_short_in_the_name_of_its_file(self, cuts, tmp_path):
        cuts._engine.machines.logs = tmp_path
        names = ["-".join(map(str, [point, *range(500)])) for point in (500, 501)]
        images = set()
        for name in names:
            failure = namespace(state=name)
            builder = namespace(write=lambda state, path: path.write_text(state.name))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(crash_points, "replace", lambda _, image: image)
                images.add(cuts._kept(builder, failure))
        assert {image.read_text() for image in images} == {*names}
        assert crash_points._file_text("41-38") == "41-38"

    @pytest.mark.parametrize("boot", [True, False])
    def test_a_recording_without_writes(self, cuts, boot):
        with pytest.raises(ConfigError, match="nothing was written to the disk disk0"):
            cuts.check(good, boot=boot)
