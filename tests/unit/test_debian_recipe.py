"""What the recipe of the Debian images asks of mmdebstrap for each suite."""

import os
import re
import subprocess
from pathlib import Path

import pytest

IMAGES = Path(__file__).parents[2] / "images"
# The recipe up to the point where mmdebstrap would start.
STUBS = """
enter() { :; }
stage() { :; }
install_system() { printf '%s\\n' "$@" "drivers=$drivers" "init=$init"; exit 0; }
"""
SOURCES = """\
deb http://mirror.example/debian {0} main
deb http://mirror.example/debian {0}-updates main
deb http://security.debian.org/debian-security {0}-security main
"""


def asked(folder: str) -> list[str]:
    """What the recipe of an image asks for. It runs as far as that."""
    build = (IMAGES / folder / "build").read_text().replace("recipe ", f"{STUBS}recipe ", 1)
    done = subprocess.run(
        ["sh", "-c", build],
        cwd=IMAGES / folder,
        env={**os.environ, "VMSANDBOX_DEBIAN_ARCHITECTURE": "amd64"},
        text=True,
        capture_output=True,
        check=True,
    )
    return done.stdout.splitlines()


def hooked(options: list[str], suite: str, root: Path) -> str:
    """What the set-up hooks among the options make of the list of sources."""
    sources = root / "etc" / "apt" / "sources.list"
    (sources.parent / "preferences.d").mkdir(parents=True)
    sources.write_text(SOURCES.format(suite))
    for option in options:
        if (hook := option.removeprefix("--setup-hook=")) != option:
            subprocess.run(["sh", "-c", hook, "sh", str(root)], check=True)
    return sources.read_text()


@pytest.mark.parametrize("folder", ["debian-13", "debian-testing", "debian-13-backports"])
def test_later_suites_merge_usr_by_themselves(folder, tmp_path):
    options = asked(folder)
    hooked(options, "trixie", tmp_path)
    assert not (tmp_path / "bin").exists()
    assert "drivers=pvpanic pvpanic_pci" in options


@pytest.mark.parametrize(
    ("folder", "suite"), [("debian-11", "bullseye"), ("debian-12", "bookworm")]
)
def test_usr_of_earlier_suites_is_merged_without_perl(folder, suite, tmp_path):
    hooked(asked(folder), suite, tmp_path)
    (tmp_path / "usr/lib/modules").mkdir()
    assert (tmp_path / "lib/modules").is_dir()
    preferences = (tmp_path / "etc/apt/preferences.d/vmsandbox").read_text()
    assert preferences == "Package: usrmerge\nPin: release *\nPin-Priority: -1\n"


def test_what_is_gone_is_not_asked_for(tmp_path):
    """The suite with security updates of Debian 11 lists packages that are no longer there."""
    options = asked("debian-11")
    assert hooked(options, "bullseye", tmp_path) == SOURCES.format("bullseye").splitlines(True)[0]
    assert "drivers=" in options


@pytest.mark.parametrize("folder", ["debian-testing", "debian-sid", "debian-13"])
def test_only_rolling_suites_may_have_expired(folder):
    lenient = [option for option in asked(folder) if "Check-Valid-Until" in option]
    assert bool(lenient) == (folder != "debian-13")


@pytest.mark.parametrize(("number", "suite"), [("12", "bookworm"), ("13", "trixie")])
def test_the_kernel_of_backports(number, suite, tmp_path):
    plain, options = asked(f"debian-{number}"), asked(f"debian-{number}-backports")
    kernel = re.match(r"linux-image-[^,/]+", plain[1])
    assert kernel is not None
    assert f"{kernel[0]}/{suite}-backports," in options[1]
    assert options[1].replace(f"/{suite}-backports", "") == plain[1]
    first = f"deb http://mirror.example/debian {suite}"
    assert hooked(options, suite, tmp_path).startswith(f"{first} main\n{first}-backports main\n")


def test_one_without_systemd():
    options = asked("debian-13-sysvinit")
    packages = options[1].split(",")
    assert {"sysvinit-core", "udev", "openssh-server"} <= {*packages}
    assert not {"systemd", "systemd-sysv", "libpam-systemd", "dbus-user-session"} & {*packages}
    assert "init=sysvinit" in options
