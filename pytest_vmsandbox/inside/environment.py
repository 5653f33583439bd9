"""What is installed in a guest for the tests that run there, prepared on this machine.

A guest has Python, but neither pip nor a network. The distributions that tests need are resolved
here by uv for the guest's Python and platform, from wheels: nothing of them is run, and this
process's own environment is not touched. They are kept in the cache and pushed as files. Where there
are sources only, the wheel is made here, of what is installed here or of what uv builds.

A failure is a `TransferError`: files that the guest needs could not be brought there. What cannot
be meant is a `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from pytest_vmsandbox.core.errors import ConfigError, TransferError
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.inside.environments_store import RESOLVED, EnvironmentsStore
from pytest_vmsandbox.inside.wheels import make_wheel

ENV = "/opt/vmsandbox/env"  # the virtual environment in the guest
OURSELVES = "pytest-vmsandbox"
SETTING = "vm_requirements"

# What the mirror of this machine's environment leaves out, and with it what nothing else needs.
LEFT_OUT = frozenset(
    {
        OURSELVES,
        # They install, and nothing can be installed from within a guest.
        "pip",
        "uv",
        "wheel",
        # They start test runs, or look at the sources.
        "mypy",
        "nox",
        "pre-commit",
        "ruff",
        "tox",
        # Plugins that select tests, which is done here.
        "pytest-picked",
        "pytest-shard",
        "pytest-split",
        "pytest-testmon",
    }
)
# Plugins that do their work where the run is: here. They are installed in the guest, for conftest
# files that import them, and not loaded there.
HOST_ONLY = frozenset(
    {
        "pytest-cov",
        "pytest-forked",
        "pytest-reportlog",
        "pytest-timeout",
        "pytest-xdist",
    }
)

_FORMAT = 2  # goes into each digest: raise it when what is made of the same input changes
_OLDEST_PYTHON, _OLDEST_PYTEST = (3, 9), "8.4"  # the latter needs the former
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
_NESTED = re.compile(r"^\s*(?:-r|-c|--requirement|--constraint)[=\s]*(\S+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class GuestPython:
    """The Python of a guest.

    Args:
        version: the first three of its ``sys.version_info``.
        machine: its ``platform.machine()``.
        libc: the version of its glibc, such as (2, 41).
    """

    version: tuple[int, int, int]
    machine: str
    libc: tuple[int, int]

    @property
    def platform(self) -> str:
        """What uv calls it; the newest glibc that uv knows stands for newer ones.

        Raises:
            TransferError: there are no wheels for it, or no pytest.
        """
        text = ".".join(map(str, self.version))
        if self.version < _OLDEST_PYTHON:
            oldest = ".".join(map(str, _OLDEST_PYTHON))
            raise TransferError(
                f"the guest's Python {text} is too old: tests in a guest need {oldest}",
                remedy="an image with a newer Python",
            )
        known = [minor for minor in _GLIBC if (2, minor) <= self.libc]
        if self.machine not in _MACHINES or not known:
            libc = ".".join(map(str, self.libc))
            raise TransferError(
                f"there are no wheels for the guest: it is {self.machine} with glibc {libc}",
                remedy=f"an image for {' or '.join(_MACHINES)}, with glibc 2.{_GLIBC[0]} or newer",
            )
        return f"{self.machine}-manylinux_2_{known[-1]}"


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a guest's environment is to hold; `of_host` and `of_entries` make it.

    Args:
        root: the project's folder. uv is started there and finds its settings from there.
        lines: PEP 508 requirements; the first is that of pytest.
        preferred: ``name==version`` of what is taken where nothing speaks against it.
        dropped: names that are not installed, whoever needs them.
        files: further sources for uv (files of requirements, pyproject.toml), relative to `root`.
        options: further arguments of ``uv pip compile``.
        contents: what stands in those files, for the digest.
    """

    root: Path
    lines: tuple[str, ...]
    preferred: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()

    @classmethod
    def of_host(
        cls,
        root: Path,
        projects: Collection[str] = (),
        *,
        say: Callable[[str], object],
        sys_path: Sequence[str] | None = None,
    ) -> Requirements:
        """The same distributions as here, in the same versions if the guest's Python lets it.

        What this environment was asked for is asked for again: all that nothing else needs, but
        for `LEFT_OUT`. The rest follows from it.

        Args:
            root: the project's folder.
            projects: canonical names of the distributions that come as a tree. What they need is
                mirrored.
            say: is told the distributions that cannot be had again: those that were installed
                from a folder, a file or a repository.
            sys_path: where the distributions are; default: where Python finds them.
        """
        here = installed(sys_path)
        local = {name for name, it in here.items() if name not in LEFT_OUT and _is_local(it)}
        local -= {*projects, "pytest"}
        if local:
            say(
                f"not in the guest, since no package index has them: {', '.join(sorted(local))}"
                f" (installed here from a folder, a file or a repository)"
            )
        dropped = {*local, *projects, OURSELVES} - {"pytest"}
        trees = [name for name in (*local, *projects) if name in here]
        mirror = _Mirror(here)
        roots = mirror.roots() - LEFT_OUT - dropped
        kept = mirror.reached({"pytest", *roots, *(it for name in trees for it in mirror.of(name))})
        lines = roots.union(*(_base_requires(here[name]) for name in trees))
        return cls(
            root=root,
            lines=(_pytest_requirement(here.get("pytest")), *sorted(lines)),
            preferred=tuple(sorted(f"{it}=={here[it].version}" for it in kept - dropped)),
            dropped=tuple(sorted(dropped)),
        )

    @classmethod
    def of_entries(
        cls,
        root: Path,
        entries: Sequence[str],
        projects: Collection[str] = (),
        *,
        sys_path: Sequence[str] | None = None,
    ) -> Requirements:
        """What the setting `vm_requirements` names, and pytest.

        Args:
            root: the project's folder.
            entries: each is ``.`` (what the project in `root` needs), ``extra:NAME`` (that, and
                what its optional dependencies of that name need), ``group:NAME`` (a dependency
                group of its pyproject.toml), the path of a file of requirements relative to
                `root`, or a requirement such as ``requests>=2``.
            projects: canonical names of the distributions that come as a tree.
            sys_path: where this machine's pytest is; default: where Python finds it.

        Raises:
            ConfigError: an entry is none of these, or what it names does not exist.
        """
        pytest = installed(sys_path).get("pytest")
        lines, files, contents = [_pytest_requirement(pytest)], [], []
        # A tree is not installed a second time, but what it needs is, also by way of `-e .`.
        options = [it for name in sorted(projects) for it in ("--no-emit-package", name)]
        tables: dict[str, Any] = {}
        for entry in entries:
            kind, _, name = entry.partition(":")
            if entry == "." or kind in ("extra", "group"):
                tables = tables or _pyproject(root, entry)
                if kind == "group":
                    _check_known(entry, name, tables.get("dependency-groups", {}))
                    options += ["--group", f"pyproject.toml:{name}"]
                    continue
                if "project" not in tables:
                    raise _bad_entry(entry, "pyproject.toml has no table [project]")
                if "dependencies" in tables["project"].get("dynamic", ()):
                    raise _bad_entry(entry, "only a build would tell: they are `dynamic`")
                if "pyproject.toml" not in files:
                    files.append("pyproject.toml")
                if kind == "extra":
                    _check_known(entry, name, tables["project"].get("optional-dependencies", {}))
                    options += ["--extra", name]
            elif (root / entry).is_file():
                files.append(entry)
                contents += _with_nested(root / entry, entry)
            else:
                lines.append(_plain_requirement(entry))
        if tables:
            contents.append(json.dumps(tables, sort_keys=True, default=str))
        return cls(
            root=root,
            lines=tuple(lines),
            files=tuple(files),
            options=tuple(options),
            contents=tuple(contents),
        )

    def with_one(self, name: str) -> Requirements:
        """These, and one more distribution, in the version of this environment if it can be had."""
        if name in self.dropped:
            return self
        here = installed().get(name)
        return dataclasses.replace(
            self,
            lines=(*self.lines, name),
            preferred=(*self.preferred, *([f"{name}=={here.version}"] if here else [])),
        )

    def without(self, name: str) -> Requirements:
        """These, but for one distribution, whoever needs it."""
        return dataclasses.replace(
            self,
            lines=tuple(line for line in self.lines if _name_of(line) != name),
            dropped=(*self.dropped, name),
        )

    def digest(self, python: GuestPython) -> str:
        """SHA-256, in hex, of all that decides what is installed, but for the package index."""
        fields = {**dataclasses.asdict(self), "root": None, "python": dataclasses.asdict(python)}
        text = json.dumps([_FORMAT, fields], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Files for a guest's environment, complete and in the cache.

    Args:
        folder: holds them.
        digest: of what they were made from.
    """

    folder: Path
    digest: str

    @property
    def site_packages(self) -> Path:
        """What goes into the folder site-packages of `ENV`."""
        return self.folder / "site-packages"

    @property
    def scripts(self) -> Path:
        """What goes into the folder bin of `ENV`."""
        return self.folder / "bin"


def prepare(
    requirements: Requirements,
    python: GuestPython,
    *,
    cache: Path,
    offline: bool,
    say: Callable[[str], object],
    tell: Callable[[str], object] = lambda _: None,
) -> Environment:
    """Have a guest's environment in the cache. If it is there, uv is not needed.

    Args:
        requirements: what it holds.
        python: what it is for.
        cache: the user's cache.
        offline: use only what uv has in its own cache.
        say: is told what takes long.
        tell: is told that it was damaged, and is made anew.

    Raises:
        TransferError: it cannot be made: uv is missing, a distribution has no wheel for the guest,
            the package index cannot be reached.
        TeardownError: what was made in vain cannot be removed.
    """
    version = ".".join(map(str, python.version))

    def make(folder: Path, lock: int) -> None:
        say(f"preparing the packages for the guest's Python {version}")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            uv = _Uv(requirements, python, offline=offline, lock=lock, work=Path(work), tell=tell)
            resolved = uv.resolve()
            uv.install(resolved, folder / "site-packages")
            _make_scripts(folder / "site-packages", folder / "bin")
            shutil.copyfile(resolved, folder / RESOLVED)

    digest = requirements.digest(python)
    folder = EnvironmentsStore(cache).obtain(
        digest,
        make,
        on_busy=lambda: say("waiting for another run that is preparing packages for a guest"),
        on_damage=lambda why: tell(
            f"the packages for the guest were damaged ({why}); they are made anew"
        ),
    )
    return Environment(folder=folder, digest=digest)


def installed(sys_path: Sequence[str] | None = None) -> dict[str, Distribution]:
    """The distributions on `sys_path` (default: Python's own) by canonical name; the first that is
    found of a name is the one that counts.
    """
    found: dict[str, Distribution] = {}
    for distribution in importlib.metadata.distributions(**_path(sys_path)):
        # None: what a removal has left. By its key, Python 3.12 warns of that.
        if name := dict(distribution.metadata.items()).get("Name"):  # type: ignore[attr-defined]
            found.setdefault(canonicalize_name(name), distribution)
    return found


def origin(distribution: Distribution) -> dict[str, Any]:
    """What ``direct_url.json`` says (PEP 610); empty for what came from a package index."""
    try:
        found = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def home(distribution: Distribution) -> Path:
    """The folder that a distribution's metadata lie in, an entry of ``sys.path``."""
    return Path(str(distribution.locate_file("")))


def console_scripts(distribution: Distribution) -> dict[str, bytes]:
    """The programs of a distribution as files for the folder bin of `ENV`, by name."""
    found = {}
    for entry in distribution.entry_points.select(group="console_scripts"):
        if "/" in entry.name or not entry.attr:  # no name of a file, or nothing to call
            continue
        found[entry.name] = (
            f"#!{ENV}/bin/python\n"
            "import sys\n"
            f"from {entry.module} import {entry.attr.partition('.')[0]}\n"
            'if __name__ == "__main__":\n'
            f"    sys.exit({entry.attr}())\n"
        ).encode()
    return found


class _Mirror:
    """Which of the distributions here need which.

    A node is a name, or for what an extra of it needs, ``name[extra]``.
    """

    def __init__(self, here: Mapping[str, Distribution]) -> None:
        self._here = here
        self._parsed: dict[str, list[Requirement]] = {}
        self._needs: dict[str, set[str]] = {}

    def of(self, node: str) -> set[str]:
        """The nodes that one needs, with markers seen from here."""
        if node not in self._needs:
            name, _, extra = node.rstrip("]").partition("[")
            if name not in self._parsed:
                self._parsed[name] = list(_parse(self._here[name]))
            found = set()
            for it in self._parsed[name]:
                target = canonicalize_name(it.name)
                if target in self._here and (not it.marker or it.marker.evaluate({"extra": extra})):
                    found |= {target, *(f"{target}[{canonicalize_name(e)}]" for e in it.extras)}
            self._needs[node] = found
        return self._needs[node]

    def walk(self, nodes: Iterable[str]) -> set[str]:
        """`nodes` that are here, and all nodes that they need."""
        seen: set[str] = set()
        todo = [it for it in nodes if it.partition("[")[0] in self._here]
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += self.of(node)
        return seen

    def reached(self, nodes: Iterable[str]) -> set[str]:
        """The names of `nodes`, and of all that they need."""
        return {it.partition("[")[0] for it in self.walk(nodes)}

    def roots(self) -> set[str]:
        """Names that nobody else needs; of those that need each other in a ring, the first."""
        needed = {
            target.partition("[")[0]
            for node in self.walk(self._here)
            for target in self.of(node)
            if target.partition("[")[0] != node.partition("[")[0]
        }
        roots = self._here.keys() - needed
        covered = self.reached(roots)
        for name in sorted(self._here):
            if name not in covered:
                roots.add(name)
                covered |= self.reached({name})
        if sys.version_info < (3, 12):  # a new environment has it by itself: nobody asked for it
            roots.discard("setuptools")
        return roots


class _Uv:
    """uv, as a program.

    Args:
        requirements: what is resolved.
        python: for whom.
        offline: use only uv's cache.
        lock: a descriptor that uv inherits: while it runs, the lock is held.
        work: an empty folder for files of ours.
        tell: is told what is left out.

    Raises:
        TransferError: uv is missing, or has nothing for that Python.
    """

    def __init__(
        self,
        requirements: Requirements,
        python: GuestPython,
        *,
        offline: bool,
        lock: int,
        work: Path,
        tell: Callable[[str], object],
    ) -> None:
        self._requirements = requirements
        self._python = python
        self._offline = offline
        self._lock = lock
        self._work = work
        self._tell = tell
        self._wheels = work / "wheels"  # those that were made here
        self._wheels.mkdir()
        self._without_wheel: set[str] = set()  # what uv complained of last
        version = ".".join(map(str, python.version))
        self._target = ["--python-version", version, "--python-platform", python.platform]
        self._program = _find_uv()

    def resolve(self) -> Path:
        """Write the versions of all that is to be installed into a file.

        Where something has no wheel, one is made here if it is pure Python; else it is left out if
        nobody has imported it here.

        Raises:
            TransferError: the requirements cannot be met.
        """
        tried: set[str] = set()
        while True:
            try:
                return self._resolve()
            except TransferError:
                names = self._without_wheel - tried
                if not names or not all(map(self._do_without_index, sorted(names))):
                    raise
                tried |= names

    def _do_without_index(self, name: str) -> bool:
        """Make the wheel of a distribution that the index does not have, or leave it out."""
        here = installed().get(name)
        wanted = [line for line in self._requirements.lines if _name_of(line) == name]
        if here is None or not all(_allows(line, here.version) for line in wanted):
            return not self._offline and self._build(name, wanted or [name])
        if make_wheel(here, self._wheels) is not None:
            return True
        if _is_imported(name):
            return False
        self._requirements = self._requirements.without(name)
        self._tell(
            f"{name} is not in the guest: it has no wheel for the guest's Python, and no test here "
            "has imported it yet"
        )
        return True

    def _build(self, name: str, wanted: Sequence[str]) -> bool:
        """Let uv build a distribution here; False if that does not work, or it is not pure Python."""
        target = self._work / f"built-{name}"
        arguments = ["--no-deps", "--no-binary", name, "--target", os.fspath(target), *wanted]
        try:
            self._run("install", *arguments, only_wheels=False)
        except TransferError:
            return False
        built = installed([os.fspath(target)]).get(name)
        return built is not None and make_wheel(built, self._wheels) is not None

    def _resolve(self) -> Path:
        requirements, work = self._requirements, self._work
        asked, resolved, overrides = (work / it for it in ("asked.in", "resolved.txt", "drop.txt"))
        asked.write_text(_lines(requirements.lines), encoding="utf-8")
        # uv keeps to the versions that its output names already, as far as it can.
        resolved.write_text(_lines(requirements.preferred), encoding="utf-8")
        overrides.write_text(
            _lines(f"{it} ; python_version < '3'" for it in requirements.dropped), encoding="utf-8"
        )
        self._run(
            "compile",
            *self._links(),
            *("--no-header", "--no-annotate", "--no-universal"),
            *("--overrides", os.fspath(overrides)),
            *("--output-file", os.fspath(resolved)),
            *requirements.options,
            os.fspath(asked),
            *requirements.files,
        )
        return resolved

    def _links(self) -> list[str]:
        """The folders of wheels besides the index; for uv, an argument would replace the variable."""
        theirs = filter(None, os.environ.get("UV_FIND_LINKS", "").split(","))
        folders = (*theirs, os.fspath(self._wheels))
        return [word for folder in folders for word in ("--find-links", folder)]

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

    def _run(self, command: str, *arguments: str, only_wheels: bool = True) -> None:
        wheels = ["--only-binary", ":all:", *self._target] if only_wheels else []
        self._without_wheel = set()
        done = subprocess.run(
            [
                *(self._program, "pip", command, "--quiet", "--no-progress", "--color", "never"),
                *("--python", sys.executable, "--no-python-downloads", *wheels),
                *(["--offline"] if self._offline else []),
                *arguments,
            ],
            cwd=self._requirements.root,
            env={name: it for name, it in os.environ.items() if name not in _NOT_FOR_UV},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[self._lock],
            check=False,
        )
        if done.returncode:
            text = printable(done.stderr.decode(errors="replace")).strip()
            raise self._error(text or f"uv ended with status {done.returncode}")

    def _error(self, text: str) -> TransferError:
        details = text if len(text) <= _DETAILS_LIMIT else f"{text[:_DETAILS_LIMIT]}…"
        if self._offline and "network was disabled" in text.replace("\n", " "):
            return TransferError(
                "the run is offline, and uv's cache does not hold all packages for the guest",
                details=details,
                remedy="run these tests once with the network",
            )
        found = {it for match in _NO_WHEEL.findall(text) for it in match if it}
        self._without_wheel = set(map(canonicalize_name, found))
        if found:
            names = ", ".join(sorted(found))
            version = ".".join(map(str, self._python.version[:2]))
            return TransferError(
                f"no wheel for the guest (Python {version}, {self._python.machine}) of: {names}",
                details=details,
                remedy=f"name in {SETTING} what the tests need in the guest, without it,"
                " or build a wheel of it for that Python and name its folder in UV_FIND_LINKS",
            )
        return TransferError(
            "the packages for the guest cannot be had",
            details=details,
            remedy=f"name other requirements in {SETTING}, or another package index in"
            " UV_DEFAULT_INDEX or uv.toml",
        )


def _name_of(requirement: str) -> str:
    """The canonical name in a requirement."""
    return canonicalize_name(Requirement(requirement).name)


def _allows(requirement: str, version: str) -> bool:
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _is_imported(name: str) -> bool:
    """Whether this process has imported anything of a distribution."""
    found = importlib.metadata.packages_distributions()
    return any(
        module in sys.modules and any(canonicalize_name(it) == name for it in distributions)
        for module, distributions in found.items()
    )


def providers(module: str) -> list[str]:
    """The names of the distributions that have installed a top-level module here."""
    return sorted(set(importlib.metadata.packages_distributions().get(module, ())))


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


def _make_scripts(site_packages: Path, scripts: Path) -> None:
    """Make the programs of all distributions in `site_packages`, for the guest's Python.

    uv has put them into a folder there, for this machine's Python.
    """
    scripts.mkdir()
    theirs = site_packages / "bin"
    for file in theirs.iterdir() if theirs.is_dir() else ():
        if file.is_file():
            content = _with_our_python(file.read_bytes())
            (scripts / file.name).write_bytes(content)
    shutil.rmtree(theirs, ignore_errors=True)
    for distribution in importlib.metadata.distributions(path=[os.fspath(site_packages)]):
        for name, content in console_scripts(distribution).items():
            (scripts / name).write_bytes(content)
    for file in scripts.iterdir():
        file.chmod(0o755)


def _with_our_python(script: bytes) -> bytes:
    """A program with the guest's Python in its first line, if there is one in it."""
    first, _, rest = script.partition(b"\n")
    if first == b"#!/bin/sh" and rest.startswith(b"'''exec'"):  # what stands for a long path
        rest = rest.split(b"\n", 2)[-1]
    elif not (first.startswith(b"#!") and b"python" in first):
        return script
    return f"#!{ENV}/bin/python\n".encode() + rest


def _is_local(distribution: Distribution) -> bool:
    """Whether a distribution did not come from a package index."""
    developed = home(distribution).name not in ("site-packages", "dist-packages")
    return bool(origin(distribution)) or (developed and bool(distribution.read_text("PKG-INFO")))


def _parse(distribution: Distribution) -> Iterator[Requirement]:
    for line in distribution.requires or ():
        try:
            yield Requirement(line)
        except InvalidRequirement:
            continue  # from before PEP 508: pip takes no notice of it either


def _base_requires(distribution: Distribution) -> list[str]:
    """What a distribution needs without any extra, for all Pythons and platforms."""
    return [str(it) for it in _parse(distribution) if "extra" not in str(it.marker or "")]


def _pytest_requirement(pytest: Distribution | None) -> str:
    """pytest, not newer than here: the guest's reports must be understood."""
    wanted = f"pytest>={_OLDEST_PYTEST}"
    try:
        return f"{wanted},<={Version(pytest.version).public}" if pytest else wanted
    except InvalidVersion:
        return wanted


def _pyproject(root: Path, entry: str) -> dict[str, Any]:
    """What pyproject.toml says of requirements.

    Raises:
        ConfigError: it is missing or cannot be read.
    """
    try:
        tables = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad_entry(entry, f"pyproject.toml: {error}") from error
    tables["uv"] = tables.get("tool", {}).get("uv")
    return {key: tables[key] for key in ("project", "dependency-groups", "uv") if key in tables}


def _check_known(entry: str, name: str, known: Collection[str]) -> None:
    if canonicalize_name(name) not in map(canonicalize_name, known):
        those = ", ".join(sorted(known)) or "none"
        raise _bad_entry(entry, f"pyproject.toml has no such name, but: {those}")


def _plain_requirement(entry: str) -> str:
    if entry.endswith((".txt", ".in", ".toml")):
        raise _bad_entry(entry, "there is no such file")
    try:
        return str(Requirement(entry))
    except InvalidRequirement as error:
        raise _bad_entry(entry, str(error)) from error


def _bad_entry(entry: str, why: str) -> ConfigError:
    return ConfigError(
        f"{SETTING}: {entry!r} cannot be meant",
        details=why,
        remedy="a file of requirements, its path relative to the project's root; group:NAME or"
        " extra:NAME of the project's pyproject.toml; `.` for what the project itself needs;"
        " or a requirement such as requests>=2",
    )


def _with_nested(file: Path, entry: str) -> list[str]:
    """The text of a file of requirements, and of those that it includes.

    Raises:
        ConfigError: one of them cannot be read.
    """
    found: dict[Path, str] = {}
    todo = [file]
    while todo:
        it = Path(os.path.normpath(todo.pop()))
        if it in found:
            continue
        try:
            found[it] = it.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise _bad_entry(entry, str(error)) from error
        nested = [name for name in _NESTED.findall(found[it]) if "://" not in name]
        todo += [it.parent / name for name in nested]
    return list(found.values())


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _path(sys_path: Sequence[str] | None) -> dict[str, Any]:
    return {} if sys_path is None else {"path": list(sys_path)}
