"""Brings back files that tests inside guests write into the project, and reports about them."""

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
"""What became of files (or guests) → their names, as we show them at the end, in order."""

# Globs of files that always come back.
_KNOWN = ("**/__snapshots__", "!**/__snapshots__/*.lock", "**/cassettes", ".hypothesis/examples")
# Likewise, if the plugin with that name is loaded: the names of its files are too general.
_KNOWN_OF = {
    "regressions": "**/test_*/test_*",
    "datadir": "**/test_*/test_*",  # pytest-regressions uses this plugin for its files
    "snapshot": "**/snapshots",
}
_MOST_NAMES = 5  # in one line
_MOST_KEPT = 10_000  # of one kind

LOST = "lost"
_LINES = {
    "brought": "brought back {files} that tests inside guests wrote: {names}",
    "left": "tests inside guests wrote {files} that stayed there: {names}\n"
    "  To bring them back, add to the ini file: `vm_pull = {patterns}`. To hide a name here, put `!` in "
    "front of it",
    "different": "not brought back, because another guest or somebody on this machine wrote other "
    "content meanwhile: {names}\n  Let one guest run all tests that write the same file "
    "(--vm-isolation=session or module, --dist=loadfile)",
    "code": "not brought back, because a guest may change code only if vm_pull has the exact path: "
    "{names}",
    "large": "not brought back, because a guest may send at most 64 MiB in a file, and 256 MiB and "
    "20,000 files in all: {names}\n  Exclude files that you do not need: `!` in front of a glob in "
    "vm_pull",
    "unwritable": "not brought back, because the file cannot be written on this machine: {names}",
    "way": "not brought back, because a link or a folder has that name on this machine: {names}",
    "removed": "deleted by tests inside guests, but kept on this machine: {names}",
    LOST: "these guests were lost, and with them the files that tests wrote there: {names}",
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
    """Keep syrupy from removing or counting unused snapshots.

    On this side, it would see all snapshots of tests inside as unused. In a guest, it would see those
    of other tests as unused.
    """
    option = run.config.option
    is_used = any("snapshot" in getattr(item, "fixturenames", ()) for item in inside)
    if not is_used or not run.config.pluginmanager.has_plugin("syrupy"):
        return
    run.tell(
        "syrupy does not look for unused snapshots, because tests run inside guests. To remove unused "
        "ones, use --snapshot-update without --in-vm"
    )
    if hasattr(option, "disable_unused_snapshots"):
        option.disable_unused_snapshots = True
        return
    option.warn_unused_snapshots = True  # a warning fails no run
    if option.update_snapshots:
        run.usage_errors.append(
            "--snapshot-update: this version of syrupy would remove all snapshots of tests that run "
            "inside a guest\nRemedy: install a version that has --snapshot-disable-unused, or update "
            "the snapshots without --in-vm"
        )


def bring_back(run: Run, guest: Guest, folder: str, tree: Tree) -> Mapping[Outcome, Iterable[str]]:
    """Bring back those files of a guest that the patterns select.

    Args:
        folder: the project's folder in the guest.
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
    """Remember names for the lines at the end, as they are shown. Their number has a limit."""
    kept = found[kind]
    for name in names:
        if len(kept) < _MOST_KEPT:
            # xdist cannot send lone surrogates.
            text = printable(name.encode(errors="replace").decode())
            kept[text.replace("\n", " ").replace("\t", " ")] = None


def lines(found: Found) -> Iterator[str]:
    """The lines for the end of the run, one for each kind."""
    for kind, text in _LINES.items():
        if names := [*found.get(kind, ())]:
            some = names[:_MOST_NAMES]
            more = [f"and {len(names) - len(some):,} more"] if len(names) > len(some) else []
            yield text.format(
                files=f"{len(names):,} file{'s' * (len(names) > 1)}",
                names=", ".join([*some, *more]),
                patterns=" ".join([*map(shlex.quote, some), *(["…"] if more else [])]),
            )
