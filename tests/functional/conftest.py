from __future__ import annotations

import pytest

from support import leaks


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After each test nothing of ours is left: process, file, thread, descriptor, port.

    What belongs to the whole run (the launcher, its folder, the loop) is there before.
    """
    if "vm_factory" in request.fixturenames:
        factory = request.getfixturevalue("vm_factory")
        factory._running()
        factory.accelerator("tiny")
    before = leaks.inventory()
    yield
    shared = any(
        mark.kwargs.get("isolation", "test") != "test" for mark in request.node.iter_markers("vm")
    )
    if not shared:
        assert leaks.left_over(before, seconds=2) == {}
