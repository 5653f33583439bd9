"""The pytest plugin: hook implementations and fixtures; what they do lies in the modules beside this one.

It is imported by every pytest run on a machine where it is installed, so nothing that drives
guests is imported before a guest is asked for.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.plugin import (
    collection,
    config as options,
    hookspecs,
    naming,
    pulling,
    reporting,
    unimportable,
)
from pytest_vmsandbox.plugin.plan import limit, plan_of
from pytest_vmsandbox.plugin.run import Run, SharedGuests

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from pytest_vmsandbox.guests.factory import GuestFactory
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.guests.provision import PreparedImage, PreparedLayer
    from pytest_vmsandbox.inside.session import Collected
    from pytest_vmsandbox.plugin.inside import Inside

RUN = pytest.StashKey[Run]()
_INSIDE = pytest.StashKey["InsideProtocol"]()
# What an xdist worker tells.
_USAGE_ERRORS, _FAILED, _TOLD = "vmsandbox_usage_errors", "vmsandbox_failed", "vmsandbox_told"
_PULLED = "vmsandbox_pulled"


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "vm(*images, cpus, memory, disk, disks, network, isolation, user, test_timeout, skip, "
        "xfail): which images (names or globs) and which hardware the guest of a test has",
    )
    config.addinivalue_line(
        "markers", "in_vm: run this test inside its guest; in_vm(False) keeps it here under --in-vm"
    )
    config.stash[RUN] = run = Run(config)
    config.stash[_INSIDE] = InsideProtocol(run)
    config.pluginmanager.register(config.stash[_INSIDE], "vmsandbox-inside")


def pytest_unconfigure(config: pytest.Config) -> None:
    if RUN in config.stash:
        config.stash[RUN].close()


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if not config.getoption("--vm-list"):
        return None
    try:
        for line in Run(config).image_lines():  # pytest does not configure itself for this
            print(line)  # noqa: T201  # what was asked for
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error
    return 0


# -- which tests run on which images ----------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)  # the image is the first part of a test's id
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if collection.needs_parameter(metafunc):
        collection.parametrize(metafunc.config.stash[RUN], metafunc)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    run = collector.config.stash[RUN]
    report = unimportable.stand_in(run, collector, report)
    naming.give_both_names(report.result or ())
    naming.know_again(run, [node.nodeid for node in report.result or ()])
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, object, object]:
    run = config.stash[RUN]
    without = collection.plan(run, items)
    _refuse(config, items, collection.check(run, items))
    unimportable.replace(run, items, config.stash[_INSIDE].collected)
    collection.deselect(run, items, without)
    everything = items[:]
    naming.give_both_names(everything)
    naming.deselect_by_plain_ids(config, items)
    result = yield
    naming.give_full_names(everything)
    for item in items:
        collection.plan_again(run, item)
    _refuse(config, items, collection.check_run(run, items))
    collection.group(items)
    return result


def _refuse(config: pytest.Config, items: list[pytest.Item], errors: list[str]) -> None:
    """Let a run end before its first test if there is anything invalid in it."""
    if errors:
        items.clear()
        if not hasattr(config, "workeroutput"):
            raise pytest.UsageError(*errors)
        config.workeroutput[_USAGE_ERRORS] = errors  # xdist's controller raises them


@pytest.hookimpl(tryfirst=True)  # then the header asks for the factory, which wants to know
def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[RUN].coming = collection.guests_to_come(session.items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Let xdist's controller, which collects nothing, remember which tests failed."""
    naming.know_again(node.config.stash[RUN], ids)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what an xdist worker has found; all of them find the same."""
    run, output = node.config.stash[RUN], getattr(node, "workeroutput", {})
    run.usage_errors = output.get(_USAGE_ERRORS, run.usage_errors)
    run.failed |= output.get(_FAILED, False)
    run.told.update(dict.fromkeys(output.get(_TOLD, ())))
    for kind, names in output.get(_PULLED, {}).items():
        pulling.note(run.pulled, kind, names)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash[RUN]
    session.config.stash[_INSIDE].close()
    if run.failed and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_FAILED] = run.failed
        session.config.workeroutput[_TOLD] = [*run.about(run.images_used), *run.told]
        session.config.workeroutput[_PULLED] = {
            kind: [*names] for kind, names in run.pulled.items()
        }
    if run.usage_errors and session.config.pluginmanager.has_plugin("dsession"):
        raise pytest.UsageError(*run.usage_errors)


def pytest_report_collectionfinish(
    config: pytest.Config, items: Sequence[pytest.Item]
) -> list[str]:
    if config.getoption("collectonly"):
        return []
    return config.stash[RUN].about(collection.images_needed(items))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Tell what xdist's workers ran guests with; they have no terminal of their own."""
    run = config.stash[RUN]
    for line in pulling.lines(run.pulled):
        run.tell(line)
    for line in run.told:
        terminalreporter.write_line(line)


