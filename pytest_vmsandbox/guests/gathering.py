"""Asks a guest what it is doing: its processes, its memory, its kernel's log and its journal.

This is for a test that has just failed. So it is never another failure, and it takes bounded time.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import CommandError, CommandTimeout, GuestLost, VMSandboxError
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.reaching.access import greeting
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.reaching.ways_in import check_way_in
from pytest_vmsandbox.guests.running.machines import Running

MOST = 256 << 10  # bytes of each text; the end is what matters
WHY_NOT = "not-gathered.txt"  # the file that says why there is none, or not all
_ALIVE_SECONDS = 1.0  # for a sign of life; both longer under emulation
_SECONDS = 3.0  # for all of it
_LEAST_SECRET = 6  # characters; shorter values, such as «1» and «true», are in many texts
_SSH_PORT = 22
# One program for all: the cheap parts first, as time may run out. `ps` is that of procps or of busybox.
_SCRIPT = r"""
PATH=$PATH:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C; export PATH LC_ALL
exec </dev/null 2>&1
part() { printf '\n%s %s\n' "$1" "$2"; }
run() { printf '$ %s\n' "$*"; "$@"; echo; }
part "$1" processes.txt
{
    ps -eo pid,ppid,user,stat,rss,vsz,wchan:20,etime,args 2>/dev/null ||
    ps -o pid,ppid,user,stat,rss,vsz,args 2>/dev/null || ps
} | tail -c "$2"
part "$1" memory.txt
{ run free; run cat /proc/meminfo; } | tail -c "$2"
part "$1" dmesg.txt
dmesg | tail -c "$2"
if command -v journalctl >/dev/null; then
    part "$1" journal.txt
    journalctl -b --no-pager -q -n 3000 | tail -c "$2"
fi
part "$1" end
"""


def gathered(guest: Guest, secret: Iterable[str] = ()) -> dict[str, str]:
    """Texts about a guest, by the name of a file for each. If some are missing, `WHY_NOT` says why.

    Args:
        secret: values that must not be in the texts.
    """
    token = secrets.token_hex(8)
    said, why = _said(guest, token)
    texts = {name: _clean(text, secret) for name, text in split(said, token).items()}
    if why or "end" not in texts:
        texts[WHY_NOT] = f"{why or f'{guest.name} ended while it was asked'}\n"
    texts.pop("end", None)
    return texts


def _said(guest: Guest, token: str) -> tuple[bytes, str]:
    """What the guest says about itself, and why that is not all; empty if it is all."""
    engine = guest.engine
    said = bytearray()

    def take(data: bytes) -> None:
        if len(said) < 6 * MOST:  # a guest may send without end
            said.extend(data)

    try:
        with engine.use() as running:
            _check_alive(running, engine.stretch(_ALIVE_SECONDS))
        for user in ("root", None):  # who may not become root says what it may
            command = Command(argv=("/bin/sh", "-c", _SCRIPT, "sh", token, f"{MOST}"), user=user)
            try:
                engine.run(command, stdout=take, timeout=engine.stretch(_SECONDS))
            except CommandTimeout as late:
                return bytes(said), f"{guest.name} did not say more within {late.seconds:g} s"
            except CommandError as error:
                if user is None:
                    return bytes(said), error.brief
                continue
            break
    except (VMSandboxError, OSError) as error:
        return bytes(said), error.brief if isinstance(error, VMSandboxError) else str(error)
    return bytes(said), ""


def _check_alive(running: Running, seconds: float) -> None:
    """Check that a guest shows a sign of life, so nobody waits for one that hangs.

    Raises:
        VMSandboxError: it shows none, or there is no way in.
    """
    machine, deadline = running.machine, Deadline(seconds)
    machine.check()
    if running.resident.is_away:
        raise GuestLost(f"a fault keeps {machine.spec.name} from answering", stage="command")
    check_way_in(running.blueprint, machine.spec.name)
    if (helper := running.helper) is not None:
        helper.ping(seconds)
    elif not greeting(machine.forward(_SSH_PORT), deadline.remaining()):
        raise GuestLost(f"{machine.spec.name} does not answer on SSH", stage="ssh")


def split(said: bytes, token: str) -> dict[str, str]:
    """The parts of what the script wrote, by name. Nobody in the guest knows the token before."""
    parts = re.split(rb"\n%s ([\w.]+)\n" % token.encode(), said)
    return {
        name.decode(): text[-MOST:].decode(errors="replace")
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def _clean(text: str, secret: Iterable[str]) -> str:
    """A text without control sequences and secret values."""
    values = _as_shown(secret)
    return _masked(printable(_masked(text, values)), values)


def _masked(text: str, values: Iterable[str]) -> str:
    for value in values:
        text = text.replace(value, "[secret]")
    return text


def _as_shown(secret: Iterable[str]) -> list[str]:
    """What may be left of values in a text, the longest first: one may be the beginning of another.

    Logs have their own text before each line, and others replace control characters.
    """
    found = {part for value in secret for part in (value, *value.splitlines())}
    found |= {part.strip() for part in found} | {printable(part) for part in found}
    return sorted((part for part in found if len(part) >= _LEAST_SECRET), key=len, reverse=True)
