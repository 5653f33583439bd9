"""The guests that tests run inside. Each place has one guest, which is opened, replaced and ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from pytest_vmsandbox.core.errors import (
    INFRASTRUCTURE,
    CacheError,
    GuestLost,
    InterpreterLost,
    TransferError,
    VMSandboxError,
)
from pytest_vmsandbox.core.text import printable
from pytest_vmsandbox.plugin.in_vm import pulling
from pytest_vmsandbox.plugin.in_vm.measuring import Measuring
from pytest_vmsandbox.plugin.in_vm.provisioning import COLLECT_SECONDS, Lease, Provisioner
from pytest_vmsandbox.plugin.in_vm.side_messages import SideMessages
from pytest_vmsandbox.plugin.plan import Place, plan_of
from pytest_vmsandbox.plugin.run import Run

_MOST_UNLUCKY = 3  # tests in a row that lose their guest, and a fresh one, to the host or chance
_TEAR_DOWN_SECONDS = 10.0  # after Ctrl-C; longer on a slow host


class Leases:
    """The guests of one run that tests run inside.

    Args:
        messages: gets what a session says before it runs tests, and when it is interrupted.
    """

    def __init__(self, run: Run, session: pytest.Session, messages: SideMessages) -> None:
        self._run = run
        self._messages = messages
        self._provisioner = Provisioner(run, session)
        self._leases: dict[Place, Lease] = {}
        self._failures: dict[Place, VMSandboxError] = {}
        self._unlucky: dict[Place, int] = {}
        self._finished_badly: set[Place] = set()  # kinds of guests with a session that ended badly

    # -- having one ---------------------------------------------------------------------------

    def lease(self, item: pytest.Item) -> Lease:
        """The guest for a test, with a session that has collected.

        If the guest is lost because of the host or chance, a fresh one is tried, once.

        Raises:
            VMSandboxError: no guest can be made ready.
        """
        kind = plan_of(item).kind
        any_kind = kind._replace(shared="any")  # of this image and hardware
        for failed in (any_kind, kind):
            if failed in self._failures:
                raise self._failures[failed].with_traceback(None)  # else it grows with each test
        try:
            lease = self._ready_or_retried(item)
        except VMSandboxError as error:
            self._unlucky[kind] = self._unlucky.get(kind, 0) + 1
            if not error.transient or self._unlucky[kind] == _MOST_UNLUCKY:
                # The next guest would fail in the same way.
                is_general = isinstance(error, TransferError | CacheError)
                self._failures[any_kind if is_general else kind] = error
            raise
        self._unlucky.pop(kind, None)
        return lease

    def _ready_or_retried(self, item: pytest.Item) -> Lease:
        try:
            return self._ready(item)
        except VMSandboxError as error:
            if not error.transient:
                raise
            self._run.note_retry(error, item)
        return self._ready(item)

    def _ready(self, item: pytest.Item) -> Lease:
        """The guest for a test, with a session that has collected. It is opened if need be."""
        self._drop_lost(item)
        plan = plan_of(item)
        if plan.place not in self._leases:
            self._leases[plan.place] = self._provisioner.open(plan)
        lease = self._leases[plan.place]
        if not lease.is_recorded:  # else nobody can ask it anything
            for guest in lease.guests:
                self._run.note_use(guest)
        try:
            if lease.session is None:
                lease.start(item.config.rootpath)
            while lease.said:
                self._messages.tell(lease, lease.said.pop(0))
        except (GuestLost, InterpreterLost) as error:
            self._abandon(lease, error)
            if not lease.has_collected:  # collecting did this, and would do it again
                raise
            return self._ready(item)  # it worked once: a fresh guest will work
        lease.has_collected = True
        return lease

    def _drop_lost(self, item: pytest.Item) -> None:
        """End the guest for a test if it is lost."""
        lease = self._leases.get(plan_of(item).place)
        if lease is None or (loss := lease.loss) is None:
            return
        self._note_loss(lease)
        self._end(item)
        if loss.transient:  # the test may already have run in it, ahead of its reports
            self._run.note_retry(loss, item)
        else:
            self._run.tell_problem(f"between two tests: {loss.brief}")

    # -- the end of one -----------------------------------------------------------------------

    def lose(self, lease: Lease, error: VMSandboxError) -> None:
        """Handle a session that ended in the middle of a test. A broken guest is ended, too."""
        error.details = lease.reader.text(error.details)
        if lease.session is not None and Measuring.of(self._run.config) is not None:
            self._run.tell(
                f"coverage of tests inside {lease.guest.name} is not complete: a test crashed its "
                "interpreter or lost its guest"
            )
        if isinstance(error, InterpreterLost):
            lease.session = None
        elif isinstance(error, INFRASTRUCTURE):
            self._abandon(lease, error)

    def _abandon(self, lease: Lease, error: VMSandboxError) -> None:
        """End a guest because of an error."""
        self._leases = {place: other for place, other in self._leases.items() if other is not lease}
        self._note_loss(lease)
        try:
            with lease.stack:
                raise error  # the guest's context sees the error
        except Exception as raised:  # noqa: BLE001  # a user's hook may raise anything
            if raised is not error:
                self._run.tell_problem(f"ending the guest {lease.guest.name} failed: {raised!r}")

    def interrupt(self, item: pytest.Item) -> None:
        """Let the session of a test, if there is one, tear everything down, as after Ctrl-C."""
        lease = self._leases.get(plan_of(item).place)
        if lease is not None and lease.session is not None:
            for message in lease.session.interrupt(_TEAR_DOWN_SECONDS * lease.connection.patience):
                with suppress(VMSandboxError):  # not important now
                    self._messages.tell(lease, message)
            lease.session = None

    @contextmanager
    def ending(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        """Tear down this side's fixtures in the block. Then end the guest, unless the next test needs it."""
        place = plan_of(item).place
        with ExitStack() as stack:
            is_over = place.shared != "session" and not plan_of(item).shares_with(nextitem)
            if is_over and place in self._leases:
                stack.callback(self._end, item)
                self._wind_up(item)
            yield

    def _wind_up(self, item: pytest.Item) -> None:
        """Let a session end, and bring back what its tests have left.

        If each test has a guest of its own, only the first session that ends badly is reported.
        """
        plan = plan_of(item)
        lease = self._leases[plan.place]
        problems = self._finish(lease)
        if problems and plan.kind not in self._finished_badly:
            self._finished_badly.add(plan.kind)
            for problem in problems:
                self._run.tell_problem(problem)
        self._bring_back(lease)

    def _end(self, item: pytest.Item) -> None:
        self._leases.pop(plan_of(item).place).stack.close()

    def close(self) -> None:
        """Let all sessions tear down what is left, and end the guests."""
        problems = []
        for place, lease in list(self._leases.items()):
            try:
                problems += self._finish(lease)
            except (VMSandboxError, TimeoutError) as error:
                problems.append(str(error))
            self._bring_back(lease)
            del self._leases[place]
            try:
                lease.stack.close()
            except Exception as error:  # noqa: BLE001  # a user's hook may raise anything
                problems.append(str(error) if isinstance(error, VMSandboxError) else repr(error))
        for problem in problems:
            self._run.tell_problem(f"ending the guests of tests inside failed: {problem}")

    def _finish(self, lease: Lease) -> list[str]:
        """Let a session tear down what is left, and end.

        Returns:
            What went wrong, for people.

        Raises:
            VMSandboxError: the session does not end properly.
        """
        if lease.session is None:
            return []
        if (loss := lease.guest.engine.loss) is not None:
            return [f"{lease.guest.name} was lost after its last test: {loss.brief}"]
        said = lease.session.finish(COLLECT_SECONDS * lease.connection.patience)
        lease.is_untouched = any("untouched" in message for message in said)
        if (measuring := Measuring.of(self._run.config)) is not None:
            measuring.keep(said, lease.payload.tree, lease.guest.name)
        has_failed = lease.has_failed or lease.session.collected.has_errors
        allowed = {0, 1} if has_failed else {0, 5}  # as pytest ends: 5 is «no tests»
        problems = []
        for message in said:
            if "allure" in message:  # results of fixtures that were torn down just now
                self._messages.tell(lease, message)
            if "exit" in message and message["exit"] not in allowed:
                tail = lease.reader.text(printable(str(message.get("tail", ""))))
                problems.append(
                    f"{lease.guest.name}: {tail}\n  pytest in this guest ended with status "
                    f"{message['exit']}. No test caused that, but a conftest.py or a plugin did"
                )
        return problems

    def _bring_back(self, lease: Lease) -> None:
        """Bring back files that tests have written into the project. The guest's session is over."""
        if not lease.has_collected or lease.is_untouched or lease.is_recorded:
            return
        if lease.guest.engine.loss is not None:
            self._note_loss(lease)
            return
        try:
            found = pulling.bring_back(self._run, lease.guest, lease.tree, lease.payload.tree)
        except VMSandboxError as error:
            about = f"files that tests wrote in {lease.guest.name} were not brought back: {error}"
            self._run.tell_problem(about)
            return
        for outcome, paths in found.items():
            pulling.note(self._run.pulled, outcome.value, paths)

    def _note_loss(self, lease: Lease) -> None:
        """Report at the end that files written in a guest are lost, if they would have come back."""
        if lease.has_collected and not lease.is_recorded:
            pulling.note(self._run.pulled, pulling.LOST, [lease.guest.name])
