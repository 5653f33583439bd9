"""uv, which finds out which distributions a guest needs, and unpacks them here.

It resolves for the guest's Python and platform, from wheels: nothing of them is run, and this
process's own environment is not touched. Where there are sources only, the wheel is made here, of
what is installed here or of what uv builds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pytest_vmsandbox.core.errors import TransferError
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.inside.distributions import installed, is_imported
from pytest_vmsandbox.inside.guest_python import GuestPython
from pytest_vmsandbox.inside.requirements import SETTING, Requirements
from pytest_vmsandbox.inside.wheels import make_wheel

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


@dataclass
class Uv:
    """uv, as a program.

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
            *self._links(),
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
        if here is None or not all(_allows(line, here.version) for line in wanted):
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
            *self._links(),
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

    def _links(self) -> list[str]:
        """The folders of wheels besides the index; for uv, an argument would replace the variable."""
        theirs = filter(None, os.environ.get("UV_FIND_LINKS", "").split(","))
        folders = (*theirs, os.fspath(self._wheels))
        return [word for folder in folders for word in ("--find-links", folder)]

    def _run(self, command: str, *arguments: str, only_wheels: bool = True) -> None:
        wheels = ["--only-binary", ":all:", "--python-version", str(self.python)]
        wheels += ["--python-platform", self.python.platform]
        done = subprocess.run(
            [
                *(_find_uv(), "pip", command, "--quiet", "--no-progress", "--color", "never"),
                *("--python", sys.executable, "--no-python-downloads"),
                *(wheels if only_wheels else []),
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
        else:
            brief = "the packages for the guest cannot be had"
            remedy = (
                f"name other requirements in {SETTING}, or another package index in"
                " UV_DEFAULT_INDEX or uv.toml"
            )
        details = text if len(text) <= _DETAILS_LIMIT else f"{text[:_DETAILS_LIMIT]}…"
        return TransferError(brief, details=details, remedy=remedy)


def _allows(requirement: str, version: str) -> bool:
    return Requirement(requirement).specifier.contains(version, prereleases=True)


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
