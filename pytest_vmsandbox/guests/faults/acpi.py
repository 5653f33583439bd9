"""ACPI registers of the board of x86, which the firmware loses when a guest wakes up.

SeaBIOS sets up these registers at a boot, but on this board not when a guest wakes up from S3. Linux relies
on them: without them, it does not switch off, sees no plugged device, and does not fall asleep again.
"""

from __future__ import annotations

import re

from pytest_vmsandbox.machine.machine import Machine

_ADDRESS, _DATA = 0xCF8, 0xCFC  # of the configuration space of PCI devices
_BRIDGE = 0x8000F800  # the device 00:1f.0 there
_BASE, _CONTROL = 0x40, 0x44  # where the registers are, and whether they are there
# Events, control, general events, management interrupts: what is enabled. Sizes as the monitor says them: h is 16 bits, w is 32.
_ENABLED = (("h", 0x602), ("h", 0x604), *(("b", 0x628 + n) for n in range(8)), ("w", 0x630))


class AcpiRegisters:
    """The ACPI registers of a machine of x86, as they are now. It must be paused."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._where = {place: self._configured(place) for place in (_BASE, _CONTROL)}
        self._enabled = {(size, port): self._read(size, port) for size, port in _ENABLED}

    def restore(self) -> None:
        """Write them again. The machine must be paused."""
        for place, value in self._where.items():
            self._configured(place, value)
        for (size, port), value in self._enabled.items():
            self._write(size, port, value)

    def _configured(self, place: int, value: int | None = None) -> int:
        """A value in the bridge's configuration space. The guest may be using the same ports."""
        address = self._read("w", _ADDRESS)
        self._write("w", _ADDRESS, _BRIDGE | place)
        if value is not None:
            self._write("w", _DATA, value)
        value = self._read("w", _DATA)
        self._write("w", _ADDRESS, address)
        return value

    def _read(self, size: str, port: int) -> int:
        answer = self._machine.human(f"i /{size} {port:#x}")  # portw[0x0602] = 0x0001
        found = re.search(r"= (0x[0-9a-f]+)", answer)
        return int(found[1], 16) if found else 0

    def _write(self, size: str, port: int, value: int) -> None:
        self._machine.human(f"o /{size} {port:#x} {value:#x}")
