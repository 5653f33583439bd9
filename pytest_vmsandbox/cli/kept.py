"""``vmsandbox kept``: the guests of failed tests, which ``pytest --vm-keep`` has saved."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import click

from pytest_vmsandbox.cache.store import KEPT, Discarded
from pytest_vmsandbox.cli.screen import Screen, write_json
from pytest_vmsandbox.core.errors import CacheError, ConfigError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.core.text import one_line
from pytest_vmsandbox.guests import exported
from pytest_vmsandbox.guests.kept import TPM, KeptGuest, KeptStore, harmful, key_of, misshapen

guest_option = click.option(
    "--guest",
    metavar="NAME",
    help="Which guest, if the test had several. 'kept list' has the names.",
)


@click.group
def kept() -> None:
    """List, share and remove the kept guests of failed tests.

    'pytest --vm-keep=failed' keeps them, and 'vmsandbox enter' enters them.
    """


@kept.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(*, as_json: bool) -> None:
    """List the kept guests, the oldest first.

    Below each test are its guests: the name, the image, when it was saved, its size on the disk, the QEMU
    that it needs, and why the test failed.
    """
    store = KeptStore(cache_dir())
    found = sorted(store.all(), key=lambda it: (it.saved_at, it.moment.number))
    if as_json:
        write_json({"kept": [_described(it) for it in found]})
        return
    screen = Screen()
    if not found:
        screen.say("no guest is kept. 'pytest --vm-keep=failed' keeps those of failed tests")
    here = os.fspath(store.project(Path.cwd()))
    tests: dict[tuple[str, str], list[KeptGuest]] = {}
    for it in found:
        tests.setdefault((it.moment.nodeid, it.moment.rootdir), []).append(it)
    for (nodeid, rootdir), guests in tests.items():
        is_here = rootdir == here
        screen.parts((nodeid, "bold"), ("" if is_here else f"  ({rootdir})", "dim"))
        for it in sorted(guests, key=lambda it: it.moment.number):
            screen.parts(
                (f"  {it.guest}  {it.image}  {_moment_of(it):%Y-%m-%d %H:%M}", ""),
                (f"  {format_size(it.size_on_disk)}  QEMU {it.qemu[0]}", ""),
                (f"  {why(it)}", "red" if it.moment.outcome == "failed" else "dim"),
            )
    if unreadable := len(store.folders()) - len(found):
        screen.say(
            f"{number(unreadable)} cannot be read: damaged, or of another version. "
            "'vmsandbox kept rm --all' removes these, too",
            "yellow",
        )


@kept.command
@click.argument("nodeids", nargs=-1, metavar="[NODEID...]")
@click.option("--all", "every", is_flag=True, help="Remove all of them.")
@guest_option
def rm(*, nodeids: tuple[str, ...], every: bool, guest: str | None) -> None:
    """Remove the kept guests of tests.

    A NODEID may also be a file, a class or a folder of the project here: then it stands for all tests in
    it. A dot stands for the whole project. --all takes those of all projects.

    A guest that somebody has entered stays, and the exit status is 69.
    """
    if every == bool(nodeids) or (every and guest):
        raise ConfigError(
            "nothing to remove is named",
            remedy="give NODEIDs of tests, a dot for all of this project, or --all",
        )
    store = KeptStore(cache_dir())
    folders = store.folders() if every else []
    for nodeid in nodeids:
        if guest is not None:
            folders.append(choose(store, nodeid, guest).folder)
        else:
            below = store.below(nodeid, store.project(Path.cwd()))
            folders += [it.folder for it in below or find(store, nodeid)]
    done = store.discard(dict.fromkeys(folders))
    store.sweep()
    if done.removed or not done.in_use:
        Screen().say(f"removed: {number(done.removed)}; freed {format_size(done.freed)}")
    _check_removed(store, done)


def _check_removed(store: KeptStore, done: Discarded) -> None:
    if not done.in_use:
        return
    names = [it.moment.nodeid for key in done.in_use if (it := store.get(key.name)) is not None]
    raise CacheError(
        f"{number(len(done.in_use))} in use, and not removed",
        details="\n".join(dict.fromkeys(names)),
        remedy="leave 'vmsandbox enter', or wait for the export, then try again",
    )


@kept.command
@click.argument("nodeid")
@click.argument("file", type=click.Path(path_type=Path))
@guest_option
def export(*, nodeid: str, file: Path, guest: str | None) -> None:
    """Write a kept guest to FILE, for another machine with the same QEMU.

    FILE is new. Only you can read it. It has the guest's memory and the key that opens the guest.
    """
    store = KeptStore(cache_dir())
    it = choose(store, nodeid, guest)
    screen = Screen()
    with in_use(store, it), _new_file(file) as out:
        with screen.counting(f"writing {file.name}") as tell:
            exported.write(it, out, tell)
        size = out.tell()
    screen.say(f"wrote {file}: {format_size(size)}. Only you can read it")
    for text in [*secrets_of(it), *_left_out(it)]:
        screen.say(text)


def _left_out(it: KeptGuest) -> Iterator[str]:
    """Which guests wake together with a kept one, and are not in its file."""
    if others := [name for name in (it.group.guests if it.group else ()) if name != it.guest]:
        yield f"Not in it: {', '.join(others)}. Export them, too, if all should wake together there"


def secrets_of(it: KeptGuest) -> Iterator[str]:
    """What is in a kept guest that not everybody should read."""
    has = "the memory and the disks" if it.has_memory else "the disks"
    yield f"It has {has} of {it.guest}, and the SSH key that opens it"
    if names := it.moment.environment:
        yield f"vm_env gave the guest {', '.join(names)}: their values can be found in the file"


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file for this user only. It has its name only when it is complete.

    Raises:
        ConfigError: there is such a file, or it cannot be made.
    """
    if os.path.lexists(path):
        raise _there(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be made: {error.strerror}", remedy="name a file in a folder of yours"
        ) from error
    try:
        with os.fdopen(descriptor, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(part, path)  # unlike a renaming, it replaces nothing
        except FileExistsError:
            raise _there(path) from None
        except OSError:  # a file system without hard links
            if os.path.lexists(path):
                raise _there(path) from None
            part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _there(path: Path) -> ConfigError:
    return ConfigError(
        f"there is {path} already", remedy="name a new file, or remove that one first"
    )


@kept.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--trust", is_flag=True, help="You trust FILE and its maker, as you trust a program.")
def import_(*, file: Path, trust: bool) -> None:
    """Take a kept guest from a FILE that 'kept export' has written.

    QEMU reads the saved state of the guest. Somebody who has made a FILE by hand can attack this machine
    with it, so --trust is needed. Files and sizes are checked in any case.
    """
    store = KeptStore(cache_dir())
    screen = Screen()
    with exported.read(file, KEPT) as export:
        it = _checked(export, file)
        if not trust:
            raise _not_trusted(it, file)
        key = key_of(it.moment)
        if store.get(key) is not None:
            raise _kept_already(it)
        is_unreadable = (store.root / key).exists()
        unpacked: list[str] = []

        def fill(folder: Path, _: int) -> dict[str, object]:
            unpacked.append(key)
            with screen.counting(f"reading {file.name}") as tell:
                export.unpack(folder, tell)
            return dict(export.record)

        busy = "waiting: a run keeps the guest of this test"
        made = store.make(key, fill, on_busy=lambda: screen.say(busy), replace=is_unreadable)
    if not unpacked:  # another process was faster
        raise _kept_already(it)
    screen.say(f"imported {made.guest} of {made.moment.nodeid}: {format_size(made.size_on_disk)}")
    for text in _unusual(made):
        screen.say(text, "yellow")
    screen.say(f"enter it by: {line(made, several=len(find(store, made.moment.nodeid)) > 1)}")


def _not_trusted(it: KeptGuest, file: Path) -> ConfigError:
    it_is = (
        f"{file.name} has {it.guest} of {it.moment.nodeid}, in which {it.moment.rootdir} was tested"
    )
    return ConfigError(
        f"{file} is not imported: QEMU would read the state in it, and a state that was made for it "
        "can attack this machine",
        details="\n".join(one_line(text) for text in (it_is, *_unusual(it))),
        remedy=f"if you trust its maker: vmsandbox kept import {shlex.quote(str(file))} --trust",
    )


def _unusual(it: KeptGuest) -> Iterator[str]:
    if more := it.record["more_args"]:
        yield f"its QEMU gets further arguments, which a hook has added: {shlex.join(more)}"


def _checked(export: exported.Export, file: Path) -> KeptGuest:
    """What a file has, as far as its record can be read."""
    it = KeptGuest(folder=file, record=export.record)
    if wrong := misshapen(export.record) or harmful(export.record):
        raise ConfigError(
            f"{file.name} is no kept guest, or it is damaged: its record cannot be read ({wrong})",
            remedy="export it again where it was kept",
        )
    try:
        _described(it)
        why(it)
        list(_unusual(it))
        strange = set(_named(it.record)) - it.record["digests"].keys()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        raise ConfigError(
            f"{file.name} is no kept guest, or it is damaged: its record cannot be read ({error!r})",
            remedy="export it again where it was kept",
        ) from error
    if strange:
        raise ConfigError(
            f"{file.name} is no kept guest, or it is damaged: its record names {min(strange)!r}, which is "
            "not in it",
            remedy="export it again where it was kept",
        )
    return it


def _named(record: Mapping[str, Any]) -> Iterator[str]:
    """The files that are opened when a guest is entered, as far as its record names them."""
    yield from (name for layers in record["layers"] for name in layers)
    for disk in record["plugged"]:
        yield from disk["layers"]
        yield from () if disk["base"] is None else [disk["base"]]
    yield from (f"{TPM}/{name}" for name in record["tpm"])


def _kept_already(it: KeptGuest) -> ConfigError:
    return ConfigError(
        f"a guest of {it.moment.nodeid} in {it.moment.rootdir} is kept here already",
        remedy=f"enter that one, or remove it first: {shlex.join(['vmsandbox', 'kept', 'rm', it.moment.nodeid])}",
    )


# -- which one ------------------------------------------------------------------------------------------


def find(store: KeptStore, nodeid: str) -> list[KeptGuest]:
    """All kept guests of one test; the project here is preferred.

    Raises:
        ConfigError: there is none, or tests of several projects match.
    """
    return store.find(nodeid, store.project(Path.cwd()))


def choose(store: KeptStore, nodeid: str, guest: str | None) -> KeptGuest:
    """The kept guest of a test.

    Args:
        guest: its name, or that of a machine of a cluster: ``db1`` for ``db1-4``. None if the test had
            only one.

    Raises:
        ConfigError: there is none, or there are several.
    """
    found = find(store, nodeid)
    chosen = [it for it in found if guest in (None, it.guest)]
    chosen = chosen or [it for it in found if it.guest.rpartition("-")[0] == guest]
    if len(chosen) == 1:
        return chosen[0]
    details = "\n".join(f"  {it.guest}  ({it.image})  {line(it, several=True)}" for it in found)
    if chosen:
        raise ConfigError(
            f"{len(chosen)} guests of {found[0].moment.nodeid} are kept",
            details=details,
            remedy="name one of them with --guest",
        )
    raise ConfigError(
        f"no guest {guest!r} of {found[0].moment.nodeid} is kept",
        details=details,
        remedy="name one of these with --guest",
    )


@contextmanager
def in_use(store: KeptStore, it: KeptGuest) -> Iterator[None]:
    """While this lasts, nobody removes a kept guest.

    Raises:
        ConfigError: somebody has just removed it.
    """
    try:
        with store.hold(it.folder):
            yield
    except FileNotFoundError as error:
        if it.folder.exists():
            raise
        raise ConfigError(
            f"{it.moment.nodeid} was removed meanwhile",
            remedy="'vmsandbox kept list' has the others",
        ) from error


# -- for people -----------------------------------------------------------------------------------------


def line(it: KeptGuest, *, several: bool) -> str:
    """The command that enters it, for a shell."""
    which = ["--guest", it.guest] if several else []
    return shlex.join(["vmsandbox", "enter", it.moment.nodeid, *which])


def why(it: KeptGuest) -> str:
    """How its test ended."""
    moment = it.moment
    if moment.outcome != "failed":
        return "passed"
    error = one_line(moment.error) or "failed"
    return error if moment.phase == "call" else f"{moment.phase}: {error}"


def number(count: int) -> str:
    """So many kept guests."""
    return f"{count} kept guest{'' if count == 1 else 's'}"


def by_image(cache: Path) -> dict[str, list[int]]:
    """The sizes of the kept guests of each image, in bytes."""
    sizes: dict[str, list[int]] = {}
    for it in sorted(KeptStore(cache).all(), key=lambda it: it.image):
        sizes.setdefault(it.image, []).append(it.size_on_disk)
    return sizes


def total(sizes: Sequence[int]) -> str:
    """So many kept guests, and their size on the disk."""
    return f"{number(len(sizes))} of tests ({format_size(sum(sizes))})"


def _moment_of(it: KeptGuest) -> datetime:
    return datetime.fromtimestamp(it.saved_at, UTC).astimezone()


def _described(it: KeptGuest) -> dict[str, Any]:
    moment = it.moment
    return {
        "test": moment.nodeid,
        "rootdir": moment.rootdir,
        "guest": it.guest,
        "number": moment.number,
        "together": [] if it.group is None else list(it.group.guests),
        "image": it.image,
        "saved_at": _moment_of(it).isoformat(timespec="seconds"),
        "phase": moment.phase,
        "outcome": moment.outcome,
        "error": moment.error,
        "has_memory": it.has_memory,
        "answers": it.answers,
        "stands": moment.stands,
        "environment": list(moment.environment),
        "qemu": it.qemu[0],
        "accelerator": it.accelerator,
        "size_bytes": it.size_on_disk,
        "folder": os.fspath(it.folder),
    }
