"""The judgements of `vmsandbox doctor`, one table for each thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.cli import checks, examine
from pytest_vmsandbox.cli.checks import Check, Status
from pytest_vmsandbox.core.spec import GIB, MIB

OK, WARNING, FAILED = Status
IDS = "tester:100000:65536\n"
QEMU = "qemu-system-x86_64"


@pytest.fixture(autouse=True)
def debian(monkeypatch):
    monkeypatch.setattr(programs, "find", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("os.geteuid", lambda: 1000)


@pytest.mark.parametrize(
    ("check", "status", "found", "remedy"),
    [
        (lambda: checks.operating_system("linux", "Debian"), OK, "Debian", ""),
        (lambda: checks.operating_system("darwin", "macOS"), WARNING, "macOS", "build images on Linux"),
        (lambda: checks.operating_system("win32", "Windows"), FAILED, "Windows", "use Linux"),
        (lambda: checks.python("3.11.2", "/p"), OK, "3.11.2, /p", ""),
        (lambda: checks.qemu(Path("/q"), (7, 2, 22)), OK, "7.2.22, /q", ""),
        (lambda: checks.qemu(Path("/q"), (7, 1)), WARNING, "7.1", "7.2 or newer"),
        (lambda: checks.no_qemu("there is no q", "r", QEMU, missing=True), FAILED,
         "there is no q", "sudo apt-get install qemu-system-x86"),
        (lambda: checks.no_qemu("broken", "install anew", QEMU, missing=False), FAILED, "broken",
         "install anew"),
        (lambda: checks.no_qemu("no", "r", "/opt/qemu", missing=True), FAILED, "no", "r"),
        (lambda: checks.qemu_img("/i"), OK, "/i", ""),
        (lambda: checks.qemu_img(None), FAILED, "need it for their disks", "qemu-utils"),
        (lambda: checks.accelerator("", ("kvm", "proven")), OK, "kvm: proven", ""),
        (lambda: checks.accelerator("", ("tcg", "it lies")), WARNING, "it lies", "nested"),
        (lambda: checks.accelerator("no device", ("tcg", "no device")), WARNING, "no device", "firmware"),
        (lambda: checks.accelerator("no device", None), WARNING, "no device", "firmware"),
        (lambda: checks.accelerator("not open; usermod", None), WARNING, "usermod", "log in again"),
        (lambda: checks.accelerator("", None), OK, "The first guest will show", ""),
        (lambda: checks.loopback("", "r"), OK, "works", ""),
        (lambda: checks.loopback("unreachable", "lo up"), FAILED, "unreachable", "lo up"),
        (lambda: checks.image_tools([], needed=True), OK, "all installed", ""),
        (lambda: checks.image_tools(["xz"], needed=True), FAILED, "missing: xz", "install xz-utils"),
        (lambda: checks.image_tools(["xz"], needed=False), WARNING, "missing: xz", "install xz-utils"),
        (
            lambda: checks.image_tools(["cc", "libc.a"], needed=True),
            *(FAILED, "missing: cc, libc.a", "install gcc libc6-dev"),
        ),
        (lambda: checks.keyring(True, needed=True), OK, "installed", ""),
        (lambda: checks.keyring(False, needed=True), FAILED, "missing", "debian-archive-keyring"),
        (lambda: checks.keyring(False, needed=False), WARNING, "missing", "debian-archive-keyring"),
        (lambda: checks.firmware([], needed=True), OK, "installed", ""),
        (lambda: checks.firmware(["swtpm"], needed=False), OK, "missing: swtpm", ""),
        (lambda: checks.firmware(["ovmf"], needed=True), WARNING, "UEFI or a TPM", "ovmf"),
        (lambda: checks.user_namespaces("", needed=True), OK, "work", ""),
        (lambda: checks.user_namespaces("denied", needed=True), FAILED, "denied", "sysctl"),
        (lambda: checks.user_namespaces("denied", needed=False), WARNING, "denied", "sysctl"),
        (lambda: checks.folder("f", Path("/f"), "", variable="V"), OK, "/f", ""),
        (lambda: checks.folder("f", Path("/f"), "is no folder", variable="V"), FAILED, "is no folder", "V"),
        (lambda: checks.qemu_user(1000, "joe", None), OK, "joe", ""),
        (lambda: checks.qemu_user(0, "root", (61184, 61184)), OK, "61184", ""),
        (lambda: checks.qemu_user(0, "root", None), WARNING, "root", "ordinary user"),
        (lambda: checks.emulators([], {}), OK, "none can be emulated", ""),
        (lambda: checks.emulators(["arm64"], {"a_arm64": ""}), OK, "arm64; a_arm64 built", ""),
        (
            lambda: checks.emulators(["arm64"], {"a_arm64": "", "a_s390x": "get it"}),
            WARNING,
            "emulated: arm64; a_arm64, a_s390x built; no emulator for a_s390x",
            "get it",
        ),
        (lambda: checks.images({}, "debian-13"), WARNING, "none", "vmsandbox images build debian-13"),
        (lambda: checks.images({"a": "missing"}, "a"), WARNING, "none", "build a"),
        (lambda: checks.images({"a": "built", "b": "missing"}, "b"), OK, "a built", ""),
        (lambda: checks.images({"a": "built", "b": "stale"}, "a"), WARNING, "a built, b stale", "build b"),
        (lambda: checks.ssh_client("/ssh"), OK, "/ssh", ""),
        (lambda: checks.ssh_client(None), WARNING, "vmsandbox shell", "openssh-client"),
    ],
    ids=lambda value: str(value) if isinstance(value, Status) else "",
)  # fmt: skip
def test_judgement(check, status, found, remedy):
    check = check()
    assert check.status is status
    assert found in check.found
    assert remedy in check.remedy
    assert bool(check.remedy) is (status is not OK)


@pytest.mark.parametrize(
    ("available", "status"),
    [(None, OK), (8 * GIB, OK), (700 * MIB, OK), (500 * MIB, WARNING), (200 * MIB, FAILED),
     (-1, FAILED)],
)  # fmt: skip
def test_memory(available, status):
    check = checks.memory(available, default=512 * MIB, smallest=128 * MIB, overhead=96 * MIB)
    assert check.status is status


@pytest.mark.parametrize(
    ("free", "status"), [(4 * GIB, OK), (3 * GIB, OK), (2 * GIB, WARNING), (MIB, FAILED)]
)
def test_disk(free, status):
    check = checks.disk("disk", Path("/c"), free, needed=3 * GIB, variable="VMSANDBOX_CACHE")
    assert check.status is status
    assert ("VMSANDBOX_CACHE" in check.remedy) is (status is not OK)


@pytest.mark.parametrize(
    ("subuid", "subgid", "command"),
    [
        (IDS, IDS, ()),
        ("1000:100000:65536\n", IDS, ()),
        (IDS, "", ("usermod", "--add-subgids", "165536-231071", "tester")),
        ("", "", ("usermod", "--add-subuids", "100000-165535", "--add-subgids", "100000-165535",
                  "tester")),
        ("other:100000:65536\n", "other:100000:65536\n",
         ("usermod", "--add-subuids", "165536-231071", "--add-subgids", "165536-231071",
          "tester")),
        ("tester:1:10\nnonsense\n::\n", IDS, ("usermod", "--add-subuids", "165536-231071",
                                             "tester")),
    ],
)  # fmt: skip
def test_subordinate_ids(subuid, subgid, command):
    check = checks.subordinate_ids("tester", 1000, subuid, subgid, needed=True)
    assert check.commands == ((command,) if command else ())
    assert check.status is (FAILED if command else OK)
    if command:
        assert check.remedy == f"sudo {' '.join(command)}"


def test_the_worst_counts():
    good = Check(name="a", status=OK, found="")
    fair = Check(name="b", status=WARNING, found="")
    bad = Check(name="c", status=FAILED, found="")
    assert checks.worst([]) is OK
    assert checks.worst([fair, good]) is WARNING
    assert checks.worst([good, bad, fair]) is FAILED


def test_every_program_that_a_definition_requires_has_a_package():
    from pytest_vmsandbox.catalogue.catalogue import Catalogue

    catalogue = Catalogue()
    wanted = {program for name in catalogue.names() for program in catalogue.get(name).requires}
    own = {"mmdebstrap", "cpio", "zstd", "tar", "qemu-img", "gpgv"}  # called like their package
    assert wanted - own <= set(programs.PACKAGES)


@pytest.mark.parametrize(("system", "more"), [("debian", []), ("ubuntu", ["gpg"]), ("", ["gpg"])])
def test_what_mmdebstrap_needs_on_other_systems(monkeypatch, system, more):
    release = {"ID": system} if system else {}
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)
    assert programs.with_theirs(["cpio", "mmdebstrap"]) == ["cpio", "mmdebstrap", *more]
    assert programs.with_theirs(["cpio"]) == ["cpio"]


def test_what_people_see_of_a_command_line(monkeypatch):
    assert programs.shown(programs.apt_install(["cpio"])) == (
        "sudo apt-get install --yes --no-install-recommends cpio"
    )


@pytest.mark.parametrize(
    ("manager", "line"),
    [("apt-get", "sudo apt-get install cpio"), ("dnf", "sudo dnf install"),
     ("brew", "brew install qemu"), ("", "packages of Debian contain: cpio")],
)  # fmt: skip
def test_how_packages_are_installed_elsewhere(monkeypatch, manager, line):
    monkeypatch.setattr(programs, "find", lambda name: name if name == manager else None)
    assert line in programs.install_line(["cpio"])


def test_an_emulator_that_a_variable_chooses(monkeypatch):
    for name in ("VMSANDBOX_QEMU_S390X", "VMSANDBOX_QEMU_RISCV64"):
        monkeypatch.setenv(name, "/bin/true")
    found = [check for check in examine._chosen_emulators("riscv64") if check.found]
    assert [(check.name, check.status) for check in found] == [("QEMU for s390x", WARNING)]
    assert "VMSANDBOX_QEMU_S390X" in found[0].remedy
