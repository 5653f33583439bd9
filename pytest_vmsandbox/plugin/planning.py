"""Makes the plan of each test while pytest collects, and reports what is invalid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.plugin import (
    cluster_marker,
    clusters,
    config as options,
    plan as plans,
    terminal,
)
from pytest_vmsandbox.plugin.in_vm import pulling
from pytest_vmsandbox.plugin.plan import PLAN, Plan, Variant, plan_of
from pytest_vmsandbox.plugin.run import Run

# Options that are refused for tests inside guests; and those that have no effect on them.
_REFUSED = ("--setup-plan", "--setup-only")
_AT_TERMINAL = ("--pdb", "--trace")  # refused without a terminal
_WITHOUT_EFFECT = ("--setup-show", "--benchmark-cprofile")
_THOSE = "tests that run inside a guest"


# -- one parameter for each image -------------------------------------------------------------------


def needs_parameter(metafunc: pytest.Metafunc) -> bool:
    """Whether a test function gets one parameter for each of its images."""
    names = metafunc.fixturenames
    if "_vm_image" in names:
        return True
    with suppress(ConfigError):  # reported with the tests' plans
        if plans.belongs_inside(metafunc.definition, names):
            names.append("_vm_image")  # so pytest lets us parametrize it; nobody uses its value
            return True
    return False


def parametrize(run: Run, metafunc: pytest.Metafunc) -> None:
    """Give a test one parameter for each of its images, on each of its kernels.

    A test without an image gets a placeholder, and is deselected later. Errors go to
    `run.usage_errors`.
    """
    variants: list[Variant] = []
    try:
        variants = _variants(run, metafunc.definition, metafunc.fixturenames)
    except ConfigError as error:
        run.note_usage_error(metafunc.definition.nodeid, error)
    metafunc.parametrize(
        "_vm_image",
        [pytest.param(variant, id=variant.label) for variant in variants]
        or [pytest.param(None, id=plans.NO_IMAGE)],
        indirect=True,
        scope="function",  # so pytest keeps the tests in order; see `group`
    )


def _variants(run: Run, node: pytest.Item, fixturenames: Iterable[str]) -> list[Variant]:
    """The systems that a test runs on."""
    if plans.belongs_inside(node, fixturenames):
        mark = cluster_marker.of_inside(node)
        if mark is not None and mark.inside is not None:
            image, hardware = clusters.guests(run, mark)[mark.inside]
            clusters.check_images(run, node)
            return [run.variant(image, hardware.kernel)]
    return run.variants(node.iter_markers("vm"))


# -- the plans ----------------------------------------------------------------------------------------


def plan(run: Run, items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Make the plan of each test that needs a guest.

    Errors go to `run.usage_errors`.

    Returns:
        The tests to which no selected image applies.
    """
    without = set()
    for item in items:
        try:
            if PLAN not in item.stash and not _plan(run, item):
                without.add(item)
        except ConfigError as error:
            run.note_usage_error(item.nodeid, error)
    return without


def _plan(run: Run, item: pytest.Item) -> bool:
    """Make the plan of a test if it needs a guest. Returns False if no selected image applies."""
    names = getattr(item, "fixturenames", ())
    is_inside = plans.belongs_inside(item, names)
    if plans.has_parameter(item):
        variant = plans.variant_of(item)
    elif is_inside or "_vm_image" in names:
        variant = _only_variant(run, item)
    else:
        return True
    if variant is None:
        return False
    store(run, item, variant=variant, plain=plans.plain_nodeid(item), is_inside=is_inside)
    return True


def _only_variant(run: Run, item: pytest.Item) -> Variant | None:
    """The system of a test that pytest cannot parametrize (unittest's classes, doctests)."""
    variants = _variants(run, item, getattr(item, "fixturenames", ()))
    if len(variants) > 1:
        what = "kernels" if variants[0].image == variants[1].image else "images"
        run.tell(
            f"unittest's classes and doctests ran on {variants[0].label} only, the first of the selected "
            f"{what}: pytest cannot parametrize them. To run them on another one, select only that one"
        )
    return next(iter(variants), None)


def is_for_guest(item: pytest.Item) -> bool:
    """Whether a test must not run on this machine; also for one that came too late to have a plan.

    Raises:
        ConfigError: its marker `in_vm` is wrong, or contradicts its fixtures.
    """
    if PLAN in item.stash:
        return plan_of(item).runs_inside
    return plans.belongs_inside(item, getattr(item, "fixturenames", ()))


def plan_now(run: Run, item: pytest.Item) -> Plan:
    """The plan of a test that asks for `vm` now. It has no image if none applies.

    A test can ask for `vm` while it runs, and can have new marks by then.

    Raises:
        ConfigError: its markers are wrong.
    """
    if PLAN in item.stash:
        plan_again(run, item)
    elif (variant := _only_variant(run, item)) is not None:
        store(run, item, variant=variant, plain=item.nodeid, is_inside=False)
    return plan_of(item)


