"""Preparations of guests, done once before they become a template, and digests of their inputs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Network, NetworkArgument, parse_network
from pytest_vmsandbox.guests.guest import Guest

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in what `repr` says of many objects

Facts = Mapping[str, object] | None


@dataclass(frozen=True, kw_only=True)
class Provision:
    """A layer on top of an image: what is done to a guest before it becomes a template.

    It is done once, and again if its inputs change.

    Attributes:
        name: what it is, for people.
        depends_on: the inputs: texts (names, versions), and paths (`pathlib.Path`) of files and folders,
            whose names and content count. The code of ``run`` counts by itself. What it calls and the
            variables around it do not count: name them here.
        run: called with the guest, which no test has used. The guest's user is the image's. The return
            value is ignored. What it raises is an error of each test that needs such a guest.
        network: what the layer needs: ``isolated``, ``nat``, or a list of hosts and ports; None for the network of the guest. A
            guest that is booted, not cloned, must have the same.

    Example::

        Provision(
            name="postgresql",
            depends_on=["postgresql"],
            network="nat",
            run=lambda vm: vm.shell("apt-get install -y postgresql"),
        )
    """

    name: str
    depends_on: Sequence[str | os.PathLike[str]]
    run: Callable[[Guest], object]
    network: NetworkArgument | None = None

    def step(self) -> Step:
        """The layer with a digest of its inputs.

        Raises:
            ConfigError: `depends_on` is invalid, or a path does not exist.
        """
        network = None if self.network is None else parse_network(self.network)
        if not callable(self.run):
            raise ConfigError(
                f"{self.name}: run={self.run!r} cannot be called",
                remedy="pass a function that takes a guest",
            )
        parts = [self.name, network, *_code(self.run), *_contents(self.name, self.depends_on)]
        return Step(
            digest=hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
            run=lambda guest: _no_facts(self.run(guest)),
            about=self.name,
            network=network,
        )


@dataclass(frozen=True, kw_only=True)
class Step:
    """A layer whose digest is known; those of the same digest are equal.

    Attributes:
        digest: of all that its result depends on.
        run: does it, and returns what is to be remembered of it: values that JSON keeps.
        about: what it is, for people.
        network: see `Provision`.
        personal: whether it is done as the user whom the guests are for, else as the image's.
    """

    digest: str
    run: Callable[[Guest], Facts] = field(compare=False)
    about: str = field(compare=False)
    network: Network | None = field(default=None, compare=False)
    personal: bool = field(default=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """An image with more in it. `GuestFactory.prepare` makes it.

    Attributes:
        image: the name of the image below.
        steps: what is done to its guests, in order. Not part of the public interface.
    """

    image: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class PreparedLayer:
    """A preparation for whatever image a test runs on. ``GuestFactory.prepare(None, …)`` makes it.

    Attributes:
        steps: what is done to guests of that image, in order. Not part of the public interface.
    """

    steps: tuple[Step, ...]


def _no_facts(_: object) -> None:
    """Ignore what users' functions return."""


def check_inputs(name: str, entries: object) -> None:
    """Check the type of `depends_on`. Whether its paths exist is not checked.

    Raises:
        ConfigError: it is no list, or has something other than texts and paths.
    """
    if isinstance(entries, str | bytes) or not isinstance(entries, Sequence):
        raise ConfigError(
            f"{name}: depends_on={entries!r} is not a list",
            remedy="write a list of texts and paths, such as ['postgresql', Path('setup.sh')]",
        )
    for entry in entries:
        if not isinstance(entry, str | os.PathLike):
            raise ConfigError(
                f"{name}: depends_on has {entry!r}, which is neither a text nor a path",
                remedy="use texts, and paths such as Path('setup.sh')",
            )


def _contents(name: str, entries: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """The current content of each entry."""
    check_inputs(name, entries)
    for entry in entries:
        if isinstance(entry, str):
            yield f"text {entry}"
        else:
            yield f"path {os.fspath(entry)}"
            yield from _files(name, Path(entry))


def _files(name: str, path: Path) -> Iterator[str]:
    """The digests of a file, or of all files of a folder."""
    files = [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if "__pycache__" not in file.relative_to(path).parts and file.is_file()
        )
    for file in files:
        try:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(
                f"{name}: depends_on has {file}, which cannot be read: {error.strerror}",
                remedy="correct the path, or make the file readable. For a text, use a str",
            ) from error
        yield f"{file.relative_to(path)} {content}"


def _code(run: Callable[..., Any]) -> Iterator[str]:
    """The code of a function, or of an object's ``__call__``."""
    if isinstance(run, functools.partial):
        yield _stable((run.args, sorted(run.keywords.items())))
        yield from _code(run.func)
        return
    if (code := getattr(run, "__code__", None)) is None:
        run = type(run).__call__
        code = getattr(run, "__code__", None)
    yield f"{getattr(run, '__module__', '')}.{getattr(run, '__qualname__', '')}"
    if isinstance(code, CodeType):
        yield from _instructions(code)


def _instructions(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            yield _stable(constant)


def _stable(value: object, around: tuple[int, ...] = ()) -> str:
    """A value as text that is the same in each process. It has no addresses, and sets are sorted.

    Args:
        around: the identities of the values that contain this one.
    """

    def inner(part: object) -> str:
        return "…" if id(part) in around else _stable(part, (*around, id(value)))

    if isinstance(value, set | frozenset):
        return f"set {sorted(map(inner, value))}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} {[inner(part) for part in value]}"
    if isinstance(value, dict):
        return f"dict {sorted((inner(key), inner(item)) for key, item in value.items())}"
    if isinstance(value, functools.partial | FunctionType | MethodType):
        return f"code {list(_code(value))}"
    if type(value).__repr__ is object.__repr__:  # which shows an address
        kind = type(value)
        return f"{kind.__module__}.{kind.__qualname__} {inner(object.__getstate__(value))}"
    return _ADDRESS.sub("", repr(value))
