"""The pytest plugin: its hooks and fixtures. The modules beside this one do the work.

Every pytest run imports this module where the package is installed. So code that drives guests is
imported only when a test asks for a guest.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.plugin import (
    alarms,
    cluster_marker,
    clusters,
    config as options,
    hookspecs,
    naming,
    noise,
    planning,
    reporting,
    unimportable,
)
from pytest_vmsandbox.plugin.in_vm import pulling
from pytest_vmsandbox.plugin.plan import Variant, limit, plan_of
from pytest_vmsandbox.plugin.repeating import Repeating
from pytest_vmsandbox.plugin.run import Run, SharedGuests, leased

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence
    from pathlib import Path

    from pytest_vmsandbox.guests.clusters.cluster import Cluster
    from pytest_vmsandbox.guests.clusters.declaration import Base
    from pytest_vmsandbox.guests.factory import GuestFactory
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.plugin.in_vm.protocol import Inside as Inside

RUN = pytest.StashKey[Run]()
_INSIDE = pytest.StashKey["Inside"]()  # set in a run that has tests inside guests
_REPEATING = pytest.StashKey[Repeating]()  # set in a run with --vm-repeat
_FOUND = "vmsandbox"  # what an xdist worker has found, in its output


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "vm(*images, cpus, memory, disk, disks, network, user, kernel, firmware, tpm, isolation, "
        "test_timeout, skip, xfail): run the test on these images (names or globs), in a guest with "
        "this hardware",
    )
    config.addinivalue_line(
        "markers",
        "in_vm: run this test inside a guest; in_vm(False) keeps it on this machine under --in-vm",
    )
    config.addinivalue_line(
        "markers",
        "vm_cluster(machines, networks, inside, form, depends_on): the machines and networks of the fixture "
        "vm_cluster: name → image or {'image': …, hardware}, and name → names of machines; the machine that tests "
        "with the marker in_vm run inside; and a function that forms the cluster once",
    )
    run = config.stash[RUN] = Run(config)
    config.pluginmanager.register(_Protocol(), "vmsandbox-protocol")
    config.pluginmanager.register(alarms, "vmsandbox-alarms")
    config.pluginmanager.register(run.faults, "vmsandbox-faults")
    noise.register(config)
    if count := options.repetitions(config):
        config.stash[_REPEATING] = Repeating(config, count)
        config.pluginmanager.register(config.stash[_REPEATING], "vmsandbox-repeating")
    with suppress(pytest.UsageError):  # it is reported with all other wrong values
        if run.keeping.is_on:
            config.pluginmanager.register(run.keeping, "vmsandbox-keeping")


def pytest_unconfigure(config: pytest.Config) -> None:
    if RUN in config.stash:
        config.stash[RUN].close()


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if not config.getoption("--vm-list"):
        return None
    from pytest_vmsandbox.catalogue.store import ImageStore, columns, left_out
    from pytest_vmsandbox.core.paths import cache_dir

    try:
        # pytest has not run `pytest_configure`, so there is no other `Run`.
        run = Run(config)
        selected = () if isinstance(run.selection, ConfigError) else run.selection[0]
        found = ImageStore(cache_dir()).entries(run.catalogue, (), also=selected)
        for row in columns(found):
            print("  ".join(row))  # noqa: T201  # the list
        if more := left_out(run.catalogue, found):
            print(more)  # noqa: T201
        if problems := [image.problem for image in found if image.problem]:
            raise pytest.UsageError(*problems)
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error
    return 0


# -- which tests run on which images ----------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)  # the image is the first part of a test's id
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if planning.needs_parameter(metafunc):
        planning.parametrize(metafunc.config.stash[RUN], metafunc)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    try:
        return (yield)
    except pytest.UsageError as error:
        hints = naming.not_selected(session.config.stash[RUN], session.config.args)
        raise pytest.UsageError(*error.args, *hints) from None


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
    session: pytest.Session, items: list[pytest.Item]
) -> Generator[None, object, object]:
    run = session.config.stash[RUN]
    without = planning.plan(run, items)
    planning.check(run, items)
    _refuse(run, items)
    if (inside := _inside(session, items)) is not None:
        unimportable.replace(run, items, inside.collected)
    planning.deselect(run, items, without)
    everything = items[:]
    naming.give_both_names(everything)
    naming.deselect_by_plain_ids(run.config, items)
    result = yield
    if not items:
        naming.tell_of_words(run, everything)
    naming.give_full_names([*everything, *items])
    for item in items:
        planning.plan_again(run, item)
    # Hooks may have added tests, or the marker `in_vm`.
    planning.deselect(run, items, planning.plan(run, items))
    _inside(session, items)
    planning.check_kernels(run, items)
    planning.check_run(run, items)
    _refuse(run, items)
    planning.group(items)
    if (repeating := session.config.stash.get(_REPEATING, None)) is not None:
        repeating.repeat(items)
    return result


def _inside(session: pytest.Session, items: Iterable[pytest.Item]) -> Inside | None:
    """What runs tests inside guests; None while there is no such test."""
    stash = session.config.stash
    if _INSIDE not in stash and any(plan_of(item).is_inside for item in items):
        from pytest_vmsandbox.plugin.in_vm.protocol import Inside

        stash[_INSIDE] = Inside(stash[RUN], session)
        session.config.pluginmanager.register(stash[_INSIDE], "vmsandbox-inside")
    return stash.get(_INSIDE, None)


def _refuse(run: Run, items: list[pytest.Item]) -> None:
    """End a run before its first test if anything in it is invalid."""
    if run.usage_errors:
        items.clear()
        if not hasattr(run.config, "workeroutput"):  # for workers, xdist's controller raises them
            raise pytest.UsageError(*run.usage_errors)


@pytest.hookimpl(tryfirst=True)  # before the header asks for the factory, which needs this
def pytest_collection_finish(session: pytest.Session) -> None:
    run = session.config.stash[RUN]
    run.coming = planning.guests_to_come(run, session.items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Let xdist's controller, which collects nothing, know the tests of former runs."""
    run = node.config.stash[RUN]
    with suppress(ConfigError):  # the workers report it
        run.variants()  # so that it knows the kernels' names
    naming.know_again(run, ids)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what an xdist worker has found. All workers find the same."""
    run, found = node.config.stash[RUN], getattr(node, "workeroutput", {}).get(_FOUND, {})
    run.usage_errors = found.get("usage_errors") or run.usage_errors
    run.failed |= found.get("failed", False)
    run.told.update(dict.fromkeys(found.get("told", ())))
    run.keeping.take_over(found.get("kept", {}))
    for kind, names in found.get("pulled", {}).items():
        pulling.note(run.pulled, kind, names)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash[RUN]
    if _INSIDE in session.config.stash:
        session.config.stash[_INSIDE].leases.close()
    run.keeping.close()
    if run.failed and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_FOUND] = {
            "usage_errors": run.usage_errors,
            "failed": run.failed,
            "told": [*run.about(run.images_used), *run.told],
            "pulled": {kind: [*names] for kind, names in run.pulled.items()},
            "kept": run.keeping.found(),
        }
    if run.usage_errors and session.config.pluginmanager.has_plugin("dsession"):
        raise pytest.UsageError(*run.usage_errors)


def pytest_report_collectionfinish(
    config: pytest.Config, items: Sequence[pytest.Item]
) -> list[str]:
    if config.getoption("collectonly"):
        return []
    run = config.stash[RUN]
    images = [plan.image for plan in planning.with_guests(items)]
    return run.about([*images, *clusters.images(run, items)])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Write our lines to the summary, including those of xdist's workers."""
    run = config.stash[RUN]
    for line in pulling.lines(run.pulled):
        run.tell(line)
    for line in run.told:
        terminalreporter.write_line(line)
    if kept := run.keeping.summary():
        terminalreporter.write_sep("=", kept[0])
        for line in kept[1:]:
            terminalreporter.write_line(line)


