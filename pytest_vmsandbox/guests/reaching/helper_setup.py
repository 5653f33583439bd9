"""Gives a helper to a guest that answers SSH and has none, while its template is made.

The program goes there over SSH. The guest's init starts it, and starts it again after a reboot. Where the
init cannot do so, this side puts it there again. Nothing changes on the image's own disk.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pytest_vmsandbox.catalogue.helpers import helper_program, helper_source
from pytest_vmsandbox.core.architecture import by_any_name
from pytest_vmsandbox.core.deadline import Deadline, within
from pytest_vmsandbox.core.errors import (
    CacheError,
    CommandError,
    CommandTimeout,
    ConfigError,
    ImageError,
)
from pytest_vmsandbox.core.spec import MIB, format_size
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.reaching import helper_scripts as scripts
from pytest_vmsandbox.guests.reaching.commands import NAME, Command
from pytest_vmsandbox.guests.reaching.helper import Helper
from pytest_vmsandbox.guests.reaching.process import RemoteProcess
from pytest_vmsandbox.guests.templates import NoTemplateError

Start = Callable[
    [Command, str], RemoteProcess
]  # starts a program by SSH; who logs in is the second

# On a usual host with KVM:
_LOOK_SECONDS = 20.0  # to find out what the guest is, for all who may log in
_SECONDS = 60.0  # for everything after that
_SPARE_SECONDS = 20.0  # to kill what takes longer
_WORD_SECONDS = 15.0  # of this host; then people are told
_HELLO_SECONDS = 20.0
_RETURN_SECONDS = 5.0  # for the init to start it after a boot, once the guest answers SSH
_BECOME_ROOT: tuple[tuple[str, ...], ...] = (("sudo", "-n"), ("doas", "-n"))
_READ_SCRIPT = 'eval "$(cat)"'  # servers and shells take no long arguments
_BY_HAND = "hand"

# What belongs to one login, and not to the user.
_OF_LOGIN = {"HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "SHLVL", "_", "MAIL", "TERM"}
_OF_SESSION = ("SSH_", "XDG_", "DBUS_")
_MOST_OUTPUT = 65_536  # bytes of a script
_TOO_MUCH = MIB  # who prints so many bytes never ends
_MOST_VARIABLES = 8_000  # bytes of them
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")

Reason = Literal["system", "architecture", "program", "root", "place", "run", "port", "silent"]
_FAILURES: Mapping[str, tuple[Reason, str]] = {
    "place": ("place", "there is no place for the helper in it"),
    "run": ("run", "the helper cannot run in it"),
    "port": ("port", "its kernel shows no virtio-serial port"),
}


class NoHelperError(NoTemplateError):
    """A guest cannot have a helper. It can still be booted, and used by SSH.

    Its ``reason`` is one of `Reason`: it is no Linux (``system``), there is no program for its processor
    (``architecture``) or none can be made here (``program``), nobody becomes ``root``, no folder can hold
    the program (``place``), it does not ``run``, there is no ``port``, or it is ``silent`` or never
    stops talking.
    """


@functools.cache
def digest() -> str:
    """SHA-256, in hex, of the helper's source, and of how it gets into a guest."""
    parts = (scripts.PLACE, scripts.START, scripts.INSTALL)
    source = helper_source().read_bytes()
    return hashlib.sha256(b"\0".join([source, *map(str.encode, parts)])).hexdigest()


