"""Artifacts: what we keep of a failed test's guests."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.plugin.keeping import belong_together

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.guest import Guest

_LOGS = "guests-"  # the start of the names of folders for logs
_MOST_ASKED = 20  # failed tests; it takes 0.2 s for each, and longer if a guest hangs
_MAX_NAME = 120  # characters; file systems allow 255 bytes
# Node ids whose folder names are unique: only separators in them are replaced.
_PLAIN = re.compile(r"(?:\w[\w.]*/)*\w[\w.]*(?:::\w+)*(?:\[\w+(?:[.-]\w+)*\])?", re.ASCII)


class Artifacts:
    """The folders of one run's artifacts: one for each test, and in it one for each guest.

    A guest may outlive the test that booted it. So guests log into folders of their own, and a test's
    folder gets links to the logs.

    Args:
        root: made when it is first needed.
        own: called with the folder of the logs. That folder is removed even if this process is killed.
    """

    def __init__(self, root: Path, own: Callable[[Path], None] = lambda _: None) -> None:
        self._root = root
        self._own = own
        self._making = threading.Lock()
        self._logs: Path | None = None
        self._stack = ExitStack()

    def of_test(self, nodeid: str) -> Path:
        """The folder of a test. It is made if it is missing."""
        folder = self._root / folder_name(nodeid)
        self._root.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)  # a guest's logs may hold secrets
        return folder

    def of_guest(self, nodeid: str, guest: str) -> Path:
        """The folder of a guest in the folder of a test. It is made if it is missing."""
        folder = self.of_test(nodeid) / guest
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def add(self, nodeid: str, guest: str, texts: Mapping[str, str]) -> None:
        """Put texts about a guest into its folder in the folder of a test, by the name of a file for each."""
        for name, text in texts.items():
            file = self.of_guest(nodeid, guest) / name
            with _private(file):
                file.write_text(text, "utf-8", "replace")

    def of_logs(self, guest: str, was: str = "") -> Path:
        """The folder that a guest logs into, private to this run. It is made if it is missing.

        Args:
            was: the guest's name until now. Its folder is renamed, also while files in it are open.
        """
        folder = self._guests / guest
        if was:
            with suppress(FileNotFoundError):
                (self._guests / was).rename(folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # somebody may have removed them
        return folder

    def keep_logs(self, nodeid: str, guest: str) -> None:
        """Link a guest's logs into the folder of a test. The guest may go on logging.

        Raises:
            OSError: they are missing there, or not complete.
        """
        place = self.of_guest(nodeid, guest)
        if (logs := self._guests / guest).is_dir():
            shutil.copytree(logs, place, copy_function=_link, dirs_exist_ok=True)

    def discard_logs(self, guest: str) -> None:
        """Remove the folder that a guest has logged into. Links in tests' folders stay."""
        if self._logs is not None:
            shutil.rmtree(self._logs / guest, ignore_errors=True)

    def close(self) -> None:
        """Remove the logs of guests. Links in tests' folders stay."""
        if self._logs is not None:
            shutil.rmtree(self._logs, ignore_errors=True)
        self._stack.close()

    @property
    def _guests(self) -> Path:
        from pytest_vmsandbox.cache.files import locked

        with self._making:  # other threads make guests ahead of demand
            if self._logs is None:
                self._root.mkdir(parents=True, exist_ok=True)
                with locked(self._root, on_busy=lambda: None):
                    for folder in self._root.glob(f"{_LOGS}*"):  # left by killed runs
                        with suppress(OSError), locked(folder):
                            shutil.rmtree(folder)
                    logs = self._root / f"{_LOGS}{os.urandom(4).hex()}"
                    self._own(logs)  # before mkdir: we may be killed at any moment
                    logs.mkdir(mode=0o700)
                    self._stack.enter_context(locked(logs))
                    self._logs = logs
            return self._logs

    def discard(self, nodeid: str) -> None:
        """Remove the folder of a test that passed."""
        shutil.rmtree(self._root / folder_name(nodeid), ignore_errors=True)


