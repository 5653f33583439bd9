"""Keeps guests of failed tests in the cache.

A guest waits only while its memory is written, as for a snapshot. Guests on common networks stop at one
moment, and wait for each other. A thread does the rest: it copies what the guest has written to its
disks, links the files of its image, and puts all in its place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Self

from pytest_vmsandbox.cache.copying import copy_to, link, link_open
from pytest_vmsandbox.cache.files import own_size
from pytest_vmsandbox.cache.store import IMAGES, PRIVATE_KEY
from pytest_vmsandbox.catalogue.store import BuiltImage, files_of
from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import CacheError, ConfigError, GuestLost, VMSandboxError
from pytest_vmsandbox.core.paths import CACHE
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.guests import kept as names, plugged_files
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.freezing import Frozen, freeze
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.kept import Group, KeptGuest, KeptStore, Moment, key_of
from pytest_vmsandbox.guests.networks.network import Network, Seat
from pytest_vmsandbox.guests.running.engine import seized
from pytest_vmsandbox.guests.running.machines import Machines
from pytest_vmsandbox.guests.running.together import Meet, in_step
from pytest_vmsandbox.guests.templates import layer_name
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.cmdline import Start

_THREADS = 8  # guests that are put in their place at the same time
_MOST = (
    1000  # guests that are being kept, at any time: all of a group have to be saved at one moment
)
_SEIZE_SECONDS = 10.0
_RESTART_SECONDS = 3.0  # for a guest that restarts by itself, on a usual host with KVM


class KeepError(CacheError):
    """A guest could not be kept."""

    stage = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What has become of a guest.

    Attributes:
        key: of the kept guest.
        moment: when the test failed.
        guest: its name.
        kept: the kept guest; None if there is none.
        error: why there is none; None if it was kept, and is gone because of the limit.
    """

    key: str
    moment: Moment
    guest: str
    kept: KeptGuest | None
    error: KeepError | None


@dataclass(eq=False)
class _Job:
    """A guest that is being kept.

    Attributes:
        group: those that are kept with it.
        meet: waits for them.
    """

    guest: Guest
    moment: Moment
    group: _Together
    meet: Meet
    goes_on: threading.Event = field(default_factory=threading.Event)
    future: Future[KeptGuest] = field(init=False)


class _Together:
    """Guests that are kept at one moment because they are on networks."""

    def __init__(self, guests: Sequence[Guest]) -> None:
        self._id = secrets.token_hex(8)
        self._guests = tuple(it.engine.name for it in guests if _networks_of(it.engine.machines))
        self._numbers: dict[Network, int] = {}
        for guest in guests:
            for network in _networks_of(guest.engine.machines).values():
                self._numbers.setdefault(network, len(self._numbers))

    def of(self, machines: Machines) -> Group | None:
        """The group, as the record of one of its guests has it; None for a guest on no network."""
        if machines.name not in self._guests:
            return None
        networks = _networks_of(machines)
        return Group(
            id=self._id,
            guests=self._guests,
            networks=tuple(self._described(networks.get(it.card.port)) for it in machines.cards),
        )

    def _described(self, network: Network | None) -> dict[str, object] | None:
        if network is None:
            return None
        return {
            "number": self._numbers[network],
            "ipv4": str(network.ipv4),
            "ipv6": str(network.ipv6),
            "addresses": network.addresses,
        }


def _networks_of(machines: Machines) -> dict[str, Network]:
    """The networks of a guest, by the port of its card."""
    return {
        it.card.port: it.network
        for it in machines.cards
        if isinstance(it, Seat) and not it.network.is_over
    }


