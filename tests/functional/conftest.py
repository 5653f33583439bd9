from __future__ import annotations

import dataclasses

import pytest

from pytest_vmsandbox.plugin import RUN
from support import leaks

# The files that take longest, in that order. A worker that got one of them last would leave the other one idle.
LONGEST = (
    "test_documentation.py",
    "test_debian.py",
    "test_ownership.py",
    "test_inside.py",
    "test_isolated.py",
    "test_machine.py",
    "test_damage.py",
    "test_inside_fidelity.py",
    "test_foreign.py",
    "test_finalizers.py",
    "test_crash_points.py",
    "test_clones.py",
    "test_faults_power.py",
)
ORIGINS = {"cloned": "demand", "booted": "never"}  # how a guest comes to be, and what asks for it


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "origins(*ways): cloned or booted; only these are of interest"
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):
    """Begin with the files that take longest. xdist would begin with those that have most tests."""
    result = yield
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
    return result


def pytest_generate_tests(metafunc):
    """Tests of guests run twice: in clones, and in guests that were booted."""
    if "vm_factory" in metafunc.fixturenames:
        ways = ["cloned"] if shared(metafunc.definition) else list(ORIGINS)
        for mark in metafunc.definition.iter_markers("origins"):
            ways = mark.args
        metafunc.parametrize("origin", ways, indirect=True)


def shared(node):
    """Whether the guest of a test may be one of other tests, too."""
    marks = node.iter_markers("vm")
    return any(mark.kwargs.get("isolation", "test") != "test" for mark in marks)


@pytest.fixture(autouse=True)
def origin(request, monkeypatch):
    """How the guests of this test come to be; that they did is checked."""
    if "vm_factory" not in request.fixturenames:
        yield None
        return
    factory = request.getfixturevalue("vm_factory")
    settings = dataclasses.replace(factory.backend.settings, clones=ORIGINS[request.param])
    monkeypatch.setattr(factory.backend, "settings", settings)
    found = set()
    ready = factory.backend.callbacks.guest_ready

    def note(guest):
        found.add(guest.engine.origin)
        ready(guest)

    monkeypatch.setattr(factory.backend.callbacks, "guest_ready", note)
    yield request.param
    if "vm" in request.fixturenames and not shared(request.node):
        assert found == {request.param}
    else:  # it may expect that none comes up
        assert found <= {request.param}


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After each test nothing of ours is left: process, file, thread, descriptor, port.

    What belongs to the whole run (the launcher, its folder, the loop, the switch, templates that are
    open, the folder for logs) is there before.
    """
    if "vm_factory" in request.fixturenames:
        factory = request.getfixturevalue("vm_factory")
        factory.backend.hypervisor.switch.network("first").close()
        factory.backend.accelerator("tiny")
        _ = factory._clones._builder, factory._clones.pool
        _ = request.config.stash[RUN].artifacts._guests  # locked as long as the run lives
    before = leaks.inventory()
    yield
    if not shared(request.node):
        assert leaks.left_over(before, seconds=30) == {}  # this machine may be busy
