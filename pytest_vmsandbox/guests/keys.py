"""The keys that open guests by SSH."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


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
        """The key of which that is the private part.

        Raises:
            ValueError: it is none.
        """
        try:
            key = serialization.load_ssh_private_key(private.encode(), None)
        except (TypeError, UnsupportedAlgorithm) as error:  # of damaged ones
            raise ValueError(str(error)) from error
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        return cls(private=private, public=public.decode())

    @property
    def name(self) -> str:
        """What tells it from other keys, short enough for the name of a file."""
        return hashlib.sha256(self.public.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the private part to a file that only this user can read."""
        path.touch(mode=0o600)
        path.write_text(self.private, encoding="utf-8")
