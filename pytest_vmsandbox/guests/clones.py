"""Whether a guest can be a clone, and of which template. If it cannot, it has to be booted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property, partial

from pytest_vmsandbox.core.errors import GuestLost, LaunchError, MonitorError, VMSandboxError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.cloning import Clone, cloned
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.pool import Pool
from pytest_vmsandbox.guests.provision import PreparedImage, Step
from pytest_vmsandbox.guests.template_builder import (
    NoTemplateError,
    OpenTemplate,
    TemplateBuilder,
    template_key,
)
from pytest_vmsandbox.machine.quota import Quota

_MOST_LOST = 3  # clones in a row that are lost before anybody has them; then guests are booted


class Clones:
    """The clones of one run. Guests of a kind that cannot be cloned have to be booted."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._impossible: set[str] = set()  # keys of templates that cannot be
        self._expected: Counter[tuple[PreparedImage, Hardware]] = Counter()

    def expect(self, prepared: PreparedImage, hardware: Hardware, count: int) -> None:
        """Be told that so many guests of a kind are going to be asked for."""
        self._expected[prepared, hardware] += count

    def build_template(self, blueprint: Blueprint, steps: Sequence[Step]) -> None:
        """See that guests can be cloned, where any can."""
        if self._may_clone(blueprint, steps):
            try:
                self._builder.obtain(blueprint, steps)
            except NoTemplateError as error:
                self._fall_back(blueprint, steps, error)

    def guest(
        self, blueprint: Blueprint, prepared: PreparedImage, stack: ExitStack
    ) -> Guest | None:
        """A guest that is a clone, running; None where it has to be booted.

        Args:
            stack: ends it.

        Raises:
            VMSandboxError: the host or chance took it away, or it cannot be prepared.
        """
        if not self._may_clone(blueprint, prepared.steps):
            return None
        try:
            opened, clone, was_armed = self._lease(blueprint, prepared, stack)
        except (LaunchError, GuestLost, MonitorError) as error:
            if error.transient:
                raise
            self._fall_back(blueprint, prepared.steps, error)
            return None
        self._backend.callbacks.guest_begun(clone.machines.name)
        engine = self._backend.engine(clone.machines)
        engine.spec = blueprint.hardware  # its user may be another one
        engine.origin = "armed" if was_armed else "cloned"
        engine.facts = opened.template.facts
        return Guest(stack.enter_context(engine))

    def _lease(
        self, blueprint: Blueprint, prepared: PreparedImage, stack: ExitStack
    ) -> tuple[OpenTemplate, Clone, bool]:
        """A clone of a template that is what it was when it was built."""
        ahead = self._backend.settings.clones == "armed"
        kind = prepared, blueprint.hardware
        lost: list[VMSandboxError] = []
        while len(lost) < _MOST_LOST:
            opened = self._builder.obtain(blueprint, prepared.steps)
            count = self._expected.pop(kind, 0)
            if ahead and count:
                self.pool.expect(opened, blueprint, count)
            own = stack.enter_context(ExitStack())
            try:
                leased = own.enter_context(self.pool.lease(opened, blueprint, more=ahead))
            except VMSandboxError as error:
                failure, fault = error, opened.fault(anew=True)
                # A host with too much to do may lose one.
                if not (fault or failure.transient or isinstance(failure, GuestLost)):
                    raise
            else:
                if not (fault := opened.fault(anew=False)):
                    return opened, *leased
                failure = LaunchError("its template was damaged", details=fault)
            lost.append(failure)
            if fault:
                own.close()
                self._expected[kind] = self.pool.forget(opened) + 1  # this one
                self._builder.drop(opened, fault)
        raise LaunchError(
            f"{len(lost)} clones in a row were lost, the last one so: {lost[-1].brief}",
            details=lost[-1].details,
            remedy=lost[-1].remedy,
        ) from lost[-1]

    def _may_clone(self, blueprint: Blueprint, steps: Sequence[Step]) -> bool:
        is_possible = template_key(blueprint, steps) not in self._impossible
        return self._backend.settings.clones != "never" and is_possible

    def _fall_back(
        self, blueprint: Blueprint, steps: Sequence[Step], error: VMSandboxError
    ) -> None:
        """Let guests of a kind be booted from now on, and say so once."""
        self._impossible.add(template_key(blueprint, steps))
        self._backend.callbacks.tell(
            f"guests of {blueprint.image} are booted one by one, not cloned: {error.brief}"
        )

    @cached_property
    def _builder(self) -> TemplateBuilder:
        """Made once, and ended after the pool."""
        self._backend.clean()
        return self._backend.stack.enter_context(TemplateBuilder(self._backend))

    @cached_property
    def pool(self) -> Pool:
        """Arms clones ahead of demand."""
        quota = Quota(self._backend.hypervisor.folder)
        return self._backend.stack.enter_context(Pool(partial(cloned, self._backend), quota))
