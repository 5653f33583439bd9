"""What tests need in a guest, put there: its Python environment, the project, the runner."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pytest_vmsandbox.core.errors import CommandError, TransferError
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.inside import tree as trees
from pytest_vmsandbox.inside.environment import (
    ENV,
    Environment,
    GuestPython,
    Requirements,
    prepare,
)
from pytest_vmsandbox.inside.project import Project
from pytest_vmsandbox.inside.session import Place, parse_probe
from pytest_vmsandbox.inside.tree import Tree

BASE = "/opt/vmsandbox"
OLDEST_PYTHON = (3, 9)
_RUNNER = Path(__file__).with_name("runner.py")


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What tests need.

    Attributes:
        tree: the project's files.
        project: how it is imported, and its metadata.
        requirements: what is installed besides.
        cache: the user's cache folder; prepared environments are kept there.
        offline: never touch the network.
        say: told of long waits.
    """

    tree: Tree
    project: Project
    requirements: Requirements
    cache: Path
    offline: bool
    say: Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A guest that has what tests need.

    Attributes:
        place: of the interpreter and the runner.
        tree: the project's folder in the guest.
        path: what stands first on `sys.path`.
        programs: the folder of installed programs, the first on ``PATH``.
    """

    place: Place
    tree: str
    path: tuple[str, ...]
    programs: str


def install(guest: Guest, payload: Payload) -> Installed:
    """Put into a guest what tests need.

    Raises:
        TransferError: the guest has no usable Python, or something cannot be had for it.
        ConfigError: the requirements cannot be meant.
        GuestLost: the guest is gone.
    """
    python, executable = _probe(guest)
    environment = prepare(
        payload.requirements, python, cache=payload.cache, offline=payload.offline, say=payload.say
    )
    packages = "lib/python{}.{}/site-packages".format(*python.version)
    there = f"{BASE}/src/{payload.project.root.name}"
    path = tuple(f"{there}/{root}".rstrip("/") for root in payload.project.import_roots)
    if guest.spec.user != "root":
        guest.run(["install", "-d", "-o", guest.spec.user, BASE], user="root")
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:
        base = Path(folder)
        base.chmod(0o755)
        shutil.copyfile(_RUNNER, base / "runner.py")
        # Not pytest.ini: a pytest that a test starts in the tree would find it above.
        (base / "session.ini").write_text("[pytest]\n")
        _make_environment(base / "env", packages, executable, environment, payload.project, path)
        guest.push(base, BASE)
    guest.push(environment.site_packages, f"{ENV}/{packages}")
    trees.sync(guest, payload.tree, there)
    return Installed(
        place=Place(python=f"{ENV}/bin/python", runner=f"{BASE}/runner.py", folder=f"{BASE}/run"),
        tree=there,
        path=path,
        programs=f"{ENV}/bin",
    )


def _probe(guest: Guest) -> tuple[GuestPython, str]:
    """The guest's Python, and its path."""
    try:
        done = guest.run(["python3", "-I", "-S", "-", "probe"], input=_RUNNER.read_text())
    except CommandError as error:
        raise TransferError(
            f"{guest.name} has no Python that works",
            details=error.details,
            remedy="tests run inside guests that have Python 3.9 or newer; others can be driven "
            "from here, with the fixture vm",
        ) from error
    facts = parse_probe(done.stdout)
    if facts["version"] < OLDEST_PYTHON:
        raise TransferError(
            "{} has Python {}.{}, which is too old".format(guest.name, *facts["version"]),
            remedy="tests run inside guests that have Python {}.{} or newer".format(*OLDEST_PYTHON),
        )
    libc = tuple(int(it) for it in facts["libc"].split(".")[:2] if it.isdecimal())
    if len(libc) != 2:
        raise TransferError(
            f"{guest.name} has no GNU C library that tells its version ({facts['libc']!r})",
            remedy="wheels for such a system are not supported; choose another image",
        )
    python = GuestPython(version=facts["version"], machine=facts["machine"], libc=libc)
    return python, facts["executable"]


def _make_environment(
    folder: Path,
    packages: str,
    executable: str,
    environment: Environment,
    project: Project,
    path: Sequence[str],
) -> None:
    """A virtual environment, but for its packages; none of the guest's own tools is needed."""
    shutil.copytree(environment.scripts, folder / "bin")
    for name in ("python", "python3"):
        (folder / "bin" / name).unlink(missing_ok=True)
        (folder / "bin" / name).symlink_to(executable)
    home = PurePosixPath(executable).parent
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = true\n")
    files = {f"{packages}/{name}": data for name, data in project.metadata.items()}
    files[f"{packages}/vmsandbox-project.pth"] = "".join(f"{it}\n" for it in path).encode()
    files |= {f"bin/{name}": data for name, data in project.scripts.items()}
    for name, data in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        file.chmod(0o755 if name.startswith("bin/") else 0o644)
