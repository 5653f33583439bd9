"""Gives systems that have no helper one over SSH: systemd, sysvinit, OpenRC, runit, busybox, an rc script, none.

Run it by hand: ``python tests/systems/helperless.py [SYSTEM…]``. It makes each system from our image
debian-12, with packages of Debian's archive, and never boots it for that. Then it looks whether guests
are cloned, whether clones differ, whether a clone comes back with its helper after a reboot and a power
cut, and whether tests run inside. What is done is kept in --work, so it goes on where it was ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

from pytest_vmsandbox.catalogue.builder import build
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.making import Build
from pytest_vmsandbox.catalogue.store import (
    DISK,
    HOST_KEY,
    INITRD,
    KERNEL,
    BuiltImage,
    ImageState,
    ImageStore,
)
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.images.adopting import INSECURE_KEYS
from pytest_vmsandbox.guests.images.maker import make_image
from pytest_vmsandbox.guests.reaching.access import KeyPair
from support.helperless import bare

BASE = "debian-13"
PAIRS = 5  # of clones: one of the system, one of its base

# Runs as root in name spaces of its own: a copy of a disk, changed by a script in it.
_CHANGE = r"""
set -eu
debugfs -R "rdump / $TREE" "$SOURCE" >/dev/null 2>&1
echo "$KEY" >"$TREE/tmp/key"
rm -rf "$TREE/lost+found"
for node in null zero urandom; do
    : >"$TREE/dev/$node"
    mount --bind "/dev/$node" "$TREE/dev/$node"
