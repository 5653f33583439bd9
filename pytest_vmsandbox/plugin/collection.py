"""Tests and their images while pytest collects."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.plugin import config as options, pulling, selection

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pytest_vmsandbox.plugin.session import VMSession

_NO_IMAGE = "no-image"
_IMAGE = pytest.StashKey[str | None]()  # of a test that pytest cannot parametrize
_INSIDE = pytest.StashKey[bool]()
_PLAIN = pytest.StashKey[str]()  # of a test that only the guest could collect
_CALLED = pytest.StashKey[str]()
_PLACE = pytest.StashKey[tuple[str, str, str]]()
# Seconds that a plugin for time-outs gives a test, and its function alone.
LIMIT, CALL_LIMIT = pytest.StashKey[float](), pytest.StashKey[float]()
# What asks a plugin to take over tests' protocol: its options, or an ini key; and its marker.
_RERUNS = (("reruns", "force_reruns"), "flaky")
_FORKED = (("forked",), "forked")
_REFUSED = {
    "usepdb": "--pdb",
    "trace": "--trace",
    "setupplan": "--setup-plan",
    "setuponly": "--setup-only",
}
# Fixtures of tests that drive guests from here.
_DRIVES = {"vm", "vm_factory", "vm_artifacts", "vm_prepared"}


def is_inside(item: pytest.Item) -> bool:
    """Whether a test runs inside its guest."""
    if _INSIDE not in item.stash:
        item.stash[_INSIDE] = _runs_inside(item, getattr(item, "fixturenames", ()))
    return item.stash[_INSIDE]


def settle_inside(item: pytest.Item, *, image: str, plain: str) -> None:
    """Note what a test is that no function of this machine stands for."""
    item.stash[_INSIDE] = True
    item.stash[_IMAGE] = image
    item.stash[_PLAIN] = plain


def runs_inside(item: pytest.Item) -> bool:
    """Whether a test's protocol is carried out inside its guest.

    A test that its marker `vm` skips on that image is skipped here: for that, nothing is booted.
    """
    if not is_inside(item):
        return False
    wishes = selection.read_marks(item.iter_markers("vm"))
    return selection.reason(wishes.skip, image_of(item) or "") is None


def refuse_here(item: pytest.Item) -> None:
    """Let no test run on this machine that is meant for a guest.

    Raises:
        ConfigError: another plugin is about to do that.
    """
    if runs_inside(item):
        raise ConfigError(
            "this test is to run inside a guest, and a plugin or a conftest.py is about to run it on this "
            "machine",
            remedy="look for hooks pytest_runtest_protocol and pytest_runtestloop that run tests themselves",
        )


def _runs_inside(node: pytest.Item, fixturenames: Iterable[str]) -> bool:
    try:
        marked = selection.in_guest(node.iter_markers("in_vm"))
    except ConfigError:
        return False  # told by `check`
    if marked is None:
        return options.inside(node.config) and _DRIVES.isdisjoint(fixturenames)
    return marked


def needs_parameter(metafunc: pytest.Metafunc) -> bool:
    """Whether a test function gets one parameter for each of its images."""
    names = metafunc.fixturenames
    if "_vm_image" in names:
        return True
    if _runs_inside(metafunc.definition, names):
        names.append("_vm_image")  # which lets pytest parametrize it; nobody asks for its value
        return True
    return False


def isolation_of(item: pytest.Item) -> str:
    """What shares the guest that a test runs inside: ``test``, ``module`` or ``session``."""
    wishes = selection.read_marks(item.iter_markers("vm"))
    return wishes.isolation or options.isolation(item.config)


def place_of(item: pytest.Item) -> tuple[str, str, str]:
    """What decides which guest a test runs inside: image, hardware, and what shares the guest."""
    if _PLACE not in item.stash:
        wishes = selection.read_marks(item.iter_markers("vm"))
        shared = {"session": "session", "module": item.nodeid.partition("::")[0]}
        isolation = isolation_of(item)
        item.stash[_PLACE] = (
            image_of(item) or "",
            repr(sorted(wishes.hardware.items())),
            shared.get(isolation, item.nodeid),
        )
    return item.stash[_PLACE]


def plain_nodeid(item: pytest.Item) -> str:
    """What a test is called where it has no parameter for its image."""
    if _PLAIN in item.stash:
        return item.stash[_PLAIN]
    if _CALLED not in item.stash:
        item.stash[_CALLED] = _plain_nodeid(item)
    return item.stash[_CALLED]


def argument_of(item: pytest.Item) -> str:
    """What has pytest run a test again; its file where only the guest could collect it."""
    if _PLAIN in item.stash:
        return item.stash[_PLAIN].partition("::")[0]
    return item.nodeid


def remember_nodeids(items: Iterable[pytest.Item]) -> None:
    """Keep what tests of guests are called: pytest-xdist adds their group, which no guest knows."""
    for item in items:
        if is_inside(item):
            plain_nodeid(item)


def _plain_nodeid(item: pytest.Item) -> str:
    if not _has_parameter(item):
        return item.nodeid
    identity: str = item.callspec.id  # type: ignore[attr-defined]
    rest = identity.removeprefix(
        image_of(item) or _NO_IMAGE
    )  # of other parameters, which may be ""
    base = item.nodeid.removesuffix(f"[{identity}]")
    return f"{base}[{rest[1:]}]" if rest else base


def plain_indices(item: pytest.Item) -> dict[str, int] | None:
    """The indices of a test's parameters, but for its image; None for a test without any."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return None
    return {name: index for name, index in callspec.indices.items() if name != "_vm_image"} or None