def plan_again(run: Run, item: pytest.Item) -> None:
    """Update the plan of a test if its marks have changed since."""
    old = plan_of(item)
    # The same objects: what a mark's arguments are compared with, such as an array, may raise.
    if old.image and [*map(id, old.marks)] != [*map(id, item.iter_markers())]:
        same = {name: getattr(old, name) for name in ("variant", "plain", "is_inside", "is_remote")}
        store(run, item, **same)


def store(
    run: Run,
    item: pytest.Item,
    *,
    variant: Variant,
    plain: str,
    is_inside: bool,
    is_remote: bool = False,
) -> None:
    """Make a plan from the marks of a test, and add pytest's marks for skip and xfail."""
    image = variant.image
    request = plans.read_marks(item.iter_markers("vm"), options.hardware(run.config))
    cluster = cluster_marker.of_inside(item) if is_inside and not is_remote else None
    default = options.isolation(item.config) if is_inside and cluster is None else "test"
    old = plan_of(item)
    skip, xfail = (plans.reason(why, image, run.catalogue) for why in (request.skip, request.xfail))
    if skip not in (None, old.skip):
        item.add_marker(pytest.mark.skip(reason=skip))
    if xfail not in (None, old.xfail):
        item.add_marker(pytest.mark.xfail(reason=xfail))
    is_recorded = is_inside and cluster is None and options.record(run.config)
    is_alone = is_recorded or options.repetitions(run.config)
    if is_recorded and request.networks:
        raise ConfigError(
            "networks= and --vm-record cannot be combined: a run with network cards cannot be repeated",
            remedy="leave one of them out",
        )
    hardware = replace(request.hardware, kernel=variant.kernel, recorded=is_recorded)
    hardware = run.catalogue.get(image).hardware(hardware, {})
    if cluster is not None and cluster.inside is not None:  # a hook may have added the marker
        image, hardware = clusters.guests(run, cluster)[cluster.inside]
    item.stash[PLAN] = Plan(
        image=image,
        hardware=hardware,
        release=variant.release,
        networks=request.networks if cluster is None else (),
        is_inside=is_inside,
        isolation="test" if is_alone else request.isolation or default,
        cluster=cluster,
        plain=plain,
        is_remote=is_remote,
        indices=plans.plain_indices(item),
        skip=skip,
        xfail=xfail,
        is_rerun=is_inside and _is_rerun(item),
        timeout=request.test_timeout,
        repetition=old.repetition,
        marks=tuple(item.iter_markers()),
    )


def deselect(run: Run, items: list[pytest.Item], without: set[pytest.Item]) -> None:
    """Deselect the tests to which no selected image applies."""
    if gone := [item for item in items if item in without]:
        run.config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in without]
        if not isinstance(run.selection, ConfigError) and not run.selection[0]:
            patterns, from_command_line = options.selected_patterns(run.config)
            option = "--vm=" if from_command_line else ""
            asked = " ".join(f"{option}{pattern}" for pattern in patterns)
            run.tell(f"deselected {len(gone)} tests, because {asked} selects no image")
        elif hasattr(run.config, "workerinput"):  # xdist does not count deselected tests
            run.tell(f"deselected {len(gone)} tests to which no selected image applies")


def group(items: list[pytest.Item]) -> None:
    """Group tests by image and kernel. Within a group their order stays."""
    numbers = {
        variant: place for place, variant in enumerate(dict.fromkeys(map(plans.variant_of, items)))
    }
    numbers[None] = 0
    items.sort(key=lambda item: numbers[plans.variant_of(item)])


def guests_to_come(run: Run, items: Iterable[pytest.Item]) -> list[tuple[str, Hardware]]:
    """Image and hardware of each fresh guest that the tests will ask for.

    A worker of xdist runs only a share of the tests. Nobody knows yet which.
    """
    items = list(items)
    guests = [
        (plan.image, plan.hardware)
        for plan in with_guests(items)
        if not plan.is_inside and plan.isolation == "test"
    ]
    guests += clusters.guests_to_come(run, items)
    return guests[: options.share(run.config, len(guests))]


def with_guests(items: Iterable[pytest.Item]) -> Iterator[Plan]:
    """The plans of the tests that will run with guests."""
    for item in items:
        if plan_of(item).image and item.get_closest_marker("skip") is None:
            yield plan_of(item)


# -- what is invalid ----------------------------------------------------------------------------------


