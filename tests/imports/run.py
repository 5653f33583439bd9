"""Import our own Debian disk in each format, boot it, seal it, clone it, and print what each step took.

    python tests/imports/run.py [--only FORMAT]... [--again] [--work DIR] [--minutes N]

The disk of the image debian-13, which must be built, is converted to each format by qemu-img, and packed into an
OVA and boxes of three kinds. `vmsandbox images import` makes an image of it with the kernel and the initial RAM
disk of debian-13, booted directly, so the helper in it works and guests are cloned. For each format:

- its files are converted back, and the disk that comes out is compared with the one that went in;
- two tests run on it by pytest: each asks its guest for its release, and the second must not see the first
  one's file; `--vm-artifacts` says whether they were clones;
- `vmsandbox images rm` removes it, and nothing may be left.

The folder --work holds the files, a log of each step, and `results.json`. A format that has passed is not tried
again unless --again says so, so a run that was ended goes on where it was. Exit status 0 if all have passed.
Plan 10 minutes on a quiet machine with KVM, and up to an hour where guests are emulated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pytest_vmsandbox.cache.integrity import chunks
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.importing import headers
from pytest_vmsandbox.catalogue.importing.archives import pack
from pytest_vmsandbox.catalogue.importing.convert import convert
from pytest_vmsandbox.catalogue.importing.source import opened
from pytest_vmsandbox.catalogue.importing.unpacking import unpacked_disk
from pytest_vmsandbox.catalogue.store import BuiltImage, ImageStore
from pytest_vmsandbox.core.paths import cache_dir
from support import disks

BASE = "debian-13"
TESTS = """
def test_it_answers(vm):
    assert "trixie" in vm.read_text("/etc/os-release")
    vm.write_text("/root/note", "only here")

def test_the_next_one_is_fresh(vm):
    assert vm.run(["test", "-e", "/root/note"], check=False).returncode == 1
    print("origin:", vm.origin)
