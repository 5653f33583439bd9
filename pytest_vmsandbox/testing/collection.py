"""Tests and their images while pytest collects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.testing import config as options, selection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_vmsandbox.testing.session import VMSession

_NO_IMAGE = "no-image"
_IMAGE = pytest.StashKey[str | None]()  # of a test that pytest cannot parametrize


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
        scope="session",  # pytest then runs tests of the same image one after the other
    )


def check(session: VMSession, items: list[pytest.Item]) -> list[str]:
    """What cannot be meant in the tests and in the settings that they need."""
    for item in items:
        if "_vm_image" in getattr(item, "fixturenames", ()) and not _has_parameter(item):
            _settle(session, item)
    if any("vm_factory" in getattr(item, "fixturenames", ()) for item in items):
        try:
            options.check(session.config)
        except pytest.UsageError as error:
            session.usage_errors.extend(error.args)
    return session.usage_errors


def deselect(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out the tests to which no selected image applies."""
    without = {item for item in items if _needs_image(item) and image_of(item) is None}
    if without:
        config.hook.pytest_deselected(items=[item for item in items if item in without])
        items[:] = [item for item in items if item not in without]


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


def _settle(session: VMSession, item: pytest.Item) -> None:
    """Do what `parametrize` does for a test that pytest cannot parametrize (unittest's)."""
    try:
        wishes = selection.read_marks(item.iter_markers("vm"))
        image = next(iter(session.images(wishes)), None)
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
