"""Run tests under real KVM, in an emulated host that has it, on a machine that may have none.

    python tests/nested/run.py [--again] [--only STEP]... [--minutes N] [--work DIR]

QEMU emulates a processor with SVM. Debian 13 with its ordinary kernel boots on it, has a KVM of its
own, and runs the steps below one after the other, with what is in this checkout. Each step is some of our
tests. All of it is slow (plan 150 minutes), and none of it is part of CI.

The folder --work holds the host's disk, which is made once, and `results`: the log of each step, and its
status. A step that has passed is not run again unless --again says so, so a run that was ended (Ctrl-C is
fine) goes on where it was. Exit status 0 if all steps have passed.

Needs QEMU, the image tools, and a package index and the archive of Debian when the disk is made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uv import find_uv_bin

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.paths import cache_dir

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
IMAGES = ("tiny", "debian-13")
PYTHON, PLATFORM = "3.13", "manylinux_2_28_x86_64"  # of Debian 13
BUILD_SECONDS = 3600.0
LOOK_SECONDS = 2.0

CLONES = "tests/functional/test_clones.py"
MACHINE = "tests/functional/test_machine.py"
CHECKS = "tests/nested/checks.py"
KVM = "--vm-accel=kvm"
# What runs there, in this order: pytest's arguments by the step's name.
STEPS = {
    "auto": [f"{CHECKS}::test_auto"],
    "debian-13": [KVM, f"{CHECKS}::test_three_clones_and_a_rollback"],
    "inside": [KVM, f"{CHECKS}::test_inside"],
    "power": [KVM, f"{MACHINE}::test_power", "-k", "tiny"],
    "machine": [
        KVM,
        *(
            f"{MACHINE}::test_{name}"
            for name in ("nobody_was_here_before", "one_guest", "two_at_once")
        ),
        *("-k", "cloned"),
    ],
    "panic": [KVM, f"{MACHINE}::test_power_off_and_panic_from_inside"],
    "put-right": [KVM, f"{CLONES}::TestWhatIsPutRight"],
    "ahead": [KVM, f"{CLONES}::TestKeepingAhead"],
    "sharing": [KVM, f"{CLONES}::TestSharingNothing"],
    "templates": [
        KVM,
        f"{CLONES}::TestTemplates::test_a_second_run_boots_nothing",
        f"{CLONES}::TestTemplates::test_prepared_once_per_change",
    ],
    "snapshot": [KVM, f"{CLONES}::TestSnapshot"],
}


def main() -> int:
    """Make what is missing, boot the host, and tell what became of the steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=STEPS, metavar="STEP", help="repeatable")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--minutes", type=float, default=150.0, help="limit (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=cache_dir() / "nested", metavar="DIR")
    args = parser.parse_args()
    names = args.only or list(STEPS)
    work = args.work.resolve()
    host = Host(work)
    if todo := [name for name in names if args.again or not host.passed(name)]:
        host.make()
        # What the others build on is known for one boot of the host only.
        host.run(["auto", *(name for name in todo if name != "auto")], seconds=args.minutes * 60)
    for name in names:
        say(f"{name:12} {host.told(name)}")
    say(f"the logs are in {host.results}")
    return 0 if all(map(host.passed, names)) else 1