class Gatherer:
    """Puts into the artifacts what guests show and say when a test has failed.

    Args:
        artifacts: of the run.
        ask: returns what a guest says about itself, by the name of a file for each text.
        tell: prints a line at the end of the run.
    """

    def __init__(
        self,
        artifacts: Callable[[], Artifacts],
        ask: Callable[[Guest], Mapping[str, str]],
        tell: Callable[[str], object],
    ) -> None:
        self._artifacts = artifacts
        self._ask = ask
        self._tell = tell
        # Guests, in this attempt at a test, with an error that the test may expect.
        self._seen: dict[str, BaseException | str | None] = {}
        self._asked_for: set[str] = set()  # failed tests

    def begin(self) -> None:
        """Another attempt at a test begins. What a guest showed before is replaced if it fails again."""
        self._seen.clear()

    def gather(
        self,
        nodeid: str,
        guest: Guest,
        name: str = "",
        *,
        error: BaseException | str | None = None,
        is_certain: bool = True,
    ) -> None:
        """Look at a guest, if this attempt has not failed before. This raises no error.

        Args:
            name: of its folder; empty for its own name.
            error: what was raised, or one line.
            is_certain: whether the test has failed. It may expect what was raised.
        """
        name = name or guest.name
        if self._was_seen(name, error, is_certain=is_certain):
            return
        try:
            with telling(self._tell):
                self._look(nodeid, guest, name)
        except Exception as failed:  # noqa: BLE001  # whatever it is, it is no failure of the test
            self._tell(f"{guest.name} could not be asked what it was doing: {failed!r}")

    def _look(self, nodeid: str, guest: Guest, name: str) -> None:
        picture = self._artifacts().of_guest(nodeid, name) / "screenshot.png"
        # The guest may be gone, which is the failure.
        with suppress(VMSandboxError), _private(picture):
            guest.screenshot(picture)
        self._asked_for.add(nodeid)
        if len(self._asked_for) > _MOST_ASKED:
            self._tell(
                f"the guests of the first {_MOST_ASKED} failed tests were asked for their processes, memory and "
                "logs, and those of others were not, to save time"
            )
            return
        self._artifacts().add(nodeid, name, self._ask(guest))

    def _was_seen(self, name: str, error: BaseException | str | None, *, is_certain: bool) -> bool:
        """Whether this attempt has looked at a guest for the same failure, or for its first one."""
        was_seen, earlier = name in self._seen, self._seen.get(name)
        if earlier is not None and error is not None and not belong_together(earlier, error):
            was_seen = False
        if not was_seen or is_certain:
            self._seen[name] = None if is_certain else error
        return was_seen


@contextmanager
def telling(tell: Callable[[str], object]) -> Iterator[None]:
    """Print a line at the end of the run if artifacts cannot be written. No test fails because of that."""
    try:
        yield
    except OSError as error:
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or error
        brief, _, _ = str(why).partition(": '")
        tell(f"artifacts of failed tests are missing or not complete: {brief}")


def temporary_folder(config: pytest.Config) -> Path:
    """Make a folder. pytest removes it some runs later, unless its `tmpdir` is off."""
    factory: pytest.TempPathFactory | None = getattr(config, "_tmp_path_factory", None)
    if factory is None:
        return Path(tempfile.mkdtemp(prefix="vm-artifacts-"))
    return factory.mktemp("vm-artifacts")


@contextmanager
def _private(file: Path) -> Iterator[None]:
    """A new file that only this user can read. There is none if the block fails."""
    file.unlink(missing_ok=True)
    file.touch(0o600)
    try:
        yield
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _link(source: str, dest: str) -> None:
    Path(dest).unlink(missing_ok=True)
    try:
        os.link(source, dest)
    except FileNotFoundError:  # the guest has just removed it
        return
    except OSError:  # a file system without hard links
        shutil.copy2(source, dest)


def folder_name(nodeid: str) -> str:
    """A node id as the name of a folder: readable and unique.

    Example:
        >>> folder_name("tests/test_a.py::test_b[debian-13]")
        'tests-test_a.py-test_b-debian-13'
    """
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", nodeid).strip("-.")
    if len(name) > _MAX_NAME or not _PLAIN.fullmatch(nodeid):
        digest = hashlib.sha256(nodeid.encode(errors="surrogatepass")).hexdigest()[:8]
        name = f"{name[:_MAX_NAME]}-{digest}".lstrip("-")
    return name