# -- running ------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    run = item.config.stash[RUN]
    run.item = item
    try:
        return (yield)
    finally:
        run.finish(item)


class _Protocol:
    """Takes over the protocol of tests that run inside guests.

    It is registered late, so that it runs before other plugins that take over a protocol.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        if not plan_of(item).runs_inside:
            return None
        item.config.stash[_INSIDE].run(item, nextitem)
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note a failure after all other plugins: one may have repeated the test, or changed its report."""
        report = yield
        if plan_of(item).is_inside:
            return report
        run = item.config.stash[RUN]
        if call.when == "setup":
            run.begin_attempt()
        if report.failed:
            if call.excinfo is not None:
                alarms.stop(item)
            error = report.longreprtext if call.excinfo is None else call.excinfo.value
            run.at_failure(item, call.when, error)
        elif call.when == "call":
            run.at_success(item)
        run.show(item, report)
        if call.when == "teardown":
            run.faults.finish(item)
        return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse to run a test on this machine that belongs inside a guest."""
    if planning.is_for_guest(item):
        raise ConfigError(
            "this test must run inside a guest, but a plugin or a conftest.py tried to run it on this "
            "machine",
            remedy="look for a hook pytest_runtest_protocol or pytest_runtestloop that runs tests itself, "
            "and leave that plugin out (-p no:NAME)",
        )


pytest_runtest_call = pytest_runtest_setup


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Take over pytest-timeout's limit. Its own alarm would end the whole run."""
    if not plan_of(item).is_inside:
        return None
    if settings.timeout:
        limit(item, settings.timeout, of_call=getattr(settings, "func_only", False))
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    only_text = reporting.before_report(item, call)
    return reporting.after_report(item, call, (yield), only_text=only_text)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_report_teststatus(
    report: pytest.TestReport, config: pytest.Config
) -> Generator[None, object, object]:
    """Report a lost guest as ERROR, even while the test's function runs.

    If another plugin's hook fails here, the test is still counted.
    """
    try:
        status = yield
    except Exception as error:
        if not getattr(report, "vm_inside", False):
            raise
        from pytest_vmsandbox.plugin.in_vm import hooks

        hook, ours = config.hook.pytest_report_teststatus, sys.modules[__name__]
        status = hooks.result_of_others(
            config.stash[RUN], hook, error, ours, report=report, config=config
        )
    return ("error", "E", "ERROR") if reporting.is_lost_guest(report) else status


