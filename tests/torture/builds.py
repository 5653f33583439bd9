"""Kill what makes images at random moments: nothing half-made may be left, and no good image may be harmed.

    python tests/torture/builds.py --seed 1 --kills 60 --guests

Each round starts `vmsandbox images build` for three images: one by a recipe that has programs in the
background, one that derives from it, and one that is fetched from a server. It is killed with SIGKILL,
SIGTERM or SIGINT at a random moment. In half of the rounds the images are there before, and are made again.
Then no process of it may be alive, each image must be whole (the one from before, or the new one), and after
the next start no other file may be left in the cache or among the temporary ones. In the end the images must be
made without a fault.

With --guests, the derived image is made in a guest of `tiny`, and the fetched one is `tiny`, which is booted
for the first time. It goes on after the rounds that an earlier call with the same seed has passed, if --state
names a file.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pytest_vmsandbox.cache.store import tidy
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageState, ImageStore
from pytest_vmsandbox.core.architecture import native_architecture
from pytest_vmsandbox.core.paths import cache_dir
from torture import kill

NAMES = ("made", "derived", "fetched")
GRACE = 20.0  # seconds for all processes to be gone: this machine may be busy
ORDERLY = 60.0  # seconds to end after SIGINT and SIGTERM
COMMAND = "from pytest_vmsandbox.cli import main; main()"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
RECIPE = f"""#!/bin/sh
sleep 1000 &
(setsid sleep 1000 &)
for name in vmlinuz initrd.img; do
    head -c 1000000 /dev/urandom >$VMSANDBOX_OUT/$name
    cp $VMSANDBOX_OUT/$name $VMSANDBOX_WORK/
done
echo {KEY} >$VMSANDBOX_OUT/host_key.pub
truncate -s 64M $VMSANDBOX_OUT/disk.raw
sleep 0.1
echo x >>$VMSANDBOX_OUT/disk.raw
truncate -s 1G $VMSANDBOX_OUT/disk.raw
"""
MADE = f"""schema = 1
description = "By a recipe"
architecture = "{native_architecture()}"
recipe = "build"
[boot]
append = ""
[disk]
size = "1GiB"
[system]
python = false
init = "busybox"
"""
DERIVED = """schema = 1
description = "Derived"
from = "{base}"
[boot]
append = "quiet"
"""
SCRIPT = '[add]\nscript = "setup.sh"\n'
FETCHED = f"""schema = 1
description = "Fetched"
architecture = "{native_architecture()}"
[source]
{{source}}
[boot]
append = "{{append}}"
[system]
python = false
init = "busybox"
"""
NO_LOGIN = """[disk]
size = "1GiB"
[login]
method = "none"
ready = "login"
"""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One kill: which signal, at which part of the time that a whole build takes, and of what."""

    number: int
    signal: signal.Signals
    share: float
    again: bool  # whether the images are there before


@dataclass
class World:
    """What all rounds have in common.

    Attributes:
        folder: for everything.
        guests: whether guests are booted.
        seconds: how long all images take.
    """

    folder: Path
    guests: bool
    seconds: float = 0.0
    harmed: list[str] = field(default_factory=list)

    @property
    def definitions(self) -> Path:
        return self.folder / "images"

    @property
    def good(self) -> Path:
        """A cache in which all images are made."""
        return self.folder / "good"