class Keeper:
    """Keeps guests of one run. A context manager: at the end, all is in its place.

    Args:
        backend: of the run.
        limit: bytes that all kept guests may take together.
        tell: gets lines for people, such as which old guest was removed.
    """

    def __init__(self, backend: Backend, *, limit: int, tell: Callable[[str], object]) -> None:
        self._store = KeptStore(backend.cache)
        self._backend = backend
        self._limit = limit
        self._tell = tell
        self._jobs: dict[str, _Job] = {}
        self._began = wall()
        self._pool = ThreadPoolExecutor(_MOST, thread_name_prefix="vmsandbox-keep")
        self._places = threading.Semaphore(_THREADS)
        self._freezing = threading.Lock()
        self._limiting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def keep(self, guest: Guest, moment: Moment) -> str:
        """Keep a guest as it is now. It goes on when this returns, and may be ended.

        A guest that was kept for the same test before is replaced.

        Returns:
            Its key.

        Raises:
            KeepError: it cannot be kept.
        """
        (result,) = self.keep_all({guest: moment})
        if isinstance(result, KeepError):
            raise result
        return result

    def keep_all(self, wanted: Mapping[Guest, Moment]) -> list[str | KeepError]:
        """Keep guests as they are now. Those that are on networks stop at one moment, and can go on together.

        Returns:
            For each guest, its key, or why it cannot be kept.
        """
        group = _Together(list(wanted))

        def kept(guest: Guest, moment: Moment, meet: Meet) -> str | KeepError:
            try:
                return self._frozen(key_of(moment), _Job(guest, moment, group, meet))
            except KeepError as error:
                return error

        with self._freezing:  # a second thread would wait for the same guests in another order
            return in_step([partial(kept, guest, moment) for guest, moment in wanted.items()])

    def _frozen(self, key: str, job: _Job) -> str:
        """Begin to keep a guest. Returns when it goes on.

        Raises:
            KeepError: it cannot be kept.
        """
        if (former := self._jobs.get(key)) is not None:
            wait([former.future])
        job.future = self._pool.submit(self._made, key, job)
        job.future.add_done_callback(lambda _: job.goes_on.set())
        self._jobs[key] = job
        job.goes_on.wait()
        if job.future.done() and (error := job.future.exception()) is not None:
            raise error
        return key

    def forget(self, key: str) -> None:
        """Remove a kept guest, for instance because the test has passed when it was run again."""
        if (job := self._jobs.pop(key, None)) is not None:
            wait([job.future])
        with suppress(VMSandboxError):  # it is in use, or somebody else removes it
            self._store.discard([self._store.root / key])

    def close(self) -> list[Outcome]:
        """Wait until all is in its place. Returns what has become of each guest."""
        self._pool.shutdown()
        found = []
        for key, job in self._jobs.items():
            error = job.future.exception()
            assert error is None or isinstance(error, KeepError)
            found.append(
                Outcome(
                    key=key,
                    moment=job.moment,
                    guest=job.guest.name,
                    kept=None if error else self._store.get(key),
                    error=error,
                )
            )
        return found

    def _made(self, key: str, job: _Job) -> KeptGuest:
        """Keep a guest.

        Raises:
            KeepError: it cannot be kept.
        """
        name = job.guest.name
        place = ExitStack()

        def fill(folder: Path, _lock: int) -> dict[str, object]:
            with ExitStack() as stack:
                frozen = _saved(job, folder / names.STATE, stack)
                job.goes_on.set()
                place.enter_context(self._places)
                record = _written(folder, job, frozen)
            self._check_size(folder)
            return record

        try:
            with place:
                kept = self._store.make(key, fill, on_busy=lambda: None, replace=True)
            with self._limiting:
                self._remove_former(job.moment)
                self._store.limit(self._limit, self._tell)
        except VMSandboxError as error:
            details = "\n".join(filter(None, [error.brief, error.details]))
            remedy = error.remedy
            if any(os.strerror(number) in details for number in (errno.ENOSPC, errno.EDQUOT)):
                remedy = (
                    f"make room on the disk of {self._store.root}, or set {CACHE} to another folder"
                )
            raise KeepError(f"{name} could not be kept", details=details, remedy=remedy) from error
        except Exception as error:
            raise KeepError(f"{name} could not be kept: {error!r}") from error
        return kept

    def _check_size(self, folder: Path) -> None:
        """Check that a guest alone does not take more than the limit, before older ones go for it.

        Raises:
            CacheError: it takes more.
        """
        if (size := own_size([folder])) > self._limit:
            raise CacheError(
                f"it takes {format_size(size)}, and vm_keep_size is {format_size(self._limit)}",
                remedy="set vm_keep_size to more (ini file)",
            )

    def _remove_former(self, moment: Moment) -> None:
        """Remove further guests that an earlier run has kept for this test."""
        of_test = (moment.rootdir, moment.nodeid)
        self._store.discard(
            kept.folder
            for kept in self._store.all()
            if (kept.moment.rootdir, kept.moment.nodeid) == of_test and kept.saved_at < self._began
        )


def _saved(job: _Job, state: Path, stack: ExitStack) -> Frozen:
    """Save a guest. It goes on."""
    engine = job.guest.engine
    if engine.running is not None:
        with suppress(GuestLost):  # then it is saved as it is
            engine.running.restarts.await_end(engine.stretch(_RESTART_SECONDS))
    with seized(engine, _SEIZE_SECONDS) as running:
        if running is not None and running.resident.is_away:
            raise ConfigError(
                "a fault keeps it from answering",
                remedy="end the fault before: otherwise the guest could not be entered",
            )
        return freeze(engine.machines, running, state, stack, job.meet)


