"""A fresh guest for a command, and what is seen while it boots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest


@contextmanager
def fresh_guest(image: str, settings: Settings, hardware: Mapping[str, object]) -> Iterator[Guest]:
    """A guest that answers, and is gone at the end. What we say goes to the standard error.

    Raises:
        VMSandboxError: see `GuestFactory.boot`.
    """
    screen = Screen(stderr=True)
    with ExitStack() as stack:
        factory = stack.enter_context(GuestFactory.open(settings, Announcer(screen.say)))
        with screen.waiting(f"starting {image}"):
            guest = stack.enter_context(factory.boot(image, **hardware))
        yield guest
