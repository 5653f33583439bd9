"""OpenPGP signatures of lists of digests, checked by ``gpgv`` against a keyring that the definition has."""

from __future__ import annotations

import base64
import binascii
import subprocess
import tempfile
from pathlib import Path

from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.text import printable

_ARMOUR = b"-----BEGIN PGP PUBLIC KEY BLOCK-----"
_SECONDS = 60.0
_SHOWN = 2_000  # characters of gpgv's output
# What gpgv says of a signature that must not count, whatever else is there.
_BAD = {"BADSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG"}


def checked(text: bytes, signature: bytes | None, keyring: Path, name: str) -> tuple[bytes, str]:
    """Check the signature of a list of digests.

    Args:
        text: the list.
        signature: of it; None if the list is a clear-signed text.
        keyring: the public keys that may sign it, in OpenPGP's binary form or armoured.
        name: of the list, for people.

    Returns:
        The text that was signed, and the fingerprints of the keys, for people.

    Raises:
        ImageError: there is no good signature by these keys, or it cannot be checked.
    """
    with tempfile.TemporaryDirectory(prefix="vmsandbox-") as folder:
        place = Path(folder)
        (place / "keys.gpg").write_bytes(_binary(keyring))
        (place / "list").write_bytes(text)
        files = ["list"]
        if signature is not None:
            (place / "signature").write_bytes(signature)
            files = ["signature", "list"]
        signed = [] if signature is not None else ["--output", "signed"]
        argv = ["gpgv", "--homedir", ".", "--status-fd", "1", "--keyring", "./keys.gpg"]
        try:
            done = subprocess.run(
                [*argv, *signed, *files],
                cwd=place,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_SECONDS,
                check=False,
            )
        except OSError as error:
            raise ImageError(
                f"the signature of {name} cannot be checked: gpgv: {error.strerror}",
                remedy="install gpgv (Debian and Ubuntu: sudo apt-get install gpgv)",
            ) from error
        except subprocess.TimeoutExpired as error:
            raise _bad(name, keyring, f"gpgv did not end within {_SECONDS:.0f} s") from error
        words = [line.split() for line in done.stdout.decode(errors="replace").splitlines()]
        said = [line[1:] for line in words if line[:1] == ["[GNUPG:]"] and len(line) > 1]
        keys = sorted({line[-1] for line in said if line[0] == "VALIDSIG"})
        if not keys or any(line[0] in _BAD for line in said):
            raise _bad(name, keyring, done.stderr.decode(errors="replace"))
        return (text if signature is not None else (place / "signed").read_bytes()), ", ".join(keys)


def _binary(keyring: Path) -> bytes:
    """A keyring as gpgv reads it."""
    try:
        content = keyring.read_bytes()
        if not content.lstrip().startswith(_ARMOUR):
            return content
        lines = content.replace(b"\r\n", b"\n").partition(b"\n\n")[2].splitlines()
        packed = [line for line in lines if not line.startswith((b"=", b"-"))]
        return base64.b64decode(b"".join(packed), validate=True)
    except (OSError, binascii.Error) as error:
        raise ImageError(
            f"the keyring {keyring} cannot be read: {getattr(error, 'strerror', None) or error}",
            remedy="make it again: gpg --export KEY >keyring.gpg",
        ) from error


def _bad(name: str, keyring: Path, details: str) -> ImageError:
    return ImageError(
        f"{name} has no good signature by a key in {keyring.name}, so it does not count",
        details=printable(details.strip())[:_SHOWN],
        remedy="get the vendor's current key from a place that you trust, and put it into "
        f"{keyring}. Otherwise somebody changed the list",
    )