@dataclass(eq=False)
class HelperSetup:
    """How a guest gets a helper after each boot.

    Attributes:
        cache: the user's cache, for the program.
        users: whose environment counts; the first one logs in if root cannot.
        strict: whether a guest that cannot have a helper is an error. If not, `failure` has it.
        say: gets lines for people about long waits.
        way: what starts the helper in the guest: ``systemd``, ``openrc``, ``runit``, ``inittab``,
            ``busybox``, ``rc`` or ``hand``; empty if the guest has a helper of its own.
        environments: user → the variables that SSH gives to the user's programs.
        failure: why the guest has no helper now.
    """

    cache: Path
    users: tuple[str, ...]
    strict: bool = False
    say: Callable[[str], object] = lambda _: None
    way: str = ""
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    failure: NoHelperError | None = None

    @classmethod
    def of(cls, blueprint: Blueprint, cache: Path, record: Mapping[str, Any]) -> HelperSetup:
        """The setup for guests of a blueprint.

        Args:
            record: what a template below has of it; empty if there is none.
        """
        users = dict.fromkeys((blueprint.built.definition.user, blueprint.hardware.user))
        return cls(
            cache,
            tuple(user for user in users if user),
            way=record.get("way", ""),
            environments=dict(record.get("environments", {})),
        )

    def record(self) -> dict[str, object]:
        """For a template's record; empty if the guest has a helper of its own."""
        return {"way": self.way, "environments": self.environments} if self.way else {}

    @property
    def is_by_hand(self) -> bool:
        """Whether nothing in the guest starts the helper after a boot."""
        return self.way == _BY_HAND

    def in_environment(self, command: Command, user: str) -> Command:
        """A command with the variables that it would have by SSH."""
        variables = self.environments.get(user)
        return replace(command, env={**variables, **command.env}) if variables else command

    def give(self, helper: Helper, start: Start, stretch: Callable[[float], float]) -> None:
        """Give a guest that answers SSH a helper, unless it says hello before.

        Args:
            helper: our side of it.
            start: starts a program in the guest by SSH.
            stretch: scales a timeout to this host.

        Raises:
            NoHelperError: that cannot be done, and `strict` is set.
        """
        self.failure = None
        if self.way and not self.is_by_hand and _says_hello(helper, stretch(_RETURN_SECONDS)):
            return
        try:
            _Giving(self, helper, start, stretch).give()
        except NoHelperError as error:
            self.failure = error
        except (CommandError, ConfigError) as error:
            self.failure = NoHelperError(error.brief, reason="root", details=error.details)
        if self.failure is not None and self.strict and not helper.is_there:
            raise self.failure


@dataclass(eq=False)
class _Giving:
    """Gives one guest a helper.

    Attributes:
        deadline: for all that the guest does now.
        told: whether people know that it takes long.
    """

    setup: HelperSetup
    helper: Helper
    start: Start
    stretch: Callable[[float], float]
    deadline: Deadline = field(init=False)
    told: bool = False

    def give(self) -> None:
        """Do it.

        Raises:
            NoHelperError: it cannot be done.
        """
        self.deadline = Deadline(self.stretch(_LOOK_SECONDS))
        login, prefix, found = self._root()
        program = self._program(found)  # to make it here may take minutes
        self.deadline = Deadline(self.stretch(_SECONDS))
        if self.helper.is_there:
            return
        placed = self._run(login, prefix, scripts.PLACE, str(len(program)), stdin=program)
        place = _result(placed, "place")
        started = self._script(login, prefix, scripts.INSTALL, place)
        way = _result(started, "way")
        if not _says_hello(self.helper, self.deadline.remaining(self.stretch(_HELLO_SECONDS))):
            words = self._text(login, (*prefix, *_shell(scripts.LAST_WORDS), place), b"")
            raise NoHelperError(
                f"the helper was started in it ({way}), but does not answer",
                reason="silent",
                details="\n".join(
                    filter(None, (started.get("not", ""), *map(_plain, words.splitlines())))
                ),
            )
        if not self.setup.way:
            for user in dict.fromkeys(("root", *self.setup.users)):
                self._note_environment(user)
        self.setup.way = way

    def _root(self) -> tuple[str, tuple[str, ...], dict[str, str]]:
        """Who logs in, the beginning of a command line that makes that user root, and what root finds."""
        tried: list[str] = []
        for user in dict.fromkeys(("root", *self.setup.users)):
            for prefix in ((),) if user == "root" else _BECOME_ROOT:
                try:
                    found = self._run(user, prefix, scripts.LOOK)
                except (ConfigError, CommandError) as error:
                    tried.append(error.brief)
                    break
                if found.get("user") == "0":
                    return user, prefix, found
                tried.append(f"{' '.join(prefix)} does not work for {user!r}")
        raise NoHelperError("nobody becomes root in it", reason="root", details="\n".join(tried))

    def _program(self, found: Mapping[str, str]) -> bytes:
        """The program for the guest's processor."""
        system, machine = found.get("system", ""), found.get("machine", "")
        if system != "Linux":
            what = system or "a system without uname"
            raise NoHelperError(
                f"the helper runs on Linux only, and this is {what}", reason="system"
            )
        if not (architecture := by_any_name(machine)):
            raise NoHelperError(
                f"there is no helper for its processor ({machine})", reason="architecture"
            )
        try:
            return helper_program(architecture, self.setup.cache, say=self.setup.say).read_bytes()
        except (ImageError, CacheError) as error:
            raise NoHelperError(
                error.brief, reason="program", details=error.details, remedy=error.remedy
            ) from error

    def _note_environment(self, user: str) -> None:
        """Note the variables that SSH gives to a user's programs."""
        try:
            text = self._text(user, ("env",), b"")
        except (ConfigError, CommandError):
            return  # only others log in as this user
        self.setup.environments[user] = variables(text)

    def _script(
        self, login: str, prefix: tuple[str, ...], script: str, *words: str
    ) -> dict[str, str]:
        """Run a long script. What it prints."""
        return self._run(login, prefix, _READ_SCRIPT, *words, stdin=script.encode())

    def _run(
        self, login: str, prefix: tuple[str, ...], script: str, *words: str, stdin: bytes = b""
    ) -> dict[str, str]:
        """Run a script as root. What it prints."""
        text = self._text(login, (*prefix, *_shell(script), *words), stdin)
        lines = (_plain(line).partition("=") for line in text.splitlines())
        return {name: value for name, mark, value in lines if mark}

    def _text(self, login: str, argv: tuple[str, ...], stdin: bytes) -> str:
        """What a program in the guest prints.

        Raises:
            NoHelperError: it does not end in time, or does not stop printing.
        """
        output, errors = _Limited(), _Limited()

        def talk() -> None:
            process = self.start(Command(argv=argv), login)
            try:
                timeout = self.deadline.remaining()
                process.communicate(io.BytesIO(stdin), output.take, errors.take, timeout)
            finally:
                process.close()

        try:
            in_time = within(self.deadline.remaining() + _SPARE_SECONDS, talk, self._tell)
        except CommandTimeout:
            in_time = False
        if not in_time:
            raise NoHelperError(
                f"the setup of its helper did not end within {self.deadline.seconds:g} s",
                reason="silent",
                details="\n".join(map(_plain, errors.text.splitlines())),
            )
        return output.text

    def _tell(self) -> None:
        """Tell people once what takes so long."""
        if not self.told and self.deadline.elapsed > _WORD_SECONDS:
            self.told = True
            self.setup.say(
                "waiting for the guest's shell, which sets up a helper "
                f"(at most {self.deadline.seconds:.0f} s)"
            )