"""
VMX = 'scsi0:0.present = "TRUE"\nscsi0:0.fileName = "disk.vmdk"\nfirmware = "bios"\n'
LIBVIRT = {"provider": "libvirt", "format": "qcow2", "virtual_size": 8}


def converted(image: BuiltImage, folder: Path, kind: str, *options: str) -> list[Path]:
    """The disk of an image in another format: its files."""
    target = folder / f"disk.{kind}"
    argv = ["qemu-img", "convert", "-f", "raw", "-O", kind, *options, str(image.disk), str(target)]
    subprocess.run(argv, check=True)
    return sorted(folder.iterdir(), key=lambda path: path != target)


def packed(folder: Path, name: str, texts: dict[str, bytes], files: list[Path]) -> list[Path]:
    """An archive with some texts and files."""
    for text, data in texts.items():
        (folder / text).write_bytes(data)
    with ExitStack() as stack:
        members = [
            stack.enter_context(opened(path))
            for path in (*(folder / text for text in texts), *files)
        ]
        pack(members, folder / name)
    for path in files:
        path.unlink()
    return [folder / name]


def ova(image: BuiltImage, folder: Path) -> list[Path]:
    """An OVA."""
    files = converted(image, folder, "vmdk", "-o", "subformat=streamOptimized")
    return packed(folder, "a.ova", {"a.ovf": disks.ovf("disk.vmdk")}, files)


def box(image: BuiltImage, folder: Path, provider: str) -> list[Path]:
    """A box of Vagrant."""
    metadata = {"metadata.json": json.dumps({"provider": provider}).encode()}
    if provider == "libvirt":
        (file,) = converted(image, folder, "qcow2")
        disk = file.rename(folder / "box.img")
        return packed(folder, "a.box", {"metadata.json": json.dumps(LIBVIRT).encode()}, [disk])
    if provider == "virtualbox":
        files = converted(image, folder, "vmdk", "-o", "subformat=streamOptimized")
        return packed(folder, "a.box", metadata | {"box.ovf": disks.ovf("disk.vmdk")}, files)
    files = converted(image, folder, "vmdk", "-o", "subformat=twoGbMaxExtentSparse")
    return packed(folder, "a.box", metadata | {"a.vmx": VMX.encode()}, files)


def _options(kind: str, *options: str) -> Callable[[BuiltImage, Path], list[Path]]:
    return lambda image, folder: converted(image, folder, kind, *options)


FORMATS: dict[str, Callable[[BuiltImage, Path], list[Path]]] = {
    "qcow2": _options("qcow2"),
    "qcow2-compressed": _options("qcow2", "-c"),
    "raw": _options("raw"),
    "vmdk-sparse": _options("vmdk", "-o", "subformat=monolithicSparse"),
    "vmdk-stream": _options("vmdk", "-o", "subformat=streamOptimized"),
    "vmdk-flat": _options("vmdk", "-o", "subformat=monolithicFlat"),
    "vmdk-split": _options("vmdk", "-o", "subformat=twoGbMaxExtentSparse"),
    "vdi": _options("vdi"),
    "vhdx": _options("vhdx"),
    "vhd": _options("vpc"),
    "ova": ova,
    "box-libvirt": lambda image, folder: box(image, folder, "libvirt"),
    "box-virtualbox": lambda image, folder: box(image, folder, "virtualbox"),
    "box-vmware": lambda image, folder: box(image, folder, "vmware_desktop"),
}


class Failed(Exception):
    """A step did not do what it should."""


def main() -> int:
    """Try the formats, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=FORMATS, metavar="FORMAT", help="repeatable"
    )
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--work", type=Path, default=cache_dir() / "imports", metavar="DIR")
    parser.add_argument(
        "--minutes", type=float, default=300.0, help="begin no format after that time"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "results.json"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    image = ImageStore(cache_dir()).require(Catalogue().get(BASE))
    end = time.monotonic() + args.minutes * 60
    for name in args.only or FORMATS:
        if (results.get(name, {}).get("passed") and not args.again) or time.monotonic() > end:
            continue
        print(f"{name} …", flush=True)
        results[name] = attempt(name, image, args.work)
        kept.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_table(results)
    return 0 if all(results.get(name, {}).get("passed") for name in FORMATS) else 1


def attempt(name: str, image: BuiltImage, work: Path) -> dict[str, object]:
    """Try a format. Returns what each step took, in seconds."""
    folder, log = work / name, work / f"{name}.log"
    log.unlink(missing_ok=True)
    if (cache_dir() / "imported" / f"import-{name}").exists():  # a run was ended
        command(log, "images", "rm", f"import-{name}")
    seconds: dict[str, object] = {"passed": False}
    for left in (folder, work / f"{name}-tests", work / f"{name}-back"):
        shutil.rmtree(left, ignore_errors=True)
    for new in (folder, work / f"{name}-tests"):
        new.mkdir()
    try:
        began = time.monotonic()
        files = FORMATS[name](image, folder)
        seconds["file_mib"] = round(sum(path.stat().st_blocks for path in files) / 2048)
        seconds["made"] = round(time.monotonic() - began, 1)
        steps(name, image, files, work, log, seconds)
        seconds["passed"] = True
    except Failed as error:
        seconds["error"] = str(error)
    finally:
        command(log, "images", "rm", f"import-{name}")
        shutil.rmtree(folder)
    return seconds


def steps(
    name: str,
    image: BuiltImage,
    files: list[Path],
    work: Path,
    log: Path,
    seconds: dict[str, object],
) -> None:
    """Import, compare, test."""
    kind = ["--format", name.partition("-")[0]] if name.startswith(("box", "ova")) else []
    imported = f"import-{name}"
    argv = [
        *("images", "import", imported, *map(str, files), *kind, "--login=key"),
        *(
            f"--kernel={image.kernel}",
            f"--initrd={image.initrd}",
            f"--append={image.definition.append}",
        ),
    ]
    seconds["converted"] = convert_back(image, files, work / f"{name}-back")
    seconds["import"] = expect(log, *argv)
    seconds["first_boot"] = "first time" in log.read_text(encoding="utf-8")
    tests = work / f"{name}-tests"
    (tests / "test_it.py").write_text(TESTS, encoding="utf-8")
    (tests / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    pytest = [sys.executable, "-m", "pytest", "-q", "-rP", f"--vm={imported}", str(tests)]
    seconds["first_run"] = run(log, pytest)
    seconds["second_run"] = run(log, pytest)
    said = log.read_text(encoding="utf-8")
    seconds["origin"] = said.rpartition("origin:")[2].split()[0] if "origin:" in said else ""


def convert_back(image: BuiltImage, files: list[Path], folder: Path) -> float:
    """Convert the files as an import does, and compare the disk, whose end may be rounded up. Returns the seconds.

    Raises:
        Failed: it is another disk.
    """
    began = time.monotonic()
    folder.mkdir()
    out = folder / "disk.raw"
    with ExitStack() as stack:
        there = {path.name: stack.enter_context(opened(path)) for path in files}
        first = there[files[0].name]
        if len(there) > 1:
            disk = headers.check(first, "vmdk", there)
        else:
            disk = stack.enter_context(unpacked_disk(first, "", folder, lambda _: None)).disk
        convert(disk, out, folder)
    took = round(time.monotonic() - began, 1)
    assert image.disk is not None
    if content(out) != content(image.disk):
        raise Failed("what came out is another disk")
    shutil.rmtree(folder)
    return took


def content(path: Path) -> str:
    """A digest of what is not zero in a file, and of its places."""
    total = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for start, data in chunks(file):
            total.update(b"%d\n" % start)
            total.update(data)
    return total.hexdigest()


def expect(log: Path, *arguments: str) -> float:
    """Run our command, which must succeed. Returns its seconds."""
    began = time.monotonic()
    if command(log, *arguments) != 0:
        raise Failed(f"{' '.join(arguments[:2])} failed: see {log}")
    return round(time.monotonic() - began, 1)


def command(log: Path, *arguments: str) -> int:
    """Run our command. Returns its status."""
    return status(log, [sys.executable, "-m", "pytest_vmsandbox", *arguments])


def run(log: Path, argv: list[str]) -> float:
    """Run pytest, which must pass. Returns its seconds."""
    began = time.monotonic()
    if status(log, argv) != 0:
        raise Failed(f"its tests failed: see {log}")
    return round(time.monotonic() - began, 1)


def status(log: Path, argv: list[str]) -> int:
    """Run a program with its output in a log."""
    with log.open("ab") as out:
        out.write(f"$ {' '.join(argv)}\n".encode())
        out.flush()
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ}, check=False
        )
    return done.returncode


def print_table(results: dict[str, dict[str, object]]) -> None:
    """Print what each format took."""
    columns = ("file_mib", "made", "converted", "import", "first_run", "second_run", "origin")
    print(f"| format | {' | '.join(columns)} | passed |")
    print(f"| --- |{' --- |' * (len(columns) + 1)}")
    for name in FORMATS:
        found = results.get(name, {})
        values = " | ".join(str(found.get(column, "")) for column in columns)
        print(
            f"| {name} | {values} | {found.get('error') or ('yes' if found.get('passed') else 'no')} |"
        )


if __name__ == "__main__":
    sys.exit(main())