def parametrize(session: VMSession, metafunc: pytest.Metafunc) -> None:
    """Give a test one parameter for each of its images.

    A test without any gets a placeholder, to be deselected. What cannot be meant is noted in
    `session.usage_errors`.
    """
    params = []
    try:
        wishes = selection.read_marks(metafunc.definition.iter_markers("vm"))
        params = [
            pytest.param(image, id=image, marks=_marks(wishes, image))
            for image in session.images(wishes)
        ]
    except ConfigError as error:
        session.note_usage_error(metafunc.definition.nodeid, error)
    metafunc.parametrize(
        "_vm_image",
        params or [pytest.param(None, id=_NO_IMAGE)],
        indirect=True,
        scope="function",  # so that pytest leaves the order as it is without it; see `group`
    )


def check(session: VMSession, items: list[pytest.Item]) -> list[str]:
    """What cannot be meant in the tests, in any value, and in the places that they need."""
    for item in items:
        _check_marks(session, item)
        if (
            not _has_parameter(item)
            and _PLAIN not in item.stash
            and ("_vm_image" in getattr(item, "fixturenames", ()) or is_inside(item))
        ):
            _settle(session, item)
    config = session.config
    try:
        options.check_values(config)
        if any(is_inside(it) or "vm_factory" in getattr(it, "fixturenames", ()) for it in items):
            options.check_places(config)
    except pytest.UsageError as error:
        session.usage_errors.extend(error.args)
    if config.getoption("--vm") and (wrong := session.selection_error) is not None:
        session.note_usage_error("", wrong)
    return session.usage_errors


def check_run(session: VMSession, items: Sequence[pytest.Item]) -> list[str]:
    """What cannot be meant of the way in which the tests that are left are to be run."""
    if inside := [item for item in items if is_inside(item)]:
        if option := refused(session.config):
            session.usage_errors.append(
                f"{option} cannot reach tests that run inside a guest\nRemedy: leave out --in-vm, and "
                "tests that are marked, with -m 'not in_vm'; 'vmsandbox shell IMAGE' is a way to "
                "look around in a guest"
            )
        if session.config.getoption("setupshow", default=False):
            session.tell("--setup-show shows nothing of tests that run inside a guest")
        if session.config.pluginmanager.has_plugin("TestmonCollect"):
            session.usage_errors.append(
                "testmon cannot see what tests that run inside a guest depend on, and would leave them "
                "out when it changes\nRemedy: --testmon-nocollect, or no --testmon"
            )
        if session.config.getoption("benchmark_cprofile", default=None):
            session.tell("--benchmark-cprofile shows nothing of tests that run inside a guest")
        try:
            pulling.patterns(session.config)
            if not session.config.getoption("collectonly"):
                _check_tree(session.config)
        except ConfigError as error:
            session.usage_errors.append(str(error))
        pulling.spare_unused(session, inside)
        for plugin in _does_nothing(session.config, inside):
            session.tell(f"{plugin} does nothing for tests that run inside a guest")
    return session.usage_errors


def _check_tree(config: pytest.Config) -> None:
    """Look whether the project can go to a guest, before one is started.

    Raises:
        ConfigError: it cannot.
    """
    from pytest_vmsandbox.inside import pushable

    pushable.check(config.rootpath, options.push(config))


def refused(config: pytest.Config) -> str | None:
    """An option that was given, and has no meaning for tests inside guests; None without any."""
    given = (option for name, option in _REFUSED.items() if config.getoption(name, default=False))
    return next(given, None)


def deselect(session: VMSession, items: list[pytest.Item]) -> None:
    """Take out the tests to which no selected image applies."""
    without = {item for item in items if _needs_image(item) and image_of(item) is None}
    if without:
        gone = [item for item in items if item in without]
        session.config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in without]
        if hasattr(session.config, "workerinput"):  # of xdist, which counts no deselected tests
            session.tell(f"deselected, since no selected image applies: {len(gone)}")