class Host:
    """The emulated host.

    Args:
        work: the folder that holds all of it.
    """

    def __init__(self, work: Path) -> None:
        self._share = work / "share"
        self._image = work / "image"
        self._overlay = work / "disk.qcow2"
        self._console = work / "console.log"
        self.results = self._share / "results"
        self.results.mkdir(parents=True, exist_ok=True, mode=0o700)

    def passed(self, name: str) -> bool:
        """Whether a step was run, and all of its tests passed."""
        return self._result(name).get("status") == 0

    def told(self, name: str) -> str:
        """What became of a step, for people."""
        if not (result := self._result(name)):
            return "was not run"
        outcome = "passed" if result["status"] == 0 else f"FAILED ({result['status']})"
        lines = (self.results / f"{name}.log").read_text(errors="replace").splitlines()
        return f"{outcome} after {result['seconds']} s: {lines[-1].strip('= ') if lines else ''}"

    def _result(self, name: str) -> dict[str, Any]:
        try:
            result: dict[str, Any] = json.loads((self.results / f"{name}.json").read_text())
        except FileNotFoundError:
            return {}
        return result

    def make(self) -> None:
        """Build the disk, if there is none, and put into the share what the steps need."""
        if not self._image.exists():
            self._build()
        call(Path(sys.executable).with_name("vmsandbox"), "images", "build", *IMAGES)
        catalogue, store = Catalogue(), ImageStore(cache_dir())
        folders = [store.require(catalogue.get(name)).folder for name in IMAGES]
        relative = [folder.relative_to(cache_dir() / "images") for folder in folders]
        self._pack("images.tar", cache_dir() / "images", relative)
        listed: list[str | Path] = [
            "git",
            "-C",
            CHECKOUT,
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
        ]
        files = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
        self._pack(
            "checkout.tar",
            CHECKOUT,
            [Path(name) for name in files.splitlines() if (CHECKOUT / name).exists()],
        )
        installed = self._share.with_name("installed")
        shutil.rmtree(installed, ignore_errors=True)
        call(uv(), "pip", "install", "--quiet", "--no-deps", "--target", installed, CHECKOUT)
        self._pack("installed.tar", installed, [Path()])
        shutil.copy(HERE / "host.py", self._share)

    def _pack(self, name: str, root: Path, files: Iterable[Path]) -> None:
        """Put files below a folder into an archive of the share."""
        command: list[str | Path] = [
            "tar",
            "-cSf",
            self._share / name,
            "-C",
            root,
            "--files-from=-",
        ]
        subprocess.run(command, input="\n".join(map(str, files)), text=True, cwd=root, check=True)

    def _build(self) -> None:
        """Make the disk, with our dependencies and wheels for the guests on it."""
        say("making the host's disk, once; this takes some minutes")
        incoming = self._image.with_name("incoming")
        shutil.rmtree(incoming, ignore_errors=True)
        folders = {name: incoming / name.lower() for name in ("OUT", "WORK", "PACKAGES", "WHEELS")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        wanted = incoming / "requirements.txt"
        call(
            *(uv(), "pip", "compile", "--quiet", "--python-version", PYTHON, "--output-file"),
            *(wanted, CHECKOUT / "pyproject.toml", "--group", f"{CHECKOUT}/pyproject.toml:test"),
        )
        binary = ("--only-binary=:all:", "--python-version", PYTHON)
        wheels = folders["WHEELS"]
        call(
            *(uv(), "tool", "run", "pip", "download", "-qq", "--dest", wheels, *binary),
            *("--implementation", "cp", "--platform", PLATFORM),
            *("--platform", "manylinux2014_x86_64", "--requirement", wanted),
        )
        call(
            *(uv(), "pip", "install", "--quiet", "--target", folders["PACKAGES"], *binary),
            *("--python-platform", f"x86_64-{PLATFORM.removesuffix('_x86_64')}"),
            *("--find-links", wheels, "--requirement", wanted),
        )
        environment = {
            "VMSANDBOX_OUT": folders["OUT"],
            "VMSANDBOX_WORK": folders["WORK"],
            "VMSANDBOX_DEBIAN_ARCHITECTURE": "amd64",
            "PACKAGES": folders["PACKAGES"],
            "WHEELS": wheels,
        }
        subprocess.run(
            [HERE / "build"],
            cwd=CHECKOUT / "images" / "debian",  # as recipes are
            env={**os.environ, **{name: str(folder) for name, folder in environment.items()}},
            stdin=subprocess.DEVNULL,
            timeout=BUILD_SECONDS,
            check=True,
        )
        self._overlay.unlink(missing_ok=True)  # of another disk
        folders["OUT"].rename(self._image)
        shutil.rmtree(incoming)

    def run(self, names: Iterable[str], *, seconds: float) -> None:
        """Boot it and wait until it has done some steps and switched itself off, or time is up."""
        waiting = list(names)
        for name in waiting:
            for file in self.results.glob(f"{name}.*"):
                file.unlink()
        order = {name: STEPS[name] for name in waiting}
        (self._share / "order.json").write_text(json.dumps(order, indent=1))
        if (
            not self._overlay.exists()
        ):  # what a run leaves, such as templates, is there for the next
            base = self._image / "disk.raw"
            call("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, self._overlay)
        started = time.monotonic()
        say(f"booting the host; its console is {self._console}")
        with subprocess.Popen(self._command(), stdin=subprocess.DEVNULL) as qemu:
            try:
                while qemu.poll() is None:
                    for name in [name for name in waiting if self._result(name)]:
                        waiting.remove(name)
                        say(f"{name}: {self.told(name)}")
                    if time.monotonic() - started > seconds:
                        say(f"{seconds / 60:.0f} minutes are over; the next run goes on from here")
                        break
                    time.sleep(LOOK_SECONDS)
            finally:
                qemu.kill()

    def _command(self) -> list[str]:
        """QEMU, which ends with this program.

        One thread emulates, since QEMU 7.2 is not to be trusted with more; and that QEMU corrupts flags after
        cmpxchg16b.
        """
        words = "root=/dev/vda rw console=ttyS0 loglevel=5 mitigations=off net.ifnames=0 panic=-1"
        return [
            *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-reboot"),
            *("-machine", "q35", "-accel", "tcg,thread=single"),
            *("-cpu", "max,-cx16,+svm,+npt", "-smp", "1", "-m", "4G"),
            *("-display", "none", "-serial", f"file:{self._console}"),
            *("-kernel", str(self._image / "vmlinuz")),
            *("-initrd", str(self._image / "initrd.img")),
            *("-append", f"{words} init=/usr/local/sbin/nested"),
            *("-drive", f"file={self._overlay},if=virtio,format=qcow2,cache=unsafe"),
            *("-virtfs", f"local,path={self._share},mount_tag=share,security_model=none"),
            *("-device", "virtio-rng-pci"),
        ]


def uv() -> str:
    """Its program."""
    return find_uv_bin()


def call(*argv: str | Path) -> None:
    """Run a program that must end well."""
    subprocess.run(argv, stdin=subprocess.DEVNULL, check=True)


def say(text: str) -> None:
    """For who waits."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
