"""Lists of digests, as vendors write them."""

import pytest

from pytest_vmsandbox.catalogue.importing.checksums import Digest, find
from pytest_vmsandbox.core.errors import ImageError

A, B, C = "a" * 64, "b" * 64, "c" * 128
SHA256 = Digest("sha256", A)
SIGNED = f"""-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA256

# disk.qcow2: 12 bytes
SHA256 (disk.qcow2) = {A}
- SHA256 (other) = {B}
-----BEGIN PGP SIGNATURE-----

{B}
-----END PGP SIGNATURE-----
SHA256 (disk.qcow2) = {B}
"""


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        (f"{A}  disk.qcow2\n{B}  other\n", SHA256),
        (f"{B} *other\n{A.upper()} *disk.qcow2", SHA256),
        (f"{A}  ./disk.qcow2\r\n", SHA256),
        (f"SHA256 (disk.qcow2) = {A}\nSHA256 (disk.qcow2.xz) = {B}", SHA256),
        (f"SHA512 (disk.qcow2) = {C}\nSHA256 (disk.qcow2) = {A}", Digest("sha512", C)),
        (f"{C}\n", Digest("sha512", C)),
        (SIGNED, SHA256),
        (f"{'d' * 32}  disk.qcow2\n{A}  disk.qcow2\n", SHA256),
    ],
)
def test_it_is_found(text, digest):
    assert find(text, "disk.qcow2", alone=False) == digest


def test_a_list_for_one_file_may_have_another_name():
    """OpenSUSE's does: its name has the number of the build."""
    text = f"{A}  disk-Build1.2.qcow2\n"
    assert find(text, "disk.qcow2", alone=True) == SHA256
    with pytest.raises(ImageError, match="has none for disk.qcow2"):
        find(text, "disk.qcow2", alone=False)
    with pytest.raises(ImageError, match="has none for disk.qcow2"):
        find(f"{text}{B}  more\n", "disk.qcow2", alone=True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has none for disk"),
        ("<html>404</html>", "has none for disk"),
        (f"{A}  xdisk\n", "has none for disk"),
        (f"{'d' * 32}  disk\n", "has only MD5 for disk"),
        (f"MD5 (disk) = {'d' * 32}\nSHA1 (disk) = {'d' * 40}\n", "has only MD5 and SHA-1 for disk"),
        (f"{A}  disk\n{B}  disk\n", "two different ones for disk"),
        (f"{A}\n{B}\n", "has none for disk"),
        (f"{'a' * 65}  disk\n", "has none for disk"),
    ],
)
def test_it_is_not_found(text, why):
    with pytest.raises(ImageError, match=why) as caught:
        find(text, "disk", alone=False)
    assert caught.value.remedy