# -- running ------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, trylast=True)  # pytest-cov combines after it
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        if session.config.pluginmanager.has_plugin("_cov"):
            session.config.stash[_INSIDE].close()  # guests tell what they have measured


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    run = item.config.stash[RUN]
    run.item = item
    try:
        return (yield)
    finally:
        run.finish(item)


class InsideProtocol:
    """Takes over the protocol of tests that run inside guests.

    It is registered late, so that it comes before other plugins that take over a protocol.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    @cached_property
    def _inside(self) -> Inside:
        from pytest_vmsandbox.plugin.inside import Inside

        return Inside(self._run)

    def collected(self, item: pytest.Item) -> Collected:
        """What the guest for a test has collected; see `Inside`."""
        return self._inside.collected(item)

    def close(self) -> None:
        """Let what runs inside guests tear down what is left."""
        if "_inside" in self.__dict__:
            for problem in self._inside.leases.close():
                self._run.tell_problem(f"at the end of the tests inside: {problem}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        if not plan_of(item).runs_inside:
            return None
        self._inside.run(item, nextitem)
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_report_teststatus(
        self, report: pytest.TestReport, config: pytest.Config
    ) -> Generator[None, object, object]:
        """Let no test be lost from the count because a plugin cannot tell its status."""
        try:
            return (yield)
        except Exception as error:
            if not getattr(report, "vm_inside", False):
                raise
            from pytest_vmsandbox.plugin import hooks

            hook = config.hook.pytest_report_teststatus
            return hooks.result_of_others(
                self._run, hook, error, self, report=report, config=config
            )

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any] | None:
        """What benchmarks ran on: the guest, where they ran in one."""
        return self._inside.benchmarks.machine() if "_inside" in self.__dict__ else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    collection.refuse_here(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    collection.refuse_here(item)


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Take over pytest-timeout's limit: its alarm would end the whole run."""
    if not plan_of(item).is_inside:
        return None
    if settings.timeout:
        limit(item, settings.timeout, of_call=getattr(settings, "func_only", False))
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool | None:
    return True if plan_of(item).is_inside else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    only_text = reporting.before_report(item, call)
    return reporting.after_report(item, call, (yield), only_text=only_text)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """A test that fails is FAILED; a guest that fails is an ERROR, also while the test runs."""
    return ("error", "E", "ERROR") if reporting.is_lost_guest(report) else None


# -- fixtures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vm_factory(pytestconfig: pytest.Config) -> GuestFactory:
    """Boots guests: ``with vm_factory.boot("debian-13", memory="1GiB") as guest: …``."""
    return pytestconfig.stash[RUN].factory


@pytest.fixture
def vm_artifacts(
    request: pytest.FixtureRequest,
    vm_factory: GuestFactory,  # noqa: ARG001  # a test with artifacts is one that has guests
) -> Path:
    """The folder of this test's artifacts; it is kept if the test fails."""
    return request.config.stash[RUN].artifacts_of(request.node)


@pytest.fixture(scope="session")
def vm_prepared() -> PreparedImage | PreparedLayer | None:
    """What `vm` is booted from, for users to override: what ``vm_factory.prepare(None, …)`` returns."""
    return None


@pytest.fixture
def vm(
    request: pytest.FixtureRequest,
    vm_factory: GuestFactory,
    vm_prepared: PreparedImage | PreparedLayer | None,
    _vm_image: str | None,
) -> Iterator[Guest]:
    """A running `Guest` in a known-clean state."""
    run = request.config.stash[RUN]
    plan, base = collection.plan_now(run, request.node), run.base(vm_prepared)
    if not plan.image or base is None:
        pytest.skip("no selected image applies to this test")
    if plan.isolation == "test":
        with vm_factory.lease(base, plan.hardware) as guest:
            yield guest
    else:
        guests: SharedGuests = request.getfixturevalue(f"_vm_of_{plan.isolation}")
        yield guests.get(base, plan.hardware)


@pytest.fixture(scope="session")
def _vm_image(request: pytest.FixtureRequest) -> str | None:
    """The image of this test; None where pytest cannot parametrize (unittest's classes)."""
    image: str | None = getattr(request, "param", None)
    return image


@pytest.fixture(scope="module")
def _vm_of_module(pytestconfig: pytest.Config) -> Iterator[SharedGuests]:
    with ExitStack() as stack:
        yield SharedGuests(pytestconfig.stash[RUN], stack)


@pytest.fixture(scope="session")
def _vm_of_session(pytestconfig: pytest.Config) -> Iterator[SharedGuests]:
    with ExitStack() as stack:
        yield SharedGuests(pytestconfig.stash[RUN], stack)
