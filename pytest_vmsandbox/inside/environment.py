"""What is installed in a guest for the tests that run there, prepared on this machine.

A guest has Python, but neither pip nor a network. So the distributions that tests need are resolved
and unpacked here, kept in the cache, and pushed as files.

A failure is a `TransferError`: files that the guest needs could not be brought there. What is
invalid is a `ConfigError`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.inside.environments_store import RESOLVED, EnvironmentsStore
from pytest_vmsandbox.inside.guest_python import GuestPython
from pytest_vmsandbox.inside.programs import move_programs
from pytest_vmsandbox.inside.requirements import Requirements
from pytest_vmsandbox.inside.uv import Uv


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Files for a guest's environment, complete and in the cache.

    Args:
        folder: holds them.
        digest: of what they were made from.
    """

    folder: Path
    digest: str

    @property
    def site_packages(self) -> Path:
        """What goes into the folder site-packages of `programs.ENV`."""
        return self.folder / "site-packages"

    @property
    def scripts(self) -> Path:
        """What goes into the folder bin of `programs.ENV`."""
        return self.folder / "bin"


def prepare(
    requirements: Requirements,
    python: GuestPython,
    *,
    cache: Path,
    offline: bool,
    say: Callable[[str], object],
    tell: Callable[[str], object] = lambda _: None,
) -> Environment:
    """Have a guest's environment in the cache. If it is there, uv is not needed.

    Args:
        requirements: what it holds.
        python: what it is for.
        cache: the user's cache.
        offline: use only what uv has in its own cache.
        say: is told what takes long.
        tell: is told that it was damaged, and is made anew.

    Raises:
        TransferError: it cannot be made: uv is missing, a distribution has no wheel for the guest,
            the package index cannot be reached.
        TeardownError: what was made in vain cannot be removed.
    """

    def make(folder: Path, lock: int) -> None:
        say(f"preparing the packages for the guest's Python {python}")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            uv = Uv(requirements, python, offline=offline, lock=lock, work=Path(work), tell=tell)
            resolved = uv.resolve()
            uv.install(resolved, folder / "site-packages")
            move_programs(folder / "site-packages", folder / "bin")
            shutil.copyfile(resolved, folder / RESOLVED)

    digest = requirements.digest(python)
    folder = EnvironmentsStore(cache).obtain(
        digest,
        make,
        on_busy=lambda: say("waiting for another run that is preparing packages for a guest"),
        on_damage=lambda why: tell(
            f"the packages for the guest were damaged ({why}); they are made anew"
        ),
    )
    return Environment(folder=folder, digest=digest)
