"""Other plugins' hooks, called for tests that run inside guests: what one raises ends nothing.

Such a hook may rely on what another hook of its plugin did before, which was called in the guest and
not here. In plain pytest a hook that raises ends the run; here the test goes on, all other plugins
are told of it, and what was raised is told once.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import pluggy
import pytest

from pytest_vmsandbox.plugin.reporting import report_without_plugins

if TYPE_CHECKING:
    from pluggy import HookCaller, HookImpl

    from pytest_vmsandbox.plugin.run import Run

ENDING: tuple[type[BaseException], ...] = (
    pytest.exit.Exception,
    KeyboardInterrupt,
    pytest.Session.Failed,
    pytest.Session.Interrupted,
)


def end_run(message: Mapping[str, Any]) -> NoReturn:
    """End the run as a test or a hook in a guest has ended it there."""
    from pytest_vmsandbox.plugin.remote_reports import colourless

    how, why = message.get("how"), colourless(str(message.get("interrupted")))
    if how == "left":
        status = message.get("status")
        pytest.exit(why, status if isinstance(status, int) and 0 <= status < 256 else None)
    if how == "failed":
        raise pytest.Session.Failed(why)
    if how == "stopped":
        raise pytest.Session.Interrupted(why)
    raise KeyboardInterrupt


class Hooks:
    """Calls hooks of all plugins.

    Args:
        run: is told what a hook raises.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._manager = run.config.pluginmanager
        self._reached = _Reached()
        self._manager.register(self._reached, "vmsandbox-reached")

    def notify(self, hook: Any, **arguments: Any) -> None:
        """Call a hook whose results nobody needs; plugins after one that raises are called, too.

        Args:
            hook: one of ``item.ihook`` or ``config.hook``.
        """
        self._reached.called = False
        try:
            with _told_by_us():
                if hook.is_historic():
                    hook.call_historic(kwargs=arguments)
                else:
                    hook(**arguments)
        except ENDING:
            raise
        except BaseException as error:  # noqa: BLE001  # also what pytest.fail and the like raise
            self._run.failed = True  # something may have been lost
            tell(self._run, hook.name, error)
            if left := self._not_reached(hook.get_hookimpls(), error):
                keep = {id(impl.plugin) for impl in left} | {id(self._reached)}
                others = [
                    plugin for plugin in self._manager.get_plugins() if id(plugin) not in keep
                ]
                self.notify(self._manager.subset_hook_caller(hook.name, others), **arguments)

    def make_report(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> pytest.TestReport:
        """The report that plugins make of a phase which ran here; one without them if they make none."""
        try:
            with _told_by_us():
                report = item.ihook.pytest_runtest_makereport(item=item, call=call)
        except ENDING:
            raise
        except BaseException as error:  # noqa: BLE001  # likewise
            tell(self._run, "pytest_runtest_makereport", error)
            report = None
        if isinstance(report, pytest.TestReport):
            return report
        return report_without_plugins(item, call)

    def _not_reached(self, impls: list[HookImpl], error: BaseException) -> list[HookImpl]:
        """The implementations that a hook's call had not come to when one raised."""
        order = [impl for impl in reversed(impls) if not _is_wrapper(impl)]
        raised = _last_of(error.__traceback__, [_code(impl) for impl in order])
        if raised is not None:
            return order[raised + 1 :]
        # A wrapper has raised: before all of them, or after its yield, when all had been called.
        is_before = not self._reached.called and len(order) < len(impls)
        return order if is_before else []


@contextmanager
def _told_by_us() -> Iterator[None]:
    """While pluggy does not warn of a hook that raises: `tell` says so, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pluggy.PluggyTeardownRaisedWarning)
        yield


def tell(run: Run, name: str, error: BaseException) -> None:
    """Tell people, once, what a hook has raised."""
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        where = f" ({frame.f_code.co_filename}:{line})"  # the innermost counts
    if (name, type(error), where) in run.failed_hooks:
        return
    run.failed_hooks.add((name, type(error), where))
    run.tell(
        f"the hook {name} of a plugin or a conftest.py failed for a test inside a guest, and the run "
        f"goes on: {type(error).__name__}: {error}{where}\n  Such a test was not set up on this side: "
        "hooks that need what others made there have to do without"
    )


def result_of_others(
    run: Run, hook: HookCaller, error: BaseException, ours: object, **arguments: Any
) -> Any:
    """The result of a hook, one for all plugins, from those that do not raise.

    Args:
        error: what one of them has raised.
        ours: the plugin that asks, which is not called again.
    """
    left_out = [ours]
    while True:
        run.failed = True
        tell(run, hook.name, error)
        impls = [impl for impl in hook.get_hookimpls() if impl.plugin not in left_out]
        guilty = _last_of(error.__traceback__, [_code(impl) for impl in impls])
        if guilty is None:
            raise error
        left_out.append(impls[guilty].plugin)
        others = run.config.pluginmanager.subset_hook_caller(hook.name, left_out)
        try:
            return others(**arguments)
        except Exception as another:  # noqa: BLE001  # a plugin may raise anything
            error = another


def _is_wrapper(impl: HookImpl) -> bool:
    return impl.wrapper or impl.hookwrapper


def _code(impl: HookImpl) -> CodeType | None:
    return getattr(impl.function, "__code__", None)


def _last_of(trace: TracebackType | None, codes: list[CodeType | None]) -> int | None:
    """The place in `codes` of the innermost frame that runs one of them; None if none does."""
    frames = traceback.walk_tb(trace)
    found = [codes.index(frame.f_code) for frame, _ in frames if frame.f_code in codes]
    return found[-1] if found else None


class _Reached:
    """Sees that the call of a hook has come to its ordinary implementations."""

    called = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self) -> None:
        self.called = True

    pytest_runtest_logstart = pytest_runtest_logreport
    pytest_runtest_logfinish = pytest_runtest_logreport
    pytest_warning_recorded = pytest_runtest_logreport
