"""Every error that this package raises, and `CommandResult`, which one of them has.

::

    VMSandboxError
    ├── ConfigError        an option, a marker's argument or an image definition is invalid
    ├── ImageError         an image is missing, stale, or its build failed
    ├── LockError          an image differs from the project's lock file
    ├── CacheError         something cannot be kept in the cache: its folder, or its disk
    ├── LaunchError        QEMU is missing, refused to start, or the host has no room for a guest
    ├── BootError          the guest did not get as far as answering; `stage` says how far it got
    ├── GuestLost          a guest that ran is gone: panic, power-off from inside, QEMU exit
    ├── CommandError       a program in the guest returned non-zero, or could not be started
    ├── CommandTimeout     a program in the guest did not end in time, and was killed
    ├── InterpreterLost    a test inside a guest crashed its interpreter, or it was killed
    ├── TransferError      files could not be copied to or from the guest
    ├── MonitorError       QEMU refused a monitor command, or its monitor is gone
    └── TeardownError      something that the run had made could not be ended or removed

The text of an error is its brief first line, then details, then the remedy. Errors of third-party
libraries do not leave the module that uses the library; they are the `__cause__` of one of these.

`INFRASTRUCTURE` are the errors that are not the fault of the test: pytest reports them as ERROR,
the command `vmsandbox` ends with status 69.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, AnyStr, Generic

from pytest_vmsandbox.core.text import one_line, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypedDict, Unpack

    class More(TypedDict, total=False):
        """Optional attributes of an error; see `VMSandboxError`."""

        details: str
        remedy: str
        stage: str
        transient: bool


class VMSandboxError(Exception):
    """The base class of all errors of this package.

    Attributes:
        brief: one line that says what happened.
        details: more lines, for instance what a program wrote to standard error.
        remedy: what you can do about it.
        stage: where it happened: ``image``, ``launch``, ``firmware``, ``boot loader``, ``kernel``,
            ``init``, ``ssh``, ``command``, ``transfer`` or ``teardown``; empty if it happened in none of
            them.
        transient: whether the host or chance is to blame, and nothing in the guest. Then a fresh
            guest may work.
    """

    details = remedy = stage = ""
    transient = False

    def __init__(self, brief: str, **more: Unpack[More]) -> None:
        brief = one_line(brief)  # it may have names out of a stranger's file
        super().__init__(brief)
        self.brief = brief
        vars(self).update(more)

    def __str__(self) -> str:
        lines = [f"[{self.stage}] {self.brief}" if self.stage else self.brief]
        if self.details:
            lines.append(self.details.rstrip("\n"))
        if self.remedy:
            lines.append(f"Remedy: {one_line(self.remedy)}")
        return printable("\n".join(lines))


def add_hints(error: VMSandboxError, hints: Callable[[], Iterable[str]]) -> None:
    """Add `hints` to an error as notes, unless it already has notes."""
    if not getattr(error, "__notes__", None):
        for hint in hints():
            error.add_note(hint)


def in_brief(error: VMSandboxError, where: str) -> VMSandboxError:
    """The same error in one line, for a test that meets it again.

    Args:
        where: the test whose report has the full text.
    """
    brief: VMSandboxError = type(error).__new__(type(error), error.brief)
    brief.__dict__ |= error.__dict__ | {"details": "", "remedy": "", "__notes__": []}
    brief.add_note(f"{where} failed with the same error. Its report has the full text.")
    return brief.with_traceback(error.__traceback__)


class ConfigError(VMSandboxError):
    """An option, an argument of a marker, or an image definition is invalid."""


class ImageError(VMSandboxError):
    """An image is missing or stale, or its build failed."""

    stage = "image"


class LockError(VMSandboxError):
    """An image is not the one in the project's lock file, or the lock file does not have it."""

    stage = "image"


class CacheError(VMSandboxError):
    """Something cannot be kept in the cache: its folder cannot be used, or the disk is full."""

    stage = "image"


