"""Decides whether a guest can be a clone, and of which template. If not, it must be booted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property, partial

from pytest_vmsandbox.core.errors import GuestLost, LaunchError, MonitorError, VMSandboxError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.cloning.making import Clone, call, cloned
from pytest_vmsandbox.guests.cloning.pool import Pool
from pytest_vmsandbox.guests.cloning.template_builder import (
    OpenTemplate,
    TemplateBuilder,
    template_key,
)
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.provision import PreparedImage, Step
from pytest_vmsandbox.guests.templates import NoTemplateError

_MOST_LOST = 3  # clones lost in a row before a test has one; after that, guests are booted


class Clones:
    """The clones of one run. Kinds of guests that cannot be cloned must be booted."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._impossible: set[str] = set()  # keys of templates that cannot be built
        self.refusals: dict[str, VMSandboxError] = {}  # image → why its guests are booted
        self._expected: Counter[tuple[PreparedImage, Hardware]] = Counter()

    def expect(self, prepared: PreparedImage, hardware: Hardware, count: int) -> None:
        """Note that `count` guests of a kind will be asked for."""
        self._expected[prepared, hardware] += count

    def build_template(self, blueprint: Blueprint, steps: Sequence[Step]) -> None:
        """Build the template of these guests, if they can be cloned."""
        if self._may_clone(blueprint, steps):
            try:
                self._builder.obtain(blueprint, steps)
            except NoTemplateError as error:
                self._fall_back(blueprint, steps, error)

    def opened(self, blueprint: Blueprint, steps: Sequence[Step]) -> OpenTemplate:
        """The open template of such guests.

        Raises:
            NoTemplateError: they cannot be cloned.
        """
        return self._builder.obtain(blueprint, steps)

    def guest(
        self, blueprint: Blueprint, prepared: PreparedImage, stack: ExitStack, hostname: str = ""
    ) -> Guest | None:
        """A running clone; None if the guest must be booted.

        Args:
            stack: ends the guest.
            hostname: of the guest; empty for its name.

        Raises:
            VMSandboxError: the guest was lost because of the host or chance, or cannot be prepared.
        """
        if not self._may_clone(blueprint, prepared.steps):
            return None
        try:
            opened, clone, was_armed = self._lease(blueprint, prepared, stack)
            if hostname:
                call(self._backend, clone, hostname)
        except (LaunchError, GuestLost, MonitorError) as error:
            if error.transient:
                raise
            self._fall_back(blueprint, prepared.steps, error)
            return None
        self._backend.callbacks.guest_begun(clone.machines.name)
        engine = self._backend.engine(clone.machines)
        engine.spec = blueprint.hardware  # its user may differ from the template's
        engine.origin = "armed" if was_armed else "cloned"
        engine.facts = opened.template.facts
        return Guest(stack.enter_context(engine))

    def _lease(
        self, blueprint: Blueprint, prepared: PreparedImage, stack: ExitStack
    ) -> tuple[OpenTemplate, Clone, bool]:
        """A clone of an undamaged template."""
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
                failure, fault = error, opened.fault(again=True)
                # An overloaded host may lose a clone.
                if not (fault or failure.transient or isinstance(failure, GuestLost)):
                    raise
            else:
                if not (fault := opened.fault(again=False)):
                    return opened, *leased
                failure = LaunchError("its template was damaged", details=fault)
            lost.append(failure)
            if fault:
                own.close()
                self._expected[kind] = self.pool.forget(opened) + 1  # this one
                self._builder.drop(opened, fault)
        raise LaunchError(
            f"{len(lost)} clones in a row were lost. The last error: {lost[-1].brief}",
            details=lost[-1].details,
            remedy=lost[-1].remedy,
        ) from lost[-1]

    def _may_clone(self, blueprint: Blueprint, steps: Sequence[Step]) -> bool:
        # Without a way in, nobody could wake a clone.
        is_possible = (
            blueprint.has_way_in and template_key(blueprint, steps) not in self._impossible
        )
        return self._backend.settings.clones != "never" and is_possible

    def _fall_back(
        self, blueprint: Blueprint, steps: Sequence[Step], error: VMSandboxError
    ) -> None:
        """Boot guests of a kind from now on, and report that once."""
        self._impossible.add(template_key(blueprint, steps))
        self.refusals[blueprint.image] = error
        self._backend.callbacks.tell(
            f"guests of {blueprint.image} are booted, because they cannot be cloned: {error.brief}. Tests "
            "give the same results, but are slower"
        )

    @cached_property
    def _builder(self) -> TemplateBuilder:
        """Builds and opens templates. It ends after the pool."""
        self._backend.clean()
        return self._backend.stack.enter_context(TemplateBuilder(self._backend))

    @cached_property
    def pool(self) -> Pool:
        """Arms clones ahead of demand."""
        backend = self._backend
        return backend.stack.enter_context(Pool(partial(cloned, backend), backend.quota))
