"""A guest's TPM: the program swtpm, one process for each machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.machine.process import Identity, Launcher, OwnedProcess

PROGRAM = "swtpm"
_CONTROL, _STATE = 3, 4  # its descriptors


def find_swtpm() -> str:
    """The path of the program that emulates TPMs.

    Raises:
        LaunchError: it is missing.
    """
    if path := programs.find(PROGRAM):
        return path
    raise LaunchError(
        f"there is no {PROGRAM} on this machine, so guests can have no TPM",
        remedy=f"install it: {programs.install_line([programs.package_of(PROGRAM)])}",
    )


def argv(program: str) -> list[str]:
    """Its command line: a TPM 2.0, controlled by a socket, with its state in an open folder.

    It has a seccomp sandbox of its own, which is on by default. It ends when QEMU closes the socket.
    """
    return [
        *(program, "socket", "--tpm2", "--terminate"),
        *("--ctrl", f"type=unixio,clientfd={_CONTROL}"),
        *("--tpmstate", f"dir=/proc/self/fd/{_STATE},mode=0600"),
    ]


@dataclass(frozen=True, kw_only=True)
class Tpm:
    """A running TPM.

    Attributes:
        process: emulates it.
        channel: the socket for QEMU.
    """

    process: OwnedProcess
    channel: socket.socket

    @property
    def said(self) -> str:
        """The last lines that it wrote, for the details of an error; with a hint if it was denied a file."""
        lines = self.process.stderr_tail
        if not lines:
            return ""
        if "Permission denied" in lines:
            lines += (
                "AppArmor may keep it from its state, which is in the cache. Ubuntu allows it folders in "
                f"your home and in /tmp: set {paths.CACHE} to one of them\n"
            )
        return f"--- {PROGRAM}, the TPM\n{lines}"


@contextmanager
def running(launcher: Launcher, folder: Path, identity: Identity | None) -> Iterator[Tpm]:
    """A TPM. At the end it is killed.

    Args:
        folder: keeps what a TPM keeps without power. A TPM in an empty folder is a new one, with
            seeds of its own.
        identity: the user that it runs as; None for this process's user.

    Raises:
        LaunchError: it is missing, or cannot be started.
    """
    program = find_swtpm()
    if identity is not None:
        for path in (folder, *folder.iterdir()):  # a kept guest's TPM has files before
            os.chown(path, identity.uid, identity.gid)
    state = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    ours, theirs = socket.socketpair()
    with ours:
        try:
            spawned = launcher.spawn(
                argv(program),
                fds={_CONTROL: theirs.fileno(), _STATE: state},
                env={"PATH": os.defpath, "LC_ALL": "C"},
                identity=identity,
            )
            with spawned as process:
                theirs.close()
                yield Tpm(process=process, channel=ours)
        finally:
            theirs.close()
            os.close(state)
