"""Shows one state of a disk after another to a check that runs in the guest.

The guest is the one that wrote to the disk. It is saved before and rolled back afterwards, so the check
finds all that the test has installed, and nothing is left of the states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from pytest_vmsandbox.core.errors import ConfigError, VMSandboxError
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.guests.crash import checker
from pytest_vmsandbox.guests.crash.building import Builder
from pytest_vmsandbox.guests.crash.checker import Program
from pytest_vmsandbox.guests.crash.conversation import (
    Conversation,
    Unusable,
    Verdict,
    conversation,
)
from pytest_vmsandbox.guests.crash.freeing import compare, release
from pytest_vmsandbox.guests.crash.mounts import Place
from pytest_vmsandbox.guests.crash.states import State
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.root_programs import run_as_root
from pytest_vmsandbox.guests.running.saved import Saved
from pytest_vmsandbox.machine import filters
from pytest_vmsandbox.machine.disk import empty_overlay
from pytest_vmsandbox.machine.filters import Filter


class Bench:
    """A running guest that looks at one state after another. A context manager.

    Args:
        disk: the name of the disk.
        place: where it was mounted when the recording ended.
        check: what runs for each state.
        seconds: for each state.
    """

    def __init__(
        self,
        engine: Engine,
        disk: str,
        place: Place,
        builder: Builder,
        check: Program,
        seconds: float,
    ) -> None:
        self._engine, self._disk, self._place = engine, disk, place
        self._builder, self._check, self._seconds = builder, check, seconds
        self._saved: Saved
        self._talk: Conversation | None = None
        self._shown: Filter | None = None
        self._stack = ExitStack()
        # These differ in all that was written. If the guest sees both, it sees those between.
        self._unseen = {State(0), State(len(builder.history.entries))}

    def __enter__(self) -> Self:
        refuse_faults(self._engine)
        refuse_root(self._disk, self._place)
        self._saved = self._engine.save()
        try:
            self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _begin(self) -> Conversation:
        """Free the disk, and start the check."""
        release(self._engine, self._disk, self._place)
        self._talk = self._stack.enter_context(conversation(self._engine, self._check))
        return self._talk

    def _end(self) -> None:
        """Roll the guest back."""
        self._talk = self._shown = None
        with suppress(VMSandboxError):  # the guest may be gone
            self._stack.close()
        self._engine.roll_back(self._saved)

    def verdict(self, state: State, acknowledged: Sequence[object]) -> Verdict:
        """See `Looks`. A state on which the guest panics or hangs is broken. The guest is rolled back then."""
        line = checker.line(acknowledged, is_python=self._check.is_python)
        with self._builder.state(state):
            talk = self._talk or self._begin()
            try:
                self._show()
                if state in self._unseen:
                    drop = checker.drop_script(self._place)
                    compare(self._engine, self._place, drop, self._builder, state)
                    self._unseen.remove(state)
                return talk.ask(line, self._seconds)
            except Unusable as broken:
                self._end()
                return broken.verdict

    def _show(self) -> None:
        """Let the disk have the state that was built."""
        with self._engine.use() as running, shown(self._builder, self._engine) as content:
            if self._shown is not None:
                running.machine.drives.remove(self._disk, self._shown)
            running.machine.drives.insert(self._disk, content)
            self._shown = content


def refuse_root(disk: str, place: Place) -> None:
    """Refuse a disk that cannot be unmounted, because the guest runs from it.

    Raises:
        ConfigError: it is such a disk.
    """
    if place.is_root:
        raise ConfigError(
            f"the guest runs from the disk {disk!r}, so it cannot be unmounted",
            remedy="pass boot=True, so that the guest boots for each state; or keep what you test on a disk of its "
            "own: disks=['64MiB'] (marker vm)",
        )


def refuse_faults(engine: Engine) -> None:
    """Refuse to look at states while a fault is in force: the state would be blamed for it.

    Raises:
        ConfigError: there is one.
    """
    if found := engine.machines.faults.in_force:
        raise ConfigError(
            f"check() cannot tell a fault that is in force from a power cut: {found[0].text}",
            remedy="end the faults before: vm.faults.end_all()",
        )


@contextmanager
def shown(builder: Builder, engine: Engine) -> Iterator[Filter]:
    """What lets a disk have the state that was built. It is put under the disk while this lasts.

    What the guest writes goes into an overlay.
    """

    def device(place: filters.Place) -> Mapping[str, object]:
        base, top = place.files
        file = {"driver": "file", "filename": base, "read-only": True}
        return {
            "driver": "qcow2",
            "cache": {"no-flush": True},
            "file": {"driver": "file", "filename": top, "discard": "unmap"},
            "backing": {"driver": "raw", "file": file, "read-only": True},
        }

    with (
        empty_overlay(builder.size, engine.machines.hypervisor.cache) as overlay,
        Path(f"/proc/self/fd/{builder.file.fileno()}").open("rb") as content,
    ):
        yield Filter(order=filters.RECORDER, device=device, files=(content, overlay))


@contextmanager
def mounted(
    engine: Engine, disk: str, place: Place, builder: Builder, state: State
) -> Iterator[str]:
    """The guest with one state on the disk, mounted. Afterwards it is as before.

    Raises:
        ConfigError: the state cannot be mounted, or the disk is used.
    """
    refuse_faults(engine)
    refuse_root(disk, place)
    saved = engine.save()
    try:
        release(engine, disk, place)
        with builder.state(state):
            with shown(builder, engine) as content, engine.use() as running:
                running.machine.drives.insert(disk, content)
            compare(engine, place, checker.drop_script(place), builder, state)
            _mount(engine, place, state)
            yield place.folder
    finally:
        engine.roll_back(saved)


def _mount(engine: Engine, place: Place, state: State) -> None:
    script = f"{checker.drop_script(place)}\n{checker.mount_script(place)}"
    done = run_as_root(engine, script, check=False)
    if done.returncode:
        raise ConfigError(
            f"the state {state.name} cannot be mounted",
            details=printable(done.stdout + done.stderr),
            remedy="write it into a file with write_state(), and attach that with vm.attach_disk()",
        )
