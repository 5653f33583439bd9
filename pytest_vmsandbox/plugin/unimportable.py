"""Test files that this machine cannot collect, or skips as a whole. A guest may collect them.

Under ``--in-vm``, one item for each image stands for such a file until the guest has collected it.
Then the file's tests replace the item. If the guest cannot collect the file either, the item reports
that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from pytest_vmsandbox.core.errors import ConfigError, VMSandboxError
from pytest_vmsandbox.plugin import config as options, naming, planning
from pytest_vmsandbox.plugin.plan import Variant, plan_of

if TYPE_CHECKING:
    from pytest_vmsandbox.inside.session import Collected
    from pytest_vmsandbox.plugin.run import Run


_MAX_LINE = 10_000_000


class RemoteItem(pytest.Item):
    """A test, or a file of tests, that only the guest can collect."""

    place: tuple[Path, int | None, str] | None = None

    @classmethod
    def of(cls, run: Run, parent: pytest.Collector, *, variant: Variant, plain: str) -> Self:
        """An item for the test, or the file, with the id `plain` in the guest."""
        name = naming.with_image(plain, variant.label)
        item: Self = cls.from_parent(parent, name=name.partition("::")[2] or name, nodeid=name)
        planning.store(run, item, variant=variant, plain=plain, is_inside=True, is_remote=True)
        return item

    def runtest(self) -> None:
        raise NotImplementedError("this test runs inside a guest")

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.place or (self.path, None, self.name)


def stand_in(
    run: Run, collector: pytest.Collector, report: pytest.CollectReport
) -> pytest.CollectReport:
    """A file's report. If the file failed here, it has items for the guest instead, where possible."""
    config = collector.config
    is_here = report.passed or config.option.collectonly or not options.inside(config)
    if is_here or not isinstance(collector, pytest.Module):
        return report
    try:
        variants = run.variants()
    except ConfigError:
        return report  # reported elsewhere
    first = run.unimportable.setdefault(collector.nodeid, type(collector))
    if first is not type(collector):
        variants = []  # the guest reports tests and doctests together
    items: list[pytest.Item | pytest.Collector] = [
        RemoteItem.of(run, collector, variant=variant, plain=collector.nodeid)
        for variant in variants
    ]
    return pytest.CollectReport(collector.nodeid, "passed", None, result=items)


def replace(
    run: Run, items: list[pytest.Item], collected: Callable[[pytest.Item], Collected]
) -> None:
    """Replace the items of files by the tests that guests have collected.

    Args:
        collected: returns what the guest for an item has collected.
    """
    if run.unimportable and planning.refused(run.config) is None:
        items[:] = [test for item in items for test in _collected(run, item, collected)]


def _collected(
    run: Run, item: pytest.Item, collected: Callable[[pytest.Item], Collected]
) -> Sequence[pytest.Item]:
    if not isinstance(item, RemoteItem):
        return [item]
    try:
        found = collected(item)
    except (VMSandboxError, pytest.skip.Exception):  # by --vm-missing=skip
        return [item]  # the item reports it when it runs
    plan = plan_of(item)
    assert item.parent is not None
    tests = []
    for plain in found.items:
        if plain.partition("::")[0] == plan.plain:
            test = RemoteItem.of(run, item.parent, variant=plan.variant, plain=plain)
            _describe(test, found.details.get(plain))
            tests.append(test)
    return tests or [item]


def _describe(item: RemoteItem, details: Any) -> None:
    """Give a test the location, the keywords and the marks that it has in the guest."""
    with suppress(TypeError, ValueError):  # the test runs without them, too
        (_, line, _), keywords, marks = details
        if isinstance(line, int | None) and abs(line or 0) < _MAX_LINE:
            item.place = (item.path, line, item.name.replace("::", "."))
        item.extra_keyword_matches.update(map(str, keywords))
        for mark in marks:
            if isinstance(mark, str) and mark.isidentifier() and not mark.startswith("_"):
                # With strict markers, pytest refuses a marker that is unknown here.
                with suppress(pytest.fail.Exception):
                    item.add_marker(mark)
