"""What is installed in a guest for the tests that run there, prepared on this machine.

A guest has Python, but neither pip nor a network. So the distributions that tests need are resolved
and unpacked here, kept in the cache, and pushed as files.

A failure is a `TransferError`: files that the guest needs could not be brought there. What is
invalid is a `ConfigError`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pytest_vmsandbox.cache.store import ENVIRONMENTS, Entry, Store
from pytest_vmsandbox.inside.guest_python import GuestPython
from pytest_vmsandbox.inside.programs import move_programs
from pytest_vmsandbox.inside.requirements import Requirements
from pytest_vmsandbox.inside.uv import Uv

_RESOLVED = "requirements.txt"  # what was resolved, for people


class Environment(Entry):
    """Files for a guest's environment, complete and in the cache."""

    @property
    def site_packages(self) -> Path:
        """What goes into the folder site-packages of `programs.ENV`."""
        return self.folder / "site-packages"

    @property
    def scripts(self) -> Path:
        """What goes into the folder bin of `programs.ENV`."""
        return self.folder / "bin"


@contextmanager
def prepare(
    requirements: Requirements,
    python: GuestPython,
    *,
    cache: Path,
    offline: bool,
    say: Callable[[str], object],
    tell: Callable[[str], object] = lambda _: None,
) -> Iterator[Environment]:
    """Have a guest's environment in the cache, and keep it there. If it is there, uv is not needed.

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
        CacheError: it cannot be kept.
        TeardownError: what was made in vain cannot be removed.
    """
    store = Store(cache, ENVIRONMENTS, Environment)
    digest = requirements.digest(python)

    def tell_of_damage(why: str) -> None:
        tell(f"the packages for the guest were damaged ({why}); they are made anew")

    def fill(folder: Path, lock: int) -> dict[str, object]:
        if why := store.unreadable(digest):
            tell_of_damage(why)
        say(f"preparing the packages for the guest's Python {python}")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            uv = Uv(requirements, python, offline=offline, lock=lock, work=Path(work), tell=tell)
            resolved = uv.resolve()
            uv.install(resolved, folder / "site-packages")
            move_programs(folder / "site-packages", folder / "bin")
            shutil.copyfile(resolved, folder / _RESOLVED)
        return {}

    with ExitStack() as stack:
        if (environment := store.get(digest)) is not None:
            with suppress(FileNotFoundError):  # another run removes it, to make room
                stack.enter_context(store.hold(environment.folder))
            if why := environment.damage():
                tell_of_damage(why)
                store.throw_away(digest, environment)
                environment = None
        if environment is None:
            on_busy = "waiting for another run that is preparing packages for a guest"
            environment = store.make(digest, fill, on_busy=lambda: say(on_busy))
            stack.enter_context(store.hold(environment.folder))
        yield environment
