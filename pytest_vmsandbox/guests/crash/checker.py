"""The checks of users: what is sent to the guest, and started there."""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import shlex
import symtable
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.crash.freeing import FUNCTIONS
from pytest_vmsandbox.guests.crash.mounts import Place, escaped
from pytest_vmsandbox.guests.reaching.commands import Command, StrPath, command

CheckFunction = Callable[[Path, list[Any]], object]
Check = CheckFunction | Sequence[StrPath]
LIMIT = 16_384  # bytes of text that a check can send for one state
_FEW_ARGUMENTS = 100_000  # characters of what was acknowledged, for a variable of a program
_FORGET = "btrfs device scan --forget 2>/dev/null"
_GIVEN = {"__name__", "__builtins__"}  # what the source finds beside the builtins

# Runs a program for each line that it reads, as resident.py does it with a function. $@: the program.
_SHELL = r"""
{functions}
drop() {{
    {drop}
}}
mount_all() {{
    {mount}
}}
unmount_all() {{
    {unmount}
}}
answer() {{
    size=$(wc -c <"$output")
    [ "$size" -le {limit} ] || size={limit}
    printf '%s %d\n' "$1" "$size"
    tail -c "$size" "$output"
}} >&4

cd / || exit 1
umask 077
output=/dev/shm/vmsandbox-check.$$
: >"$output" 2>/dev/null || output=/tmp/vmsandbox-check.$$
: >"$output" || exit 1
exec 3<&0 4>&1 5<>"$output" </dev/null >/dev/null 2>&1
rm "$output"  # nothing is left of it, however this ends
output=/proc/$$/fd/5
export VMSANDBOX_ACKNOWLEDGED VMSANDBOX_FOLDER={folder}
answer ready
while IFS= read -r VMSANDBOX_ACKNOWLEDGED <&3; do
    word=ok
    drop
    if mount_all >"$output" 2>&1; then
        (cd {cwd} && exec 3<&- 4>&- 5<&- && exec "$@") >"$output" 2>&1
        status=$?
        [ $status = 0 ] || word=broken-$status
    else
        word=unmountable
    fi
    n=0
    until unmount_all && [ -z "$(held {devices})" ]; do
        n=$((n + 1))
        [ $n -lt 10 ] || {{ word=busy; break; }}
        leave {folders} {devices}
        ! unmount_all || expel {devices}
        sleep 0.1
    done
    answer "$word"
done
"""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What runs in the guest and looks at the states.

    Attributes:
        command: starts it.
        opening: what it reads first.
        is_python: whether it is a Python function.
    """

    command: Command
    opening: bytes
    is_python: bool


def program(check: Check, place: Place) -> Program:
    """What runs a check in the guest.

    Args:
        place: the disk; its file systems are mounted for each state.

    Raises:
        ConfigError: the check cannot be sent to a guest.
    """
    if callable(check):
        return _function(check, place)
    is_one = isinstance(check, str | bytes) or not isinstance(check, Sequence)
    if is_one or not check:
        raise ConfigError(
            f"the check {check!r} is neither a function nor a list of words",
            remedy="for a script, use ['/bin/sh', '-c', SCRIPT]",
        )
    words = command(check).argv
    argv = ("/bin/sh", "-c", _shell_script(place), "sh", *words)
    return Program(command=Command(argv=argv, user="root"), opening=b"", is_python=False)


def line(acknowledged: Sequence[object], *, is_python: bool) -> bytes:
    """What the program reads for one state.

    Raises:
        ConfigError: more was acknowledged than a program can get.
    """
    text = json.dumps(acknowledged)
    if not is_python and len(text) > _FEW_ARGUMENTS:
        raise ConfigError(
            f"{len(acknowledged)} values were acknowledged, which are too much for a program's variable",
            remedy="acknowledge short values, such as numbers, or use a Python function as the check",
        )
    return f"{text}\n".encode()


def drop_script(place: Place) -> str:
    """Lets the kernel forget what it knows of a disk's content. Run by a shell."""
    lines = [f"blockdev --flushbufs {shlex.quote(device)} 2>/dev/null" for device in place.devices]
    if any(it.kind == "btrfs" for it in place.mounts):
        lines.append(_FORGET)
    return "; ".join([*lines, ":"])


