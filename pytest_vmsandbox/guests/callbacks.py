"""What a factory of guests asks of whoever has opened it, and what it tells them."""

# ruff: noqa: ARG002  # these methods do nothing by themselves

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
    """What a run adds to its guests and to their errors, and what it is told of them.

    The methods here add nothing and listen to nothing: whoever derives from this class overrides
    those that it needs.
    """

    def logs(self, guest: str) -> Path | None:
        """The folder for the logs of a guest of that name; None for no logs.

        Called from any thread, also for guests that nobody may ever get.
        """
        return None

    def image(self) -> str | None:
        """The image of the test that runs now; None where there is none."""
        return None

    def hints(self) -> Sequence[str]:
        """Lines for an error of a guest: where the artifacts are, how to reproduce it."""
        return ()

    def qemu_args(self, spec: MachineSpec) -> Sequence[str]:
        """Further arguments for QEMU."""
        return ()

    def provisions(self, image: str) -> Sequence[Provision]:
        """What is done to all guests of an image before they become a template."""
        return ()

    def missing(self, error: VMSandboxError) -> NoReturn:
        """QEMU or an image is missing: raise what is to be raised."""
        raise error

    def say(self, text: str) -> None:
        """Tell people of a long wait."""
        return

    def tell(self, text: str) -> None:
        """Tell people, once, of what does not go as it should."""
        return

    def note_retry(self, error: VMSandboxError) -> None:
        """A fresh guest is tried after this error."""
        return

    def guest_begun(self, guest: str) -> None:
        """A guest of that name is going to be somebody's."""
        return

    def guest_ready(self, guest: Guest) -> None:
        """A guest answers, and is about to be handed out."""
        return

    def guest_stopping(self, guest: Guest, failed: bool) -> None:
        """A guest is about to be ended.

        Args:
            failed: whether an error passes through its use.
        """
        return


class Announcer(Callbacks):
    """Callbacks that tell people by a function, and do nothing else.

    Args:
        say: told of long waits.
        tell: told of what does not go as it should; None for `say`.
    """

    def __init__(
        self,
        say: Callable[[str], object] = lambda _: None,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self._say = say
        self._tell = tell or say

    def say(self, text: str) -> None:
        """Tell people of a long wait."""
        self._say(text)

    def tell(self, text: str) -> None:
        """Tell people of what does not go as it should."""
        self._tell(text)
