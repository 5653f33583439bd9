"""Guests of another architecture: their image is made here, and they are booted, saved and cloned."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.architecture import ARCHITECTURES, native_architecture
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.images.maker import make_image

FOREIGN = next(name for name in ("aarch64", "x86_64") if name != native_architecture())
IMAGE = f"tiny_{ARCHITECTURES[FOREIGN].debian}"


@pytest.fixture
def cache(tmp_path):
    """A cache without that image. Helpers that are made already are used."""
    shared, cache = cache_dir(), tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for kind in ("helpers", "accelerator"):
        (shared / kind).mkdir(parents=True, exist_ok=True, mode=0o700)
    (cache / "accelerator").symlink_to(shared / "accelerator")
    shutil.copytree(shared / "helpers", cache / "helpers")
    return cache


@pytest.mark.skipif(
    shutil.which(f"qemu-system-{ARCHITECTURES[FOREIGN].qemu}") is None,
    reason=f"needs the package {ARCHITECTURES[FOREIGN].package}",
)
def test_an_image_is_made_and_its_guests_are_cloned(cache, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    settings = Settings(cache=cache, clones="demand")
    definition = Catalogue().get(IMAGE)
    image = make_image(definition, settings, progress=print)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert ImageStore(cache).require(definition).folder == image.folder
    with GuestFactory.open(settings) as factory:
        seen = []
        for _ in range(2):
            with factory.boot(IMAGE) as vm:
                assert vm.engine.origin == "cloned"
                assert vm.run(["uname", "-m"]).stdout == f"{FOREIGN}\n"
                assert vm.run(["cat", "/only-here"], check=False).returncode == 1
                vm.write_text("/only-here", "x")
                seen.append(vm.run(["head", "-c", "8", "/dev/urandom"], text=False).stdout)
        assert seen[0] != seen[1]
        with factory.boot(IMAGE) as vm:
            # The lists of modules, the host key and the libraries of the server were made or found here.
            vm.run(["modprobe", "overlay"])
            argv = [*shlex.split(vm.ssh_command), "grep", "-c", "^overlay ", "/proc/modules"]
            assert subprocess.run(argv, capture_output=True, check=True).stdout == b"1\n"
