"""A disk from elsewhere is the disk of a guest: a box for VMware goes in, and the guest reads its bytes."""

import hashlib
import os
import shutil
import subprocess
import sys

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.factory import GuestFactory
from support import disks


def test_a_box_becomes_the_disk_of_a_guest(tmp_path):
    """The system in the guest is `tiny`, which lives in memory and leaves the disk alone."""
    tiny = ImageStore(cache_dir()).require(Catalogue().get("tiny"))
    cache, file = tmp_path / "cache", tmp_path / "a.box"
    file.write_bytes(disks.tar(disks.box("vmware_desktop"), "w:gz"))
    cache.mkdir(mode=0o700)
    (cache_dir() / "accelerator").mkdir(parents=True, exist_ok=True, mode=0o700)
    (cache / "accelerator").symlink_to(cache_dir() / "accelerator")
    environment = {**os.environ, "VMSANDBOX_CACHE": str(cache), "TMPDIR": str(tmp_path)}

    def images(*arguments):
        argv = [sys.executable, "-m", "pytest_vmsandbox", "images", *map(str, arguments)]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    kernel = (f"--kernel={tiny.kernel}", f"--initrd={tiny.initrd}", "--login=key")
    append = f"--append={tiny.definition.append}"
    said = images("import", "boxed", file, *kernel, append, "--python=no", "--init=busybox")
    assert "format: box" in said
    assert "booting it for the first time" in said
    settings = Settings(cache=cache, clones="never")
    with GuestFactory.open(settings) as factory, factory.boot("boxed") as vm:
        found = vm.run(["sha256sum", "/dev/vda"]).stdout.split()[0]
    assert found == hashlib.sha256(disks.content()).hexdigest()
    images("rm", "boxed")
    left = {path.name for path in cache.iterdir()}
    assert left == {"accelerator", "images", "imported"}
    assert list((cache / "imported").iterdir()) == []
    shutil.rmtree(cache / "images")
