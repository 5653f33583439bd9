"""Guests on another kernel than the image's own: Debian 13 on the kernel of Debian 12, with its modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.kernels import read_release
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.paths import cache_dir

SUITE = """
import platform

import pytest


def test_from_outside(vm, pytestconfig):
    release = vm.run(["uname", "-r"]).stdout.strip()
    assert release.startswith("6.1.")
    assert vm.origin in ("armed", "cloned")
    assert vm.run(["lsmod"]).stdout.find("xfs") < 0
    vm.run(["modprobe", "xfs"])  # which has to load libcrc32c first
    vm.run(["modinfo", "dummy"])
    assert "xfs" in vm.read_text("/proc/filesystems")
    assert vm.run(["lsmod"]).stdout.find("pvpanic") > 0


@pytest.mark.in_vm
def test_inside():
    assert platform.release().startswith("6.1.")
"""


@pytest.fixture
def other_kernel(tmp_path) -> Path:
    """The kernel of Debian 12, in a folder like an unpacked package."""
    built = ImageStore(cache_dir()).require(Catalogue().get("debian-12"))
    (folder := tmp_path / "kernel").joinpath("boot").mkdir(parents=True)
    assert built.kernel
    release = read_release(built.kernel)
    (folder / f"boot/vmlinuz-{release}").symlink_to(built.kernel)
    (folder / "lib").mkdir()
    debugfs, disk = programs.find("debugfs"), built.disk
    assert debugfs
    assert disk
    request = f"rdump /usr/lib/modules {folder / 'lib'}"
    subprocess.run([debugfs, "-R", request, disk], check=True, capture_output=True)
    return folder


def test_another_kernel(tmp_path, other_kernel):
    (suite := tmp_path / "suite").mkdir()
    (suite / "test_it.py").write_text(SUITE)
    argv = [sys.executable, "-P", "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--vm=debian-13"]
    done = subprocess.run(
        [*argv, f"--vm-kernel={other_kernel}"],
        cwd=suite,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    release = next((other_kernel / "lib/modules").iterdir()).name
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("test_from_outside", "test_inside"):
        assert f"PASSED test_it.py::{name}[debian-13+{release}]" in done.stdout
