"""What is installed in a guest for the tests that run there, prepared on this machine.

A guest has Python, but neither pip nor a network. So the distributions that tests need are resolved
and unpacked here, kept in the cache, and pushed as files. uv does that, for the guest's Python and
platform, from wheels: nothing of them is run, and this process's own environment is not touched.
Where there are sources only, the wheel is made here, of what is installed here or of what uv builds.

A failure is a `TransferError`: files that the guest needs could not be brought there. What is
invalid is a `ConfigError`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pytest_vmsandbox.cache.store import ENVIRONMENTS, Entry, Store
from pytest_vmsandbox.core.errors import CommandError, TransferError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.inside.distributions import installed, is_imported, make_wheel, move_programs
from pytest_vmsandbox.inside.requirements import SETTING, Requirements
from pytest_vmsandbox.inside.wire import broken

OLDEST_PYTHON = (3, 9)
_PROBE = Path(__file__).with_name("runner") / "probe.py"
_GLIBC = (17, 28, *range(31, 41))  # minor versions that uv has a platform of
_MACHINES = ("x86_64", "aarch64")
_DETAILS_LIMIT = 8_000  # characters of uv's own text in an error
# uv's variables that contradict the arguments it is given here.
_NOT_FOR_UV = ("UV_COMPILE_BYTECODE", "UV_REQUIRE_HASHES", "UV_WORKING_DIR")
_NO_WHEEL = re.compile(
    r"wheels are (?:required|available) for `(?P<a>[^`]+)`"
    r"|found wheels for `(?P<b>[^`]+)`"
    r"|(?:^|\s)(?P<c>[a-z0-9][a-z0-9._-]*)(?:\[[^\]]*\])?(?:[=<>!~]\S*)?"
    r" ha(?:s|ve) no (?:usable )?wheels",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class GuestPython:
    """The Python of a guest.

    Args:
        version: the first three of its ``sys.version_info``.
        machine: its ``platform.machine()``.
        libc: the version of its glibc, such as (2, 41); empty if it is another C library.
    """

    version: tuple[int, ...]
    machine: str
    libc: tuple[int, ...]

    def __str__(self) -> str:
        return _dotted(self.version)

    @property
    def platform(self) -> str:
        """What uv calls it. The newest glibc that uv knows stands for newer ones.

        Raises:
            TransferError: there are no wheels for it, or no pytest.
        """
        if self.version < OLDEST_PYTHON:
            raise TransferError(
                f"the guest's Python {self} is too old:"
                f" tests in a guest need {_dotted(OLDEST_PYTHON)} or newer",
                remedy="choose an image with a newer Python",
            )
        known = [minor for minor in _GLIBC if (2, minor) <= self.libc]
        if self.machine not in _MACHINES or not known:
            libc = f"glibc {_dotted(self.libc)}" if self.libc else "no glibc"
            raise TransferError(
                f"there are no wheels for the guest: it is {self.machine} with {libc}",
                remedy=f"choose an image for {' or '.join(_MACHINES)}, with glibc 2.{_GLIBC[0]} or newer",
            )
        return f"{self.machine}-manylinux_2_{known[-1]}"


def probe(guest: Guest) -> tuple[GuestPython, str]:
    """Ask a guest for its Python, and the path of it.

    Raises:
        TransferError: it has no Python that works.
        GuestLost: the guest is gone.
    """
    try:
        done = guest.run(["python3", "-I", "-S", "-"], input=_PROBE.read_text("utf-8"))
    except CommandError as error:
        raise TransferError(
            f"{guest.name} has no Python that works",
            details=error.details,
            remedy="tests run inside guests that have Python 3.9 or newer. Other guests can be "
            "driven from here, with the fixture vm",
        ) from error
    return parse_probe(done.stdout)


def parse_probe(text: str) -> tuple[GuestPython, str]:
    """What ``runner/probe.py`` has printed.

    Raises:
        GuestLost: it is anything else.
    """
    try:
        facts = json.loads(text)
        libc = str(facts["libc"][1]).split(".")[:2]
        python = GuestPython(
            version=tuple(map(int, facts["version"]))[:3],
            machine=str(facts["machine"]),
            libc=tuple(int(part) for part in libc if part.isdecimal()),
        )
        return python, str(facts["executable"])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise broken("no facts about its Python", text) from error


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# -- what is kept -----------------------------------------------------------------------------------


@contextmanager
def prepare(
    requirements: Requirements,
    python: GuestPython,
    *,
    offline: bool,
    say: Callable[[str], object],
    tell: Callable[[str], object] = lambda _: None,
) -> Iterator[Entry]:
    """Have a guest's environment in the cache, and keep it there. If it is there, uv is not needed.

    What goes into the folders site-packages and bin of `distributions.ENV` is in folders of these
    names.

    Args:
        requirements: what it holds.
        python: what it is for.
        offline: use only what uv has in its own cache.
        say: is told what takes long.
        tell: is told that it was damaged, and is made anew.

    Raises:
        TransferError: it cannot be made: uv is missing, a distribution has no wheel for the guest,
            the package index cannot be reached.
        CacheError: it cannot be kept.
        TeardownError: what was made in vain cannot be removed.
    """
    store = Store(cache_dir(), ENVIRONMENTS, Entry)
    digest = requirements.digest(python)

    def fill(folder: Path, lock: int) -> dict[str, object]:
        say(f"preparing the packages for the guest's Python {python}")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            uv = Uv(requirements, python, offline=offline, lock=lock, work=Path(work), tell=tell)
            resolved = uv.resolve()
            uv.install(resolved, folder / "site-packages")
            move_programs(folder / "site-packages", folder / "bin")
            shutil.copyfile(resolved, folder / "requirements.txt")  # for people
        return {}

    with ExitStack() as stack:
        environment, why = store.get(digest), store.unreadable(digest)
        if environment is not None:
            with suppress(FileNotFoundError):  # another run removes it, to make room
                stack.enter_context(store.hold(environment.folder))
            if why := environment.damage():
                store.throw_away(digest, environment)
                environment = None
        if why:
            tell(f"the packages for the guest were damaged ({why}); they are made anew")
        if environment is None:
            on_busy = "waiting for another run that is preparing packages for a guest"
            environment = store.make(digest, fill, on_busy=lambda: say(on_busy))
            stack.enter_context(store.hold(environment.folder))
        yield environment


# -- uv ---------------------------------------------------------------------------------------------


@dataclass
class Uv:
    """uv, as a program, which finds out which distributions a guest needs, and unpacks them.

    Args:
        requirements: what is resolved.
        python: for whom.
        offline: use only uv's cache.
        lock: a descriptor that uv inherits: while it runs, the lock is held.
        work: an empty folder for files of ours.
        tell: is told what is left out.
    """

    requirements: Requirements
    python: GuestPython
    offline: bool
    lock: int
    work: Path
    tell: Callable[[str], object]
    _without_wheel: set[str] = field(default_factory=set, init=False)  # uv complained of them last

    def resolve(self) -> Path:
        """Write the versions of all that is to be installed into a file.

        Where something has no wheel, one is made here if it is pure Python; else it is left out if
        nobody has imported it here.

        Raises:
            TransferError: the requirements cannot be met, uv is missing, or it has nothing for that
                Python.
        """
        self._wheels.mkdir()
        tried: set[str] = set()
        while True:
            try:
                return self._compile()
            except TransferError:
                names = self._without_wheel - tried
                if not names or not all(map(self._do_without_index, sorted(names))):
                    raise
                tried |= names

    def install(self, resolved: Path, target: Path) -> None:
        """Unpack the wheels of what `resolve` found into the folder `target`, which is made.

        Raises:
            TransferError: one of them cannot be had.
        """
        self._run(
            "install",
            *("--no-deps", "--no-compile-bytecode"),
            *("--link-mode", "copy"),  # uv's cache shares no file with ours
            *("--target", os.fspath(target)),
            *("--requirements", os.fspath(resolved)),
        )
        (target / ".lock").unlink(missing_ok=True)

    @property
    def _wheels(self) -> Path:
        """The folder of wheels that were made here."""
        return self.work / "wheels"

    def _do_without_index(self, name: str) -> bool:
        """Make the wheel of a distribution that the index does not have, or leave it out."""
        here = installed().get(name)
        wanted = self.requirements.lines_of(name)
        allowed = [Requirement(line).specifier for line in wanted]
        if not here or not all(one.contains(here.version, prereleases=True) for one in allowed):
            return not self.offline and self._build(name, wanted or [name])
        if make_wheel(here, self._wheels) is not None:
            return True
        if is_imported(name):
            return False
        self.requirements = self.requirements.without(name)
        self.tell(
            f"{name} is not in the guest: it has no wheel for the guest's Python, and no test here "
            "has imported it yet"
        )
        return True

    def _build(self, name: str, wanted: Sequence[str]) -> bool:
        """Let uv build a distribution here; False if that does not work, or it is not pure Python."""
        target = self.work / f"built-{name}"
        arguments = ["--no-deps", "--no-binary", name, "--target", os.fspath(target), *wanted]
        try:
            self._run("install", *arguments, only_wheels=False)
        except TransferError:
            return False
        built = installed([os.fspath(target)]).get(name)
        return built is not None and make_wheel(built, self._wheels) is not None

    def _compile(self) -> Path:
        requirements = self.requirements
        dropped = [f"{name} ; python_version < '3'" for name in requirements.dropped]
        # uv keeps to the versions that its output names already, as far as it can.
        resolved = self._write("resolved.txt", requirements.preferred)
        self._run(
            "compile",
            *("--no-header", "--no-annotate", "--no-universal"),
            *("--overrides", os.fspath(self._write("drop.txt", dropped))),
            *("--output-file", os.fspath(resolved)),
            *requirements.options,
            os.fspath(self._write("asked.in", requirements.lines)),
            *requirements.files,
        )
        return resolved

    def _write(self, name: str, lines: Iterable[str]) -> Path:
        file = self.work / name
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return file

    def _run(self, command: str, *arguments: str, only_wheels: bool = True) -> None:
        wheels = ["--only-binary", ":all:", "--python-version", str(self.python)]
        wheels += ["--python-platform", self.python.platform]
        # Folders of wheels besides the index. For uv, an argument would replace the variable.
        theirs = filter(None, os.environ.get("UV_FIND_LINKS", "").split(","))
        folders = (*theirs, os.fspath(self._wheels))
        done = subprocess.run(
            [
                *(_find_uv(), "pip", command, "--quiet", "--no-progress", "--color", "never"),
                *("--python", sys.executable, "--no-python-downloads"),
                *(wheels if only_wheels else []),
                *(word for folder in folders for word in ("--find-links", folder)),
                *(["--offline"] if self.offline else []),
                *arguments,
            ],
            cwd=self.requirements.root,
            env={name: value for name, value in os.environ.items() if name not in _NOT_FOR_UV},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[self.lock],
            check=False,
        )
        if done.returncode:
            text = printable(done.stderr.decode(errors="replace")).strip()
            raise self._error(text or f"uv ended with status {done.returncode}")

    def _error(self, text: str) -> TransferError:
        no_network = self.offline and "network was disabled" in text.replace("\n", " ")
        found = {name for match in _NO_WHEEL.findall(text) for name in match if name}
        self._without_wheel = set() if no_network else {*map(canonicalize_name, found)}
        brief = "the packages for the guest cannot be had"
        remedy = (
            f"name other requirements in {SETTING}, or another package index in"
            " UV_DEFAULT_INDEX or uv.toml"
        )
        if no_network:
            brief = "the run is offline, and uv's cache does not hold all packages for the guest"
            remedy = "run these tests once with the network"
        elif found:
            python = "{}.{}".format(*self.python.version)
            names = ", ".join(sorted(found))
            brief = f"no wheel for the guest (Python {python}, {self.python.machine}) of: {names}"
            remedy = (
                f"name in {SETTING} what the tests need in the guest, without it, or build a wheel"
                " of it for that Python and name its folder in UV_FIND_LINKS"
            )
        details = text if len(text) <= _DETAILS_LIMIT else f"{text[:_DETAILS_LIMIT]}…"
        return TransferError(brief, details=details, remedy=remedy)


def _find_uv() -> str:
    """The path of uv's program.

    Raises:
        TransferError: it is missing.
    """
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError) as error:
        raise TransferError(
            "uv is missing: it gets the packages for tests in a guest",
            details=str(error),
            remedy=f"{sys.executable} -m pip install uv",
        ) from error
