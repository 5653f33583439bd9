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
from pytest_vmsandbox.guests.replay.store import RecordedStore
from pytest_vmsandbox.plugin.run import Run


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
            keeper, begun, is_lost = cls(recorded, opened), monotonic(), False
            try:
                yield keeper
            except Exception:
                is_lost = True
                raise
            finally:
                recorded.finish()
                if item is not None and (is_lost or keeper.failure()):
                    keeper._keep(run, factory, item, digest=digest, seconds=monotonic() - begun)

    def _keep(
        self, run: Run, factory: GuestFactory, item: pytest.Item, *, digest: str, seconds: float
    ) -> None:
        try:
            RecordedStore(factory.backend.cache).keep(
                self.run,
                self.opened,
                nodeid=item.nodeid,
                rootdir=run.config.rootpath,
                failure=self.failure(),
                digest=digest,
                seconds=seconds,
            )
        except VMSandboxError as error:
            run.tell_problem(f"the recording of {item.nodeid} was not kept: {error.brief}")
        else:
            line = f"vmsandbox replay {shlex.quote(item.nodeid)}"
            run.tell(f"{item.nodeid} was recorded, which is experimental: {line}")
