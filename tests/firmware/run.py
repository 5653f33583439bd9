"""Boots Debian from a disk as vendors lay it out, by each firmware, and measures it.

    python tests/firmware/run.py [--folder FOLDER] [STEP…]

It is not part of CI: where guests are emulated, a step takes minutes. Each step's result is kept in the
folder, so a run that was ended goes on. With another QEMU:

    python tests/second_qemu/run.py python tests/firmware/run.py --folder other

It needs the packages ovmf, swtpm, shim-signed, grub-efi-amd64-signed, grub-pc-bin, gdisk, dosfstools and
mtools of Debian, and the built image debian-13.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageStore
from pytest_vmsandbox.core.deadline import monotonic
from pytest_vmsandbox.core.errors import BootError
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Clones, Settings
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.machine.qemu import find_qemu
from support import vendor_disk

Result = dict[str, object]
MEMORY = "768MiB"
VARIABLE = "/sys/firmware/efi/efivars/Test-4dd1a1d1-2f3c-4c1f-9d51-0f6b7a3c9e21"
# The endorsement key, which a TPM makes from its seed.
SEED = r"""
import os
command = bytes.fromhex(
    "80020000004300000131" "4000000b" "0000000940000009" "0000000000" "000400000000"
    "001a" "0023000b000300720000" "000600800043" "0010" "0003" "0010" "0000" "0000" "0000" "00000000"
)
fd = os.open("/dev/tpmrm0", os.O_RDWR)
os.write(fd, command)
answer = os.read(fd, 4096)
assert answer[6:10] == bytes(4), answer.hex()
print(answer[14:].hex())
"""


class Lab:
    """A folder with a cache of its own, and what was found so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images, self.cache = folder / "images", folder / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        self.base: BuiltImage = ImageStore(cache_dir()).require(Catalogue().get("debian-13"))
        key = folder / "key"
        if not key.exists():
            KeyPair.generate().save(key)
        self.key = KeyPair.of(key.read_text())

    def image(
        self, name: str, *, more: str = "", signed: bool = False, damaged: bool = False
    ) -> str:
        """Make an image, unless it is there."""
        if ImageStore(self.cache).folders_of(name):
            return name
        print(f"  making the disk of {name}", flush=True)
        debian = vendor_disk.Debian(built=self.base, keys={"root": [self.key.public]})
        if signed:
            search = f"search --no-floppy --label --set=root {vendor_disk.LABEL}\n"
            chain = vendor_disk.signed_chain(search + debian.menu("/boot"))
            debian = vendor_disk.Debian(built=self.base, keys=debian.keys, efi=chain)
        disk = self.folder / "disk"
        debian.write(disk, self.folder)
        if damaged:
            assert self.base.kernel is not None
            _damage(disk, self.base.kernel.read_bytes())
        size = f"{disk.stat().st_size // 1024**2}MiB"
        definition = vendor_disk.define(self.images / name, init="systemd", size=size, more=more)
        vendor_disk.image(definition, self.cache, self.base, self.key, disk)
        disk.unlink()
        return name

    def factory(self, clones: Clones) -> AbstractContextManager[GuestFactory]:
        """Makes guests."""
        return GuestFactory.open(
            Settings(
                hardware=Hardware().changed({"memory": MEMORY}),
                cache=self.cache,
                image_path=(self.images,),
                clones=clones,
                boot_timeout=600.0,
            )
        )

    @contextmanager
    def booted(self, image: str, **hardware: object) -> Iterator[tuple[Guest, float]]:
        """A guest that was booted, and the seconds until it answered on SSH."""
        with self.factory("never") as factory:
            factory.backend.accelerator(image)
            start = monotonic()
            with factory.boot(image, **hardware) as vm:
                yield vm, round(monotonic() - start, 1)


