"""The table of architectures, and which programs and accelerators the machine layer takes for them."""

import ast
import platform
import re
import shutil
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.core.architecture import ARCHITECTURES, by_any_name, native_architecture
from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.machine import accelerator, host, qemu
from pytest_vmsandbox.machine.accelerator import Trial
from pytest_vmsandbox.machine.qemu import Qemu, find_qemu

QEMU = Qemu(path=Path("qemu"), version=(7, 2), build="one")


@pytest.fixture
def machine(monkeypatch):
    """Lets this machine's processor have another name."""
    for name in ARCHITECTURES:
        monkeypatch.delenv(f"VMSANDBOX_QEMU_{ARCHITECTURES[name].debian.upper()}", raising=False)
    monkeypatch.delenv("VMSANDBOX_QEMU", raising=False)
    return lambda name: monkeypatch.setattr(platform, "machine", lambda: name)


def test_names():
    assert [one.debian for one in ARCHITECTURES.values()] == [
        *("amd64", "i386", "arm64", "armhf", "riscv64", "ppc64el", "s390x"),
    ]
    for one in ARCHITECTURES.values():
        assert by_any_name(one.name) == by_any_name(one.debian) == one.name
    assert by_any_name("sparc64") == ""


NAMES = re.compile(
    r"(?<![\w-])(?:x86[-_]64|i[36]86|aarch64|arm64|armhf|armv7l|riscv64|ppc64(?:le|el)|s390x|amd64"
    r"|pc-q35\S*|pseries\S*|s390-ccw\S*|tty(?:S0|AMA0|sclp0)|hvc0|pvpanic\w*)(?!\w)"
)
KNOWERS = {  # which other files name an architecture, a board, a console or a panic device, and why
    "pytest_vmsandbox/catalogue/importing/cell.py": "a program of its own: numbers of system calls",
    "pytest_vmsandbox/catalogue/kernels.py": "kernels of users are for x86_64 only until now",
    "pytest_vmsandbox/catalogue/programs.py": "the emulator on a machine that we do not know",
    "pytest_vmsandbox/catalogue/store.py": "an example in a message",
    "pytest_vmsandbox/machine/firmware.py": "where distributions keep the files of firmware",
    "images/debian/lib.sh": "Debian's kernel packages, and the modules of the panic device",
    "images/tiny/build": "suites that have a kernel",
}


