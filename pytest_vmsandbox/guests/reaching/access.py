"""Access to guests by SSH: keys, settings for other tools, and checks whether a server answers."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pytest_vmsandbox.core.errors import ImageError, LaunchError


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """The key with which one run enters its guests.

    Attributes:
        private: in OpenSSH's format.
        public: ``ssh-ed25519 AAAA…``.
    """

    private: str
    public: str

    @classmethod
    def generate(cls) -> KeyPair:
        """A new key."""
        private = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        return cls.of(private.decode())

    @classmethod
    def of(cls, private: str) -> KeyPair:
        """The key with this private part.

        Raises:
            ValueError: `private` is no key.
        """
        try:
            key = serialization.load_ssh_private_key(private.encode(), None)
        except (TypeError, UnsupportedAlgorithm) as error:  # of damaged ones
            raise ValueError(str(error)) from error
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        return cls(private=private, public=public.decode())

    @classmethod
    def for_image(cls, key: Path | None) -> KeyPair:
        """The key for guests of an image.

        Args:
            key: the file with the private part, if the image has a key of its own. Guests of other
                images take any key at their boot.

        Raises:
            ImageError: the file cannot be read.
        """
        if key is None:
            return cls.generate()
        try:
            return cls.of(key.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ImageError(
                f"the image is damaged: its key {key} cannot be read: {error}",
                remedy="build the image again: vmsandbox images build NAME --force",
            ) from error

    @property
    def name(self) -> str:
        """A unique name for the key, short enough for the name of a file."""
        return hashlib.sha256(self.public.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the private part to a file that only this user can read."""
        path.touch(mode=0o600)
        path.write_text(self.private, encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class SSHAccess:
    """What an SSH client needs to log in to a guest, as long as the guest is switched on.

    Attributes:
        host: an address of this host.
        port: a port there, which is the guest's SSH server.
        user: who logs in.
        key_file: the private key. Only this user can read it.
        known_hosts_file: the guest's host key, for that address and port.
    """

    host: str
    port: int
    user: str
    key_file: Path
    known_hosts_file: Path

    @property
    def command(self) -> str:
        """The command line that logs in."""
        options = [part for option in self._options.items() for part in ("-o", "=".join(option))]
        return shlex.join(["ssh", "-F", "none", *options, f"{self.user}@{self.host}"])

    def config(self, name: str) -> str:
        """A section of OpenSSH's configuration that calls the guest ``name``."""
        options = {"HostName": self.host, "User": self.user, **self._options}
        lines = [f"    {option} {value}\n" for option, value in options.items()]
        return f"Host {name}\n{''.join(lines)}"

    @property
    def _options(self) -> dict[str, str]:
        return {
            "Port": str(self.port),
            "IdentityFile": _quoted(self.key_file),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": _quoted(self.known_hosts_file),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "LogLevel": "ERROR",
        }


def greeting(address: tuple[str, int], timeout: float) -> bool:
    """Whether an SSH server at `address` greets us within `timeout` seconds."""
    try:
        with socket.create_connection(address, timeout) as sock:
            return sock.recv(4) == b"SSH-"
    except OSError:
        return False


def refusal(address: tuple[str, int], timeout: float) -> bool:
    """Whether a guest refuses a connection to `address` within `timeout` seconds.

    Args:
        address: is forwarded by QEMU to a port of the guest. QEMU accepts a connection itself, and drops
            it if the guest's kernel refuses it.
    """
    try:
        with socket.create_connection(address, timeout) as sock:
            return sock.recv(1) == b""
    except OSError as error:
        return isinstance(error, ConnectionResetError)


def _quoted(path: Path) -> str:
    """A path in the syntax of OpenSSH's options."""
    text = str(path).replace("%", "%%")
    return f'"{text}"' if " " in text else text


def require_client(
    brief: str = "there is no SSH client on this machine", *, instead: str = ""
) -> None:
    """Check that this machine has an SSH client.

    Args:
        brief: the error, if it has none.
        instead: a command line that needs none; empty for none.

    Raises:
        LaunchError: it has none.
    """
    if shutil.which("ssh") is None:
        remedy = "install one: apt-get install openssh-client (Debian, Ubuntu)"
        if instead:
            remedy += f". Without one, you can use {instead}"
        raise LaunchError(brief, remedy=remedy)