def _damage(disk: Path, kernel: bytes) -> None:
    """Change a byte in the middle of the kernel's file."""
    middle = kernel[len(kernel) // 2 :][:4096]
    content = disk.read_bytes()
    place = content.index(middle)
    with disk.open("r+b") as file:
        file.seek(place)
        file.write(bytes([middle[0] ^ 1]))


def boots_and_clones(lab: Lab, image: str, **hardware: object) -> Result:
    """Seconds to SSH, to a template, and to a clone; and what is the same in two clones."""
    with lab.booted(image, **hardware) as (vm, seconds):
        found: Result = {"ssh_s": seconds}
        assert ("efi" in vm.shell("ls /sys/firmware").stdout.split()) is (
            hardware.get("firmware") != "bios"
        )
    with lab.factory("demand") as factory:
        start = monotonic()
        with factory.boot(image, **hardware) as vm:
            found["template_s"] = round(monotonic() - start, 1)
            assert vm.engine.origin == "cloned"
        start = monotonic()
        with factory.boot(image, **hardware) as vm:
            found["clone_s"] = round(monotonic() - start, 2)
            assert vm.run(["hostname"]).stdout.strip() == vm.name
    return found


def uefi(lab: Lab) -> Result:
    return boots_and_clones(lab, lab.image("plain"))


def bios(lab: Lab) -> Result:
    return boots_and_clones(lab, lab.image("plain"), firmware="bios")


def with_tpm(lab: Lab) -> Result:
    return boots_and_clones(lab, lab.image("plain"), tpm=True)


def seeds(lab: Lab) -> Result:
    """Booted guests have TPMs of their own; clones have their template's."""
    image, found = lab.image("plain"), []
    for _ in range(2):
        with lab.booted(image, tpm=True) as (vm, _):
            found.append(vm.run(["python3", "-c", SEED]).stdout)
            vm.reboot()
            assert vm.run(["python3", "-c", SEED]).stdout == found[-1]
    assert found[0] != found[1]
    with lab.factory("demand") as factory:
        cloned = set()
        for _ in range(2):
            with factory.boot(image, tpm=True) as vm:
                cloned.add(vm.run(["python3", "-c", SEED]).stdout)
    assert len(cloned) == 1
    return {"different": found[0] != found[1], "clones_equal": True}


def variables(lab: Lab) -> Result:
    """UEFI's variables survive a power cut, and are not those of another guest."""
    image = lab.image("plain")
    with lab.booted(image) as (vm, _):
        vm.shell(f"printf '\\007\\000\\000\\000hello' > {VARIABLE}")
        vm.power_cut()
        vm.power_on()
        assert vm.shell(f"tail -c 5 {VARIABLE}").stdout == "hello"
    with lab.booted(image) as (vm, _):
        assert vm.shell(f"[ ! -e {VARIABLE} ]").returncode == 0
    return {"kept": True}


def signed(lab: Lab) -> Result:
    """Secure Boot boots Debian's signed chain."""
    image = lab.image("signed", more="secure_boot = true", signed=True)
    with lab.booted(image) as (vm, seconds):
        state = vm.shell(
            "od -An -tu1 /sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
        ).stdout.split()
        assert state[-1] == "1"
        return {"ssh_s": seconds, "lockdown": vm.read_text("/sys/kernel/security/lockdown").strip()}


def unsigned(lab: Lab) -> Result:
    """Secure Boot refuses a boot loader without a signature, and a kernel that was changed."""
    return {
        "unsigned": refused(lab, lab.image("unsigned", more="secure_boot = true")),
        "changed": refused(
            lab, lab.image("changed", more="secure_boot = true", signed=True, damaged=True)
        ),
    }


def refused(lab: Lab, image: str) -> list[object]:
    """What the error says, and after how many seconds."""
    start = monotonic()
    with pytest.raises(BootError, match="Secure Boot refused") as caught, lab.booted(image):
        pass
    return [caught.value.brief, round(monotonic() - start, 1)]


STEPS: dict[str, Callable[[Lab], Result]] = {
    "uefi": uefi,
    "bios": bios,
    "tpm": with_tpm,
    "seeds": seeds,
    "variables": variables,
    "signed": signed,
    "unsigned": unsigned,
}


def main() -> int:
    """Run the steps that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=Path("firmware-results"))
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    options = parser.parse_args()
    if lacking := vendor_disk.missing_packages():
        parser.error(f"install {' '.join(lacking)}")
    folder = options.folder.absolute()
    results = folder / "results.json"
    if options.again:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        results.unlink(missing_ok=True)
    lab = Lab(folder)
    known: dict[str, Result] = json.loads(results.read_text()) if results.exists() else {}
    failed = []
    for name in options.steps or STEPS:
        if "error" not in known.get(name, {"error": ""}):
            print(f"{name}: {known[name]} (earlier)", flush=True)
            continue
        print(f"{name}: …", flush=True)
        try:
            known[name] = {
                **STEPS[name](lab),
                "qemu": find_qemu("x86_64").release,
                "load": os.getloadavg()[0],
            }
        except Exception as error:  # noqa: BLE001  # the other steps are of interest, too
            traceback.print_exc()
            known[name] = {"error": str(error).splitlines()[0]}
            failed.append(name)
        print(f"{name}: {known[name]}", flush=True)
        part = results.with_suffix(".part")
        part.write_text(json.dumps(known, indent=1))
        part.replace(results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
