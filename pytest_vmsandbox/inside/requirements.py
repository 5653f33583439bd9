"""What has to be installed in a guest for tests inside."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.inside import distributions
from pytest_vmsandbox.inside.distributions import LEFT_OUT, OURSELVES

SETTING = "vm_requirements"
_FORMAT = 2  # part of each digest: raise it when the same input gives another result
_OLDEST_PYTEST = "8.4"
_NESTED = re.compile(r"^\s*(?:-r|-c|--requirement|--constraint)[=\s]*(\S+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """The requirements of a guest's environment. `of_host` and `of_entries` make them.

    Args:
        root: the project's folder. uv runs there and finds its settings from there.
        lines: PEP 508 requirements; the first is pytest's.
        preferred: ``name==version`` of preferred versions.
        dropped: names that are not installed, even if others need them.
        files: further sources for uv (files of requirements, pyproject.toml), relative to `root`.
        options: further arguments of ``uv pip compile``.
        contents: the content of those files, for the digest.
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
        cls, root: Path, projects: Collection[str] = (), *, say: Callable[[str], object]
    ) -> Requirements:
        """The same distributions as here, in the same versions if the guest's Python allows it.

        We require everything here that nothing else needs, except `LEFT_OUT`. The rest follows from
        that.

        Args:
            root: the project's folder.
            projects: canonical names of the distributions that come as a tree. Their requirements are
                included.
            say: gets a line about distributions that no index has, because they were installed from a
                folder, a file or a repository.
        """
        here = distributions.installed()
        local = {name for name in here.keys() - LEFT_OUT if distributions.is_local(here[name])}
        local -= {*projects, "pytest"}
        if local:
            say(
                f"not installed in guests, because they do not come from a package index:"
                f" {', '.join(sorted(local))} (installed here from a folder, a file or a repository)"
            )
        dropped = {*local, *projects, OURSELVES} - {"pytest"}
        trees = here.keys() & {*local, *projects}
        roots = _roots(here) - LEFT_OUT - dropped
        kept = set(map(_bare, _graph(here, {"pytest", *roots, *trees})))
        # Their requirements without extras, for all Pythons and platforms.
        needs = [need for name in trees for need in distributions.requirements_of(here[name])]
        lines = {*roots, *(str(need) for need in needs if "extra" not in str(need.marker or ""))}
        return cls(
            root=root,
            lines=(_pytest_requirement(here.get("pytest")), *sorted(lines)),
            preferred=tuple(sorted(f"{name}=={here[name].version}" for name in kept - dropped)),
            dropped=tuple(sorted(dropped)),
        )

    @classmethod
    def of_entries(
        cls, root: Path, entries: Sequence[str], projects: Collection[str] = ()
    ) -> Requirements:
        """The requirements in the ini key `vm_requirements`, and pytest.

        Args:
            root: the project's folder.
            entries: each is ``.`` (the requirements of the project in `root`), ``extra:NAME`` (these
                and the extra's), ``group:NAME`` (a dependency group of its pyproject.toml), the path of
                a file of requirements relative to `root`, or a requirement such as ``requests>=2``.
            projects: canonical names of the distributions that come as a tree.

        Raises:
            ConfigError: an entry is invalid, or what it names does not exist.
        """
        lines = [_pytest_requirement(distributions.installed().get("pytest"))]
        files: dict[str, None] = {}
        contents: list[str] = []
        # A tree is not installed a second time, but its requirements are, even by `-e .`.
        options = [word for name in sorted(projects) for word in ("--no-emit-package", name)]
        tables: dict[str, Any] = {}
        for entry in entries:
            kind, _, name = entry.partition(":")
            if entry == "." or kind in ("extra", "group"):
                tables = tables or _pyproject(root, entry)
                options += _pyproject_options(tables, entry, kind, name)
                if kind != "group":
                    files["pyproject.toml"] = None
            elif (root / entry).is_file():
                files[entry] = None
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
        """These and one more distribution, in this environment's version if possible."""
        if name in self.dropped:
            return self
        here = distributions.installed().get(name)
        return replace(
            self,
            lines=(*self.lines, name),
            preferred=(*self.preferred, *([f"{name}=={here.version}"] if here else [])),
        )

    def lines_of(self, name: str) -> list[str]:
        """The requirements for one distribution."""
        return [line for line in self.lines if canonicalize_name(Requirement(line).name) == name]

    def without(self, name: str) -> Requirements:
        """These without one distribution, even if others need it."""
        gone = self.lines_of(name)
        return replace(
            self,
            lines=tuple(line for line in self.lines if line not in gone),
            dropped=(*self.dropped, name),
        )

    def digest(self, *more: object) -> str:
        """SHA-256, in hex, of everything that decides what is installed, except the package index.

        Args:
            more: further parts of the digest: JSON values, and dataclasses of these.
        """
        fields = {**asdict(self), "root": None}
        text = json.dumps([_FORMAT, fields, *more], sort_keys=True, default=asdict)
        return hashlib.sha256(text.encode()).hexdigest()


