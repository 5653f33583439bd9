"""Prepares on this machine what is installed in guests for tests inside.

A guest has Python, but neither pip nor a network. So uv resolves and unpacks the distributions here,
for the guest's Python and platform. We keep them in the cache and push them as files. uv uses wheels:
it runs none of their code, and does not touch this process's environment. For a distribution without
wheels, we make a wheel from what is installed here or from what uv builds.

A failure is a `TransferError`. Invalid input is a `ConfigError`.
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
from pytest_vmsandbox.core.architecture import ARCHITECTURES, of_programs
from pytest_vmsandbox.core.errors import CommandError, TransferError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.inside import stand_in
from pytest_vmsandbox.inside.distributions import installed, is_imported, make_wheel, move_programs
from pytest_vmsandbox.inside.requirements import SETTING, Requirements
from pytest_vmsandbox.inside.wire import broken

OLDEST_PYTHON = (3, 9)
_PROBE = Path(__file__).with_name("runner") / "probe.py"
_GLIBC = (17, 28, *range(31, 41))  # minor versions for which uv has a platform
_OLDEST_GLIBC = (2, 17)  # that wheels are for
_DETAILS_LIMIT = 8_000  # characters of uv's own text in an error
# uv's variables that contradict our arguments.
_NOT_FOR_UV = ("UV_COMPILE_BYTECODE", "UV_REQUIRE_HASHES", "UV_WORKING_DIR")
# As uv says it of packages; and of files, repositories and lists of requirements.
_OFFLINE = re.compile(r"(?i)network\s+(?:connectivity\s+is|was)\s+disabled")
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
        machine: the architecture of its programs, one of `core.architecture.ARCHITECTURES`. Another
            machine has the name that ``platform.machine()`` says.
        libc: the version of its glibc, such as (2, 41); empty if it is another C library.
    """

    version: tuple[int, ...]
    machine: str
    libc: tuple[int, ...]

    def __str__(self) -> str:
        return _dotted(self.version)

    def check(self) -> None:
        """Check that tests can run with it.

        Raises:
            TransferError: there are no wheels or no pytest for it.
        """
        if self.version < OLDEST_PYTHON:
            raise TransferError(
                f"Python {self} in the guest is too old: tests inside guests need Python"
                f" {_dotted(OLDEST_PYTHON)} or newer",
                remedy="use an image with a newer Python",
            )
        if self.machine not in ARCHITECTURES or self.libc < _OLDEST_GLIBC:
            libc = f"glibc {_dotted(self.libc)}" if self.libc else "no glibc"
            raise TransferError(
                f"there are no wheels for the guest: it is {self.machine} with {libc}",
                remedy=f"use an image for {' or '.join(ARCHITECTURES)} with glibc"
                f" {_dotted(_OLDEST_GLIBC)} or newer",
            )

    def for_uv(self, folder: Path) -> list[str]:
        """The arguments of uv that name this Python and its platform.

        Args:
            folder: for an interpreter that stands in for it, if uv has no name for the platform.
        """
        version = ["--python-version", str(self)]
        if (platform := self._platform) is not None:
            return ["--python", sys.executable, *version, "--python-platform", platform]
        if not folder.exists():
            stand_in.make(folder, self.machine, _dotted(self.libc))
        return ["--python", os.fspath(folder / "bin" / "python"), *version]

    @property
    def _platform(self) -> str | None:
        """The name of this platform for uv; of the newest glibc that it knows. None if it has no name."""
        if not ARCHITECTURES[self.machine].in_uv:
            return None
        known = [minor for minor in _GLIBC if (2, minor) <= self.libc]
        return f"{self.machine}-manylinux_2_{known[-1]}"


def probe(guest: Guest) -> tuple[GuestPython, str]:
    """The Python of a guest, and its path.

    Raises:
        TransferError: the guest has no Python that works.
        GuestLost: the guest is gone.
    """
    try:
        done = guest.run(["python3", "-I", "-S", "-"], input=_PROBE.read_text("utf-8"))
    except CommandError as error:
        raise TransferError(
            f"python3 does not work in {guest.name}",
            details=error.details,
            remedy="use an image with Python 3.9 or newer. Without Python, you can drive a guest by the "
            "fixture vm",
        ) from error
    return parse_probe(done.stdout)


