"""Puts into a guest what tests inside need: the Python environment, the project and the runner."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.provision import Step
from pytest_vmsandbox.inside import tree_copy
from pytest_vmsandbox.inside.connection import GuestPaths
from pytest_vmsandbox.inside.distributions import ENV
from pytest_vmsandbox.inside.environment import prepare, probe
from pytest_vmsandbox.inside.project import Project
from pytest_vmsandbox.inside.requirements import Requirements
from pytest_vmsandbox.inside.tree import Tree, divide_push

BASE = "/opt/vmsandbox"
_FORMAT = 1  # part of each digest: raise it when the same input gives another result
RUNNER = Path(__file__).with_name("runner")


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What tests inside need.

    Attributes:
        tree: the project's files.
        outside: files of folders outside of the project.
        project: how it is imported, and its metadata.
        requirements: what else is installed.
        offline: never use the network.
        say: gets lines about long waits.
        tell: gets lines about problems.
    """

    tree: Tree
    outside: tuple[Tree, ...] = ()
    project: Project
    requirements: Requirements
    offline: bool
    say: Callable[[str], None]
    tell: Callable[[str], None]

    @classmethod
    def of(
        cls,
        root: Path,
        *,
        entries: Sequence[str] = (),
        more: Sequence[str] = (),
        offline: bool = False,
        say: Callable[[str], None],
        tell: Callable[[str], None] | None = None,
    ) -> Payload:
        """What the tests of the project in `root` need.

        Args:
            root: pytest's rootdir.
            entries: what to install, see `Requirements.of_entries`; without any, what is installed
                here.
            more: see `Tree.of`; may contain folders outside of `root`. The project's modules go in any
                case.
            offline: never use the network.
            say: gets lines about long waits.
            tell: gets lines about problems; default: `say`.

        Raises:
            ConfigError: an entry, or the tree, is invalid.
            TransferError: a module that is installed here is not in the tree.
        """
        inner, outside = divide_push(root, more)
        project = Project.of(root, outside=outside)
        if entries:
            requirements = Requirements.of_entries(root, entries, project.names)
        else:
            requirements = Requirements.of_host(root, project.names, say=say)
        tell = tell or say
        trees = tuple(map(Tree.of, outside))
        for tree in trees:
            files = sum(entry.kind == "file" for entry in tree.entries.values())
            tell(
                f"vm_push sends {files:,} file{'s' * (files != 1)} of {tree.root}, outside of the "
                "rootdir, to guests"
            )
        return cls(
            tree=Tree.of(root, more=[*inner, *project.modules]),
            outside=trees,
            project=project,
            requirements=requirements,
            offline=offline,
            say=say,
            tell=tell,
        )


@dataclass(frozen=True, kw_only=True)
class Installed:
    """Where things are in a guest that has what tests need.

    Attributes:
        place: of the interpreter and the runner.
        tree: the project's folder in the guest.
        outside: folders outside of the project: path here → path there.
        path: the first entries of ``sys.path``.
        programs: the folder of installed programs, the first on ``PATH``.
    """

    place: GuestPaths
    tree: str
    outside: Mapping[str, str]
    path: tuple[str, ...]
    programs: str


def install(guest: Guest, payload: Payload) -> Installed:
    """Put into a guest what tests need.

    Raises:
        VMSandboxError: see `install_environment` and `install_project`.
    """
    install_environment(guest, payload)
    install_project(guest, payload)
    return layout(guest, payload)


def layout(guest: Guest | None, payload: Payload) -> Installed:  # noqa: ARG001
    """Where things are in a guest after both steps. It is the same in every guest."""
    project, folders = payload.project, [tree.root for tree in payload.outside]
    there, outside = f"{BASE}/src/{project.root.name}", {}
    if folders:  # relative paths between folders are the same there and here
        common = os.path.commonpath([payload.tree.root, *folders])
        there = f"{BASE}/src/{payload.tree.root.relative_to(common)}"
        outside = {str(here): f"{BASE}/src/{here.relative_to(common)}" for here in folders}
    return Installed(
        place=GuestPaths(python=f"{ENV}/bin/python", runner=f"{BASE}/runner", folder=f"{BASE}/run"),
        tree=there,
        outside=outside,
        path=tuple(posixpath.normpath(f"{there}/{folder}") for folder in project.import_roots),
        programs=f"{ENV}/bin",
    )


