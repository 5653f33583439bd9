"""Looks at this machine, lets `checks` judge it, and describes it."""

from __future__ import annotations

import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from pytest_vmsandbox.cache.files import problem
from pytest_vmsandbox.catalogue import helpers, programs
from pytest_vmsandbox.catalogue.builder import LARGE_TMP, ROOM_FOR_A_DISK
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.store import ImageState, ImageStore
from pytest_vmsandbox.catalogue.variants import full_name
from pytest_vmsandbox.cli import checks
from pytest_vmsandbox.cli.checks import Check
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.architecture import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    native_architecture,
)
from pytest_vmsandbox.core.errors import ConfigError, LaunchError, VMSandboxError
from pytest_vmsandbox.core.settings import DEFAULT_IMAGE, Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.firmware import find_uefi
from pytest_vmsandbox.machine.qemu import find_qemu, program, variable

_KEYRINGS = [f"/usr/share/keyrings/debian-archive-keyring.{kind}" for kind in ("gpg", "pgp")]
_COMMON = next(iter(ARCHITECTURES))  # the one that most machines have
_NAMESPACE_SECONDS = 20.0


def examine(
    settings: Settings, say: Callable[[str], None], chosen: ImageDefinition | None = None
) -> Iterator[Check]:
    """All checks, the most basic first.

    Args:
        settings: of the guests that will run here.
        say: gets lines about long waits.
        chosen: an image that will be used for certain, for any architecture.
    """
    native, cache, runtime = native_architecture(), paths.cache_dir(), paths.runtime_dir()
    catalogue, store = Catalogue(settings.image_path), ImageStore(cache)
    is_known = native in ARCHITECTURES
    names = catalogue.native() if is_known else catalogue.names()
    definitions, states, wrong = _images(names, catalogue, store)
    needed = ImageState.BUILT not in states.values()
    if chosen is not None and chosen.name not in states:
        definitions.append(chosen)
        needed |= store.state(chosen) is not ImageState.BUILT
    emulators = _emulators(native)
    building = sys.platform == "linux"  # recipes run on Linux only
    yield checks.operating_system(sys.platform, system_name())
    yield checks.python(platform.python_version(), sys.executable)
    yield (qemu := _qemu(native) if is_known else checks.unknown_machine(native, emulators.there))
    if chosen is not None and chosen.architecture != native:
        yield _emulator(chosen.architecture)
    yield checks.qemu_img(shutil.which("qemu-img"))
    kvm = host.kvm_problem()
    runs = is_known and qemu.status is not checks.Status.FAILED
    verdict = _verdict(settings, states, say) if runs else None
    if is_known:  # what is emulated has no other one
        yield checks.accelerator(kvm, verdict)
    identity = host.guest_identity(verdict[0] if verdict else "tcg" if kvm else "kvm")
    numbers = (identity.uid, identity.gid) if identity else None
    yield checks.qemu_user(os.geteuid(), _user_name(), numbers)
    yield checks.loopback(host.loopback_problem(), host.LOOPBACK_REMEDY)
    if building:
        required = [name for image in definitions for name in image.requires]
        needs_helper = any(map(helpers.is_named_by, definitions))
        compiler = helpers.lacking(native, cache) if needs_helper else ()
        yield from _building(required, compiler, needed)
    yield _firmware(native, definitions)
    yield checks.images(states, _default(native))
    if is_known:
        yield from (emulators.judged(native, catalogue, store), *_chosen_emulators(native))
    if wrong:
        yield checks.definitions(wrong)
    yield checks.memory(
        host.available_memory(),
        default=settings.hardware.memory,
        smallest=min((image.memory_min for image in definitions), default=0),
        overhead=host.QEMU_OVERHEAD,
    )
    yield checks.folder("cache folder", cache, problem(cache), variable=paths.CACHE)
    lacking = problem(runtime, private=True)
    yield checks.folder("runtime folder", runtime, lacking, variable=paths.RUNTIME)
    yield _disk("free disk, cache", cache, paths.CACHE)
    if building:
        yield _disk("free disk, builds", Path(os.environ.get("TMPDIR") or LARGE_TMP), "TMPDIR")
    yield checks.ssh_client(shutil.which("ssh"))


def _images(
    names: Iterable[str], catalogue: Catalogue, store: ImageStore
) -> tuple[list[ImageDefinition], dict[str, ImageState], list[str]]:
    """The images with these names, the state of each, and the names of those that are wrong."""
    definitions: list[ImageDefinition] = []
    states: dict[str, ImageState] = {}
    wrong: list[str] = []
    for name in names:
        try:
            image = catalogue.get(name)
            states[name] = store.state(image)
            definitions.append(image)
        except ConfigError:
            wrong.append(name)
    return definitions, states, wrong


def _chosen_emulators(native: str) -> Iterator[Check]:
    """The emulators for other architectures that variables of the environment choose."""
    for its in ARCHITECTURES.values():
        chosen_by = variable(its)
        if its.name != native and chosen_by not in {"", "VMSANDBOX_QEMU"}:
            try:
                find_qemu(its.name)
            except LaunchError as error:
                yield checks.wrong_emulator(its, error.brief, error.remedy)


def _default(native: str) -> str:
    """The name of the default image on a machine of this architecture."""
    return DEFAULT_IMAGE if native in ARCHITECTURES else full_name(DEFAULT_IMAGE, _COMMON)