# -- what lies in the folder -----------------------------------------------------------------------


def line_digest(blueprint: Blueprint, more_args: Sequence[str]) -> str:
    """SHA-256, in hex, of the command line that loads a guest's state, without the path of QEMU."""
    same = replace(blueprint, qemu_args=lambda _: more_args)
    line = same.command_line(Start.RESTORED)[1:]
    return hashlib.sha256("\0".join(line).encode()).hexdigest()


def processor_digest(accelerator: str) -> str:
    """SHA-256, in hex, of this host's CPUs, if a guest's state depends on them; otherwise empty."""
    if accelerator == "tcg":
        return ""
    return hashlib.sha256(host.processor().encode()).hexdigest()


def _written(folder: Path, job: _Job, frozen: Frozen) -> dict[str, object]:
    """Put a guest's files into a folder. Returns the record of the kept guest."""
    machines = job.guest.engine.machines
    blueprint, group = machines.blueprint, job.group.of(machines)
    digests = _link_image(folder / names.IMAGE, blueprint.built)
    layers, plugged = _copy_disks(folder, frozen)
    machines.key.save(folder / PRIVATE_KEY)
    (folder / names.CONSOLE).write_text(frozen.console, encoding="utf-8")
    if frozen.tpm:
        (folder / names.TPM).mkdir(mode=0o700)
    for name, content in frozen.tpm.items():
        (folder / names.TPM / name).write_bytes(content)
    return {
        "moment": asdict(job.moment),
        "guest": machines.name,
        "hostname": machines.hostname,
        "group": None if group is None else asdict(group),
        "image": blueprint.image,
        "saved_at": wall(),
        "version": version("pytest-vmsandbox"),
        "has_memory": frozen.has_memory,
        "has_helper": frozen.has_helper,
        "answers": frozen.answers,
        "lead": frozen.lead.at(wall()),
        "qemu": blueprint.qemu.build,
        "accelerator": blueprint.verdict.accelerator,
        "processor": blueprint.verdict.processor,
        "host": processor_digest(blueprint.verdict.accelerator),
        "line": line_digest(blueprint, frozen.more_args),
        "more_args": list(frozen.more_args),
        "hardware": asdict(blueprint.hardware),
        "layers": layers,
        "plugged": plugged,
        "cards": [asdict(it.card) for it in machines.cards],
        "tpm": list(frozen.tpm),
        "kernel": _copy_kernel(folder / names.KERNEL, blueprint),
        "uefi": _copy_firmware(folder / names.FLASH, blueprint, frozen),
        "helper": {} if machines.setup is None else machines.setup.record(),
        "digests": digests,
    }


def _link_image(folder: Path, built: BuiltImage) -> dict[str, str]:
    """Link the files of an image. Returns the digests that are known, by path in the kept guest."""
    folder.mkdir(mode=0o700)
    for name in (IMAGES.record, *files_of(built.definition)):
        link(built.folder / name, folder / name)
    known = built.record().get("digests", {})
    return {
        f"{folder.name}/{name}": known[name] for name in files_of(built.definition) if name in known
    }


def _copy_disks(folder: Path, frozen: Frozen) -> tuple[list[list[str]], list[dict[str, object]]]:
    """Put the files of the disks into a folder. Returns their names."""
    layers = []
    for disk, files in enumerate(frozen.disks.overlays):
        layers.append([layer_name(disk, depth) for depth in range(len(files))])
        for file, name in zip(files, layers[-1], strict=True):
            link_open(file, folder / name)
    return layers, plugged_files.write(frozen.disks.plugged_in, folder)


def _copy_kernel(folder: Path, blueprint: Blueprint) -> dict[str, object] | None:
    """Put a kernel that is not the image's own into a folder."""
    if (kernel := blueprint.kernel) is None:
        return None
    folder.mkdir(mode=0o700)
    files = {"image": kernel.image, "initrd": kernel.initrd, "modules": kernel.modules}
    there = {what: path for what, path in files.items() if path is not None}
    for what, path in there.items():
        link(path, folder / what)
    return {"release": kernel.release, "digest": kernel.digest, "has_modules": "modules" in there}


def _copy_firmware(folder: Path, blueprint: Blueprint, frozen: Frozen) -> dict[str, object] | None:
    """Put UEFI firmware, with the guest's variables, into a folder."""
    if (uefi := blueprint.uefi) is None:
        return None
    folder.mkdir(mode=0o700)
    with uefi.code.open("rb") as code:
        copy_to(code, folder / "code")
    (folder / "variables").write_bytes(frozen.variables)
    return {"format": uefi.format, "secure_boot": uefi.secure_boot, "digest": uefi.digest}
