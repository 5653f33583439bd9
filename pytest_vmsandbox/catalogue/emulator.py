"""The emulator for single programs of another architecture: installed, or unpacked into the cache."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.cache.store import EMULATORS, IN_USE, Entry, Store
from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.catalogue.making import run_to_end
from pytest_vmsandbox.core.architecture import ARCHITECTURES, Architecture
from pytest_vmsandbox.core.errors import ImageError

VARIABLE = "VMSANDBOX_EMULATOR"  # tells a recipe where the emulator is
REGISTRATION = "VMSANDBOX_BINFMT"  # tells it what to write into a binfmt_misc of its own
NONE = "none"  # as the emulator: programs of the image cannot run here
HIDING = "VMSANDBOX_NO_BINFMT"  # of the user: as if the kernel had no binfmt_misc for us
PACKAGES = ("qemu-user-static", "qemu-user")  # until Debian 12, and since: both are static there
_SECONDS = 600.0  # for one call of apt
_HEAD = 4096  # bytes of a program that name its dynamic linker
_APART = (  # a command line that starts a program where no emulator is registered
    *("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc", "sh"),
    *("-c", 'mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc && exec "$@"', "sh"),
)
_FLAGS = "OCF"  # the emulator is opened at once, so no path in the image's tree matters
_SEPARATORS = ":|;,\x1f"  # between the parts of a registration: the first one that the path lacks
_MOST_ERRORS = 20  # lines of apt in an error


def emulator(
    architecture: str, cache: Path, *, say: Callable[[str], object] = lambda _: None
) -> str:
    """The path of a static emulator for programs of an architecture.

    Args:
        architecture: one of `core.architecture.ARCHITECTURES`.
        cache: the user's cache. What apt delivers is only unpacked there, never installed.
        say: gets lines for people about long waits.

    Raises:
        ImageError: the emulator is not here, and apt does not deliver it.
        CacheError: it cannot be kept.
    """
    wanted = ARCHITECTURES[architecture]
    if (installed := _installed(wanted)) is not None:
        return installed
    store: Store[Entry] = Store(cache, EMULATORS, Entry)
    kept = store.get(wanted.user)
    if kept is not None and kept.damage():
        store.throw_away(wanted.user, kept)
        kept = None
    if kept is None:
        kept = store.make(
            wanted.user,
            _Unpacker(wanted, store, say).fill,
            on_busy=lambda: say(
                f"waiting: another process fetches the emulator of {wanted.debian}"
            ),
        )
    with suppress(OSError):  # the cache may be read-only
        os.utime(kept.folder / IN_USE)
    return os.fspath(kept.folder / _names(wanted)[0])


def registration(architecture: str, path: str) -> str:
    """What registers an emulator with binfmt_misc for the programs of an architecture.

    Args:
        path: where the emulator is.
    """
    wanted = ARCHITECTURES[architecture]
    width, order, machine = wanted.elf
    little = order == 1
    kind, number = (value.to_bytes(2, "little" if little else "big") for value in (2, machine))
    magic = b"\x7fELF" + bytes((width, order, 1)) + bytes(9) + kind + number
    # Programs and shared objects, for any kind of Unix.
    mask = (
        b"\xff" * 7 + b"\0" + b"\xff" * 8 + (b"\xfe\xff" if little else b"\xff\xfe") + b"\xff\xff"
    )
    texts = ("".join(f"\\x{byte:02x}" for byte in part) for part in (magic, mask))
    separator = next((sign for sign in _SEPARATORS if sign not in path), _SEPARATORS[0])
    return separator.join(("", f"qemu-{wanted.user}", "M", "", *texts, path, _FLAGS))


def can_register() -> bool:
    """Whether a user name space can have a binfmt_misc of its own here: Linux can since 6.7."""
    return not os.environ.get(HIDING) and _succeeds([*_APART, "true"])


def runs(program: str) -> bool:
    """Whether this machine runs a program of ours. An emulator that the machine has registered does not count."""
    apart = _APART if _succeeds([*_APART, "true"]) else ()
    return _succeeds([*apart, program, "--about"])


def _succeeds(argv: Sequence[str]) -> bool:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def is_static(program: Path) -> bool:
    """Whether a program needs no dynamic linker, so that it runs in any tree."""
    with program.open("rb") as stream:
        head = stream.read(_HEAD)
    return head[:4] == b"\x7fELF" and b"/ld" not in head


def _installed(wanted: Architecture) -> str | None:
    for name in _names(wanted):
        path = programs.find(name)
        if path is not None and is_static(Path(path)):
            return path
    return None


def _names(wanted: Architecture) -> tuple[str, str]:
    return f"qemu-{wanted.user}-static", f"qemu-{wanted.user}"


@dataclass(frozen=True)
class _Unpacker:
    """Fetches the emulator for the store."""

    wanted: Architecture
    store: Store[Entry]
    say: Callable[[str], object]

    def fill(self, folder: Path, lock: int) -> dict[str, object]:
        """Put the emulator into a folder. Returns the content of the record."""
        if programs.find("apt-get") is None or programs.find("dpkg-deb") is None:
            raise self._error(f"there is no {_names(self.wanted)[0]}, and no apt to fetch it")
        self.say(
            f"fetching the emulator for programs of {self.wanted.debian}: apt downloads {PACKAGES[0]} "
            f"or {PACKAGES[1]}, tens of megabytes, once"
        )
        told: dict[str, None] = {}  # each line of what has failed, once

        def call(*argv: str) -> bool:
            why = _call(argv, work, lock)
            told.update(dict.fromkeys(why.splitlines()))
            return not why

        with self.store.work_folder(self.wanted.user, Path(tempfile.gettempdir())) as work:
            for package, options in _attempts(work, call):
                call("apt-get", "-qq", *options, "download", package)
                for archive in sorted(work.glob(f"{package}_*.deb")):
                    is_unpacked = call("dpkg-deb", "--extract", archive.name, "tree")
                    if is_unpacked and (found := self._found(work / "tree")) is not None:
                        found.rename(folder / _names(self.wanted)[0])
                        return {"archive": archive.name}
        details = "\n".join([*told][:_MOST_ERRORS])
        raise self._error("apt does not deliver the emulator", details)

    def _found(self, tree: Path) -> Path | None:
        files = (tree / "usr/bin" / name for name in _names(self.wanted))
        return next((file for file in files if file.is_file() and is_static(file)), None)

    def _error(self, why: str, details: str = "") -> ImageError:
        return ImageError(
            f"programs of {self.wanted.debian} do not run here: {why}",
            details=details,
            remedy=f"{programs.install_line(PACKAGES[:1])} (since Debian 13: {PACKAGES[1]}). Or set "
            f"{HIDING}=1: then a guest does what needs such programs",
        )


def _attempts(work: Path, call: Callable[..., object]) -> Iterator[tuple[str, Sequence[str]]]:
    """The packages to ask for: by the lists that apt has here, then by lists of our own, which `call` gets."""
    common = ("-o", "APT::Sandbox::User=", "-o", "APT::Get::AllowUnauthenticated=false")
    for package in PACKAGES:
        yield package, common
    state, cache = work / "state", work / "cache"
    for folder in (state / "lists/partial", cache / "archives/partial"):
        folder.mkdir(parents=True)
    own = (
        *common,
        *("-o", f"Dir::State={state}", "-o", "Dir::State::status=/dev/null"),
        *("-o", f"Dir::Cache={cache}", "-o", "Acquire::Languages=none"),
    )
    call("apt-get", "-qq", *own, "update")
    for package in PACKAGES:
        yield package, own


def _call(argv: Sequence[str], work: Path, lock: int) -> str:
    """Run a program in a folder. Returns why it failed; empty if it did not."""
    env = {**os.environ, "LC_ALL": "C.UTF-8", "PATH": programs.search_path()}
    why = run_to_end(argv, work, env, lock, _SECONDS).why
    return f"{argv[0]}: {why}" if why else ""