# -- what is installed here -------------------------------------------------------------------------
#
# A graph of distributions and what they need. A node is a name, or ``name[extra]``.


def _graph(here: Mapping[str, Distribution], nodes: Iterable[str]) -> dict[str, set[str]]:
    """Some nodes that are installed here, with all that they need: node → nodes that it needs."""
    graph: dict[str, set[str]] = {}
    todo = [*nodes]
    while todo:
        node = todo.pop()
        name, _, extra = node.rstrip("]").partition("[")
        if name in here and node not in graph:
            graph[node] = _needed(here[name], extra)
            todo += graph[node]
    return graph


@cache  # it reads metadata, and `_graph` asks several times
def _needed(distribution: Distribution, extra: str) -> set[str]:
    """The nodes that a distribution needs, with markers evaluated on this machine."""
    found = set()
    for needed in distributions.requirements_of(distribution):
        if not needed.marker or needed.marker.evaluate({"extra": extra}):
            name = canonicalize_name(needed.name)
            found |= {name, *(f"{name}[{canonicalize_name(more)}]" for more in needed.extras)}
    return found


def _roots(here: Mapping[str, Distribution]) -> set[str]:
    """Names that no other distribution needs. Of a cycle, the first name."""
    graph = _graph(here, here)
    needed = {(_bare(node), _bare(target)) for node, targets in graph.items() for target in targets}
    roots = here.keys() - {target for node, target in needed if target != node}
    covered = _graph(here, roots)
    for name in sorted(here):
        if name not in covered:
            roots.add(name)
            covered |= _graph(here, {name})
    if sys.version_info < (3, 12):  # a new environment has it by default: nobody asked for it
        roots.discard("setuptools")
    return roots


def _bare(node: str) -> str:
    return node.partition("[")[0]


def _pytest_requirement(pytest: Distribution | None) -> str:
    """pytest, not newer than here, because this side must understand the guest's reports."""
    wanted = f"pytest>={_OLDEST_PYTEST}"
    try:
        return f"{wanted},<={Version(pytest.version).public}" if pytest else wanted
    except InvalidVersion:
        return wanted


# -- what the setting names -------------------------------------------------------------------------


def _pyproject(root: Path, entry: str) -> dict[str, Any]:
    """The tables of pyproject.toml about requirements.

    Raises:
        ConfigError: the file is missing or cannot be read.
    """
    try:
        tables = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad_entry(entry, f"pyproject.toml: {error}") from error
    tables["uv"] = tables.get("tool", {}).get("uv")
    return {key: tables[key] for key in ("project", "dependency-groups", "uv") if key in tables}


def _pyproject_options(tables: Mapping[str, Any], entry: str, kind: str, name: str) -> list[str]:
    """Arguments of uv for an entry that refers to pyproject.toml.

    Raises:
        ConfigError: the file does not have what the entry names.
    """
    if kind == "group":
        _check_known(entry, name, tables.get("dependency-groups", {}))
        return ["--group", f"pyproject.toml:{name}"]
    if "project" not in tables:
        raise _bad_entry(entry, "pyproject.toml has no table [project]")
    if "dependencies" in tables["project"].get("dynamic", ()):
        raise _bad_entry(
            entry, "pyproject.toml has `dynamic` dependencies, known only after a build"
        )
    if kind != "extra":
        return []
    _check_known(entry, name, tables["project"].get("optional-dependencies", {}))
    return ["--extra", name]


def _check_known(entry: str, name: str, known: Collection[str]) -> None:
    if canonicalize_name(name) not in map(canonicalize_name, known):
        those = ", ".join(sorted(known)) or "none"
        raise _bad_entry(entry, f"pyproject.toml does not have {name!r}. It has: {those}")


def _plain_requirement(entry: str) -> str:
    if entry.endswith((".txt", ".in", ".toml")):
        raise _bad_entry(entry, "this file does not exist")
    try:
        return str(Requirement(entry))
    except InvalidRequirement as error:
        raise _bad_entry(entry, str(error)) from error


def _bad_entry(entry: str, why: str) -> ConfigError:
    return ConfigError(
        f"{SETTING}: {entry!r} is invalid",
        details=why,
        remedy="use a file of requirements, relative to the rootdir; group:NAME or extra:NAME of"
        " pyproject.toml; `.` for the project's own requirements; or a requirement such as requests>=2",
    )


def _with_nested(file: Path, entry: str) -> list[str]:
    """The text of a file of requirements, and of the files that it includes.

    Raises:
        ConfigError: a file cannot be read.
    """
    found: dict[Path, str] = {}
    todo = [file]
    while todo:
        file = Path(os.path.normpath(todo.pop()))
        if file in found:
            continue
        try:
            found[file] = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise _bad_entry(entry, str(error)) from error
        nested = [name for name in _NESTED.findall(found[file]) if "://" not in name]
        todo += [file.parent / name for name in nested]
    return list(found.values())