done
mount -t proc proc "$TREE/proc"
cat /etc/resolv.conf >"$TREE/etc/resolv.conf"
printf '#!/bin/sh\nexit 101\n' >"$TREE/usr/sbin/policy-rc.d"
chmod 0755 "$TREE/usr/sbin/policy-rc.d"
DEBIAN_FRONTEND=noninteractive chroot "$TREE" /bin/sh -ec "$SCRIPT"
printf 'nameserver 10.0.2.3\n' >"$TREE/etc/resolv.conf"
rm "$TREE/usr/sbin/policy-rc.d"
umount "$TREE/dev/null" "$TREE/dev/zero" "$TREE/dev/urandom" "$TREE/proc"
rm -rf "$TREE"/dev/* "$TREE"/var/cache/apt/archives/*.deb
truncate -s 3G "$OUT"
mke2fs -q -F -t ext4 -L root -m 0 -b 4096 -i 16384 -O ^orphan_file,^metadata_csum_seed \
    -E lazy_itable_init=1,lazy_journal_init=1,nodiscard -J size=32 -d "$TREE" "$OUT"
"""
_NO_HELPER = """
rm -rf /usr/lib/vmsandbox /etc/systemd/system/vmsandbox-helper.service
rm -f /etc/systemd/system/sysinit.target.wants/vmsandbox-helper.service
"""
_APT = "apt-get -qq update; apt-get -qq -y --allow-remove-essential -o Dpkg::Options::=--force-confold install"
_NO_SYSTEMD = (
    "systemd-sysv- libpam-systemd- dbus-user-session-"  # nothing that wants systemd as init
)
_BUSYBOX = (
    _NO_HELPER
    + r"""
rm -f /sbin/init /etc/init.d/rcS
ln -s /bin/busybox /sbin/init
cat >/etc/inittab <<'END'
::sysinit:/etc/init.d/rcS
::respawn:/usr/sbin/sshd -D
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/umount -a -r
END
printf '#!/bin/sh\nmkdir -p /run/sshd\nhostname -F /etc/hostname\n' >/etc/init.d/rcS
chmod 0755 /etc/init.d/rcS
for name in reboot poweroff halt; do rm -f /sbin/$name; ln -s /bin/busybox /sbin/$name; done
"""
)
_RC = (
    _NO_HELPER
    + r"""
rm -f /sbin/init
cat >/sbin/init <<'END'
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /run/sshd
hostname -F /etc/hostname
/etc/rc.local
stop() { kill -TERM -1; sleep 1; kill -KILL -1; sync; busybox umount -a -r; busybox "$1" -f; }
trap 'stop reboot' TERM
trap 'stop poweroff' USR2
while :; do
    /usr/sbin/sshd -D &
    wait
done
END
printf '#!/bin/sh\nexit 0\n' >/etc/rc.local
chmod 0755 /sbin/init /etc/rc.local
for name in reboot poweroff; do rm -f /sbin/$name; done
printf '#!/bin/sh\nkill -TERM 1\n' >/sbin/reboot
printf '#!/bin/sh\nkill -USR2 1\n' >/sbin/poweroff
chmod 0755 /sbin/reboot /sbin/poweroff
"""
)


@dataclass(frozen=True)
class System:
    """A system without a helper.

    Attributes:
        way: what must start the helper.
        script: what makes the system, in a root file system of `BASE`.
        has_python: whether tests run inside.
    """

    way: str
    script: str
    has_python: bool = True


SYSTEMS = {
    "systemd": System("systemd", _NO_HELPER),
    "sysvinit": System("inittab", f"{_NO_HELPER}{_APT} sysvinit-core {_NO_SYSTEMD}"),
    "openrc": System("openrc", f"{_NO_HELPER}{_APT} openrc sysvinit-core {_NO_SYSTEMD}"),
    "runit": System(
        "runit",
        f"{_NO_HELPER}{_APT} runit-init {_NO_SYSTEMD}\n"
        "mkdir -p /etc/sv/sshd /etc/runit/runsvdir/default\n"
        "printf '#!/bin/sh\\nmkdir -p /run/sshd\\nexec /usr/sbin/sshd -D\\n' >/etc/sv/sshd/run\n"
        "chmod 0755 /etc/sv/sshd/run; ln -s /etc/sv/sshd /etc/runit/runsvdir/default/",
    ),
    "busybox": System("busybox", _BUSYBOX),
    "rc": System("rc", _RC),
    "none": System("hand", "", has_python=False),
    "imported": System(
        "systemd", f"{_NO_HELPER}mkdir -p /root/.ssh; cp /tmp/key /root/.ssh/authorized_keys"
    ),
    "dropbear": System(
        "systemd",
        f"{_NO_HELPER}{_APT} dropbear-bin\n"
        "rm -f /usr/lib/openssh/sftp-server\n"
        "mkdir -p /etc/dropbear /root/.ssh; "
        "dropbearconvert openssh dropbear /etc/ssh/ssh_host_ed25519_key "
        "/etc/dropbear/dropbear_ed25519_host_key\n"
        "sed -i 's|^ExecStart=.*|ExecStart=/usr/sbin/dropbear -F -m -D /run/vmsandbox|; "
        "s/^Type=notify/Type=simple/; /^ExecReload/d' /etc/systemd/system/ssh.service",
    ),
    "mksh": System(
        "systemd", f"{_NO_HELPER}{_APT} mksh; chsh -s /bin/mksh root; ln -sf mksh /bin/sh"
    ),
    "fish": System("systemd", f"{_NO_HELPER}{_APT} fish; chsh -s /usr/bin/fish root"),
    "tcsh": System("systemd", f"{_NO_HELPER}{_APT} tcsh; chsh -s /bin/tcsh root"),
    "read-only": System(
        "systemd",
        _NO_HELPER
        + "printf 'tmpfs /usr/lib/vmsandbox tmpfs ro 0 0\\n' >>/etc/fstab; mkdir /usr/lib/vmsandbox",
    ),
    "sudo": System(
        "systemd",
        f"{_NO_HELPER}{_APT} sudo; echo 'tester ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/tester\n"
        "sed -i 's/^PermitRootLogin.*/PermitRootLogin no/' /etc/ssh/sshd_config.d/vmsandbox.conf",
    ),
}


