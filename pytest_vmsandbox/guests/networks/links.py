"""What can be wrong with the links of a network."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.lasting import Lasting
from pytest_vmsandbox.core.spec import one_of
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.machine import cabling, host
from pytest_vmsandbox.machine.cards import Card
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.switch.conditions import Conditions
from pytest_vmsandbox.machine.switch.switch import Imposed, SwitchNetwork

LOG = "links.log"  # in the folder for a guest's logs
Direction = Literal["both", "to", "from"]
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)bit\s*")
_FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Rule:
    """Conditions for the frames from one guest, to one guest, or both; None for any."""

    conditions: Conditions
    source: str | None
    dest: str | None


class NetworkFault(Fault):
    """A fault of one network.

    Args:
        switch: what carries the network's frames.
    """

    needs_answers = False

    def __init__(self, engine: Engine, text: str, switch: SwitchNetwork) -> None:
        super().__init__(engine, text)
        self.switch = switch

    def pass_on(self, others: Mapping[str, Engine]) -> bool:  # noqa: ARG002
        """Its guest leaves the network. What is wrong between others now belongs to one of them.

        Args:
            others: the guests that are left, by their names.

        Returns:
            Whether there is such a guest. Otherwise this fault may end.
        """
        return False


class LinkFault(NetworkFault):
    """Something is wrong on the way through the switch. It outlives boots and snapshots of the guest."""

    def __init__(
        self, engine: Engine, text: str, switch: SwitchNetwork, rules: Sequence[Rule]
    ) -> None:
        super().__init__(engine, text, switch)
        self._rules = rules
        self._imposed: list[tuple[Rule, Imposed]] = []

    def _start(self) -> None:
        try:
            for rule in self._rules:
                imposed = self.switch.impose(rule.conditions, source=rule.source, dest=rule.dest)
                self._imposed.append((rule, imposed))
        except BaseException:
            self._end()
            raise

    def _stop(self) -> None:
        self._end()
        if (logs := self._engine.machines.logs) is not None:
            lines = self.switch.decisions(*(imposed for _, imposed in self._imposed))
            with (
                suppress(OSError),  # the fault is over, with or without its log
                open(logs / LOG, "a", encoding="utf-8", opener=host.private) as file,
            ):
                file.writelines(f"{line}\n" for line in (self.text, *lines))

    def pass_on(self, others: Mapping[str, Engine]) -> bool:
        """See `NetworkFault.pass_on`."""
        for rule in self._rules:
            heir = None if rule.source is None else others.get(rule.source)
            if heir is not None and rule.dest in others:
                former, self._engine = self._engine, heir
                former.machines.faults.pass_on(self, self._engine.machines.faults)
                return True
        return False

    def _end(self) -> None:
        for _, imposed in self._imposed:
            imposed.end()

    def forget(self, name: str) -> None:
        """A guest is gone. What was wrong with its links is over, also for a later one of that name.

        Raises:
            LaunchError: the switch is gone.
        """
        for rule, imposed in self._imposed:
            if rule in self._rules and name in (rule.source, rule.dest):
                imposed.end()
        self._rules = [rule for rule in self._rules if name not in (rule.source, rule.dest)]

    def rolled_back(self, *, was_in_force: bool) -> None:
        """It stays as it is."""


class Unplugged(NetworkFault):
    """The cable is out of a network card.

    Args:
        cable: held while the cable is pulled or put in.

    Attributes:
        card: that of the cable.
    """

    def __init__(
        self, engine: Engine, text: str, switch: SwitchNetwork, card: Card, cable: threading.Lock
    ) -> None:
        super().__init__(engine, text, switch)
        self.card = card
        self._cable = cable

    def _start(self) -> None:
        self.switch.check()
        self._settle()

    def _stop(self) -> None:
        self._settle()
        self.switch.check()  # without it, silence proves nothing about the cable

    def _settle(self) -> None:
        """Have the cable in, unless a fault that is in force has it out: this one, or another."""
        engine = self._engine
        with self._cable:
            if engine.loss is not None:
                return
            is_out = any(
                isinstance(fault := entry.fault, Unplugged)
                and fault.in_force
                and fault.card.device == self.card.device
                for entry in engine.machines.faults.in_force
            )
            with engine.use() as running:
                cabling.set_link(running.machine.execute, self.card, up=not is_out)

    def switched_on(self, machine: Machine) -> None:
        """The new machine's cable is out, too."""
        cabling.set_link(machine.execute, self.card, up=False)

    def rolled_back(self, *, was_in_force: bool) -> None:  # noqa: ARG002
        """It stays as it is, but what was saved has the cable as it was then."""
        self._settle()


