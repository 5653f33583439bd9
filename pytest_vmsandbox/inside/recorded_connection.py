"""The connection to a session whose run is recorded: all it is told goes there at once, on a disk."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping

from pytest_vmsandbox.core.deadline import Deadline, wall
from pytest_vmsandbox.core.errors import GuestLost
from pytest_vmsandbox.guests.replay.run import RecordedRun
from pytest_vmsandbox.inside.connection import ANSWER_SECONDS, PING_SECONDS, Connection
from pytest_vmsandbox.inside.wire import Decoder, encode

_FINISH = {"do": "finish"}


class RecordedConnection(Connection):
    """A connection to a guest that is recorded. It runs once it is told to run a test.

    Until then, it seems to be awake. It cannot be interrupted.
    """

    def __init__(self, run: RecordedRun, *, patience: float) -> None:
        self.guest = run.guest
        self.patience = patience
        self._run = run
        self._decoder = Decoder()
        self._waiting = deque([{"awake": 0}])
        self._answers, self._weight = 0, 0
        self._unsent: list[Mapping[str, object]] = []
        self._has_begun = False
        self._silence = Deadline(PING_SECONDS + ANSWER_SECONDS * patience)

    def say(self, *messages: Mapping[str, object]) -> None:
        """Note messages. Once it runs, they are lost: it was told to finish."""
        self._unsent += messages

    def signal(self, name: str) -> None:
        """Give the guest up: no signal gets there. Stacks cannot be asked for either.

        Raises:
            GuestLost: the session had to be interrupted or killed.
        """
        if name != "DUMP":
            raise GuestLost(f"{self.guest.name} is recorded, so its session cannot be interrupted")

    def _receive(self, timeout: float) -> bool:
        if not self._has_begun:
            self._has_begun = True
            self._run.request(
                {"now": wall(), "hostname": self.guest.name, "seed": secrets.token_hex(32)},
                b"".join(map(encode, [*self._unsent, _FINISH])),
            )
            self._run.begin()
            self._silence = Deadline(self._silence.seconds)
        messages = self._decoder.feed(self._run.receive(timeout))
        if any(
            "gone" in it for it in messages
        ):  # the supervisor; what it said before does not count
            raise self._gone()
        self._silence = Deadline(self._silence.seconds)
        self._waiting += [it for it in messages if not {"pong", "attached", "awake"} & it.keys()]
        return bool(messages)

    def _ping(self) -> None:
        """Check that the guest still reports. It pings its supervisor by itself, as nobody else can."""
        if self._silence.expired:
            raise self._silent()