def _firmware(architecture: str, definitions: list[ImageDefinition]) -> Check:
    its = ARCHITECTURES.get(architecture)
    uefi = its.uefi_package if its is not None and its.uefi_package else "ovmf"
    lacking, secure = [], any(image.secure_boot for image in definitions)
    try:
        find_uefi(architecture, secure_boot=secure)
    except LaunchError:
        lacking.append(uefi)
    lacking += programs.missing(["swtpm"])
    wanted = {uefi} if any(image.firmware == "uefi" for image in definitions) else set()
    wanted |= {"swtpm"} if any(image.tpm for image in definitions) else set()
    return checks.firmware(lacking, needed=not wanted.isdisjoint(lacking))


def _qemu(architecture: str) -> Check:
    try:
        found = find_qemu(architecture)
    except LaunchError as error:
        wanted = program(architecture_of(architecture))
        is_missing = shutil.which(wanted) is None
        return checks.no_qemu(error.brief, error.remedy, wanted, missing=is_missing)
    return checks.qemu(found.path, found.version)


class _Emulators(NamedTuple):
    """The emulators for other architectures.

    Attributes:
        there: Debian's names of the architectures whose guests can run here.
        remedies: the names of the others → how to install the emulator.
        packages: likewise → the packages of Debian, if those are what is missing.
    """

    there: list[str]
    remedies: dict[str, str]
    packages: dict[str, list[str]]

    def judged(self, native: str, catalogue: Catalogue, store: ImageStore) -> Check:
        """The check of them."""
        built = {
            image.definition.name: image.definition.architecture
            for image in store.all()
            if image.definition.architecture != native and catalogue.folder(image.definition.name)
        }
        lacking = self.remedies.keys() & built.values()
        packages = (self.packages[name] for name in lacking if lacking <= self.packages.keys())
        remedies = {name: self.remedies.get(its, "") for name, its in built.items()}
        return checks.emulators(self.there, remedies, {*chain.from_iterable(packages)})


def _emulators(native: str) -> _Emulators:
    there: list[str] = []
    remedies: dict[str, str] = {}
    packages: dict[str, list[str]] = {}
    for name, its in ARCHITECTURES.items():
        if name == native:
            continue
        try:
            find_qemu(name)
            there.append(its.debian)
        except LaunchError as error:
            remedies[name] = error.remedy
            if _names_no_other(its) and programs.find("apt-get"):
                packages[name] = programs.emulator_packages(its)
    return _Emulators(there, remedies, packages)


def _names_no_other(its: Architecture) -> bool:
    """Whether the usual emulator of an architecture counts, and not one that a variable names."""
    return program(its) == f"qemu-system-{its.qemu}"


def _emulator(architecture: str) -> Check:
    """The check of the emulator that the chosen image needs."""
    its = architecture_of(architecture)
    try:
        found = find_qemu(architecture)
    except LaunchError as error:
        return checks.no_emulator(its, error.brief, error.remedy, missing=_names_no_other(its))
    return checks.qemu(found.path, found.version, checks.emulator_name(its))


def _verdict(
    settings: Settings, states: Mapping[str, ImageState], say: Callable[[str], None]
) -> tuple[str, str] | None:
    """The accelerator that a built image has proven, and the reason; None without a built image."""
    built = [name for name, state in states.items() if state is ImageState.BUILT]
    if not built:
        return None
    try:
        with GuestFactory.open(settings, Announcer(say)) as factory:
            image = DEFAULT_IMAGE if DEFAULT_IMAGE in built else min(built)
            verdict = factory.backend.accelerator(image)
    except (VMSandboxError, OSError):
        return None  # another check has the reason: QEMU, the cache or the runtime folder
    return verdict.accelerator, verdict.reason


def _building(required: list[str], compiler: tuple[str, ...], needed: bool) -> Iterator[Check]:
    """The checks of what building images needs.

    Args:
        required: programs.
        compiler: what is missing of it, if it is needed: see `helpers.lacking`.
        needed: whether guests cannot run without it.
    """
    root = os.geteuid() == 0
    wanted = [*programs.with_theirs(required), *([] if root else ["newuidmap"])]
    yield checks.image_tools((*programs.missing(wanted), *compiler), needed=needed)
    if "mmdebstrap" in required:
        yield checks.keyring(any(map(os.path.exists, _KEYRINGS)), needed=needed)
    if not root:
        user, subuid, subgid = _user_name(), _text("/etc/subuid"), _text("/etc/subgid")
        yield checks.subordinate_ids(user, os.geteuid(), subuid, subgid, needed=needed)
        yield checks.user_namespaces(_namespace_problem(), needed=needed)


def _disk(name: str, folder: Path, variable: str) -> Check:
    path = folder.absolute()
    existing = next(above for above in (path, *path.parents) if above.is_dir())
    free = shutil.disk_usage(existing).free
    return checks.disk(name, folder, free, needed=ROOM_FOR_A_DISK, variable=variable)


def describe() -> dict[str, object]:
    """A description of this machine, with its load."""
    model = re.search(r"^model name\s*: *(.+)", host.processor(), re.MULTILINE)
    return {
        "system": system_name(),
        "processor": model[1] if model else platform.processor() or platform.machine(),
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


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # an id without a name, as in containers
        return str(os.geteuid())


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _namespace_problem() -> str:
    """The error when we make a user namespace as builds do; empty if it works."""
    if shutil.which("unshare") is None:
        return ""  # the check of image tools reports it
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