class _Limited:
    """The beginning of what a program in the guest prints."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._size = 0

    def take(self, data: bytes) -> None:
        """Take more of it.

        Raises:
            NoHelperError: it is more than anybody needs.
        """
        self._bytes += data[: _MOST_OUTPUT - len(self._bytes)]
        self._size += len(data)
        if self._size > _TOO_MUCH:
            raise NoHelperError(
                f"it printed more than {format_size(_TOO_MUCH)} while its helper was set up",
                reason="silent",
            )

    @property
    def text(self) -> str:
        return self._bytes.decode(errors="replace")


def _plain(line: str) -> str:
    """A line of a guest, without what a terminal or a command line would take amiss."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", line)


def _shell(script: str) -> tuple[str, ...]:
    return "/bin/sh", "-c", script, "sh"


def _result(found: Mapping[str, str], name: str) -> str:
    """The value of a line that a script has printed.

    Raises:
        NoHelperError: it says that it failed, or nothing.
    """
    if found.get(name):
        return found[name]
    reason, what = _FAILURES.get(found.get("failed", ""), _FAILURES["place"])
    why = found.get("why", "the guest's shell said nothing").rstrip("; ")
    raise NoHelperError(f"{what}: {why}", reason=reason)


def _says_hello(helper: Helper, seconds: float) -> bool:
    """Whether the helper says hello within some seconds."""
    deadline = Deadline(seconds)
    while not helper.is_there and not deadline.expired:
        helper.check()
        with helper.changed:
            helper.changed.wait_for(lambda: helper.is_there, deadline.remaining(0.25))
    return helper.is_there


def variables(text: str) -> dict[str, str]:
    """The variables that ``env`` has printed, without those of one login.

    A variable of several lines cannot be told from others, so only its first line counts. One with
    control characters is left out: no command could have it.
    """
    found: dict[str, str] = {}
    size = 0
    for line in text.split("\n"):
        name, mark, value = line.partition("=")
        if not mark or not NAME.fullmatch(name) or _CONTROL.search(value):
            continue
        if name in _OF_LOGIN or name.startswith(_OF_SESSION):
            continue
        size += len(line)
        if size > _MOST_VARIABLES:
            break
        found[name] = value
    return found
