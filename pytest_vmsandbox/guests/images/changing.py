"""Boots an image to change it. What the guest writes becomes the disk of the image that is built."""

from __future__ import annotations

import fcntl
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from pytest_vmsandbox.cache.copying import copy
from pytest_vmsandbox.catalogue.making import LONGEST_LINE, Build
from pytest_vmsandbox.catalogue.store import DISK, BuiltImage
from pytest_vmsandbox.core.errors import (
    BootError,
    CacheError,
    CommandError,
    CommandTimeout,
    ImageError,
    LaunchError,
    VMSandboxError,
)
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import GIB, MIB, Hardware, Network
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.images.root_disk import grow as grow_root
from pytest_vmsandbox.guests.leasing import on_sound_host
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.machine.disk import Disks

_MEMORY = GIB  # package managers need more than most tests
_SILENT_SECONDS = 600.0  # of a program in the guest, on a usual host with KVM; then it is killed
_FICLONE = 0x40049409  # of linux/fs.h: a file shares the blocks of another one

# What a boot has left there, and what packages have; each guest gets a machine-id of its own.
_CLEAN = """
if command -v apt-get; then apt-get clean; rm -rf /var/lib/apt/lists/*; fi
if command -v dnf; then dnf clean all; fi
if command -v zypper; then zypper clean --all; fi
if command -v pacman; then rm -rf /var/cache/pacman/pkg/*; fi
[ ! -s /etc/machine-id ] || [ -L /etc/machine-id ] || : >/etc/machine-id
rm -f /var/lib/systemd/random-seed
sync
! command -v fstrim || fstrim -v / || :
"""


class Unfinished(BuiltImage):
    """An image while it is built: it has no record yet, and its key does not open it yet."""

    @property
    def key(self) -> Path | None:
        """What is built says how to log in."""
        return None

    def verified(self) -> dict[str, str]:
        """Nothing is known about its files."""
        return {}


def hardware_for(image: BuiltImage, *, disk: int | None, network: Network) -> Hardware:
    """The hardware of a guest that is booted to be changed. Its user is root."""
    memory = max(_MEMORY, image.definition.memory_min)
    return Hardware(memory=memory, disk=disk, network=network, user="root")


@contextmanager
def changing(
    build: Build,
    base: BuiltImage,
    hardware: Hardware,
    settings: Settings,
    key: KeyPair,
    *,
    further: Sequence[bytes] = (),
) -> Iterator[Guest]:
    """A guest of `base`, which answers. At the end it is shut down.

    Its disk is then the disk of the image that is built. If the block raises an error, nothing is kept.

    Args:
        build: what is built.
        base: what the guest is booted from. Its disk does not change, unless it is in the folder of
            the build.
        hardware: of the guest.
        settings: how guests run.
        key: opens the guest.
        further: the content of each further disk.

    Raises:
        BootError: the guest does not come up.
        GuestLost: this host could not read or write its disk.
        ImageError: something in it failed, it does not shut down in an orderly way, or its disk cannot
            be kept.
    """
    with ExitStack() as stack:
        backend = Backend(settings, Announcer(build.say), stack)
        hardware = replace(hardware, disks=tuple(map(_whole_disk, further)))
        blueprint = backend.blueprint_of(base, hardware)
        disks = stack.enter_context(blueprint.disks(backend.cache))
        for content, (overlay,) in zip(further, disks.overlays[-len(further) :], strict=False):
            _write(build, content, overlay)
        machines = Machines(
            blueprint,
            backend.hypervisor,
            name=backend.name(f"{build.definition.name}-made"),
            key=key,
            disks=disks,
            logs=build.work / "logs",
        )
        with backend.engine(machines) as engine, on_sound_host(guest := Guest(engine)):
            with named(build):
                yield guest
            build.say("shutting it down")
            _shut_down(engine)
        if disks.base is not None:
            build.say("making the disk")
            _keep(build, base, disks)


@contextmanager
def named(build: Build, script: str = "") -> Iterator[None]:
    """Make an error of a guest that is changed an error of the image.

    Args:
        build: what is built.
        script: the script of the image, if it may be to blame.

    Raises:
        ImageError: a program in the guest failed, or the guest is gone.
    """
    try:
        yield
    except (ImageError, CacheError, LaunchError):
        raise
    except VMSandboxError as error:
        remedy = ""
        if error.transient or isinstance(error, BootError):
            remedy = error.remedy
        elif script:
            remedy = (
                f"look at {build.definition.folder / script}. It must neither reboot the guest nor switch it off, and afterwards root "
                "must still be able to run programs"
            )
        raise ImageError(
            f"making {build.definition.name!r} failed: {error.brief}",
            details=error.details,
            remedy=remedy,
            transient=error.transient,
        ) from error


def _shut_down(engine: Engine) -> None:
    """Shut a guest down.

    Raises:
        ImageError: it did not switch itself off, so it may not have written everything.
    """
    with engine.use() as running:
        monitor = running.machine.monitor
    engine.power_off()
    ends = [event["data"] for event in monitor.events() if event["event"] == "SHUTDOWN"]
    if not any(end["guest"] for end in ends):
        raise ImageError(
            f"{engine.name} did not shut down in an orderly way, so its disk may not be whole",
            remedy="look for what does not end in the guest",
        )


