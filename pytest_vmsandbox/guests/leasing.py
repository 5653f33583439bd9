"""Hands a guest that answers out to who has asked for it, and says so to the factory's owner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pytest_vmsandbox.core.errors import GuestLost, LaunchError, VMSandboxError
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.machine import host

T = TypeVar("T")


def retried(backend: Backend, work: Callable[[], T]) -> T:
    """Call `work`, and call it again if the host or chance took its guest away."""
    _ = backend.hypervisor  # it raises the limit on open files
    host.require_descriptors()
    try:
        return work()
    except VMSandboxError as error:
        if not error.transient:
            raise
        backend.callbacks.note_retry(error)
    return work()


@contextmanager
def leased(backend: Backend, guest: Guest) -> Iterator[Guest]:
    """Hand out a guest that answers. What was forked from it is gone at the end.

    Raises:
        GuestLost: at the end: the disk of this machine was full or failed, whatever the guest and
            the block made of that.
        LaunchError: at the end: the switch of the guest's networks is gone.
    """
    callbacks = backend.callbacks
    with backend.idle.holding(guest.engine):
        callbacks.guest_ready(guest)
        try:
            with on_sound_host(guest), guest.engine.machines.forks:
                yield guest
        except (KeyboardInterrupt, SystemExit, GeneratorExit):  # there is no time
            raise
        except BaseException as error:  # pytest's failures are no subclasses of Exception
            callbacks.guest_stopping(guest, error)
            raise
        else:
            callbacks.guest_stopping(guest, None)


@contextmanager
def on_sound_host(guest: Guest) -> Iterator[None]:
    """Check at the end that this machine could use the guest's disks, and still has its networks.

    Raises:
        GuestLost: it could not use a disk. So nothing in the block proves anything, whether it failed or not.
        LaunchError: the switch is gone, with the same consequence.
    """
    with guest.engine.explained():
        try:
            yield
        except (GuestLost, LaunchError):
            raise
        except Exception as error:
            try:
                _check(guest)
            except (GuestLost, LaunchError) as cause:
                raise cause from error
            raise
        _check(guest)


def _check(guest: Guest) -> None:
    guest.engine.check_disks()
    for place in guest.engine.machines.cards:
        place.check()