def parse_probe(text: str) -> tuple[GuestPython, str]:
    """Parse the output of ``runner/probe.py``.

    Raises:
        GuestLost: the output is invalid.
    """
    try:
        facts = json.loads(text)
        libc = str(facts["libc"][1]).split(".")[:2]
        python = GuestPython(
            version=tuple(map(int, facts["version"]))[:3],
            machine=of_programs(str(facts["machine"]), int(facts["bits"])),
            libc=tuple(int(part) for part in libc if part.isdecimal()),
        )
        return python, str(facts["executable"])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise broken("it did not describe its Python", text) from error


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
    """Hold a guest's environment in the cache. It is made with uv if it is not there.

    Its folders site-packages and bin go into the folders with these names in `distributions.ENV`.

    Args:
        requirements: what to install.
        python: the Python to install it for.
        offline: use only uv's own cache.
        say: gets lines about long waits.
        tell: gets a line if the environment was damaged and is made again.

    Raises:
        TransferError: it cannot be made: uv is missing, a distribution has no wheel for the guest, or
            the package index cannot be reached.
        CacheError: it cannot be kept.
        TeardownError: making it failed, and what was made cannot be removed.
    """
    python.check()
    store = Store(cache_dir(), ENVIRONMENTS, Entry)
    digest = requirements.digest(python)

    def fill(folder: Path, lock: int) -> dict[str, object]:
        say(f"preparing packages for Python {python} in guests")
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
            with suppress(FileNotFoundError):  # another run has removed it to make room
                stack.enter_context(store.hold(environment.folder))
            if why := environment.damage():
                store.throw_away(digest, environment)
                environment = None
        if why:
            tell(f"the cached packages for guests were damaged ({why}), so they are prepared again")
        if environment is None:
            on_busy = "waiting: another run is preparing packages for guests"
            environment = store.make(digest, fill, on_busy=lambda: say(on_busy))
            stack.enter_context(store.hold(environment.folder))
        yield environment


# -- uv ---------------------------------------------------------------------------------------------


@dataclass
class Uv:
    """Runs the program uv, which resolves and unpacks distributions for a guest.

    Args:
        requirements: what to resolve.
        python: the Python to resolve it for.
        offline: use only uv's cache.
        lock: a descriptor that uv inherits, so the lock is held while uv runs.
        work: an empty folder for our files.
        tell: gets a line for each distribution that is left out.
    """

    requirements: Requirements
    python: GuestPython
    offline: bool
    lock: int
    work: Path
    tell: Callable[[str], object]
    _without_wheel: set[str] = field(default_factory=set, init=False)  # from uv's last error

    def resolve(self) -> Path:
        """Resolve the requirements to versions. Returns a file with them.

        If a distribution has no wheel, we make one here if it is pure Python. If not, it is left out,
        unless somebody has imported it here.

        Raises:
            TransferError: the requirements cannot be met, uv is missing, or it knows no such Python.
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
        """Unpack the wheels that `resolve` found into the new folder `target`.

        Raises:
            TransferError: a wheel cannot be downloaded.
        """
        self._run(
            "install",
            *("--no-deps", "--no-compile-bytecode"),
            *("--link-mode", "copy"),  # our cache must not share files with uv's
            *("--target", os.fspath(target)),
            *("--requirements", os.fspath(resolved)),
        )
        (target / ".lock").unlink(missing_ok=True)

    @property
    def _wheels(self) -> Path:
        """The folder of wheels that were made here."""
        return self.work / "wheels"

    def _do_without_index(self, name: str) -> bool:
        """Make a wheel that the index does not have, or leave the distribution out."""
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
            f"{name} is not installed in guests: it has no wheel for their Python, and nothing has "
            "imported it on this machine"
        )
        return True

    def _build(self, name: str, wanted: Sequence[str]) -> bool:
        """Let uv build a distribution here. Returns False if that fails, or it is not pure Python."""
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
        # uv prefers the versions that are in its output file already.
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
        here = ["--python", sys.executable]
        there = ["--only-binary", ":all:", *self.python.for_uv(self.work / "python")]
        # Folders with further wheels. The argument replaces uv's variable, so we repeat its value.
        theirs = filter(None, os.environ.get("UV_FIND_LINKS", "").split(","))
        folders = (*theirs, os.fspath(self._wheels))
        done = subprocess.run(
            [
                *(_find_uv(), "pip", command, "--quiet", "--no-progress", "--color", "never"),
                "--no-python-downloads",
                *(there if only_wheels else here),
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
        no_network = self.offline and _OFFLINE.search(text) is not None
        found = {name for match in _NO_WHEEL.findall(text) for name in match if name}
        self._without_wheel = set() if no_network else {*map(canonicalize_name, found)}
        brief = "uv cannot get the packages for the guest"
        remedy = (
            f"change the requirements in {SETTING} (ini file), or set another package index in"
            " UV_DEFAULT_INDEX or uv.toml"
        )
        if no_network:
            brief = "the run is offline, and uv's cache does not have all packages for the guest"
            remedy = "run these tests once without --vm-offline"
        elif found:
            python = "{}.{}".format(*self.python.version)
            names = ", ".join(sorted(found))
            brief = f"no wheel for the guest (Python {python}, {self.python.machine}) of: {names}"
            remedy = (
                f"list in {SETTING} (ini file) what the tests need in the guest, without {names}; or"
                " build a wheel for that Python and name its folder in UV_FIND_LINKS"
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
            "uv is missing. It is needed to get the packages for tests inside guests",
            details=str(error),
            remedy=f"install it: {sys.executable} -m pip install uv",
        ) from error
