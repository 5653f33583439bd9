"""Feed what a hostile guest could send to the code that reads it.

``python tests/fuzz/reports.py --seconds 60`` goes on until something is found: an exception other
than `GuestLost`, or a report that pytest cannot show or that plays tricks on a terminal. The bytes
that led to it are printed; ``--replay HEX`` runs them again.

It uses atheris where that is installed, which looks for inputs that reach new lines; otherwise
hypothesis makes of random bytes what it makes of them, from ``--seed`` on.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import HealthCheck, given, settings, strategies as st

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

atheris: Any = importlib.import_module("atheris") if importlib.util.find_spec("atheris") else None

with atheris.instrument_imports(include=["pytest_vmsandbox"]) if atheris else nullcontext():
    from pytest_vmsandbox.core.errors import GuestLost, InterpreterLost
    from pytest_vmsandbox.inside import session
    from pytest_vmsandbox.inside.connection import Connection
    from pytest_vmsandbox.inside.wire import Decoder, encode
    from pytest_vmsandbox.plugin.in_vm.remote_reports import harmless, recorded_warning
    from support.reports import EVIL_TEXT, JSON, KEYS, Host, check_text, nearly_right, samples, sent


quick = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
EVENTS = st.sampled_from(
    [
        *(
            "report",
            "done",
            "exit",
            "tail",
            "output",
            "of",
            "items",
            "failed",
            "internal",
        ),
        *("ready", "pong", "attached", "warning", "interrupted", "stop", "finished"),
    ]
)
MESSAGES = st.dictionaries(EVENTS | KEYS, JSON, max_size=4)
COUNTS = Counter()
host = Host()


class Script:
    """A supervisor that says what it likes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces, self.name = list(pieces), "guest"
        self.engine = SimpleNamespace(running=None)

    def send(self, data, timeout):
        pass

    def receive(self, timeout):
        return self.pieces.pop(0) if self.pieces else b""

    def run(self, argv, **how):
        raise GuestLost("gone")


@quick
@given(st.data())
def reports(data):
    report = data.draw(nearly_right() | JSON)
    try:
        arrived = sent(report)
        nodeid = arrived["nodeid"] if isinstance(arrived, dict) and "nodeid" in arrived else "x"
        made = host.reader.test_report(host.item("tests/test_x.py::test_x"), nodeid, arrived)
    except GuestLost as lost:
        check_text(str(lost))
        COUNTS["refused"] += 1
    else:
        host.check(made)
        COUNTS["taken"] += 1
    try:
        longrepr = host.reader.collect_failure(report)
    except GuestLost:
        pass
    else:
        check_text(longrepr if isinstance(longrepr, str) else str(longrepr))


@quick
@given(st.lists(st.binary(max_size=50) | MESSAGES.map(encode), max_size=8), st.integers(0, 3))
def conversations(pieces, count):
    script: Any = Script(pieces)
    supervisor = Connection(script, script, patience=0.01)
    talk = session.GuestSession(supervisor)
    try:
        if count == 0:
            session.GuestSession.started(supervisor, {}, timeout=1)
        elif count == 1:
            talk.finish(1)
        elif count == 2:
            talk.interrupt(1)
        else:
            for message in talk.run("a", next=None, more=False, marks=[], limit=1):
                assert isinstance(message, dict)
    except (GuestLost, InterpreterLost) as error:
        check_text(str(error))
    talk.kill()


@quick
@given(
    st.fixed_dictionaries(
        {
            "warning": JSON,
            "category": JSON | st.lists(EVIL_TEXT, min_size=2, max_size=2)
            | st.sampled_from([["builtins", "UserWarning"], ["builtins", "open"], ["pytest", "exit"]]),
            "file": JSON,
            "line": JSON | st.integers(-1, 9),
            "when": st.sampled_from(["config", "collect", "runtest"]) | JSON,
            "node": JSON,
            "location": st.none() | JSON,
        },
        optional={"source": JSON},
    )
)  # fmt: skip
def warned(message):
    try:
        arguments = recorded_warning(message, host.reader)
    except GuestLost as lost:
        check_text(str(lost))
    else:
        check_text(host.warned(arguments))


@quick
@given(st.text() | EVIL_TEXT)
def texts(text):
    clean = harmless(text)
    check_text(clean)
    assert harmless(clean) == clean


@quick
@given(st.binary(), st.integers(0, 40))
def lines(data, at):
    def run(*pieces):
        decoder = Decoder()
        try:
            return [it for piece in pieces for it in decoder.feed(piece)]
        except GuestLost as lost:
            check_text(str(lost))
            return None

    assert run(data) == run(data[:at], data[at:])


TARGETS = [reports, reports, conversations, warned, texts, lines]


def one(data: bytes) -> None:
    """The first byte chooses what is fed."""
    if data:
        target: Any = TARGETS[data[0] % len(TARGETS)]
        target.hypothesis.fuzz_one_input(data[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--replay", metavar="HEX")
    options = parser.parse_args()
    samples()
    if options.replay:
        one(bytes.fromhex(options.replay))
        return
    (by_coverage if atheris else by_chance)(options.seconds, options.seed)


def by_chance(seconds: float, seed: int | None) -> None:
    """Random bytes, as long as it takes."""
    seed = random.randrange(1 << 32) if seed is None else seed
    chance, count, end = random.Random(seed), 0, time.monotonic() + seconds
    print(f"hypothesis, seed {seed}", flush=True)
    while time.monotonic() < end:
        data = chance.randbytes(1 + chance.choice([64, 1024, 4096, 16384]))
        try:
            one(data)
        except BaseException:
            print(f"after {count} inputs: --replay {data.hex()}", flush=True)
            raise
        count += 1
    print(f"{count} inputs, nothing found; reports: {dict(COUNTS)}")


def by_coverage(seconds: float, seed: int | None) -> None:
    """What atheris makes of the bytes that reached new lines. It ends the process."""
    more = [] if seed is None else [f"-seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        atheris.Setup(
            [
                *(
                    sys.argv[0],
                    f"-max_total_time={seconds:.0f}",
                    "-max_len=4096",
                    "-len_control=0",
                    *more,
                ),
                *("-print_final_stats=1", f"-artifact_prefix={folder}/"),
            ],
            one,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
