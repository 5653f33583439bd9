"""Records tests inside guests (``--vm-record``), and keeps the runs of those that fail."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import monotonic

import pytest

from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.cloning.template_builder import OpenTemplate
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.provision import PreparedImage
from pytest_vmsandbox.guests.replay.run import RecordedRun
from pytest_vmsandbox.guests.replay.store import MOST, RecordedStore
from pytest_vmsandbox.plugin.reporting import FAILED
from pytest_vmsandbox.plugin.run import Run

_KEPT = pytest.StashKey[int]()  # how many recordings this run has kept


@dataclass(eq=False)
class Keeper:
    """A run that is being recorded.

    Attributes:
        run: the guest.
        opened: its template.
        failure: how its test has failed, as pytest shows it; empty if it has not.
    """

    run: RecordedRun
    opened: OpenTemplate
    failure: Callable[[], str] = str

    @classmethod
    @contextmanager
    def recording(
        cls, run: Run, factory: GuestFactory, image: PreparedImage, hardware: Hardware
    ) -> Iterator[Keeper]:
        """Record a guest. At the end, the recording is kept if its test has failed, or it was lost.

        Raises:
            ConfigError: such a guest cannot be recorded.
            VMSandboxError: there is no such guest.
        """
        item = run.item
        with ExitStack() as stack:
            folder = stack.enter_context(factory.backend.hypervisor.scratch("recording"))
            recorded, opened, digest = factory.recorded(image, hardware, folder, stack)
            keeper, begun, lost = cls(recorded, opened), monotonic(), ""
            try:
                yield keeper
            except VMSandboxError as error:
                lost = "" if error.transient else str(error)  # what the host did cannot be repeated
                raise
            finally:
                recorded.finish()
                failure = keeper.failure() or lost
                if item is not None and failure:
                    seconds = monotonic() - begun
                    keeper._keep(run, factory, item, failure, digest=digest, seconds=seconds)
                elif item is not None and item.stash.get(FAILED, False):
                    run.tell(f"{item.nodeid} was not recorded: it failed before it could run")

    def _keep(
        self,
        run: Run,
        factory: GuestFactory,
        item: pytest.Item,
        failure: str,
        *,
        digest: str,
        seconds: float,
    ) -> None:
        if (count := run.config.stash.get(_KEPT, 0)) == MOST:
            run.tell(f"a run keeps {MOST} recordings. Later failures were not kept")
            return
        try:
            RecordedStore(factory.backend.cache).keep(
                self.run,
                self.opened,
                nodeid=item.nodeid,
                rootdir=run.config.rootpath,
                failure=failure,
                digest=digest,
                seconds=seconds,
            )
        except (VMSandboxError, OSError) as error:
            why = error.brief if isinstance(error, VMSandboxError) else error
            run.tell_problem(f"the recording of {item.nodeid} was not kept: {why}")
        else:
            run.config.stash[_KEPT] = count + 1
            line = f"vmsandbox replay {shlex.quote(item.nodeid)}"
            run.tell(f"{item.nodeid} was recorded, which is experimental: {line}")