def changed(name: str, base: BuiltImage, work: Build) -> Mapping[str, object]:
    """Fill the folder of a build: the files of the base, with another disk."""
    assert base.kernel is not None
    assert base.initrd is not None
    assert base.disk is not None
    for file in (KERNEL, INITRD, HOST_KEY):
        shutil.copy(base.folder / file, work.out / file)
    tree = work.work / "tree"
    tree.mkdir()
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user", "--map-auto"]
    words = ["unshare", *user, "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _CHANGE]
    environment = {
        **os.environ,
        "TREE": os.fspath(tree),
        "SOURCE": os.fspath(base.disk),
        "OUT": os.fspath(work.out / DISK),
        "SCRIPT": SYSTEMS[name].script,
        "KEY": KeyPair.of(INSECURE_KEYS[0].read_text(encoding="utf-8")).public,
        "LC_ALL": "C.UTF-8",
    }
    if work.run(words, env=environment):
        raise RuntimeError(f"{name} could not be made; see its build.log")
    return {}


def image(name: str, folder: Path) -> str:
    """The name of a built image of a system."""
    store, catalogue = ImageStore(cache_dir()), Catalogue()
    definition_folder = folder / f"helperless-{name}"
    if name == "none":
        if not definition_folder.is_dir():
            bare(definition_folder, store, store.require(catalogue.get("tiny")))
        return definition_folder.name
    base = store.require(catalogue.get(BASE))
    definition_folder.mkdir(exist_ok=True)
    text = f"""\
schema = 1
description = "Debian with {name}, and without our helper"
architecture = "{base.definition.architecture}"
recipe = "build"
[boot]
append = "{base.definition.append}"
memory_min = "256MiB"
[disk]
size = "3GiB"
[system]
python = true
init = "none"
user = "{"tester" if name == "sudo" else "root"}"
"""
    (definition_folder / "image.toml").write_text(text)
    (definition_folder / "build").write_text(
        f"#!/bin/sh\n# {base.build_id}\n{SYSTEMS[name].script}"
    )
    (definition_folder / "build").chmod(0o755)
    definition = ImageDefinition.read(definition_folder)
    if store.state(definition) is not ImageState.BUILT:
        build(definition, store, partial(changed, name, base), progress=print)
    return imported(store.require(definition), folder) if name == "imported" else definition.name


def imported(vendor: BuiltImage, folder: Path) -> str:
    """The name of an image that is made from the disk of another one, as if a vendor had published it."""
    assert vendor.disk is not None
    assert vendor.kernel is not None
    assert vendor.initrd is not None
    place = folder / f"{vendor.definition.name}-disk"
    if not (place / "image.toml").exists():
        place.mkdir(exist_ok=True)
        lines = []
        for key, file in {
            "url": vendor.disk,
            "kernel": vendor.kernel,
            "initrd": vendor.initrd,
        }.items():
            shutil.copyfile(file, place / key)
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            lines.append(
                f'{key} = "{key}"\n{"sha256" if key == "url" else f"{key}_sha256"} = "{digest}"\n'
            )
        (place / "image.toml").write_text(
            f"""\
schema = 1
description = "A disk from elsewhere"
architecture = "{vendor.definition.architecture}"
[source]
{"".join(lines)}format = "raw"
[boot]
append = "{vendor.definition.append}"
memory_min = "256MiB"
[disk]
size = "3GiB"
[system]
python = true
init = "systemd"
user = "root"
[login]
method = "vagrant"
user = "root"
"""
        )
    make_image(ImageDefinition.read(place), Settings(image_path=(folder,)), progress=print)
    return place.name


LOOK = "cat /proc/sys/kernel/hostname; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'"
INSIDE = """
import os, pytest

@pytest.mark.vm(in_vm=True)
def test_inside():
    assert os.getpid() > 1 and os.path.exists("/proc/1")
"""


def look(name: str, folder: Path) -> dict[str, object]:
    """What guests of one system do; the result is a row of the table."""
    lines: list[str] = []
    system = SYSTEMS[name]
    row: dict[str, Any] = {}
    settings = Settings(image_path=(folder,), clones="demand", command_timeout=120.0)
    tell = lines.append
    known = image(name, folder)
    with GuestFactory.open(settings, Announcer(lambda text: print(f"  {text}"), tell)) as factory:
        row["template_s"] = seconds(lambda: first_of(factory, known))
        with factory.boot(known) as one, factory.boot(known) as other:
            row["origin"] = one.origin
            row["told"] = "; ".join(lines)
            setup = one.engine.machines.setup
            row["way"] = "" if setup is None else setup.way
            left, right = (vm.shell(LOOK, user="root").stdout.split() for vm in (one, other))
            row["differ"] = all(mine != theirs for mine, theirs in zip(left, right, strict=True))
            row["clock"] = abs(float(one.run(["date", "+%s.%N"]).stdout) - time.time()) < 2
            row["ssh"] = (
                subprocess.run([*shlex.split(one.ssh_command), "true"], check=False).returncode == 0
            )
            row["reboot_s"] = seconds(lambda: one.reboot(timeout=300))
            row["after_reboot"] = comes_back(one, left[0])
            row["alone"] = brought_by_init(one)
            one.power_cut()
            row["power_on_s"] = seconds(one.power_on)
            row["after_power_cut"] = comes_back(one, left[0])
            with one.snapshot():
                one.shell("echo x >/tmp/changed")
            row["rolled_back"] = (
                one.run(["test", "-e", "/tmp/changed"], check=False).returncode == 1
            )
    row["clone_ms"], row["base_clone_ms"] = pairs(folder, known, "tiny" if name == "none" else BASE)
    row["inside"] = inside(known, folder) if system.has_python else None
    good = row["origin"] == "cloned" and row["way"] == system.way and row["differ"] and row["clock"]
    good = good and row["after_reboot"] and row["after_power_cut"] and row["rolled_back"]
    row["passed"] = bool(good and row["inside"] is not False)
    return row


def first_of(factory: GuestFactory, name: str) -> None:
    """Have the template made."""
    with factory.boot(name):
        pass


def comes_back(vm: Guest, name: str) -> bool:
    """Whether a guest has its helper and its name."""
    return vm.engine.has_helper and vm.shell(LOOK, user="root").stdout.split()[0] == name


def brought_by_init(vm: Guest) -> bool:
    """Whether the helper has another parent than a login."""
    script = "read -r _ _ _ parent _ </proc/$(pidof helper | cut -d' ' -f1)/stat; echo $parent"
    return vm.shell(script, user="root", check=False).stdout.strip() == "1"


def pairs(folder: Path, known: str, base: str) -> tuple[float, float]:
    """Milliseconds of a clone of a system and of one with a helper of its own, in turns; medians."""
    taken: dict[str, list[float]] = {known: [], base: []}
    settings = Settings(image_path=(folder,), clones="demand")
    with GuestFactory.open(settings) as factory:
        for one in taken:
            first_of(factory, one)
        for _ in range(PAIRS):
            for one, times in taken.items():
                began = time.perf_counter()
                with factory.boot(one) as vm:
                    vm.run(["true"])
                    times.append((time.perf_counter() - began) * 1000)
    mine, theirs = (round(statistics.median(times), 1) for times in taken.values())
    return mine, theirs


def inside(known: str, folder: Path) -> bool:
    """Whether a test passes inside."""
    with tempfile.TemporaryDirectory() as project:
        Path(project, "test_it.py").write_text(INSIDE, encoding="utf-8")
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"--vm={known}",
            "-o",
            f"vm_image_path={folder}",
        ]
        done = subprocess.run(words, cwd=project, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout[-3000:])
        return done.returncode == 0


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 1)


def main() -> int:
    """Look at all systems that are asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("systems", nargs="*", default=list(SYSTEMS), help="default: all")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "helperless"))
    arguments = parser.parse_args()
    folder = arguments.work / "images"
    folder.mkdir(parents=True, exist_ok=True)
    results = arguments.work / "results.json"
    rows = json.loads(results.read_text()) if results.exists() else {}
    for name in arguments.systems:
        if not rows.get(name, {}).get("passed"):
            print(f"{name}: {SYSTEMS[name].way}", flush=True)
            try:
                rows[name] = look(name, folder)
            except Exception as error:  # noqa: BLE001  # the other systems count, too
                rows[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
            results.write_text(json.dumps(rows, indent=2))
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    return 0 if all(rows[name]["passed"] for name in arguments.systems) else 1


if __name__ == "__main__":
    sys.exit(main())
