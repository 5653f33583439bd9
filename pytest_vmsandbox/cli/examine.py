"""Looks at this machine: has `checks` judge it, and describes it."""

from __future__ import annotations

import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from pytest_vmsandbox.cache.files import problem
from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.catalogue.builder import ROOM_FOR_A_DISK
from pytest_vmsandbox.catalogue.catalogue import Catalogue, native_architecture
from pytest_vmsandbox.catalogue.store import ImageState, ImageStore
from pytest_vmsandbox.cli import checks
from pytest_vmsandbox.cli.checks import Check
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.errors import LaunchError, VMSandboxError
from pytest_vmsandbox.core.settings import DEFAULT_IMAGE, Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.qemu import find_qemu

_KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
_NAMESPACE_SECONDS = 20.0


class Examination:
    """What is looked at on this machine, and what for.

    Args:
        settings: of the guests that are to run here.
        say: told of long waits, for people.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda _: None) -> None:
        self._settings = settings
        self._say = say
        self._cache = paths.cache_dir()
        catalogue = Catalogue(settings.image_path)
        self._definitions = [
            catalogue.get(name)
            for name in catalogue.names()
            if catalogue.get(name).architecture == native_architecture()
        ]
        store = ImageStore(self._cache)
        self._states = {image.name: store.state(image) for image in self._definitions}

    def checks(self) -> Iterator[Check]:
        """Everything that can be checked, most basic first."""
        building = sys.platform == "linux"  # there are no recipes for other systems
        yield checks.operating_system(sys.platform, system_name())
        yield checks.python(platform.python_version(), sys.executable)
        yield (qemu := self._qemu())
        yield checks.qemu_img(shutil.which("qemu-img"))
        verdict = self._verdict() if qemu.status is not checks.Status.FAILED else None
        yield checks.accelerator(
            host.kvm_problem(),
            (verdict.accelerator, verdict.reason) if verdict else None,
        )
        yield self._qemu_user(verdict)
        yield checks.loopback(host.loopback_problem(), host.LOOPBACK_REMEDY)
        if building:
            yield from self._building()
        yield checks.images(self._states, DEFAULT_IMAGE)
        yield checks.memory(
            host.available_memory(),
            default=self._settings.hardware.memory,
            smallest=min((image.memory_min for image in self._definitions), default=0),
            overhead=host.QEMU_OVERHEAD,
        )
        runtime = paths.runtime_dir()
        yield checks.folder(
            "cache folder", self._cache, problem(self._cache), variable="VMSANDBOX_CACHE"
        )
        yield checks.folder(
            "runtime folder",
            runtime,
            problem(runtime, private=True),
            variable="VMSANDBOX_RUNTIME",
        )
        yield self._disk("free disk, cache", self._cache, "VMSANDBOX_CACHE")
        if building:
            work = Path(os.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108  # where builds work
            yield self._disk("free disk, builds", work, "TMPDIR")
        yield checks.ssh_client(shutil.which("ssh"))

    def _qemu(self) -> Check:
        try:
            found = find_qemu(native_architecture())
        except LaunchError as error:
            program = os.environ.get("VMSANDBOX_QEMU") or f"qemu-system-{native_architecture()}"
            return checks.no_qemu(
                error.brief, error.remedy, program, missing=shutil.which(program) is None
            )
        return checks.qemu(found.path, found.version)

    def _verdict(self) -> Verdict | None:
        """The accelerator that is proven, with an image that is built; None without one."""
        built = [name for name, state in self._states.items() if state is ImageState.BUILT]
        if not built:
            return None
        image = DEFAULT_IMAGE if DEFAULT_IMAGE in built else min(built)
        try:
            with GuestFactory.open(self._settings, Announcer(self._say)) as factory:
                return factory.backend.accelerator(image)
        except (VMSandboxError, OSError):
            return None  # another check tells why: QEMU, the cache or the runtime folder

    def _qemu_user(self, verdict: Verdict | None) -> Check:
        accelerator = verdict.accelerator if verdict else "tcg" if host.kvm_problem() else "kvm"
        identity = host.guest_identity(accelerator)
        return checks.qemu_user(
            os.geteuid(), _user_name(), (identity.uid, identity.gid) if identity else None
        )

    def _building(self) -> Iterator[Check]:
        needed = ImageState.BUILT not in self._states.values()
        needed_programs = [name for image in self._definitions for name in image.requires]
        if os.geteuid() != 0:
            needed_programs.append("newuidmap")
        yield checks.image_tools(programs.missing(needed_programs), needed=needed)
        if "mmdebstrap" in needed_programs:
            yield checks.keyring(any(path.exists() for path in _KEYRINGS), needed=needed)
        if os.geteuid() != 0:
            yield checks.subordinate_ids(
                _user_name(),
                os.geteuid(),
                _text("/etc/subuid"),
                _text("/etc/subgid"),
                needed=needed,
            )
            yield checks.user_namespaces(_namespace_problem(), needed=needed)

    def _disk(self, name: str, folder: Path, variable: str) -> Check:
        return checks.disk(
            name,
            folder,
            shutil.disk_usage(_existing(folder)).free,
            needed=ROOM_FOR_A_DISK,
            variable=variable,
        )


def describe() -> dict[str, object]:
    """This machine, and how much it has to do."""
    return {
        "system": system_name(),
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "memory_bytes": host.total_memory(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def system_name() -> str:
    """The operating system and its architecture, for people."""
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.machine()}"
    except (OSError, KeyError):
        return platform.platform(terse=True)


def processor_name() -> str:
    """The processor's model, for people."""
    found = re.search(r"^model name\s*: *(.+)", host.processor(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a number without a name, as in containers
        return str(os.geteuid())


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _existing(folder: Path) -> Path:
    """`folder`, or the first above it that is there."""
    path = folder.absolute()
    return next(above for above in (path, *path.parents) if above.is_dir())


def _namespace_problem() -> str:
    """What is said when we make a user namespace as builds do; empty if it works."""
    if shutil.which("unshare") is None:
        return ""  # it is among the image tools
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            errors="replace",
            timeout=_NAMESPACE_SECONDS,
            check=False,
            encoding="utf-8",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or "unshare failed"
