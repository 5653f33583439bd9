"""Files that tests inside guests write into the project: which come back, and what is told of them."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.plugin import config as options

if TYPE_CHECKING:
    import pytest

    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.inside.tree import Tree
    from pytest_vmsandbox.inside.tree_copy import Outcome, Patterns
    from pytest_vmsandbox.plugin.run import Run

Found = defaultdict[str, dict[str, None]]
"""What is told at the end: names of files (or guests) as they are shown, in order, by what became of them."""

# What comes back without being asked for.
_KNOWN = ("**/__snapshots__", "!**/__snapshots__/*.lock", "**/cassettes", ".hypothesis/examples")
# Likewise, where a plugin with that name is loaded: the names of its files are less telling.
_KNOWN_OF = {
    "regressions": "**/test_*/test_*",
    "datadir": "**/test_*/test_*",  # pytest-regressions' files are of that plugin
    "snapshot": "**/snapshots",
}
_MOST_NAMES = 5  # in one line
_MOST_KEPT = 10_000  # of one kind

LOST = "lost"
_LINES = {
    "brought": "brought back {files} that tests inside guests wrote: {names}",
    "left": "tests inside guests wrote {files} that stayed there: {names}\n"
    "  to bring that back, add to the ini file: `vm_pull = {patterns}`; `!` in front of a name hides it here",
    "different": "not brought back, since another guest or somebody on this machine wrote other "
    "content meanwhile: {names}\n  let one guest run all tests that write a file "
    "(--vm-isolation=session or module, --dist=loadfile)",
    "code": "not brought back, since a guest may change code only where vm_pull has its exact name: "
    "{names}",
    "large": "not brought back, since it is more than a guest may send: {names}",
    "unwritable": "tests inside guests wrote what cannot be written here: {names}",
    "way": "not brought back, since a link or a folder is in its place here: {names}",
    "removed": "deleted by tests inside guests, but not here: {names}",
    LOST: "what tests wrote into the project in a guest that was lost is lost with it: {names}",
}


def patterns(config: pytest.Config) -> Patterns:
    """Which files come back.

    Raises:
        ConfigError: a pattern of the ini key is not allowed.
    """
    from pytest_vmsandbox.inside.tree_copy import Patterns

    is_loaded = config.pluginmanager.has_plugin
    of_plugins = [glob for plugin, glob in _KNOWN_OF.items() if is_loaded(plugin)]
    return Patterns([*_KNOWN, *of_plugins, *options.entries(config, "vm_pull")])


def spare_unused(run: Run, inside: Sequence[pytest.Item]) -> None:
    """Let syrupy neither remove nor count unused snapshots.

    On this side, it would take all of tests inside for unused. In a guest, those of tests that were
    not selected here, or run in another guest.
    """
    option = run.config.option
    is_used = any("snapshot" in getattr(item, "fixturenames", ()) for item in inside)
    if not is_used or not run.config.pluginmanager.has_plugin("syrupy"):
        return
    run.tell("syrupy does not look for unused snapshots, since tests run inside a guest")
    if hasattr(option, "disable_unused_snapshots"):
        option.disable_unused_snapshots = True
        return
    option.warn_unused_snapshots = True  # which fails no run
    if option.update_snapshots:
        run.usage_errors.append(
            "this version of syrupy would remove all snapshots of tests that run inside a guest\n"
            "Remedy: install one that has --snapshot-disable-unused, or update the snapshots "
            "without --in-vm"
        )


def bring_back(run: Run, guest: Guest, folder: str, tree: Tree) -> Mapping[Outcome, Iterable[str]]:
    """Bring back what tests have written in a guest, as far as it is wanted.

    Args:
        folder: the project's in the guest.
        tree: what went there.

    Raises:
        VMSandboxError: see `inside.tree_copy.bring_back`.
    """
    from pytest_vmsandbox.inside import tree_copy

    found = tree_copy.bring_back(
        guest.engine.stream_script, tree, folder, patterns=patterns(run.config), since=run.begun
    )
    run.failed |= bool(found[tree_copy.Outcome.UNWRITABLE])
    return found


def note(found: Found, kind: str, names: Iterable[str]) -> None:
    """Remember what is told at the end, as it is shown; of very many, so many and no more."""
    kept = found[kind]
    for name in names:
        if len(kept) < _MOST_KEPT:
            # xdist sends no half characters.
            text = printable(name.encode(errors="replace").decode())
            kept[text.replace("\n", " ").replace("\t", " ")] = None


def lines(found: Found) -> Iterator[str]:
    """What is told at the end of the run, a line for each kind."""
    for kind, text in _LINES.items():
        if names := [*found.get(kind, ())]:
            some = names[:_MOST_NAMES]
            more = [f"and {len(names) - len(some):,} more"] if len(names) > len(some) else []
            yield text.format(
                files=f"{len(names):,} file{'s' * (len(names) > 1)}",
                names=", ".join([*some, *more]),
                patterns=" ".join([*map(shlex.quote, some), *(["…"] if more else [])]),
            )