def check(run: Run, items: list[pytest.Item]) -> None:
    """Note invalid values of options, and folders that the tests need and cannot use."""
    config = run.config
    clusters.check(run, items)
    try:
        options.check_values(config)
        if any(
            plan_of(item).is_inside or "vm_factory" in getattr(item, "fixturenames", ())
            for item in items
        ):
            options.check_places(config)
    except pytest.UsageError as error:
        run.usage_errors.extend(error.args)
    if config.getoption("--vm") and isinstance(run.selection, ConfigError):
        run.note_usage_error("", run.selection)


def check_kernels(run: Run, items: Sequence[pytest.Item]) -> None:
    """Note wrong kernels in the markers of the tests that are left after selection, each kernel once."""
    tests: dict[ConfigError, list[str]] = {}
    for item in items:
        plan = plan_of(item)
        wrong = run.wrong_kernel(plan.variant) if plan.image else None
        if wrong is not None and item.get_closest_marker("skip") is None:
            tests.setdefault(wrong, []).append(item.nodeid)
    for error, nodeids in tests.items():
        more = f" and {len(nodeids) - 1} more" if nodeids[1:] else ""
        run.usage_errors.append(f"{nodeids[0]}{more}: {error}")


def check_run(run: Run, items: Sequence[pytest.Item]) -> None:
    """Note what is invalid for the tests that are left after selection."""
    if options.repetitions(run.config) and any(map(_is_rerun, items)):
        run.usage_errors.append(
            "--vm-repeat counts failures, and pytest-rerunfailures would hide them: it runs a failed test "
            "again\nRemedy: add --reruns=0, or -p no:rerunfailures if markers ask for it"
        )
    if inside := [item for item in items if plan_of(item).is_inside]:
        run.usage_errors += _refused_for(run.config)
        run.usage_errors += clusters.refused(run.config, inside)
        try:
            pulling.patterns(run.config)
            if not run.config.getoption("collectonly"):
                from pytest_vmsandbox.inside.tree import check_push

                check_push(run.config.rootpath, options.entries(run.config, "vm_push"))
        except ConfigError as error:
            run.usage_errors.append(str(error))
        for about in _without_effect(run.config, inside):
            run.tell(about)
        pulling.spare_unused(run, inside)
    for about in clusters.without_effect(run.config, items):
        run.tell(about)


def _refused_for(config: pytest.Config) -> Iterator[str]:
    """Errors for options that tests inside guests cannot have."""
    if (option := refused(config)) in _AT_TERMINAL:
        yield (
            f"{option} needs a terminal for tests that run inside a guest, but standard input or output is "
            "none\nRemedy: run pytest at a terminal, without a pipe. Elsewhere, keep the guests of failed "
            "tests by --vm-keep=failed. Later, vmsandbox enter --pdb opens the debugger in such a guest"
        )
    elif option:
        yield (
            f"{option} does not work for tests that run inside a guest\nRemedy: leave out --in-vm, and "
            "deselect tests with the marker in_vm by -m 'not in_vm'. To look around in a guest, run "
            "'vmsandbox shell IMAGE'"
        )
    if config.pluginmanager.has_plugin("TestmonCollect"):
        yield (
            "testmon cannot see what tests inside a guest depend on, so it would deselect tests whose "
            "code has changed\nRemedy: add --testmon-nocollect, or leave out --testmon"
        )


def refused(config: pytest.Config) -> str | None:
    """The first given option that tests inside guests cannot have; None without one."""
    given = [one for one in (*_AT_TERMINAL, *_REFUSED) if config.getoption(one, default=False)]
    return next((one for one in given if one in _REFUSED or not terminal.is_there(config)), None)


def _without_effect(config: pytest.Config, inside: Sequence[pytest.Item]) -> Iterator[str]:
    """Lines about what the user asked for and has no effect on tests inside guests."""
    for option in _WITHOUT_EFFECT:
        if config.getoption(option, default=False):
            yield f"{option} shows nothing for {_THOSE}"
    there = options.entries(config, "vm_guest_plugins")
    is_absent = there and {"rerunfailures", "pytest_rerunfailures"}.isdisjoint(there)
    if is_absent and any(map(_is_rerun, inside)):
        yield f"pytest-rerunfailures has no effect on {_THOSE}: add it to vm_guest_plugins"
    if any(_asks(item, "forked", "forked") for item in inside):
        yield f"pytest-forked has no effect on {_THOSE}"


def _is_rerun(item: pytest.Item) -> bool:
    """Whether pytest-rerunfailures is asked to run a test again if it fails."""
    return _asks(item, "flaky", "reruns", "force_reruns")


def _asks(item: pytest.Item, marker: str, *names: str) -> bool:
    """Whether an option, an ini key or a marker asks a plugin to run a test its way."""
    config = item.config
    if not hasattr(config.option, names[0]):
        return False  # the plugin is not loaded
    if any(getattr(config.option, name, None) for name in names):
        return True
    with suppress(ValueError):  # older versions have no such key
        if config.getini(names[0]):
            return True
    return item.get_closest_marker(marker) is not None
