"""Calls hooks of other plugins for tests that run inside guests. An exception in a hook ends nothing.

Such a hook may need what another hook of its plugin did before. That one may have been called in the
guest and not here. In plain pytest, an exception in a hook ends the run. Here the test goes on, the
hooks of all other plugins are called, and the exception is reported once.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from pluggy import HookCaller, HookImpl, PluggyTeardownRaisedWarning

from pytest_vmsandbox.plugin.reporting import report_without_plugins

if TYPE_CHECKING:
    from pytest_vmsandbox.plugin.run import Run

ENDING: tuple[type[BaseException], ...] = (
    pytest.exit.Exception,
    KeyboardInterrupt,
    pytest.Session.Failed,
    pytest.Session.Interrupted,
)


def end_run(message: Mapping[str, Any]) -> NoReturn:
    """End the run in the same way as a test or a hook in a guest has ended it there."""
    from pytest_vmsandbox.plugin.in_vm.remote_reports import colourless

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
        run: gets a line about each exception.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._manager = run.config.pluginmanager
        self._reached = _Reached()
        self._manager.register(self._reached, "vmsandbox-reached")

    def notify(self, hook: Any, **arguments: Any) -> None:
        """Call a hook whose results nobody needs. If a plugin's hook raises, the others are called, too.

        Args:
            hook: one of ``item.ihook`` or ``config.hook``.
        """
        self._reached.called = False
        _, error = self._call(hook, arguments)
        if error is None:
            return
        self._run.failed = True  # something may have been lost
        if left := self._not_reached(hook.get_hookimpls(), error):
            # Compare identities: a plugin may define `__eq__`.
            keep = {id(self._reached), *(id(impl.plugin) for impl in left)}
            others = [plugin for plugin in self._manager.get_plugins() if id(plugin) not in keep]
            self.notify(self._manager.subset_hook_caller(hook.name, others), **arguments)

    def make_report(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> pytest.TestReport:
        """The report that plugins make for a phase that ran here. If they fail, one without them."""
        hook = item.ihook.pytest_runtest_makereport
        report, _ = self._call(hook, {"item": item, "call": call})
        if isinstance(report, pytest.TestReport):
            return report
        return report_without_plugins(item, call)

    def _call(self, hook: Any, arguments: dict[str, Any]) -> tuple[Any, BaseException | None]:
        """The result of a hook, or its exception, which is reported."""
        try:
            with warnings.catch_warnings():
                # `tell` reports this once.
                warnings.simplefilter("ignore", PluggyTeardownRaisedWarning)
                if hook.is_historic():
                    hook.call_historic(kwargs=arguments)
                    return None, None
                return hook(**arguments), None
        except ENDING:
            raise
        except BaseException as error:  # noqa: BLE001  # pytest.fail and others raise no Exception
            tell(self._run, hook.name, error)
            return None, error

    def _not_reached(self, impls: list[HookImpl], error: BaseException) -> list[HookImpl]:
        """The implementations of a hook that were not called because another one raised."""
        order = [impl for impl in reversed(impls) if not (impl.wrapper or impl.hookwrapper)]
        raised = _guilty(error, order)
        if raised is not None:
            return order[raised + 1 :]
        # A wrapper has raised: before its yield, so none was called, or after it, so all were called.
        is_before = not self._reached.called and len(order) < len(impls)
        return order if is_before else []


def tell(run: Run, name: str, error: BaseException) -> None:
    """Print a line, once, about the exception of a hook."""
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        where = f" ({frame.f_code.co_filename}:{line})"  # the innermost frame
    if (name, type(error), where) in run.failed_hooks:
        return
    run.failed_hooks.add((name, type(error), where))
    run.tell(
        f"the hook {name} of a plugin or a conftest.py failed for a test inside a guest: "
        f"{type(error).__name__}: {error}{where}\n  The tests go on, but the run fails. A test inside a "
        "guest is not set up on this machine: a hook here cannot rely on what another hook did in setup"
    )


def result_of_others(
    run: Run, hook: HookCaller, error: BaseException, ours: object, **arguments: Any
) -> Any:
    """The result of a hook from the plugins that do not raise.

    Args:
        error: the exception of one of them.
        ours: our plugin, which asks and is not called again.
    """
    left_out = [ours]
    while True:
        run.failed = True
        tell(run, hook.name, error)
        impls = [impl for impl in hook.get_hookimpls() if impl.plugin not in left_out]
        guilty = _guilty(error, impls)
        if guilty is None:
            raise error
        left_out.append(impls[guilty].plugin)
        others = run.config.pluginmanager.subset_hook_caller(hook.name, left_out)
        try:
            return others(**arguments)
        except Exception as another:  # noqa: BLE001  # a plugin may raise anything
            error = another


def _guilty(error: BaseException, impls: list[HookImpl]) -> int | None:
    """The index in `impls` of the implementation that has raised an error; None if none has."""
    codes = [getattr(impl.function, "__code__", None) for impl in impls]
    frames = traceback.walk_tb(error.__traceback__)
    found = [codes.index(frame.f_code) for frame, _ in frames if frame.f_code in codes]
    return found[-1] if found else None


class _Reached:
    """Notices when a hook's call reaches the ordinary implementations, behind all wrappers."""

    called = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self) -> None:
        self.called = True

    pytest_runtest_logstart = pytest_runtest_logreport
    pytest_runtest_logfinish = pytest_runtest_logreport
    pytest_warning_recorded = pytest_runtest_logreport