class Capture(Lasting):
    """A capture of a network, which goes on until `end`, or until the end of its block."""

    def __init__(self, switch: SwitchNetwork, path: Path) -> None:
        self._stack = ExitStack()
        with ExitStack() as stack:
            file = stack.enter_context(path.open("wb", buffering=0))
            stack.enter_context(switch.capture(file))
            self._stack = stack.pop_all()

    def end(self) -> None:
        """End it. All frames until now are in the file. A second call does nothing."""
        self._stack.close()


def conditions_of(**values: float | str | None) -> Conditions:
    """The conditions that a user asks for. What is None is as usual.

    Raises:
        ConfigError: a value is invalid, or nothing is wrong with the link.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        names = ", ".join(f"{name}=" for name in values)
        raise ConfigError(
            "link needs to know what is wrong with the link", remedy=f"pass one of {names}"
        )
    numbers = {
        name: _rate(value) if name == "rate" else _number(name, value)
        for name, value in given.items()
    }
    conditions = replace(Conditions(), **numbers)  # type: ignore[arg-type]
    if conditions == Conditions():
        raise ConfigError(
            f"{', '.join(f'{name}={value!r}' for name, value in given.items())} is a link as usual",
            remedy="use more than 0, such as latency=0.05",
        )
    return conditions


def text_of(conditions: Conditions, direction: Direction) -> str:
    """What conditions do, in a few words."""
    usual = Conditions()
    said = []
    for field in fields(conditions):
        if (value := getattr(conditions, field.name)) == getattr(usual, field.name):
            continue
        if field.name in ("latency", "jitter"):
            said.append(f"{field.name} {value:g} s")
        elif field.name == "rate":
            said.append(f"rate {value:g} bit/s")
        else:
            said.append(f"{field.name} {value:.4g}")
    way = {"both": "", "to": " (to it)", "from": " (from it)"}[direction]
    return ", ".join(said) + way


def rules_of(name: str, conditions: Conditions, direction: object) -> tuple[Direction, list[Rule]]:
    """The rules for a guest's link.

    Raises:
        ConfigError: there is no such direction.
    """
    way: Direction = one_of(get_args(Direction), direction, "direction")
    rules = [Rule(conditions, name, None)] * (way != "to")
    return way, rules + [Rule(conditions, None, name)] * (way != "from")


def cuts(side: Sequence[str], other: Sequence[str], *, one_way: bool) -> list[Rule]:
    """The rules that keep frames of one side from the other."""
    cut = Conditions(cut=True)
    rules = [Rule(cut, source, dest) for source in side for dest in other]
    return rules + [Rule(cut, it.dest, it.source) for it in ([] if one_way else rules)]


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        example = "0.05 for 50 ms" if name in ("latency", "jitter") else "0.1 for every tenth frame"
        raise ConfigError(f"{name}={value!r} is not a number", remedy=f"use for instance {example}")
    return _finite(name, value)


def _rate(value: object) -> float:
    if isinstance(value, str) and (match := _RATE.fullmatch(value)):
        return float(match[1]) * _FACTORS[match[2]]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"rate={value!r} is not a number of bits per second",
            remedy="use for instance '10Mbit' (bit, kbit, Mbit, Gbit), or a number",
        )
    return _finite("rate", value)


def _finite(name: str, value: float) -> float:
    with suppress(OverflowError):
        if math.isfinite(number := float(value)):
            return number
    raise ConfigError(f"{name} is not a finite number", remedy="use an ordinary one, such as 0.1")
