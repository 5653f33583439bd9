"""The networks of one run."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from typing import Protocol

from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.guests.networks.dhcp import serving
from pytest_vmsandbox.guests.networks.network import Network
from pytest_vmsandbox.guests.networks.subnets import checked_name, checked_settings
from pytest_vmsandbox.machine.hypervisor import Hypervisor

_SERVER = "(dhcp)"  # no guest has such a name


class Owner(Protocol):
    """What the networks of a run belong to. A `Backend` is one.

    Attributes:
        stack: is closed at the end of the run.
    """

    stack: ExitStack

    @property
    def hypervisor(self) -> Hypervisor:
        """What has the switch."""


class Networks:
    """Makes networks. Those that are left end with the run."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._made: list[Network] = []
        self._lock = threading.Lock()
        self._ends = False  # with the run

    def make(
        self, name: object, ipv4: object, ipv6: object, addresses: object, seed: object
    ) -> Network:
        """A new network.

        Raises:
            ConfigError: an argument is invalid.
            LaunchError: the switch cannot be started.
        """
        named = checked_name(name)
        with self._lock:
            self._made = [network for network in self._made if not network.is_over]
            taken = [network.subnets for network in self._made]
            subnets, addressing, number = checked_settings(ipv4, ipv6, addresses, seed, taken)
            switch = self._owner.hypervisor.switch.network(named, seed=number)
            if not self._ends:  # before the switch, which is running now
                self._owner.stack.callback(self._end)
                self._ends = True
            network = Network(named, subnets, addressing, switch)
            if addressing == "dhcp":
                self._serve(network)
            self._made.append(network)
        return network

    def _end(self) -> None:
        for network in self._made:
            with suppress(LaunchError):  # each test and guest has been told
                network.end()

    def _serve(self, network: Network) -> None:
        """Start the network's DHCP server. It ends with the network."""
        port = network.switch.port(_SERVER)
        network.own.callback(port.close)
        loop = self._owner.hypervisor.loop
        network.own.enter_context(serving(port.socket, loop, network.subnets, network.address_of))
