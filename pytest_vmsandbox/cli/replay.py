"""``vmsandbox replay``: a recorded run of a test again, to the byte. Experimental."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import click

from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core.errors import GuestLost
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.replay.run import CONSOLE, REPORT, difference, size
from pytest_vmsandbox.guests.replay.store import Recorded, RecordedStore

_SLOWER, _LEAST_SECONDS = 10, 120.0  # how long a replay may take, compared to the recording
_DEBUGGED_SECONDS = 86_400.0


@click.command
@click.argument("nodeid")
@click.option("--times", type=click.IntRange(1), default=1, help="How often (default: 1).")
@click.option(
    "--gdb", type=click.IntRange(1, 65535), metavar="PORT", help="Wait for a debugger at this port."
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep what the guest wrote in this folder.",
)
@click.pass_context
def replay(
    ctx: click.Context, /, *, nodeid: str, times: int, gdb: int | None, output: Path | None
) -> None:
    """Repeat a recorded run of a test to the byte. Experimental.

    'pytest --vm-record' records tests inside guests, and keeps the runs that fail. NODEID is the id of the
    test. You may leave out the image, and the folders at its beginning.

    All that the guest does happens again: random numbers, times, and the order of its threads. The command
    compares what the guest writes with the recording. The exit status is 1 if it differs.

    --gdb lets the guest wait for a debugger, which can set breakpoints in its kernel and its programs, and
    go backwards: 'reverse-stepi', 'reverse-continue'. The output is not compared then.

    \b
    vmsandbox replay --times 5 'tests/test_app.py::test_start[debian-13]'
    """  # noqa: D301  # a mark for click
    screen, store = Screen(), RecordedStore(cache_dir())
    (recorded,) = store.find(nodeid, store.project(Path.cwd()))  # a test has one
    if recorded.failure:
        screen.say(recorded.failure)
    settings = Settings(accelerator="tcg")
    with (
        store.hold(recorded.folder),
        GuestFactory.open(settings, Announcer(Screen(stderr=True).say)) as factory,
    ):
        for number in range(1, times + 1):
            begun = monotonic()
            differs, count = _repeated(factory, recorded, gdb, output, screen)
            about = f"replay {number} of {times}: {count:,} bytes in {monotonic() - begun:.1f} s"
            if gdb is not None:  # it may have gone backwards, so output comes twice
                screen.say(about)
                continue
            if differs:
                screen.say(f"{about}; they differ from the recording: {differs}")
                ctx.exit(1)
            screen.say(f"{about}, the same as recorded")


def _repeated(
    factory: GuestFactory, recorded: Recorded, gdb: int | None, output: Path | None, screen: Screen
) -> tuple[str, int]:
    """Repeat a run. Returns where its output differs, and how long that is.

    Raises:
        GuestLost: it did not come to its end.
    """
    limit = _DEBUGGED_SECONDS if gdb else max(_LEAST_SECONDS, _SLOWER * recorded.seconds)
    with ExitStack() as stack:
        folder = stack.enter_context(factory.backend.hypervisor.scratch("replay"))
        run = recorded.replayed(factory.backend, folder, stack, is_debugged=gdb is not None)
        if gdb is None:
            run.begin()
        else:
            run.await_debugger(gdb)
            commands = f"-ex 'set remotetimeout 100' -ex 'target remote 127.0.0.1:{gdb}'"
            screen.say(f"the guest waits: gdb {commands}")
        ended = run.await_end(limit)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            for name in (CONSOLE, REPORT):
                shutil.copyfile(folder / name, output / name)
        if not ended:
            raise GuestLost(
                f"the replay of {recorded.nodeid} did not come to its end within {limit:g} s",
                details=run.said,
                remedy="this machine may be overloaded: try again later",
            )
        if run.was_killed:
            raise GuestLost(
                f"the debugger ended the replay of {recorded.nodeid} before it came to its end",
                remedy="use 'detach' instead of 'kill', so that the guest runs to its end",
            )
        return difference(recorded.folder, folder), size(folder)
