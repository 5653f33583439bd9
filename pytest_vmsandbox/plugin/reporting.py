"""How our errors look in pytest's reports."""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import _pytest
import pluggy
import pytest

from pytest_vmsandbox.core.errors import INFRASTRUCTURE, VMSandboxError, in_brief

FAILED = pytest.StashKey[bool]()
_TOLD = pytest.StashKey[dict[str, str]]()  # the text of an error → the first test that met it
RETRIED = "vm_retried"  # the property, in junit's file, of a test that was retried in a fresh guest

# Frames that do not help the reader: ours, and those of the standard library between ours.
_HIDDEN: tuple[str, ...] = (
    f"{Path(__file__).parents[1]}{os.sep}",
    contextlib.__file__,
    functools.__file__,
)
_STANDARD = (f"{Path(contextlib.__file__).parent}{os.sep}", "<frozen ")
_PACKAGES = {"site-packages", "dist-packages"}  # folders of installed libraries
_PYTESTS = (_pytest.__path__[0], pluggy.__path__[0])


def before_report(item: pytest.Item, call: pytest.CallInfo[Any]) -> bool:
    """Before pytest makes a report: hide our own frames, unless ``--full-trace`` asks for them.

    Returns:
        Whether no frame of the user is left. The report has only the error's text then.
    """
    if call.excinfo is None or not _is_ours(call.excinfo):
        return False
    return not item.config.getoption("fulltrace", default=False) and not hide_ours(call.excinfo)


def after_report(
    item: pytest.Item, call: pytest.CallInfo[Any], report: pytest.TestReport, *, only_text: bool
) -> pytest.TestReport:
    """After pytest has made a report: adapt it for failures of guests.

    Args:
        only_text: the result of `before_report`.
    """
    if call.excinfo is not None and isinstance(call.excinfo.value, INFRASTRUCTURE):
        if hasattr(report, "wasxfail"):  # a lost guest is not the expected failure
            del report.wasxfail
            report.outcome = "failed"
            report.longrepr = item.repr_failure(call.excinfo)
        report.vm_infrastructure = True  # type: ignore[attr-defined]  # travels with it
    if report.failed and only_text:
        report.longrepr = _told_once(item, call).getrepr(style="no")
    if report.failed:
        item.stash[FAILED] = True
    return report


def _told_once(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> pytest.ExceptionInfo[BaseException]:
    """Our error as it is shown. If it hits many tests in setup, only the first shows it in full."""
    assert call.excinfo is not None
    error = call.excinfo.value
    if call.when != "setup" or not isinstance(error, VMSandboxError):
        return call.excinfo
    first = item.config.stash.setdefault(_TOLD, {}).setdefault(str(error), item.nodeid)
    if first == item.nodeid:
        return call.excinfo
    return pytest.ExceptionInfo.from_exception(in_brief(error, first))


def report_without_plugins(item: pytest.Item, call: pytest.CallInfo[Any]) -> pytest.TestReport:
    """The report of a phase, made without other plugins."""
    only_text = before_report(item, call)
    report: pytest.TestReport | None = None
    # The item's class may come from a plugin, and fail for this error.
    with contextlib.suppress(Exception):
        report = pytest.TestReport.from_item_and_call(item, call)
    if report is None or (report.failed and report.longrepr is None):
        assert call.excinfo is not None
        report = bare_report(item, call.when, "failed", call.excinfo.getrepr(style="no"))
    return after_report(item, call, report, only_text=only_text)


def bare_report(item: pytest.Item, when: Any, outcome: Any, longrepr: Any) -> pytest.TestReport:
    """A minimal report of a phase: its outcome and the reason."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome=outcome,
        longrepr=longrepr,
        when=when,
    )


def is_lost_guest(report: pytest.TestReport) -> bool:
    """Whether the call of a test failed because of its guest. That is an error, not a failure."""
    return report.when == "call" and report.failed and getattr(report, "vm_infrastructure", False)


def _is_ours(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether the error says all that a user needs: one of our own, or Python's, raised for the user.

    `Guest` raises errors such as ConnectionRefusedError and FileNotFoundError. Any other error that comes
    from our code may be a fault of ours, which only its frames explain.
    """
    if isinstance(excinfo.value, VMSandboxError):
        return True
    files = (entry.frame.code.raw.co_filename for entry in reversed(excinfo.traceback))
    ours = _HIDDEN[0]
    last = (file for file in files if file.startswith(ours) or not file.startswith(_STANDARD))
    return isinstance(excinfo.value, OSError) and next(last, "").startswith(ours)


def hide_ours(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """Let a report end at the user's line that led to an error of ours.

    Returns:
        Whether any frame of the user is left to be shown.
    """
    outside = _without_ours(excinfo.tb)
    if outside is not None:
        excinfo.traceback = type(excinfo.traceback)(outside)
    _hide_behind(excinfo.value)
    files = [entry.frame.code.raw.co_filename for entry in excinfo.traceback]
    return not all(file.startswith((*_PYTESTS, *_HIDDEN)) for file in files)


def _hide_behind(error: BaseException) -> None:
    """Hide the causes of our error within our code. Earlier failures in the user's code stay."""
    behind = error.__context__
    if error.__cause__ is not None:
        behind = error.__cause__.__context__
    elif error.__suppress_context__:
        return
    while behind is not None and not _is_users(behind.__traceback__):
        behind = behind.__context__
    error.__cause__, error.__context__ = None, behind
    error.__suppress_context__ = behind is None
    if isinstance(behind, VMSandboxError):
        behind.__traceback__ = _without_ours(behind.__traceback__)
        _hide_behind(behind)


def _is_users(trace: TracebackType | None) -> bool:
    """Whether any frame is neither ours nor a library's."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    return any(
        not file.startswith((*_HIDDEN, *_STANDARD)) and not _PACKAGES & {*Path(file).parts}
        for file in files
    )


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    frames = []
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_HIDDEN):
            frames.append(trace)
        trace = trace.tb_next
    outside: TracebackType | None = None
    for frame in reversed(frames):
        outside = TracebackType(outside, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return outside
