"""The forks of a guest, as tests use them, and the part of `Guest` that makes them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TypeVar

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.running.engine import Engine

G = TypeVar("G")  # a `Guest`


class Forks(list[G]):
    """What `Guest.fork` returns: a list of guests, and a context manager that ends them."""

    def __init__(self, guests: Iterable[G], stack: ExitStack) -> None:
        super().__init__(guests)
        self._stack = stack

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


class HasForks:
    """The part of `Guest` that is about forks."""

    engine: Engine

    def fork(self, count: int = 1) -> Forks[Self]:
        """Make guests that go on from here. They have this guest's memory, disks and running programs.

        This guest goes on, too. From now on, each of them is a guest of its own: what one does, no other one
        sees. The memory is shared until somebody writes to it, so a fork is almost as fast as a clone.

        In the forks, the clock is right and random numbers are new. If a test has set the clock off by two
        seconds or more, it stays that far off. Attached disks are attached to each fork, with the same
        content. Network cards of private networks stay, but on no network. The hostname and all files are as they were. `name` is new: on this side, each fork has one
        of its own.

        Programs go on in every fork. A process of `popen` belongs to this guest: in the forks its program
        goes on, but nothing more is heard of it. Connections from outside end, and a forwarded port has to be
        forwarded again.

        Args:
            count: how many guests.

        Returns:
            A list of guests, which run and answer. It is also a context manager, which ends them. Without
            that, they end with this guest.

        Raises:
            ConfigError: ``count`` is invalid, the guest has no helper, a fault is in force, or a disk is
                recorded.
            GuestLost: the guest is switched off.
            MonitorError: the state of the guest cannot be saved.
            LaunchError: this host has no room.

        Example::

            with vm.fork(2) as (one, other):
                one.run(["systemctl", "stop", "app"])
                other.run(["systemctl", "restart", "app"])
        """
        with self.engine.explained():
            if type(count) is not int or count < 1:  # True is none, either
                raise ConfigError(
                    f"fork({count!r}): there can be no such number of guests",
                    remedy="use a whole number, 1 or more",
                )
            if self.engine.fork is None:
                raise ConfigError(
                    f"{self.engine.name} cannot be forked while an image is made",
                    remedy="fork guests in tests or in fixtures",
                )
            forks: Forks[Self] = self.engine.fork(self.engine, count)
            return forks