def run(
    build: Build,
    guest: Guest,
    script: str,
    arguments: Sequence[str] = (),
    *,
    what: str = "a program in the guest",
    silent: float = _SILENT_SECONDS,
    longest: float = math.inf,
) -> None:
    """Run a shell script in the guest. Its output goes into the log.

    Args:
        build: what is built.
        guest: where it runs, as root.
        script: its text.
        arguments: of the script.
        what: its name for people.
        silent: seconds without output after which it is killed, on a usual host with KVM.
        longest: seconds for all of it, likewise.

    Raises:
        ImageError: it ended with another status than 0, or was silent or took too long.
    """
    log = Lines(build)
    stretch = guest.engine.stretch
    command = Command(argv=("/bin/sh", "-c", f"exec 2>&1\n{script}", "sh", *arguments))
    name = build.definition.name
    try:
        result = guest.engine.run(
            command, stdout=log.feed, timeout=stretch(longest), idle=stretch(silent)
        )
    except CommandTimeout as late:
        raise ImageError(f"making {name!r} failed: {what} was killed: {late.brief}") from late
    finally:
        log.end()
    if result.returncode != 0:
        how = (
            f"status {result.returncode}"
            if result.returncode > 0
            else f"signal {-result.returncode}"
        )
        raise ImageError(f"making {name!r} failed: {what} ended with {how}")


def grow(build: Build, guest: Guest) -> None:
    """Grow the root file system to its disk, if the guest has the tools. Otherwise say so."""
    try:
        grow_root(guest)
    except CommandError as error:
        why = " ".join(str(error.result.stderr).split()) or error.brief
        build.say(f"the disk has grown, but not the root file system: {why}")


def clean(build: Build, guest: Guest) -> None:
    """Remove what a boot has left in the guest, and what its package manager keeps."""
    run(build, guest, _CLEAN)


class Lines:
    """Passes output of a guest on to the log of a build, line by line."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take some output.

        Raises:
            ImageError: it is too much for the log.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._build.write(line + b"\n")
        if len(self._rest) > LONGEST_LINE:
            self.end()

    def end(self) -> None:
        """The output has ended, perhaps in the middle of a line."""
        if self._rest:
            self._build.write(self._rest + b"\n")
            self._rest = b""


def _keep(build: Build, base: BuiltImage, disks: Disks) -> None:
    """Make one raw file of a guest's disk, which is an overlay on the disk of `base`.

    If the raw file is already there, or can share the blocks of the base, only what has changed is
    written.

    Raises:
        ImageError: it cannot be made.
    """
    assert disks.base is not None
    assert base.disk is not None
    ((top,), *_) = disks.overlays
    target = build.out / DISK
    is_there = base.disk == target or _shares(base.disk, target)
    below = target if is_there else base.disk
    status = build.run(
        ["qemu-img", "commit", "-q", "-d", "--image-opts", _overlay(top, below)]
        if is_there
        else [
            "qemu-img",
            "convert",
            "-q",
            "-O",
            "raw",
            "--image-opts",
            _overlay(top, below),
            f"{target}",
        ],
        pass_fds=[top.fileno()],
    )
    if status != 0:
        raise ImageError(f"the disk of {build.definition.name!r} cannot be made: qemu-img failed")


def _whole_disk(content: bytes) -> int:
    """The size of a disk with that content, in bytes."""
    return -(-len(content) // MIB) * MIB


def _write(build: Build, content: bytes, overlay: IO[bytes]) -> None:
    """Write the content of a disk into its overlay.

    Raises:
        ImageError: it cannot be written.
    """
    raw = build.work / "further.raw"
    raw.write_bytes(content)
    target = f"driver=qcow2,file.driver=file,file.filename=/proc/self/fd/{overlay.fileno()}"
    argv = ["qemu-img", "convert", "-q", "-n", "-f", "raw", "--target-image-opts", f"{raw}", target]
    if build.run(argv, pass_fds=[overlay.fileno()]) != 0:
        raise ImageError("a disk for the first boot cannot be written: qemu-img failed")


def _overlay(top: IO[bytes], below: Path) -> str:
    """What qemu-img reads: an open overlay on a raw file."""
    parts = {
        "driver": "qcow2",
        "file.driver": "file",
        "file.filename": f"/proc/self/fd/{top.fileno()}",
        "backing.driver": "raw",
        "backing.file.driver": "file",
        "backing.file.filename": os.fspath(below),
    }
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in parts.items())


def _shares(source: Path, dest: Path) -> bool:
    """Make a copy that shares the blocks of a file. Returns False where the file system cannot do it."""
    with source.open("rb") as old, dest.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            shared = False
        else:
            shared = True
    if not shared:
        dest.unlink()
    return shared


def copy_file(source: Path, dest: Path) -> None:
    """Copy a file with its mode and holes. The copy shares its blocks if the file system can do it.

    Raises:
        OSError: it cannot be copied.
    """
    if not _shares(source, dest):
        with source.open("rb") as old, dest.open("xb", buffering=0) as new:
            copy(old, new)
    dest.chmod(stat.S_IMODE(source.stat().st_mode))