class LaunchError(VMSandboxError):
    """QEMU is missing or refused to start, or the host has no room for the guest."""

    stage = "launch"


class BootError(VMSandboxError):
    """A guest did not come up. Its ``stage`` is the last one that it reached.

    Attributes:
        seconds: how long it was waited for.
    """

    def __init__(self, brief: str, *, seconds: float, **more: Unpack[More]) -> None:
        super().__init__(brief, **more)
        self.seconds = seconds


class GuestLost(VMSandboxError):
    """A guest that was up is gone: its kernel panicked, it switched itself off, or QEMU ended."""

    stage = "command"


@dataclass(frozen=True, kw_only=True)
class CommandResult(Generic[AnyStr]):
    """What a program in the guest did.

    Attributes:
        argv: the program and its arguments.
        returncode: its exit status; −N if signal N ended it, as in `subprocess`.
        stdout: what it wrote to standard output: `str`, or `bytes` with ``text=False``.
        stderr: what it wrote to standard error.
        duration: seconds from its start to its end, seen from the host.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: AnyStr
    stderr: AnyStr
    duration: float


class CommandError(VMSandboxError):
    """A program in the guest returned non-zero, or could not be started.

    Attributes:
        result: the `CommandResult`, with both streams.
    """

    stage = "command"

    def __init__(
        self, brief: str, *, result: CommandResult[str] | CommandResult[bytes], remedy: str = ""
    ) -> None:
        super().__init__(brief, details=_streams(result.stdout, result.stderr), remedy=remedy)
        self.result = result


class CommandTimeout(VMSandboxError):
    """A program in the guest did not end in time. Its process group was killed.

    Attributes:
        seconds: the timeout.
        stdout: what it had written to standard output, as `bytes`.
        stderr: what it had written to standard error.
    """

    stage = "command"

    def __init__(
        self,
        brief: str,
        *,
        seconds: float,
        stdout: bytes = b"",
        stderr: bytes = b"",
        remedy: str = "",
    ) -> None:
        super().__init__(brief, details=_streams(stdout, stderr), remedy=remedy)
        self.seconds = seconds
        self.stdout = stdout
        self.stderr = stderr


class InterpreterLost(VMSandboxError):
    """A test inside a guest crashed its interpreter, or its interpreter was killed."""

    stage = "command"


class TransferError(VMSandboxError):
    """Files could not be copied to or from the guest."""

    stage = "transfer"


class MonitorError(VMSandboxError):
    """QEMU refused a monitor command, or its monitor is gone.

    Attributes:
        error_class: QMP's class of the error, such as ``CommandNotFound``; empty if the monitor is
            gone.
    """

    stage = "command"

    def __init__(self, brief: str, *, error_class: str = "", **more: Unpack[More]) -> None:
        super().__init__(brief, **more)
        self.error_class = error_class


class TeardownError(VMSandboxError):
    """Something that the run had started or made could not be ended or removed."""

    stage = "teardown"


# They are public names of the package. pytest's short summary shows them with that module.
for _error in (VMSandboxError, *VMSandboxError.__subclasses__()):
    _error.__module__ = "pytest_vmsandbox"

INFRASTRUCTURE = (
    ImageError,
    LockError,
    CacheError,
    LaunchError,
    BootError,
    GuestLost,
    MonitorError,
    TeardownError,
)

_STREAM_LIMIT = 8_000  # characters of each stream in an error's text; the error object has all


def _streams(stdout: str | bytes, stderr: str | bytes) -> str:
    parts = []
    for name, stream in (("stdout", stdout), ("stderr", stderr)):
        text = printable(stream.decode(errors="replace") if isinstance(stream, bytes) else stream)
        if not text:
            continue
        if len(text) > _STREAM_LIMIT:
            left_out = len(text) - _STREAM_LIMIT
            text = f"[{left_out} characters left out]\n…{text[-_STREAM_LIMIT:]}"
        parts.append(f"--- {name}\n{text.rstrip()}")
    return "\n".join(parts)