def words_of(path):
    """The strings of a program, without docstrings; or the lines of a recipe, without comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    tree = ast.parse(text)
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told
    ]


def test_nobody_else_names_an_architecture():
    """Whoever needs something of one asks the table. A file that no longer does leaves this list."""
    root = Path(__file__).parents[2]
    recipes = (path for path in (root / "images").rglob("*") if path.name in ("build", "init"))
    files = [*(root / "pytest_vmsandbox").rglob("*.py"), *recipes, *(root / "images").rglob("*.sh")]
    files.remove(root / "pytest_vmsandbox/core/architecture.py")
    found = {
        path.relative_to(root).as_posix()
        for path in files
        if any(NAMES.search(word) for word in words_of(path))
    }
    assert found == set(KNOWERS)


class TestPrograms:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_by_name(self, machine, name):
        machine("x86_64")
        its = ARCHITECTURES[name]
        assert qemu.program(its) == f"qemu-system-{its.qemu}"

    @pytest.mark.parametrize(
        ("here", "counts"),
        [
            ("x86_64", {"x86_64", "i686"}),
            ("aarch64", {"aarch64", "armv7l"}),
            ("sparc64", set()),
        ],
    )
    def test_the_variable_counts_for_this_machine(self, machine, monkeypatch, here, counts):
        """One program cannot emulate them all."""
        machine(here)
        monkeypatch.setenv("VMSANDBOX_QEMU", "/mine")
        found = {name for name, one in ARCHITECTURES.items() if qemu.program(one) == "/mine"}
        assert found == counts

    def test_a_variable_for_each(self, machine, monkeypatch):
        machine("x86_64")
        monkeypatch.setenv("VMSANDBOX_QEMU", "/common")
        monkeypatch.setenv("VMSANDBOX_QEMU_S390X", "/large")
        monkeypatch.setenv("VMSANDBOX_QEMU_I386", "/small")
        assert qemu.program(ARCHITECTURES["s390x"]) == "/large"
        assert qemu.program(ARCHITECTURES["i686"]) == "/small"
        assert qemu.program(ARCHITECTURES["x86_64"]) == "/common"
        assert qemu.program(ARCHITECTURES["aarch64"]) == "qemu-system-aarch64"

    def test_a_missing_one_of_this_machine(self, machine, monkeypatch):
        machine("x86_64")
        monkeypatch.setattr(shutil, "which", lambda _: None)
        monkeypatch.setattr(programs, "find", lambda it: it if it == "apt-get" else None)
        with pytest.raises(LaunchError, match="guests of amd64 need") as raised:
            find_qemu("x86_64")
        assert "'vmsandbox quickstart'" in raised.value.remedy
        assert "apt-get install qemu-system-x86 qemu-utils" in raised.value.remedy


class TestRemedies:
    """One line with the package to install, on any system."""

    @pytest.mark.parametrize(
        ("manager", "name", "line"),
        [
            ("apt-get", "aarch64", "apt-get install qemu-system-arm"),
            ("apt-get", "s390x", "apt-get install qemu-system-misc"),
            (
                "dnf",
                "aarch64",
                "sudo dnf install qemu-system-aarch64-core qemu-device-display-virtio-gpu-pci",
            ),
            (
                "pacman",
                "riscv64",
                "sudo pacman -S qemu-system-riscv qemu-hw-display-virtio-gpu-pci",
            ),
            ("zypper", "riscv64", "sudo zypper install qemu-extra qemu-hw-display-virtio-gpu-pci"),
            ("brew", "ppc64le", "brew install qemu"),
            ("", "armv7l", "install what these packages of Debian contain: qemu-system-arm"),
        ],
    )
    def test_the_emulator(self, machine, monkeypatch, manager, name, line):
        machine("x86_64")
        monkeypatch.setattr(programs, "find", lambda it: it if it == manager else None)
        monkeypatch.setattr(programs, "_system", lambda: "debian")
        monkeypatch.setattr(shutil, "which", lambda _: None)
        with pytest.raises(LaunchError) as raised:
            find_qemu(name)
        assert raised.value.remedy.removeprefix("install it: ").removeprefix("sudo ") == (
            line.removeprefix("sudo ")
        )

    def test_ubuntu_has_another_package(self, monkeypatch):
        monkeypatch.setattr(programs, "find", lambda it: it if it == "apt-get" else None)
        monkeypatch.setattr(programs, "_system", lambda: "ubuntu")
        line = programs.emulator_line(ARCHITECTURES["s390x"])
        assert line.endswith("install qemu-system-s390x")

    @pytest.mark.parametrize("manager", ["dnf", "pacman", "zypper", "brew"])
    def test_an_arm64_host_faked_installs_its_own(self, machine, monkeypatch, manager):
        machine("aarch64")
        monkeypatch.setattr(programs, "find", lambda it: it if it == manager else None)
        line = programs.install_line(["cpio"])
        assert f" {ARCHITECTURES['aarch64'].elsewhere[manager]}" in line
        assert "x86" not in line

    @pytest.mark.parametrize(
        ("name", "package"),
        [("riscv64", "opensbi"), ("ppc64le", "qemu-system-data"), ("s390x", "qemu-system-data")],
    )
    def test_the_firmware(self, machine, monkeypatch, tmp_path, name, package):
        machine("x86_64")
        its, data = ARCHITECTURES[name], tmp_path / "data"
        program = tmp_path / f"qemu-system-{its.qemu}"
        program.write_text(
            f'#!/bin/sh\n[ "$1" = -L ] && echo /nowhere && echo {data} || echo "QEMU emulator version 9.2.1"\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(programs, "find", lambda it: it if it == "apt-get" else None)
        with pytest.raises(LaunchError, match=f"lacks its firmware {its.firmware}") as raised:
            find_qemu(name)
        assert raised.value.remedy.endswith(f"apt-get install {package}")
        data.mkdir()
        (data / its.firmware).touch()
        assert find_qemu(name).version == (9, 2, 1)


class TestAccelerators:
    def choose(self, wanted, name):
        trial = Trial(architecture=ARCHITECTURES[name])
        return accelerator.choose(
            wanted, QEMU, trial, cache=Path("none"), hypervisor=lambda: pytest.fail("a proof")
        )

    @pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {"x86_64", "i686"}))
    def test_foreign_guests_are_emulated_without_a_word(self, machine, monkeypatch, name):
        machine("x86_64")
        monkeypatch.setattr(host, "kvm_problem", lambda: pytest.fail("nobody needs to know"))
        verdict = self.choose("auto", name)
        assert (verdict.accelerator, verdict.reason) == (
            "tcg",
            f"guests of {ARCHITECTURES[name].debian}",
        )
        assert verdict.processor == ARCHITECTURES[name].emulated[(0,)]
        assert verdict.time_scale == accelerator.EMULATION_SCALE * ARCHITECTURES[name].slowness
        assert verdict.time_scale > accelerator.EMULATION_SCALE

    def test_kvm_for_foreign_guests(self, machine, monkeypatch):
        machine("x86_64")
        monkeypatch.setattr(host, "kvm_problem", lambda: "")
        with pytest.raises(LaunchError, match=r"for guests of arm64: this machine is amd64"):
            self.choose("kvm", "aarch64")

    @pytest.mark.parametrize(
        ("here", "name"), [("x86_64", "x86_64"), ("x86_64", "i686"), ("aarch64", "aarch64")]
    )
    def test_kvm_for_guests_of_this_machine(self, machine, monkeypatch, here, name):
        machine(here)
        monkeypatch.setattr(host, "kvm_problem", lambda: "there is no KVM")
        with pytest.raises(LaunchError, match="kvm cannot be used: there is no KVM"):
            self.choose("kvm", name)
        assert self.choose("auto", name).reason == "there is no KVM"


def test_a_machine_that_we_do_not_know(machine):
    """It has no guests of its own, but emulates all others."""
    machine("loongarch64")
    with pytest.raises(LaunchError, match="there are no guests of loongarch64") as raised:
        find_qemu(native_architecture())
    assert "riscv64" in raised.value.remedy
    assert all(accelerator.is_foreign(one) for one in ARCHITECTURES.values())


class TestFakedHost:
    """A faked arm64 host: only the name of this machine's processor is another one."""

    def test_its_own_guests(self, machine, monkeypatch):
        machine("arm64")  # as macOS says it
        assert native_architecture() == "aarch64"
        monkeypatch.setenv("VMSANDBOX_QEMU", "/mine")
        assert qemu.program(ARCHITECTURES["aarch64"]) == "/mine"
        assert not accelerator.is_foreign(ARCHITECTURES["aarch64"])
        assert accelerator.is_foreign(ARCHITECTURES["x86_64"])
