"""Make images in guests of Debian, and use them: what takes too long for each run of the tests.

    python tests/acceptance/made_images.py --work /var/tmp/made-images

    derived     packages, a script, a user and a larger disk on top of debian-13
    vagrant     a disk as vendors lay it out, with a boot loader for UEFI and Vagrant's insecure key
    bios        the same disk, booted by BIOS
    password    a disk without our helper, and a password
    cloud-init  a disk with cloud-init

Each image is made by `vmsandbox images build`. Then a suite uses it: a test inside, a power cut, a reboot, and
a larger disk. It goes on after what an earlier call with the same folder has passed. Plan half an hour where guests
are emulated. It needs debian-13, an archive of Debian, and the programs of `support/vendor_disk.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageStore
from pytest_vmsandbox.core.paths import cache_dir
from support.vendor_disk import Debian

COMMAND = "from pytest_vmsandbox.cli import main; main()"
INSECURE = (
    "ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzI"
    "w+niNltGEFHzD8+v1I2YJ6oXevct1YeS0o9HZyN1Q9qgCgzUFtdOKLv6IedplqoPkcmF0aYet2PkEDo3MlTBckFXPITAMzF8"
    "dJSIFo9D8HfdOV0IAdx4O7PtixWKn5y2hMNG0zQPyUecp4pzC6kivAIhyfHilFR61RGL+GPXQ2MWZWFYbAGjyiYJnAmCP3NO"
    "Td0jMZEnDkbUvxhMmBYSdETk1rRgm+R4LOzFUGaHqHDLKLX+FIPKcF96hrucXzcWyLbIbEgE98OHlnVYCzRdK8jlqm8tehUc"
    "9c9WhQ== vagrant insecure public key"
)
SUITE = """
import subprocess
import pytest


def test_power(vm):
    assert vm.run(["hostname"]).stdout == vm.name + "\\n"
    vm.write_text("/root/x", "x")
    vm.run(["sync"], user="root")
    vm.power_cut()
    vm.power_on()
    assert vm.read_text("/root/x") == "x"
    vm.reboot()
    assert vm.run(["hostname"]).stdout == vm.name + "\\n"
    keys = vm.shell("cat /root/.ssh/authorized_keys 2>/dev/null || :", user="root").stdout
    assert "insecure" not in keys


@pytest.mark.vm(disk="12GiB")
def test_disk(vm):
    blocks = vm.run(["df", "-k", "--output=size", "/"]).stdout.split()[-1]
    assert int(blocks) > 11 << 20


