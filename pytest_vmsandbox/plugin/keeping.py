"""Which guests of which tests are kept, and for which moment. `guests/keeping.py` saves them."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.unittest import TestCaseFunction

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.core.text import one_line, printable
from pytest_vmsandbox.plugin import alarms, config as options, plan as plans

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.backend import Backend
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.guests.keeping import Keeper
    from pytest_vmsandbox.guests.kept import Moment

_LONGEST_ERROR = 200  # characters
ENTER = "vm_enter"  # the property, in junit's file, with the command that enters a kept guest


@dataclass(frozen=True)
class _Occasion:
    """A moment at which guests are kept.

    Attributes:
        error: what was raised, or one line; None if nothing has failed.
        is_certain: whether the test has failed. It may expect what was raised.
        about: what else `guests.kept.Moment` says.
    """

    phase: str
    error: BaseException | str | None = None
    is_certain: bool = True
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_failure(self) -> bool:
        """Whether the test has failed then, perhaps in an attempt that a plugin has repeated."""
        return self.error is not None and self.is_certain

    def covers(self, later: _Occasion) -> bool:
        """Whether a guest that was kept on this occasion need not be kept again on a later one."""
        if self.error is None or later.error is None:
            return self.error is later.error
        return self.is_certain or belong_together(self.error, later.error)


@dataclass(frozen=True)
class _Kept:
    key: str
    occasion: _Occasion


@dataclass
class _Test:
    """What is known about a test that runs, or that has kept guests.

    Attributes:
        phase: setup, call or teardown.
        raised: by the test's function.
        kept: the guests of this attempt, by name.
        before: the keys of earlier attempts.
        over: the guests that had ended before this attempt.
        problems: why guests were not kept, by name.
        has_failed: whether a report of this attempt says so.
        is_over: whether all reports of this attempt were heard.
    """

    phase: str = "setup"
    raised: BaseException | None = None
    kept: dict[str, _Kept] = field(default_factory=dict)
    before: frozenset[str] = frozenset()
    over: frozenset[str] = frozenset()
    problems: dict[str, str] = field(default_factory=dict)
    has_failed: bool = False
    is_over: bool = False

    @property
    def keys(self) -> frozenset[str]:
        """The keys of all attempts."""
        return self.before.union(kept.key for kept in self.kept.values())


@dataclass(frozen=True)
class Line:
    """A kept guest, as the summary shows it. Workers of xdist send it as a dictionary."""

    nodeid: str
    guest: str
    phase: str
    failed: bool
    number: int = 1
    size: int = 0
    wakes_others: bool = False

    @classmethod
    def of(cls, moment: Moment, guest: str) -> Line:
        """A guest that was kept at a moment."""
        return cls(moment.nodeid, guest, moment.phase, moment.outcome == "failed", moment.number)


class Keeping:
    """Keeps guests of tests. It is registered as a plugin if the run keeps any.

    A test can fail several times: in an attempt that is repeated, in a block whose exception it expects,
    and then in its teardown. The first failure in its last attempt counts. What was kept is forgotten if
    the test passes in the end, as its reports say.

    Args:
        guests: returns all guests, by name, in the order in which they came; None for one that has ended.
        used: returns the names of those that a test may have used.
        backend: returns what runs the guests.
        tell: prints a line at the end of the run.

    Attributes:
        lines: the guests that are kept, by key, including those of xdist's workers.
    """

    def __init__(
        self,
        config: pytest.Config,
        *,
        guests: Callable[[], Mapping[str, Guest | None]],
        used: Callable[[pytest.Item], list[str]],
        backend: Callable[[], Backend],
        tell: Callable[[str], object],
    ) -> None:
        self._config = config
        self._guests = guests
        self._used = used
        self._backend = backend
        self._tell = tell
        self._tests: dict[str, _Test] = {}
        self._repeated: dict[str, str] = {}  # test → its first repetition whose guests were kept
        self._problems: defaultdict[str, dict[str, None]] = defaultdict(dict)  # reason → tests
        self._has_workers = False
        self._removed: list[str] = []  # lines about guests for which there was no room
        self.lines: dict[str, Line] = {}

    @cached_property
    def is_on(self) -> bool:
        """Whether the guest of a failed test is kept."""
        return options.keep(self._config) in {"failed", "all"}

    @cached_property
    def keeps_all(self) -> bool:
        """Whether the guests of tests that pass are kept, too."""
        return options.keep(self._config) == "all"

    @cached_property
    def keeper(self) -> Keeper:
        """Saves guests. It is opened for the first one."""
        from pytest_vmsandbox.guests.keeping import Keeper

        limit = options.keep_size(self._config)
        return Keeper(self._backend(), limit=limit, tell=self._removed.append)

    def close(self) -> None:
        """Wait until all guests are saved."""
        if "keeper" not in self.__dict__:
            return
        keeper = self.__dict__.pop("keeper")
        for outcome in keeper.close():  # also one whose test was interrupted meanwhile
            moment = outcome.moment
            self.lines.pop(outcome.key, None)
            if outcome.error is not None:
                self._problems[_why(outcome.error, outcome.guest)][moment.nodeid] = None
            elif outcome.kept is not None:  # else there was no room
                line = Line.of(moment, outcome.guest)
                group = outcome.kept.group
                self.lines[outcome.key] = replace(
                    line,
                    size=outcome.kept.size_on_disk,
                    wakes_others=group is not None and len(group.guests) > 1,
                )
        for why, nodeids in self._problems.items():
            first, *others = nodeids
            more = f" and {len(others)} more" if others else ""
            self._tell(f"the guest of {first}{more} could not be kept: {why}")
        if len(self._removed) == 1:
            self._tell(self._removed[0])
        elif self._removed:
            room = format_size(options.keep_size(self._config))
            last, _, _ = self._removed[-1].partition(" was removed: ")
            self._tell(
                f"{len(self._removed)} kept guests were removed, the oldest first, because vm_keep_size is "
                f"{room}. The last one was {last}"
            )

    # -- the course of a test ---------------------------------------------------------------------

    def begin(self, item: pytest.Item) -> None:
        """An attempt at a test begins: the first one, or another one."""
        if self.is_on:
            over = frozenset(name for name, guest in self._guests().items() if guest is None)
            self._tests[item.nodeid] = _Test(before=self._test(item).keys, over=over)

    def finish(self, item: pytest.Item) -> None:
        """All attempts at a test are over. What counts stays, and the rest is forgotten."""
        if (test := self._tests.pop(item.nodeid, None)) is None:
            return
        stays = frozenset(
            kept.key
            for kept in test.kept.values()
            if test.has_failed
            or (self.keeps_all and not kept.occasion.is_failure)
            or (not test.is_over and kept.occasion.is_certain)  # somebody pressed Ctrl-C
        )
        if test.has_failed and not stays:  # a plugin has repeated the test without our hooks
            stays = test.before
        for key in test.keys - stays:
            self.lines.pop(key, None)
            self.keeper.forget(key)
        if stays:  # the same item may run once more
            self._tests[item.nodeid] = _Test(before=stays)
            self._repeated.setdefault(plans.selectable(item), item.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Another attempt begins."""
        self.begin(item)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Note the phase, and what is raised: a plugin may repeat the test and report another exception."""
        test = self._test(item)
        test.phase = "call"
        try:
            with self._hearing_unittest(item):
                return (yield)
        except BaseException as error:
            test.raised = error
            raise

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Watch the finalizers that run now: one may fail while a guest lives that a later one ends."""
        self._test(item).phase = "teardown"
        stay = nextitem.listchain() if nextitem is not None else []
        for node, (finalizers, _) in item.session._setupstate.stack.items():  # noqa: SLF001  # there is no public way
            if node not in stay:
                finalizers[:] = [partial(self._watch, item, node, run) for run in finalizers]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Hear how a test ends. Other plugins may have changed the report until now."""
        if (test := self._tests.get(report.nodeid)) is None:
            if report.failed:  # in a worker of xdist, which may not live to the end
                self.take_over(getattr(report, "vm_kept", {}))
            return
        if report.when == "setup":
            test.has_failed = test.is_over = False
        test.has_failed |= report.failed
        test.is_over |= report.when == "teardown"

    def _test(self, item: pytest.Item) -> _Test:
        return self._tests.setdefault(item.nodeid, _Test())

    def _watch(self, item: pytest.Item, node: object, run: Callable[[], object]) -> object:
        __tracebackhide__ = True
        try:
            return run()
        except (Exception, pytest.fail.Exception) as error:
            self.keep(item, "teardown", error, is_certain=False, of_others=node is not item)
            raise

    @contextmanager
    def _hearing_unittest(self, item: pytest.Item) -> Iterator[None]:
        """Hear of a failure before ``tearDown`` runs, which is a part of the call."""
        names = ("addError", "addFailure") if isinstance(item, TestCaseFunction) else ()
        for name in names:
            setattr(item, name, partial(self._hear_failure, item, getattr(item, name)))
        try:
            yield
        finally:
            for name in names:
                delattr(item, name)

    def _hear_failure(
        self, item: pytest.Item, report: Callable[..., object], testcase: object, info: Any
    ) -> None:
        self.keep(item, "call", info[1], is_certain=False)
        report(testcase, info)

    # -- keeping ------------------------------------------------------------------------------------

    def ending(self, item: pytest.Item, guest: Guest, error: BaseException | None) -> None:
        """Keep a guest that is about to end, perhaps because of an error in the block that used it."""
        if not self.is_on:
            return
        test, names = self._test(item), self._names(item)
        if error is not None:
            self.keep(item, test.phase, error, is_certain=False, also=guest)
        elif self.keeps_all and guest.name in names and guest.name not in test.kept:
            self._keep_each(item, names, _Occasion(test.phase), only=guest)

    def passed(self, item: pytest.Item, **about: Any) -> None:
        """The function of a test has not failed. Under ``--vm-keep=all``, its guests are kept.

        Args:
            about: what else `guests.kept.Moment` says.
        """
        if self.keeps_all:
            self._keep_each(item, self._names(item), _Occasion("call", about=about))

    def keep(
        self,
        item: pytest.Item,
        phase: str,
        error: BaseException | str,
        *,
        is_certain: bool = True,
        of_others: bool = False,
        also: Guest | None = None,
        **about: Any,
    ) -> None:
        """Keep the guests of a test that fails now, unless they are kept for this failure.

        Args:
            error: what was raised, or one line.
            is_certain: whether the test has failed. It may expect what was raised.
            of_others: whether to keep guests of other tests if this one has none.
            also: a guest that ends now, and that this test need not have used.
            about: what else `guests.kept.Moment` says.
        """
        if not self.is_on or self._is_kept_already(item):
            return
        if phase == "call" and is_certain and isinstance(error, BaseException):
            raised = self._test(item).raised
            error = error if raised is None else raised  # an exception may have no truth
        guests, names = self._guests(), self._names(item)
        if of_others and not any(guests[name] for name in names):
            names = [name for name, guest in guests.items() if guest is not None]
        if also is not None and also.name not in names:
            names.append(also.name)
        self._keep_each(item, names, _Occasion(phase, error, is_certain, about))

    def _is_kept_already(self, item: pytest.Item) -> bool:
        """Whether guests of an earlier repetition are kept. Those of one failure are enough."""
        first = self._repeated.get(plans.selectable(item), item.nodeid)
        return first != item.nodeid and not self.keeps_all

    def _names(self, item: pytest.Item) -> list[str]:
        """The guests that this attempt at a test may have used, in their order."""
        over = self._test(item).over
        return [name for name in self._used(item) if name not in over]

    def _keep_each(
        self, item: pytest.Item, names: list[str], occasion: _Occasion, only: Guest | None = None
    ) -> None:
        test, guests = self._test(item), self._guests()
        wanted = {}
        for number, name in enumerate(names, 1):
            guest = guests[name]
            if guest is None or (only is not None and guest is not only):
                continue
            if (kept := test.kept.get(name)) is not None and kept.occasion.covers(occasion):
                if occasion.is_certain and kept.occasion.error is not None:
                    known = replace(kept.occasion, is_certain=True)
                    test.kept[name] = replace(kept, occasion=known)
                continue
            wanted[guest] = number
        if wanted:
            self._keep_all(item, wanted, occasion)

    def _keep_all(
        self, item: pytest.Item, wanted: Mapping[Guest, int], occasion: _Occasion
    ) -> None:
        from pytest_vmsandbox.guests.kept import Moment

        about = dict(occasion.about)
        holds_for = about.pop("guest", None)  # a name; without one, for all
        moment = Moment(
            nodeid=item.nodeid,
            rootdir=str(self._config.rootpath),
            number=0,
            phase=occasion.phase,
            outcome="passed" if occasion.error is None else "failed",
            error=_in_one_line(occasion.error),
        )
        moments = {
            guest: replace(
                moment, number=number, **(about if holds_for in (None, guest.name) else {})
            )
            for guest, number in wanted.items()
        }
        found: Sequence[str | Exception]
        try:
            with alarms.paused(item):
                found = self.keeper.keep_all(moments)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is no failure of the test
            found = [error] * len(moments)
        for (guest, its), result in zip(moments.items(), found, strict=True):
            self._note(item, guest, its, occasion, result)

    def _note(
        self,
        item: pytest.Item,
        guest: Guest,
        moment: Moment,
        occasion: _Occasion,
        result: str | Exception,
    ) -> None:
        """Note whether a guest was kept.

        Args:
            result: its key, or why it was not.
        """
        test = self._test(item)
        if isinstance(result, Exception):
            why = _why(result, guest.name)
            test.problems[guest.name] = f"{guest.name} could not be kept: {why}"
            self._problems[why][item.nodeid] = None
        else:
            test.problems.pop(guest.name, None)
            test.kept[guest.name] = _Kept(result, occasion)
            self.lines[result] = Line.of(moment, guest.name)

    # -- what people see --------------------------------------------------------------------------------

    def show(self, item: pytest.Item, report: pytest.TestReport) -> list[str]:
        """Add to the properties of a report how its guests are entered. Returns lines about that."""
        test = self._tests.get(item.nodeid)
        if test is None or not (report.failed or report.when == "teardown"):
            return []
        mine = {kept.key: self.lines[kept.key] for kept in test.kept.values()}
        commands = [enter for enter, _ in commands_for(mine)]
        report.user_properties += [(ENTER, command) for command in commands]
        if mine:
            report.vm_kept = {key: asdict(line) for key, line in mine.items()}  # type: ignore[attr-defined]
        return [*(f"enter: {command}" for command in commands), *test.problems.values()]

    def advise(self) -> None:
        """A test with a guest has failed. Say how to keep the guest, unless somebody has decided that."""
        if options.keep(self._config) is None:
            self._tell("--vm-keep=failed keeps the guest of a failed test, and you can enter it")

    def summary(self) -> list[str]:
        """The title of the summary's section and its lines; nothing if no guest is kept."""
        if self._has_workers:
            sizes = {key: self.size_of(key) for key in self.lines}
            self.lines = {
                key: replace(line, size=size)
                for key, line in self.lines.items()
                if (size := sizes[key])
                is not None  # else it was removed, or its worker has crashed
            }
        if not self.lines:
            return []
        title = "kept guests"
        if total := sum(line.size for line in self.lines.values()):
            limit = format_size(options.keep_size(self._config))
            title += f" ({format_size(total)}; all there are: {format_size(self.size_of_all())} of {limit})"
        rows = []
        for command, line in commands_for(self.lines):
            about = [f"failed in {line.phase}" if line.failed else "passed"]
            if _are_several(self.lines, line):
                about.append(f"its guest {line.number}")  # as it asked for them
            rows.append(f"{', '.join([*about, format_size(line.size)])}: {command}")
        if any(line.wakes_others for line in self.lines.values()):
            rows.append(
                "guests on common networks wake together: a second command enters another of them"
            )
        return [title, *rows]

    def found(self) -> dict[str, dict[str, Any]]:
        """The kept guests, as a worker of xdist sends them."""
        return {key: asdict(line) for key, line in self.lines.items()}

    def take_over(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what a worker of xdist sends."""
        self._has_workers |= bool(found)
        self.lines |= {key: Line(**line) for key, line in found.items()}

    def size_of_all(self) -> int:
        """How many bytes all kept guests take, also those of earlier runs."""
        from pytest_vmsandbox.core.paths import cache_dir
        from pytest_vmsandbox.guests.kept import KeptStore

        return KeptStore(cache_dir()).size_on_disk

    def size_of(self, key: str) -> int | None:
        """How many bytes a kept guest takes; None if there is none."""
        from pytest_vmsandbox.core.paths import cache_dir
        from pytest_vmsandbox.guests.kept import KeptStore

        kept = KeptStore(cache_dir()).get(key)
        return None if kept is None else kept.size_on_disk


def commands_for(lines: Mapping[str, Line]) -> list[tuple[str, Line]]:
    """What a person types to enter each kept guest. Guests of one test are told apart by name."""
    found = []
    for line in lines.values():
        words = ["vmsandbox", "enter", line.nodeid]
        if _are_several(lines, line):
            words += ["--guest", line.guest]
        found.append((shlex.join(words), line))
    return found


def _are_several(lines: Mapping[str, Line], line: Line) -> bool:
    """Whether several guests of its test are kept."""
    return [other.nodeid for other in lines.values()].count(line.nodeid) > 1


def _why(error: Exception, guest: str) -> str:
    """Why a guest could not be kept, in one line."""
    if not isinstance(error, VMSandboxError):
        return one_line(repr(error))
    brief = error.brief.removeprefix(f"{guest} could not be kept").lstrip(": ")
    why = ": ".join(filter(None, [brief, error.details.partition("\n")[0]]))
    return one_line(f"{why} ({error.remedy})" if error.remedy else why)


def _text_of(error: BaseException) -> str:
    """What an error says. Those of users may fail when they are asked."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001
        return ""


def _in_one_line(error: BaseException | str | None) -> str:
    """An error in one line, which is safe to show."""
    if isinstance(error, BaseException):
        said = error.brief if isinstance(error, VMSandboxError) else _text_of(error)
        first = next(iter(said.splitlines()), "")
        kind = type(error).__name__
        if isinstance(error, AssertionError) and first.startswith("assert "):
            error = first  # as pytest shows it
        else:
            error = f"{kind}: {first}" if first else kind
    *_, last = ["", *printable(error or "").splitlines()]
    return last[:_LONGEST_ERROR].strip()


def belong_together(earlier: BaseException | str, later: BaseException | str) -> bool:
    """Whether one of two errors has led to the other one."""
    return any(error is earlier for error in _behind(later)) or any(
        error is later for error in _behind(earlier)
    )


def _behind(error: object) -> list[object]:
    """An error, and all those that led to it."""
    found: list[object] = []
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if error is None or any(error is other for other in found):
            continue
        found.append(error)
        if isinstance(error, BaseException):
            waiting += [error.__cause__, error.__context__]
        if isinstance(error, BaseExceptionGroup):
            waiting += error.exceptions
    return found
