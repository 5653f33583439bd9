"""Kill pytest at random moments and look what is left: nothing may be.

    python tests/torture/kill.py --seed 1 --kills 100 --jobs 2

Each round starts pytest on guests of the image `tiny`, kills it with SIGKILL, SIGTERM or SIGINT at a
random moment of booting, saving, arming, test or teardown, and checks: soon no process that came from it
is alive (we are the reaper of all its orphans, so none escapes), and after the next start no
file of it is in the folders of runs, of the cache, or of shared memory, but for templates that are complete:
each of their files is as it was when it was built. The same seed kills at the same moments.

After SIGINT pytest ends in an orderly way, in its own time. The longest that it took is told.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.leaks import descendants

PR_SET_CHILD_SUBREAPER = 36
GRACE = 20.0  # seconds for all processes to be gone: this machine may be busy
INTERRUPT_GRACE = 60.0
INTERRUPTED: list[float] = []  # seconds that pytest took to end after SIGINT
TEMPLATES: list[str] = []  # that were complete when pytest was killed
SUITE = """
import pytest

pytestmark = pytest.mark.vm("tiny", memory="160MiB")


@pytest.mark.parametrize("number", range(4))
def test_run(vm, number):
    vm.popen(["sleep", "1000"])
    for _ in range(3):
        assert vm.run(["echo", "x"]).stdout == "x\\n"
    vm.write_text("/tmp/x", "y" * 100_000)


def test_prepared(vm_factory):
    image = vm_factory.prepare("tiny", lambda vm: vm.write_text("/here", "x"), depends_on=[])
    for _ in range(3):
        with vm_factory.boot(image, memory="512MiB") as vm:
            assert vm.read_text("/here") == "x"


def test_reboot(vm):
    with vm.snapshot():
        vm.run(["true"])
    vm.reboot()
"""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One kill: which signal, and after how many seconds."""

    number: int
    signal: signal.Signals
    after: float


def main() -> int:
    """Run the rounds; 0 if nothing was ever left."""
    args, rounds = begin(__doc__, longest=25.0)
    with ThreadPoolExecutor(args.jobs) as pool:
        bad = sum(pool.map(play, rounds))
    print(f"longest end after SIGINT: {max(INTERRUPTED, default=0):.1f} s")
    print(f"complete templates that were left: {len(TEMPLATES)}")
    print(f"{args.kills - bad} passed, {bad} failed")
    return 1 if bad else 0


def begin(about: str, *, longest: float) -> tuple[argparse.Namespace, list[Round]]:
    """Read the command line, and plan the rounds. This process becomes the reaper of all orphans.

    Args:
        about: the docstring of the program.
        longest: the default of the longest time before a kill, in seconds.
    """
    parser = argparse.ArgumentParser(description=about.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="rounds at the same time")
    parser.add_argument("--longest", type=float, default=longest, help="seconds before a kill")
    args = parser.parse_args()
    become_reaper()
    rng = random.Random(args.seed)
    rounds = [
        Round(
            number=number,
            signal=rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]),
            after=rng.uniform(0, args.longest),
        )
        for number in range(args.kills)
    ]
    print(f"seed {args.seed}: {args.kills} kills", flush=True)
    return args, rounds


