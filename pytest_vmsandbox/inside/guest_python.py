"""The Python of a guest: what it is, and which wheels fit it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_vmsandbox.core.errors import CommandError, TransferError
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.inside.wire import broken

OLDEST_PYTHON = (3, 9)
_PROBE = Path(__file__).with_name("runner") / "probe.py"
_GLIBC = (17, 28, *range(31, 41))  # minor versions that uv has a platform of
_MACHINES = ("x86_64", "aarch64")


@dataclass(frozen=True, kw_only=True)
class GuestPython:
    """The Python of a guest.

    Args:
        version: the first three of its ``sys.version_info``.
        machine: its ``platform.machine()``.
        libc: the version of its glibc, such as (2, 41); empty if it is another C library.
    """

    version: tuple[int, ...]
    machine: str
    libc: tuple[int, ...]

    @classmethod
    def probe(cls, guest: Guest) -> tuple[GuestPython, str]:
        """Ask a guest for its Python, and the path of it.

        Raises:
            TransferError: it has no Python that works.
            GuestLost: the guest is gone.
        """
        try:
            done = guest.run(["python3", "-I", "-S", "-"], input=_PROBE.read_text("utf-8"))
        except CommandError as error:
            raise TransferError(
                f"{guest.name} has no Python that works",
                details=error.details,
                remedy="tests run inside guests that have Python 3.9 or newer. Other guests can be "
                "driven from here, with the fixture vm",
            ) from error
        facts = parse_probe(done.stdout)
        libc = tuple(int(part) for part in facts["libc"].split(".")[:2] if part.isdecimal())
        python = cls(version=facts["version"], machine=facts["machine"], libc=libc)
        return python, facts["executable"]

    def __str__(self) -> str:
        return _dotted(self.version)

    @property
    def platform(self) -> str:
        """What uv calls it. The newest glibc that uv knows stands for newer ones.

        Raises:
            TransferError: there are no wheels for it, or no pytest.
        """
        if self.version < OLDEST_PYTHON:
            raise TransferError(
                f"the guest's Python {self} is too old:"
                f" tests in a guest need {_dotted(OLDEST_PYTHON)} or newer",
                remedy="choose an image with a newer Python",
            )
        known = [minor for minor in _GLIBC if (2, minor) <= self.libc]
        if self.machine not in _MACHINES or not known:
            libc = f"glibc {_dotted(self.libc)}" if self.libc else "no glibc"
            raise TransferError(
                f"there are no wheels for the guest: it is {self.machine} with {libc}",
                remedy=f"choose an image for {' or '.join(_MACHINES)}, with glibc 2.{_GLIBC[0]} or newer",
            )
        return f"{self.machine}-manylinux_2_{known[-1]}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def parse_probe(text: str) -> dict[str, Any]:
    """What ``runner/probe.py`` has printed.

    Raises:
        GuestLost: it is anything else.
    """
    try:
        facts = json.loads(text)
        return {
            "version": tuple(map(int, facts["version"]))[:3],
            "machine": str(facts["machine"]),
            "libc": str(facts["libc"][1]),
            "executable": str(facts["executable"]),
        }
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise broken("no facts about its Python", text) from error