def mount_script(place: Place) -> str:
    """Mounts a disk as it was mounted. Run by a shell."""
    lines = [
        shlex.join(["mount", "-t", it.kind, "-o", ",".join(it.options), it.source, it.folder])
        for it in place.mounts
    ]
    return " && ".join(lines) or ":"


def _shell_script(place: Place) -> str:
    quoted = shlex.quote
    unmounts = [
        f"! grep -qF {quoted(f' {escaped(it.folder)} ')} /proc/self/mountinfo || umount {quoted(it.folder)}"
        for it in reversed(place.mounts)
    ]
    return _SHELL.format(
        functions=FUNCTIONS,
        drop=drop_script(place),
        mount=mount_script(place),
        unmount=" && ".join(f"{{ {it}; }}" for it in unmounts) or ":",
        limit=LIMIT,
        folder=quoted(place.folder),
        cwd=quoted("/" if place.folder in place.devices else place.folder),
        folders=shlex.join(it.folder for it in place.mounts),
        devices=shlex.join(place.devices),
    )


# -- functions -------------------------------------------------------------------------------------


@cache
def _resident() -> str:
    """The program that calls functions in the guest."""
    return Path(__file__).with_name("resident.py").read_text(encoding="utf-8")


def _function(check: Callable[..., object], place: Place) -> Program:
    source, file, first = source_of(check)
    plan = {
        "source": source,
        "file": file,
        "line": first,
        "name": check.__name__,
        "folder": place.folder,
        "devices": place.devices,
        "mounts": [[it.source, it.folder, it.kind, it.options] for it in place.mounts],
        "functions": FUNCTIONS,
    }
    argv = ("python3", "-I", "-c", _resident())
    return Program(
        command=Command(argv=argv, user="root"),
        opening=f"{json.dumps(plan)}\n".encode(),
        is_python=True,
    )


def source_of(check: Callable[..., object]) -> tuple[str, str, int]:
    """The source of a function, its file, and the number of its first line.

    Raises:
        ConfigError: the source is not all that the function needs.
    """
    if not isinstance(check, FunctionType) or check.__name__ == "<lambda>":
        raise _refused(check, "it is not a plain function", "write it with def")
    if inspect.iscoroutinefunction(check) or inspect.isgeneratorfunction(check):
        raise _refused(check, "it is a coroutine or a generator", "write a plain function")
    if check.__code__.co_freevars:
        names = ", ".join(check.__code__.co_freevars)
        remedy = "acknowledge what the check needs to know: it gets these values"
        raise _refused(check, f"it uses variables of the function around it: {names}", remedy)
    try:
        inspect.signature(check).bind(None, None)
    except TypeError:
        remedy = f"write: def {check.__name__}(folder, acknowledged):"
        raise _refused(check, "it does not take two arguments", remedy) from None
    try:
        lines, first = inspect.getsourcelines(check)
        source = textwrap.dedent("".join(lines))
        tree = ast.parse(source)
    except (OSError, SyntaxError) as error:
        remedy = "write it into a file, as a function of its own"
        raise _refused(check, "its source cannot be found", remedy) from error
    node = tree.body[0]
    if not isinstance(node, ast.FunctionDef):
        raise _refused(check, "it is not a plain function", "write it with def")
    if node.decorator_list:
        raise _refused(check, "it has a decorator", "remove it: only the function is sent")
    if unknown := sorted(_unknown(tree)):
        remedy = (
            f"define or import {unknown[0]} inside the function, because only its source is sent"
        )
        raise _refused(check, f"it uses names from outside: {', '.join(unknown)}", remedy)
    return source, check.__code__.co_filename, first


def _refused(check: object, why: str, remedy: str) -> ConfigError:
    name = getattr(check, "__name__", repr(check))
    return ConfigError(f"the check {name} cannot run in the guest: {why}", remedy=remedy)


def _unknown(tree: ast.Module) -> set[str]:
    """The names that a source uses, and that nobody has defined."""
    for node in ast.walk(tree):  # nothing evaluates annotations
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    whole = symtable.symtable(ast.unparse(tree), "check", "exec")
    own = {symbol.get_name() for symbol in whole.get_symbols() if symbol.is_assigned()}
    return _globals(whole) - own - set(dir(builtins)) - _GIVEN


def _globals(table: symtable.SymbolTable) -> set[str]:
    found = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module")
    }
    return found.union(*map(_globals, table.get_children()))