# -- fixtures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vm_factory(pytestconfig: pytest.Config) -> GuestFactory:
    """Makes guests, for tests that need several and for your own fixtures.

    `boot <GuestFactory.boot>` is a context manager:
    ``with vm_factory.boot("debian-13", memory="1GiB") as guest: …``.
    `prepare <GuestFactory.prepare>` makes an image with more in it.
    """
    return pytestconfig.stash[RUN].factory


@pytest.fixture
def vm_artifacts(
    request: pytest.FixtureRequest,
    vm_factory: GuestFactory,  # noqa: ARG001  # a test with artifacts is one that has guests
) -> Path:
    """The folder (a `Path`) of this test's artifacts. It is kept if the test fails.

    It holds the console log, the QMP log, QEMU's command line and a screenshot, also of guests that the
    test shares with others. If the test fails, it also gets what its guests say about their processes,
    memory, kernel's log and journal.
    """
    return request.config.stash[RUN].artifacts_of(request.node)


@pytest.fixture(scope="session")
def vm_prepared() -> Base | None:
    """What `vm` is made of, for you to override: return what ``vm_factory.prepare(None, …)`` returned.

    In a conftest.py, the override applies to all tests beside it and below. In a file or a class, it
    applies to the tests there. Images, hardware and ``isolation`` stay as the markers say. The
    fixture can have ``params``, such as one for each old version.
    """
    return None


@pytest.fixture
def vm(
    request: pytest.FixtureRequest,
    vm_factory: GuestFactory,
    vm_prepared: Base | None,
    _vm_image: Variant | None,
) -> Iterator[Guest]:
    """A running `Guest` that no other test has touched, and none will.

    The marker ``vm`` says which image and which hardware, and whether tests share the guest.
    """
    run = request.config.stash[RUN]
    plan = planning.plan_now(run, request.node)
    if not plan.image:
        pytest.skip("no selected image applies to this test")
    if (other := getattr(vm_prepared, "image", plan.image)) != plan.image:
        raise ConfigError(
            f"this test runs on {plan.image}, but the fixture vm_prepared returned an image that was "
            f"prepared from {other}",
            remedy="let vm_prepared return vm_factory.prepare(None, …), which works for every image",
        )
    base = vm_prepared or plan.image
    if plan.isolation == "test":
        with leased(vm_factory, base, plan) as guest:
            yield guest
    else:
        guests: SharedGuests = request.getfixturevalue(f"_vm_of_{plan.isolation}")
        yield guests.get(base, plan)


@pytest.fixture
def vm_cluster(request: pytest.FixtureRequest, vm_factory: GuestFactory) -> Iterator[Cluster]:
    """A running `Cluster` that no other test has touched, and none will.

    The marker ``vm_cluster`` declares its machines and networks, and may name a function that forms it once.
    ``vm_cluster["db1"]`` is a `Guest`.
    """
    with clusters.opened(vm_factory, cluster_marker.read(request.node)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _vm_image(request: pytest.FixtureRequest) -> Variant | None:
    """The system of this test; None if pytest cannot parametrize it (unittest's classes)."""
    variant: Variant | None = getattr(request, "param", None)
    return variant


def _shared_guests(pytestconfig: pytest.Config) -> Iterator[SharedGuests]:
    with ExitStack() as stack:
        yield SharedGuests(pytestconfig.stash[RUN], stack)


_vm_of_module = pytest.fixture(scope="module")(_shared_guests)
_vm_of_session = pytest.fixture(scope="session")(_shared_guests)