def main() -> int:
    """Run the rounds; 0 if nothing was ever left or harmed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--guests", action="store_true", help="boot guests for two of the images")
    parser.add_argument("--state", type=Path, help="a file with the rounds that were passed")
    args = parser.parse_args()
    kill.become_reaper()
    rng = random.Random(args.seed)
    rounds = [
        Round(
            number=number,
            signal=rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]),
            share=rng.random(),
            again=rng.random() < 0.5,
        )
        for number in range(args.kills)
    ]
    print(f"seed {args.seed}: {args.kills} kills", flush=True)
    kind = f"{args.seed} {'guests' if args.guests else 'plain'}"
    passed = read_state(args.state, kind)
    with tempfile.TemporaryDirectory(prefix="vmsandbox-torture-") as scratch:
        world = World(Path(scratch), args.guests)
        with serving(world.folder / "server") as url:
            define(world, url)
            began = time.monotonic()
            build(world, world.good).wait()
            world.seconds = time.monotonic() - began
            if wrong := problems(world, world.good, again=True):
                print("\n".join(wrong), (world.folder / "output").read_text(), flush=True)
                return 1
            print(f"all images take {world.seconds:.1f} s", flush=True)
            bad = 0
            for one in rounds:
                if one.number in passed:
                    continue
                if play(world, one):
                    bad += 1
                elif args.state:
                    with args.state.open("a") as state:
                        state.write(f"{kind} {one.number}\n")
            last = world.folder / "last"
            status = build(world, last).wait()
            if (wrong := problems(world, last, again=True)) or status:
                output = (world.folder / "output").read_text()
                print("the last build failed:", status, *wrong, output, sep="\n", flush=True)
                bad += 1
    print(f"{args.kills - bad} passed, {bad} failed")
    return 1 if bad else 0


def read_state(file: Path | None, kind: str) -> set[int]:
    """The rounds of this kind that were passed before."""
    if file is None or not file.exists():
        return set()
    lines = file.read_text().splitlines()
    return {int(line.split()[-1]) for line in lines if line.startswith(f"{kind} ")}


def define(world: World, url: str) -> None:
    """Write the definitions, and put the files onto the server."""
    server = world.folder / "server"
    for name in NAMES:
        (world.definitions / name).mkdir(parents=True)
    recipe = world.definitions / "made" / "build"
    recipe.write_text(RECIPE)
    recipe.chmod(0o755)
    append, more = "console=ttyS0", ""
    if world.guests:
        tiny = ImageStore(cache_dir()).require(Catalogue().get("tiny"))
        assert tiny.kernel is not None
        assert tiny.initrd is not None
        append = tiny.definition.append
        lines = []
        for key, file in (("kernel", tiny.kernel), ("initrd", tiny.initrd)):
            shutil.copyfile(file, server / key)
            lines += [f'{key} = "{url}/{key}"', f'{key}_sha256 = "{sha256(file)}"']
        (world.definitions / "derived" / "setup.sh").write_text("echo more >/etc/more\n")
    else:
        disk = server / "disk.raw"
        disk.write_bytes(random.randbytes(1 << 22) + bytes(1 << 24))
        shutil.copyfile("/proc/self/exe", server / "kernel")
        lines = [f'url = "{url}/disk.raw"', 'format = "raw"', f'sha256 = "{sha256(disk)}"']
        lines += [f'kernel = "{url}/kernel"', f'kernel_sha256 = "{sha256(server / "kernel")}"']
        more = NO_LOGIN
    base, script = ("tiny", SCRIPT) if world.guests else ("made", "")
    for name, text in (
        ("made", MADE),
        ("derived", DERIVED.format(base=base).replace("quiet", append) + script),
        ("fetched", FETCHED.format(source="\n".join(lines), append=append) + more),
    ):
        (world.definitions / name / "image.toml").write_text(text)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class serving:  # noqa: N801  # a context manager, read as a word
    """A server on loopback for the files of a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Say nothing."""

        handler = functools.partial(Handler, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def build(
    world: World, cache: Path, mark: str = "", *, force: bool = False
) -> subprocess.Popen[bytes]:
    """Start to make all images."""
    if not cache.exists():
        cache.mkdir(mode=0o700)
        # The verdict on accelerators, and the base of the derived image, are shared.
        (cache_dir() / "accelerator").mkdir(parents=True, exist_ok=True, mode=0o700)
        (cache / "accelerator").symlink_to(cache_dir() / "accelerator")
        if world.guests:
            shutil.copytree(
                cache_dir() / "images" / "tiny", cache / "images" / "tiny", copy_function=os.link
            )
    (world.folder / "tmp").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", COMMAND, "images", "build", *NAMES),
            *(["--force"] if force else []),
            *("--image-path", str(world.definitions)),
        ],
        env={
            **os.environ,
            "VMSANDBOX_CACHE": str(cache),
            "VMSANDBOX_RUNTIME": str(world.folder / "runtime"),
            "TMPDIR": str(world.folder / "tmp"),
            "VMSANDBOX_TORTURE": mark,
        },
        cwd=world.folder,
        stdin=subprocess.DEVNULL,
        stdout=(world.folder / "output").open("wb"),
        stderr=subprocess.STDOUT,
    )
    kill.OURS.add(process.pid)
    return process


def play(world: World, one: Round) -> bool:
    """Play a round; whether something was left or harmed."""
    cache = world.folder / "cache"
    if one.again:
        shutil.copytree(world.good, cache, copy_function=copy, symlinks=True)
    mark = f"{os.getpid()}.{one.number}"
    process = build(world, cache, mark, force=one.again)
    after = one.share * world.seconds
    time.sleep(after)
    was_over = process.poll() is not None
    process.send_signal(one.signal)
    wrong = []
    try:
        process.wait(ORDERLY)
    except subprocess.TimeoutExpired:
        wrong.append(f"it did not end within {ORDERLY:g} s of {one.signal.name}")
        process.kill()
        process.wait()
    wrong += [f"left: {pid} {kill.cmdline(pid)}" for pid in alive(f"VMSANDBOX_TORTURE={mark}")]
    wrong += problems(world, cache, again=one.again)
    wrong += [f"left: {path}" for path in left(world, cache)]
    state = "over" if was_over else "made again" if one.again else "made"
    told = "; ".join(wrong) or "clean"
    print(f"{one.number:4} {one.signal.name:8} after {after:5.2f} s ({state}): {told}", flush=True)
    if wrong:
        print((world.folder / "output").read_text(errors="replace"), flush=True)
    shutil.rmtree(cache)
    return bool(wrong)


def copy(source: str, dest: str) -> None:
    """A copy for a cache: locks are its own, and what is never written is shared."""
    if source.endswith(".lock"):
        shutil.copy2(source, dest)
    else:
        os.link(source, dest)


def alive(mark: str) -> list[int]:
    """The processes of a round that do not end."""
    deadline = time.monotonic() + GRACE
    while (found := kill.marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return found


def problems(world: World, cache: Path, *, again: bool) -> list[str]:
    """Which images are not as they must be."""
    store, catalogue = ImageStore(cache), Catalogue([world.definitions], cache)
    wrong = []
    for name in NAMES:
        definition = catalogue.get(name)
        state = store.state(definition)
        # A base that was made again makes what derives from it stale, but does not harm it.
        if again and state is ImageState.MISSING:
            wrong.append(f"{name} is gone")
        for folder in store.folders_of(name):
            image = store.get(f"{name}/{folder.name}")
            if image is None:
                wrong.append(f"{name} cannot be read")
                continue
            try:
                image.verified()
            except Exception as error:  # noqa: BLE001  # whatever it is, it is told
                wrong.append(str(error))
    return wrong


def left(world: World, cache: Path) -> list[Path]:
    """The files that the next start does not remove."""
    if world.guests:
        kill.start_again(
            {
                **os.environ,
                "VMSANDBOX_CACHE": str(cache),
                "VMSANDBOX_RUNTIME": str(world.folder / "runtime"),
                "TMPDIR": str(world.folder / "tmp"),
            }
        )
    elif cache.exists():
        tidy(cache, print)
    found = list((world.folder / "tmp").rglob("*"))
    runtime = world.folder / "runtime"
    found += [path for path in runtime.rglob("*") if path.name not in (".lock", ".quota")]
    images = cache / "images"
    found += [path for path in images.glob(".*") if path.name != ".lock"]
    # The log of a build that failed or was killed stays until the next one.
    expected = {*NAMES, "tiny", *(f"{name}.build.log" for name in NAMES)}
    expected |= {f"{name}.lock" for name in (*NAMES, "tiny")}
    found += [path for path in images.glob("[!.]*") if path.name not in expected]
    found += list((cache / "downloads").glob(".*"))
    return found


if __name__ == "__main__":
    sys.exit(main())
