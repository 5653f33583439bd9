"""What a guest factory asks its owner, and what it tells its owner."""

# ruff: noqa: ARG002  # these methods do nothing by default

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from pytest_vmsandbox.core.errors import VMSandboxError

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.guests.provision import Provision
    from pytest_vmsandbox.machine.cmdline import MachineSpec


class Callbacks(Protocol):
    """What a run adds to its guests and their errors, and what it hears about them.

    These methods do nothing. A subclass overrides those that it needs.
    """

    def logs(self, guest: str, was: str = "") -> Path | None:
        """The folder for the logs of a guest; None for no logs.

        Called from any thread, and also for guests that no test may ever use.

        Args:
            was: its name until now, under which it already logs; empty for a new guest.
        """
        return None

    def image(self) -> str | None:
        """The image of the current test; None without one."""
        return None

    def kernel(self, default: Path | None) -> Path | None:
        """The kernel for guests of the current test that name none; None for the image's own."""
        return default

    def hints(self) -> Sequence[str]:
        """Lines for an error of a guest: where the artifacts are, and how to reproduce it."""
        return ()

    def qemu_args(self, spec: MachineSpec) -> Sequence[str]:
        """Further arguments for QEMU."""
        return ()

    def provisions(self, image: str) -> Sequence[Provision]:
        """The preparations for all guests of an image."""
        return ()

    def missing(self, error: VMSandboxError) -> NoReturn:
        """QEMU or an image is missing. Raise `error`, or something else."""
        raise error

    def say(self, text: str) -> None:
        """Print a line about a long wait."""
        return

    def tell(self, text: str) -> None:
        """Print a line about a problem, once."""
        return

    def note_retry(self, error: VMSandboxError) -> None:
        """A fresh guest is tried after this error."""
        return

    def guest_begun(self, guest: str) -> None:
        """A guest with that name will be handed out."""
        return

    def preparation_failed(self, guest: Guest, name: str) -> None:
        """A preparation of a guest has failed. The guest is about to be ended.

        Args:
            name: under which it logs.
        """
        return

    def guest_ready(self, guest: Guest) -> None:
        """A guest answers, and is about to be handed out."""
        return

    def guest_restoring(self, guest: str, error: BaseException) -> None:
        """A block with a snapshot of a guest was left with an error. The snapshot is about to be restored."""
        return

    def guest_stopping(self, guest: Guest, error: BaseException | None) -> None:
        """A guest is about to be ended.

        Args:
            error: what the block that used the guest raised.
        """
        return


class Announcer(Callbacks):
    """Callbacks that pass lines for people to a function, and do nothing else.

    Args:
        say: gets lines about long waits.
        tell: gets lines about problems; None for `say`.
    """

    def __init__(
        self,
        say: Callable[[str], object] = lambda _: None,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self._say = say
        self._tell = tell or say

    def say(self, text: str) -> None:
        """Pass on a line about a long wait."""
        self._say(text)

    def tell(self, text: str) -> None:
        """Pass on a line about a problem."""
        self._tell(text)