def become_reaper() -> None:
    """Become the parent of all orphans, and reap them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A shell starts what ends in `&` with SIGINT ignored, and pytest would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=reap, daemon=True).start()


def play(one: Round) -> bool:
    """Play a round; whether something was left."""
    with tempfile.TemporaryDirectory(prefix="vmsandbox-torture-") as scratch:
        folder = Path(scratch)
        (folder / "test_suite.py").write_text(SUITE)
        runtime, cache = folder / "runtime", folder / "cache"
        make_cache(cache)
        mark = f"VMSANDBOX_TORTURE={os.getpid()}.{one.number}"
        env = {
            **os.environ,
            "VMSANDBOX_RUNTIME": str(runtime),
            "VMSANDBOX_CACHE": str(cache),
            "TMPDIR": scratch,
            **dict([mark.split("=")]),
        }
        before = files(folder)
        pytest = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "test_suite.py",
                f"--basetemp={folder / 'base'}",
            ],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=(folder / "output").open("wb"),
            stderr=subprocess.STDOUT,
        )
        OURS.add(pytest.pid)
        time.sleep(one.after)
        ended = pytest.poll()
        guests = [pid for pid, name in descendants(pytest.pid) if name.startswith("qemu")]
        pytest.send_signal(one.signal)
        if one.signal is signal.SIGINT:
            signalled = time.monotonic()
            try:
                pytest.wait(INTERRUPT_GRACE)
            except subprocess.TimeoutExpired:
                pass  # it is found among what is left
            INTERRUPTED.append(time.monotonic() - signalled)
        deadline = time.monotonic() + GRACE
        while (alive := marked(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
            pytest.poll()
        for pid in alive:
            print(f"  left: {pid} {cmdline(pid)}", flush=True)
            os.kill(pid, signal.SIGKILL)
        start_again(env)
        left = sorted(files(folder) - before - complete_templates(cache))
        for name in left:
            print(f"  left: {name}", flush=True)
        state = f"{len(guests)} guests" if ended is None else "over"
        print(
            f"{one.number:4} {one.signal.name:8} after {one.after:5.2f} s ({state}): "
            f"{'LEFT SOMETHING' if alive or left else 'clean'}",
            flush=True,
        )
        if alive or left:
            print((folder / "output").read_text(errors="replace"), flush=True)
        return bool(alive or left)


def make_cache(cache: Path) -> None:
    """A cache of a round's own, so that nobody else's files are in it; images and verdicts are shared."""
    from pytest_vmsandbox.core.paths import cache_dir

    cache.mkdir(mode=0o700)
    for name in ("images", "accelerator"):
        (cache_dir() / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        (cache / name).symlink_to(cache_dir() / name)


def start_again(env: dict[str, str]) -> None:
    """The next start removes what a dead run could not."""
    code = (
        "from pytest_vmsandbox.core.settings import Settings\n"
        "from pytest_vmsandbox.guests.factory import GuestFactory\n"
        "with GuestFactory.open(Settings()) as factory: factory.backend.clean()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.DEVNULL)
    OURS.add(process.pid)
    if process.wait():
        raise RuntimeError("the next start failed")


def complete_templates(cache: Path) -> set[str]:
    """The files of templates that are whole, and of their locks, relative to the round's folder."""
    from pytest_vmsandbox.guests.templates import TemplateStore

    store = TemplateStore(cache)
    found = {store.root, *store.root.glob("*.lock")}
    for template in store.all():
        if not template.damage():
            found |= {template.folder, *template.folder.iterdir()}
            TEMPLATES.append(template.key)
    return {str(path.relative_to(cache.parent)) for path in found}


def files(folder: Path) -> set[str]:
    """The files that runs could leave: theirs, the cache's, shared memory's, temporary ones."""
    ours = {"runtime", "runtime/.lock", "test_suite.py", "output", "__pycache__"}
    ours |= {str(path.relative_to(folder)) for path in folder.glob("runtime/.quota")}
    ours |= {str(path.relative_to(folder)) for path in folder.glob("runtime/.arming.*")}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")} - ours
    found = {
        name
        for name in found
        if not name.startswith(("base", "__pycache__")) or "/guests-" in name  # of artifacts
    }
    return found | {str(path) for path in Path("/dev/shm").glob("*")}


def marked(mark: str) -> list[int]:
    """Living processes that came from a round: its variable is in their environment, or they
    are QEMU or the switch, whose environment is their own, below our launcher's orphans.
    """
    found = []
    for pid, _ in descendants(os.getpid()):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in environment:
            found.append(pid)
            found.extend(child for child, _ in descendants(pid))
    # What has lost its launcher is our own child now.
    found += [
        pid
        for pid, name in descendants(os.getpid())
        if parent(pid) == os.getpid()
        and (name.startswith("qemu") or "/machine/switch " in cmdline(pid))
    ]
    return sorted(set(found))


def reap() -> None:
    """Reap orphans that have ended below us; our own children are waited for by who started them."""
    while True:
        for pid, _ in descendants(os.getpid()):
            if pid not in OURS and parent(pid) == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


OURS: set[int] = set()


def parent(pid: int) -> int:
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
        )
    except OSError:
        return -1


def cmdline(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "(gone)"
    return raw.replace(b"\0", b" ").decode(errors="replace")[:200]


if __name__ == "__main__":
    sys.exit(main())
