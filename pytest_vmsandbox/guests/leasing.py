"""Hands a guest that answers out to who has asked for it, and says so to the factory's owner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pytest_vmsandbox.core.errors import GuestLost, VMSandboxError
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
    """
    callbacks = backend.callbacks
    with backend.idle.holding(guest.engine):
        callbacks.guest_ready(guest)
        try:
            with on_sound_disks(guest), guest.engine.machines.forks:
                yield guest
        except (KeyboardInterrupt, SystemExit, GeneratorExit):  # there is no time
            raise
        except BaseException as error:  # pytest's failures are no subclasses of Exception
            callbacks.guest_stopping(guest, error)
            raise
        else:
            callbacks.guest_stopping(guest, None)


@contextmanager
def on_sound_disks(guest: Guest) -> Iterator[None]:
    """Check at the end that this machine could read and write the guest's disks.

    Raises:
        GuestLost: it could not. So nothing in the block proves anything, whether it failed or not.
    """
    with guest.engine.explained():
        try:
            yield
        except GuestLost:
            raise
        except Exception as error:
            try:
                guest.engine.check_disks()
            except GuestLost as lost:
                raise lost from error
            raise
        guest.engine.check_disks()