def environment_step(payload: Payload) -> Step:
    """The step that installs the Python environment, without the project. It seldom changes."""
    runner = [file.read_text(encoding="utf-8") for file in sorted(RUNNER.rglob("*.py"))]
    return Step(
        digest=payload.requirements.digest(_FORMAT, runner),
        run=lambda guest: install_environment(guest, payload),
        about="the Python environment of the tests",
        network="isolated",
        personal=True,
    )


def project_digest(payload: Payload) -> str:
    """SHA-256, in hex, of what `install_project` puts there. For files it covers times, not content."""
    trees = [asdict(replace(tree, sent={})) for tree in (payload.tree, *payload.outside)]
    parts = [asdict(payload.project), *trees]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def install_environment(guest: Guest, payload: Payload) -> None:
    """Put the Python environment of the tests into a guest, and the runner.

    Raises:
        TransferError: the guest has no usable Python, or its packages cannot be prepared.
        CacheError: the packages cannot be kept.
        ConfigError: the requirements are invalid.
        GuestLost: the guest is gone.
    """
    python, executable = probe(guest)
    packages = "lib/python{}.{}/site-packages".format(*python.version)
    if guest.spec.user != "root":
        guest.run(["install", "-d", "-o", guest.spec.user, BASE], user="root")
    prepared = prepare(
        payload.requirements, python, offline=payload.offline, say=payload.say, tell=payload.tell
    )
    home = posixpath.dirname(executable)
    files = {
        # Not called pytest.ini: a pytest that a test starts in the tree would find it.
        "session.ini": "[pytest]\n",
        # A virtual environment without packages. Making it takes no tool of the guest.
        "env/pyvenv.cfg": f"home = {home}\ninclude-system-site-packages = true\n",
        # The project's files are outside of it, so they do not depend on the Python's version.
        f"env/{packages}/vmsandbox.pth": f"import site; site.addsitedir('{BASE}/project')\n",
    }
    contents = {name: text.encode() for name, text in files.items()}
    with prepared as environment, _folder(contents) as base:
        shutil.copytree(RUNNER, base / "runner", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(environment.folder / "bin", base / "env" / "bin")
        for name in ("python", "python3"):
            (base / "env" / "bin" / name).unlink(missing_ok=True)
            (base / "env" / "bin" / name).symlink_to(executable)
        guest.push(base, BASE)
        guest.push(environment.folder / "site-packages", f"{ENV}/{packages}")


def install_project(guest: Guest, payload: Payload) -> None:
    """Put the project into a guest that has the environment.

    Raises:
        TransferError: the guest cannot take it.
        GuestLost: the guest is gone.
    """
    project, there = payload.project, layout(guest, payload)
    files = {f"project/{name}": data for name, data in project.metadata.items()}
    files["project/vmsandbox.pth"] = "".join(f"{folder}\n" for folder in there.path).encode()
    files |= {f"env/bin/{name}": data for name, data in project.scripts.items()}
    with _folder(files) as base:
        guest.push(base, BASE)
    tree_copy.push(guest.engine.stream_script, payload.tree, there.tree)
    for tree in payload.outside:
        tree_copy.push(guest.engine.stream_script, tree, there.outside[str(tree.root)])


def await_request(guest: Guest, place: GuestPaths) -> None:
    """Let a guest that will be recorded wait for its request, on a disk."""
    argv = [place.python, "-I", "-S", place.runner, "wait", place.folder]
    guest.run(argv, user="root")


@contextmanager
def _folder(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary folder with some files, with modes for a guest."""
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:
        base = Path(folder)
        base.chmod(0o755)
        for name, data in files.items():
            file = base / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            file.chmod(0o755 if "/bin/" in f"/{name}" else 0o644)
        yield base
