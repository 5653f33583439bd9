"""In which order the tests inside one guest run: what comes next, and what may run ahead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pytest_vmsandbox.plugin.plan import Place, plan_of

_AHEAD = 8  # tests that a guest may run before the reports of one are here


class Schedule:
    """Knows which test comes after another in the same guest.

    Attributes:
        alone: ids, without the image, of tests that run while no other is announced.
    """

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        self.alone: set[str] = set()
        self._is_worker = hasattr(config, "workerinput")  # of xdist: nobody knows what is to come
        # A result could end the run, and then nothing may have been run too much.
        self._may_end = option.maxfail or getattr(option, "stepwise", False)
        self._following: dict[pytest.Item, pytest.Item] = {}

    def next(
        self, item: pytest.Item, nextitem: pytest.Item | None = None
    ) -> tuple[str | None, bool]:
        """The id of the next test of the same guest, and whether there may be any.

        Args:
            nextitem: what pytest runs next.
        """
        plan = plan_of(item)
        if self._is_worker:
            if nextitem is not None and plan.shares_with(nextitem):
                return plan_of(nextitem).plain, True
            return None, plan.isolation == "session" and nextitem is not None
        if not self._following:
            self._read(item.session)
        following = self._following.get(item)
        return (None if following is None else plan_of(following).plain), following is not None

    def _read(self, session: pytest.Session) -> None:
        last: dict[Place, pytest.Item] = {}
        for item in reversed(session.items):
            if plan_of(item).runs_inside:
                place = plan_of(item).place
                if place in last:
                    self._following[item] = last[place]
                last[place] = item

    def ahead(self, item: pytest.Item) -> Iterator[pytest.Item]:
        """The test, and those after it that may run while its reports are on their way here."""
        following: pytest.Item | None = None if self._may_end or self._is_worker else item
        for _ in range(1 + _AHEAD):
            if following is None or plan_of(following).plain in self.alone:
                return
            yield following
            following = self._following.get(following)