@pytest.mark.in_vm
def test_inside(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
"""
FROM_DEBIAN = """schema = 1
description = "On top of Debian"
from = "debian-13"
[add]
script = "setup.sh"
packages = {packages}
"""
SOURCE = """schema = 1
description = "From elsewhere"
architecture = "x86_64"
[source]
url = "disk.raw"
format = "raw"
sha256 = "{sha256}"
{kernel}
[boot]
{boot}
[disk]
size = "10GiB"
[system]
python = true
init = "systemd"
[login]
{login}
"""
DIRECT = 'append = "root=/dev/vda rw console=ttyS0 mitigations=off net.ifnames=0"'
# What a vendor's disk does not have, and what it has.
NOT_OURS = """
rm -f /etc/ssh/sshd_config.d/vmsandbox.conf /etc/systemd/system/vmsandbox-helper.service
rm -f /etc/systemd/system/sysinit.target.wants/vmsandbox-helper.service
usermod -p '!' root
printf 'UsePAM yes\\nPermitRootLogin no\\n' >/etc/ssh/sshd_config.d/vendor.conf
"""
PI = """
useradd --create-home --shell /bin/bash pi
echo pi:raspberry | chpasswd
echo 'pi ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/pi
"""


class World:
    """A folder with definitions, and what has passed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        self._passed = folder / "passed"
        self._passed.touch()

    def passed(self, name: str) -> bool:
        return name in self._passed.read_text().split()

    def note(self, name: str) -> None:
        with self._passed.open("a") as file:
            file.write(f"{name}\n")

    def write(self, name: str, **files: str) -> Path:
        """Write the files of a definition; `toml` and `script` stand for their names."""
        folder = self.images / name
        folder.mkdir(exist_ok=True)
        for file, text in files.items():
            (folder / {"toml": "image.toml", "script": "setup.sh"}[file]).write_text(text)
        return folder

    def build(self, name: str) -> BuiltImage:
        """Make an image, unless it is made."""
        where = ["--image-path", str(self.images)]
        subprocess.run([sys.executable, "-c", COMMAND, "images", "build", name, *where], check=True)
        return self.image(name)

    def image(self, name: str) -> BuiltImage:
        return ImageStore(cache_dir()).require(Catalogue([self.images]).get(name))

    def use(self, name: str) -> None:
        """Run the suite on an image."""
        suite = self.folder / name
        suite.mkdir(exist_ok=True)
        (suite / "test_suite.py").write_text(SUITE)
        (suite / "pytest.ini").write_text(f"[pytest]\nvm_image_path = {self.images}\n")
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--vm={name}"]
        subprocess.run(argv, cwd=suite, check=True)

    def source(
        self, name: str, disk: Path, *, login: str, boot: str, kernel: BuiltImage | None
    ) -> None:
        """A definition of an image from a disk, and perhaps the kernel of an image."""
        folder = self.images / name
        folder.mkdir(exist_ok=True)
        target = folder / "disk.raw"
        if not target.exists():
            subprocess.run(["cp", "--sparse=always", disk, target], check=True)
        lines = []
        if kernel is not None:
            for key, file in (("kernel", kernel.kernel), ("initrd", kernel.initrd)):
                assert file is not None
                shutil.copyfile(file, folder / key)
                lines += [f'{key} = "{key}"', f'{key}_sha256 = "{sha256(file)}"']
        text = SOURCE.format(sha256=sha256(target), kernel="\n".join(lines), boot=boot, login=login)
        self.write(name, toml=text)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def derived(world: World) -> None:
    text = FROM_DEBIAN.format(packages='["hello"]')
    text += '[disk]\nsize = "9GiB"\n[system]\nuser = "root"\n'
    world.write("derived", toml=text, script="hello >/etc/greeting\n")
    world.build("derived")


def from_vendor(world: World, name: str, firmware: str) -> None:
    """A disk with a boot loader, whose root has Vagrant's key."""
    disk = world.folder / "vendor.raw"
    if not disk.exists():
        built = ImageStore(cache_dir()).require(Catalogue().get("debian-13"))
        new = disk.with_suffix(".new")
        Debian(built=built, keys={"root": [INSECURE]}).write(new, world.folder)
        new.rename(disk)
    login = 'method = "vagrant"\nuser = "root"'
    world.source(name, disk, login=login, boot=f'firmware = "{firmware}"', kernel=None)
    world.build(name)


def by_password(world: World) -> None:
    text = FROM_DEBIAN.format(packages='["sudo"]')
    world.write("password-disk", toml=text, script=f"set -e\n{NOT_OURS}{PI}")
    made = world.build("password-disk")
    assert made.disk is not None
    login = 'method = "password"\nuser = "pi"\npassword = "raspberry"'
    world.source("password", made.disk, login=login, boot=DIRECT, kernel=made)
    world.build("password")


def by_cloud_init(world: World) -> None:
    text = FROM_DEBIAN.format(packages='["sudo", "cloud-init"]')
    world.write("cloud-disk", toml=text, script=f"set -e\n{NOT_OURS}rm -rf /var/lib/cloud\n")
    made = world.build("cloud-disk")
    assert made.disk is not None
    login = 'method = "cloud-init"\nuser = "debian"'
    world.source("cloud-init", made.disk, login=login, boot=DIRECT, kernel=made)
    world.build("cloud-init")


STEPS: dict[str, Callable[[World], None]] = {
    "derived": derived,
    "vagrant": lambda world: from_vendor(world, "vagrant", "uefi"),
    "bios": lambda world: from_vendor(world, "bios", "bios"),
    "password": by_password,
    "cloud-init": by_cloud_init,
}


def main() -> int:
    """Run the steps; 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, required=True, help="the folder to go on in")
    parser.add_argument("--only", action="append", choices=list(STEPS), help="a step")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    world, failed = World(args.work.absolute()), []
    for name in args.only or STEPS:
        if world.passed(name):
            continue
        print(f"== {name}", flush=True)
        try:
            STEPS[name](world)
            world.use(name)
            world.note(name)
        except subprocess.CalledProcessError as error:
            print(f"{name} failed: {error}", flush=True)
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
