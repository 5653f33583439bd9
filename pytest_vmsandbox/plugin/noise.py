"""Disturbs the guests of tests while these run: ``--vm-noise``."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.guests.noise import Noise

_NAME = "vmsandbox-noise"


def register(config: pytest.Config) -> None:
    """Let this run have noise, if it asks for it."""
    if config.getoption("--vm-noise"):
        config.pluginmanager.register(NoiseInTests(), _NAME)


@contextmanager
def during(item: pytest.Item) -> Iterator[None]:
    """In the block, a test runs inside its guest. It has noise if the run asks for it."""
    noise = item.config.pluginmanager.get_plugin(_NAME)
    if noise is None:
        yield
        return
    with noise.during(item):
        yield


class NoiseInTests:
    """Disturbs all guests while the function of a test runs. It is registered as a plugin."""

    def __init__(self) -> None:
        self._guests: list[Guest] = []  # those that run
        self._noise: Noise | None = None  # while it lasts
        self._test = ""  # the last test
        self._was_disturbed = False  # whether it had noise

    def pytest_report_header(self) -> str:
        """Say that there is noise."""
        from pytest_vmsandbox.guests.noise import TEXT

        return f"vmsandbox: noise in guests while tests run: {TEXT}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Disturb the guests of a test that runs here."""
        with self.during(item):
            return (yield)

    @contextmanager
    def during(self, item: pytest.Item) -> Iterator[None]:
        """Disturb guests in the block, also those that come meanwhile."""
        from pytest_vmsandbox.guests.noise import Noise

        self._test, self._was_disturbed = item.nodeid, False
        noise = Noise()
        try:
            self._noise = noise
            for guest in self._guests:
                self._disturb(noise, guest)
            yield
        finally:
            self._noise = None
            noise.close()

    def _disturb(self, noise: Noise, guest: Guest) -> None:
        noise.disturb(guest)
        self._was_disturbed = True

    @pytest.hookimpl(trylast=True)  # hooks of users make it ready without noise
    def pytest_vmsandbox_guest_ready(self, guest: Guest) -> None:
        """A guest runs from now on."""
        self._guests.append(guest)
        if self._noise is not None:
            self._disturb(self._noise, guest)

    @pytest.hookimpl(tryfirst=True)
    def pytest_vmsandbox_guest_stopping(self, guest: Guest) -> None:
        """A guest is about to end."""
        if guest in self._guests:  # else a hook has failed before it was ready
            self._guests.remove(guest)

    @pytest.hookimpl(tryfirst=True)  # before xdist sends the report
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Let a failure say that there was noise."""
        from pytest_vmsandbox.guests.noise import TEXT

        if report.failed and report.nodeid == self._test and self._was_disturbed:
            report.sections.append(("vmsandbox", f"with noise: {TEXT}"))