def group(items: list[pytest.Item]) -> None:
    """Put tests of the same image one after the other; their order is left as it is otherwise."""
    images = {image: number for number, image in enumerate(dict.fromkeys(map(image_of, items)))}
    images[None] = 0
    items.sort(key=lambda item: images[image_of(item)])


def image_of(item: pytest.Item) -> str | None:
    """The image of a test; None for a test that needs none, or to which none applies."""
    if _has_parameter(item):
        image: str | None = item.callspec.params["_vm_image"]  # type: ignore[attr-defined]
        return image
    return item.stash.get(_IMAGE, None)


def images_needed(items: Iterable[pytest.Item]) -> list[str]:
    """The images of all tests that are going to run."""
    return list(
        dict.fromkeys(
            image
            for item in items
            if (image := image_of(item)) and item.get_closest_marker("skip") is None
        )
    )


def guests_to_come(items: Sequence[pytest.Item]) -> list[tuple[str, Mapping[str, object]]]:
    """Image and hardware of the fresh guest of each test that has one.

    A worker of xdist runs its share of all tests; which, nobody knows yet.
    """
    guests = []
    for item in items:
        image = image_of(item)
        if image and "vm" in getattr(item, "fixturenames", ()) and not is_inside(item):
            wishes = selection.read_marks(item.iter_markers("vm"))
            if wishes.isolation in (None, "test") and item.get_closest_marker("skip") is None:
                guests.append((image, wishes.hardware))
    return guests[: -(-len(guests) // workers(items[0].config))] if items else []


def workers(config: pytest.Config) -> int:
    """How many workers of xdist share the tests; 1 without it."""
    count: int = getattr(config, "workerinput", {}).get("workercount", 1)
    return count


def wants_reruns(config: pytest.Config, items: Sequence[pytest.Item]) -> bool:
    """Whether pytest-rerunfailures is asked to run some of the tests again if they fail."""
    return _is_asked(config, items, *_RERUNS)


def _does_nothing(config: pytest.Config, items: Sequence[pytest.Item]) -> Iterator[str]:
    """The plugins that are asked to take over the protocol of some of the tests, and cannot."""
    there = options.guest_plugins(config)
    if (
        there
        and not {"rerunfailures", "pytest_rerunfailures"} & {*there}
        and wants_reruns(config, items)
    ):
        yield "pytest-rerunfailures"
    if _is_asked(config, items, *_FORKED):
        yield "pytest-forked"


def _is_asked(
    config: pytest.Config, items: Sequence[pytest.Item], names: tuple[str, ...], marker: str
) -> bool:
    if not hasattr(config.option, names[0]):
        return False  # it is not there
    values = [getattr(config.option, name, None) for name in names]
    with suppress(ValueError):  # older ones have no such key
        values.append(config.getini(names[0]))
    return any(values) or any(item.get_closest_marker(marker) for item in items)


def _check_marks(session: VMSession, item: pytest.Item) -> None:
    try:
        marked = selection.in_guest(item.iter_markers("in_vm"))
    except ConfigError as error:
        session.note_usage_error(item.nodeid, error)
        return
    if marked and not _DRIVES.isdisjoint(getattr(item, "fixturenames", ())):
        wrong = ConfigError(
            "a test that runs inside a guest cannot drive one from here: it asks for the fixture vm",
            remedy="take away the marker in_vm, or the fixture",
        )
        session.note_usage_error(item.nodeid, wrong)


def _settle(session: VMSession, item: pytest.Item) -> None:
    """Do what `parametrize` does for a test that pytest cannot parametrize (unittest's)."""
    try:
        wishes = selection.read_marks(item.iter_markers("vm"))
        images = session.images(wishes)
        image = next(iter(images), None)
        if len(images) > 1:
            session.tell(
                "tests of unittest's classes and doctests cannot be parametrized: of the selected "
                f"images they ran on {images[0]} only"
            )
    except ConfigError as error:
        session.note_usage_error(item.nodeid, error)
        return
    item.stash[_IMAGE] = image
    if image is not None:
        for mark in _marks(wishes, image):
            item.add_marker(mark)


def _marks(wishes: selection.Wishes, image: str) -> list[pytest.MarkDecorator]:
    marks = []
    if (why := selection.reason(wishes.skip, image)) is not None:
        marks.append(pytest.mark.skip(reason=why))
    if (why := selection.reason(wishes.xfail, image)) is not None:
        marks.append(pytest.mark.xfail(reason=why))
    return marks


def _has_parameter(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and "_vm_image" in callspec.params


def _needs_image(item: pytest.Item) -> bool:
    return _has_parameter(item) or _IMAGE in item.stash
