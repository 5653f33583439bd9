"""Guests on another kernel than the image's own: Debian 13 on the kernel of Debian 12, with its modules."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.kernels import read_release
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.images.maker import make_image

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


RESCUE = """
schema = 1
description = "A kernel and an initial RAM disk"
architecture = "x86_64"

[source]
kernel = "bzImage"
kernel_sha256 = "{kernel}"
initrd = "initramfs"
initrd_sha256 = "{initrd}"

[boot]
append = "console=ttyS0 loglevel=5"
memory_min = "128MiB"

[login]
method = "none"
ready = "^vmsandbox: ssh$"

[system]
python = false
init = "busybox"
user = "root"
"""


def test_a_system_without_a_disk_and_without_a_login(tmp_path):
    """The kernel and the initial RAM disk of tiny, driven by the console alone."""
    tiny = ImageStore(cache_dir()).require(Catalogue().get("tiny"))
    (folder := tmp_path / "images/rescue").mkdir(parents=True)
    digests = {}
    for name, file, source in (
        ("kernel", "bzImage", tiny.kernel),
        ("initrd", "initramfs", tiny.initrd),
    ):
        assert source
        shutil.copyfile(source, folder / file)
        digests[name] = hashlib.sha256(source.read_bytes()).hexdigest()
    (folder / "image.toml").write_text(RESCUE.format(**digests))
    settings = Settings(image_path=(tmp_path / "images",), cache=tmp_path / "cache")
    definition = Catalogue(settings.image_path).get("rescue")
    make_image(definition, settings, progress=lambda _: None)
    with GuestFactory.open(settings) as factory, factory.boot("rescue", memory="256MiB") as vm:
        assert "vmsandbox: ssh" in vm.console.text
        assert vm.origin == "booted"  # nobody could tell a clone the time
        with pytest.raises(ConfigError, match="there is no way into rescue"):
            _ = vm.ssh
        assert vm.qmp("query-status")["running"]
        vm.power_cut()
        assert not vm.alive
