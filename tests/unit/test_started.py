"""A guest may answer long before its system is up, and it may never get there."""

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.core.errors import BootError, CommandTimeout, ImageError
from pytest_vmsandbox.guests import changing, started
from support.images import DEFINITION


class Guest:
    """Answers `systemctl` as told."""

    engine = SimpleNamespace(name="mine-1", stretch=lambda seconds: 2 * seconds)
    causes = "fsck.service loaded failed failed\nDependency failed for /mnt.\n"

    def __init__(self, state):
        self.state = state
        self.timeouts = []

    def run(self, argv, *, check, timeout, user):
        assert argv == ("systemctl", "is-system-running", "--wait")
        assert (check, user) == (False, "root")
        self.timeouts.append(timeout)
        if not self.state:
            raise CommandTimeout("too slow", seconds=timeout)
        return SimpleNamespace(stdout=f"{self.state}\n")

    def shell(self, script, *, check, user):
        assert "systemctl --failed --plain" in script
        assert (check, user) == (False, "root")
        return SimpleNamespace(stdout=self.causes)


@pytest.mark.parametrize("state", ["running", "degraded", "unknown", "starting", ""])
def test_it_is_up_or_will_never_be_quiet(state):
    guest: Any = Guest(state)
    started.await_started(guest, "systemd")
    assert guest.timeouts == [600]


@pytest.fixture
def in_emergency() -> Any:
    return Guest("maintenance")


def test_emergency_mode_is_no_boot(in_emergency):
    with pytest.raises(BootError, match="mine-1: the system is in emergency mode") as raised:
        started.await_started(in_emergency, "systemd")
    assert raised.value.stage == "init"
    assert raised.value.details == f"--- systemd in the guest\n{Guest.causes}"
    assert "may look for a disk" in raised.value.remedy


def test_an_image_that_is_made_keeps_the_remedy(in_emergency):
    build: Any = SimpleNamespace(definition=DEFINITION)
    with pytest.raises(ImageError) as raised, changing.named(build, "setup.sh"):
        started.await_started(in_emergency, "systemd")
    assert "may look for a disk" in raised.value.remedy
