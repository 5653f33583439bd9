"""A guest may answer long before its system is up, and it may never get there."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.core.errors import BootError, CommandTimeout, ImageError
from pytest_vmsandbox.guests.images import changing, started
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


def test_an_init_of_which_nothing_is_known_is_not_asked():
    guest: Any = Guest("running")
    started.await_started(guest, "busybox")
    assert guest.timeouts == []


class Sysvinit:
    """Runs the script here, with a /proc, `runlevel` and `sleep` of ours. Each sleep does the next of `then`."""

    engine = Guest.engine

    def __init__(self, folder: Path, *then: str) -> None:
        self.folder = folder
        (folder / "proc" / "7").mkdir(parents=True)
        (folder / "level").write_text("unknown\n")
        self.put("runlevel", "cat level")
        cases = "".join(f"{number}) {text} ;;\n" for number, text in enumerate(then, 1))
        self.put("sleep", f"echo >>slept\ncase $(wc -l <slept) in {cases}esac")

    def put(self, name: str, script: str) -> None:
        file = self.folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def run(self, argv: Any, **options: Any) -> Any:
        words = [word.replace("/proc/", "proc/") for word in argv]
        path = f"{self.folder}:/usr/bin:/bin"
        return subprocess.run(
            words,
            env={"PATH": path},
            cwd=self.folder,
            text=True,
            capture_output=True,
            check=True,
            timeout=60,
        )


def test_sysvinit_is_up_when_it_has_a_run_level_and_its_scripts_have_ended(tmp_path):
    guest: Any = Sysvinit(
        tmp_path,
        'echo "7 (rc) S 1 7" >proc/7/stat',
        "echo N 2 >level",
        *("true", "true"),
        'echo "7 (rc) Z 1 7" >proc/7/stat',
    )
    started.await_started(guest, "sysvinit")
    # It is busy until the script has ended, and then calm twice.
    assert len((tmp_path / "slept").read_text()) == 7
