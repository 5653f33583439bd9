"""Signatures of lists of digests, checked by the real gpgv. The files are in tests/support/signed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue.importing.fetch import Fetcher
from pytest_vmsandbox.catalogue.importing.signatures import checked
from pytest_vmsandbox.catalogue.origin import Source
from pytest_vmsandbox.core.errors import ImageError

SIGNED = Path(__file__).parents[1] / "support" / "signed"
LIST = (SIGNED / "SUMS").read_bytes()
pytestmark = pytest.mark.skipif(shutil.which("gpgv") is None, reason="gpgv is not installed")


def check(signature, keyring, text=LIST):
    read = None if signature is None else (SIGNED / signature).read_bytes()
    return checked(text, read, SIGNED / keyring, "SUMS")


@pytest.mark.parametrize("signature", ["SUMS.sig", "SUMS.asc", "SUMS.both"])
@pytest.mark.parametrize("keyring", ["vendor.gpg", "vendor.asc"])
def test_a_good_signature(signature, keyring):
    text, keys = check(signature, keyring)
    assert text == LIST
    assert len(keys) == 40


def test_only_what_was_signed_of_a_clear_signed_list_counts():
    signed = (SIGNED / "SUMS.signed").read_bytes()
    forged = b"b" * 64 + b"  disk.qcow2\n"
    text, _ = check(None, "vendor.gpg", forged + signed + forged)
    assert text == LIST


@pytest.mark.parametrize(
    ("signature", "keyring", "text"),
    [
        ("SUMS.sig", "vendor.gpg", LIST.replace(b"a", b"b", 1)),
        ("SUMS.stranger", "vendor.gpg", LIST),
        ("SUMS.sig", "stranger.gpg", LIST),
        ("SUMS.old", "old.gpg", LIST),
        ("SUMS", "vendor.gpg", LIST),
        ("SUMS.sig", "SUMS", LIST),
        (None, "vendor.gpg", LIST),
        (None, "vendor.gpg", (SIGNED / "SUMS.signed").read_bytes().replace(b"aa", b"bb", 1)),
    ],
    ids=[
        *("another list", "a stranger's", "another's key", "an expired key", "no signature"),
        *("no keyring", "not clear-signed", "a changed clear-signed list"),
    ],
)
def test_a_signature_that_does_not_count(signature, keyring, text):
    with pytest.raises(ImageError, match="has no good signature") as caught:
        check(signature, keyring, text)
    assert "from a place that you trust" in caught.value.remedy


def test_a_keyring_that_cannot_be_read(tmp_path):
    with pytest.raises(ImageError, match=r"keyring .* cannot be read"):
        checked(LIST, b"", tmp_path / "gone", "SUMS")
    (tmp_path / "keys").write_text("-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nno base64!\n")
    with pytest.raises(ImageError, match=r"keyring .* cannot be read"):
        checked(LIST, b"", tmp_path / "keys", "SUMS")


def test_without_gpgv(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="gpgv: No such file") as caught:
        check("SUMS.sig", "vendor.gpg")
    assert "install gpgv" in caught.value.remedy


class TestFetcher:
    """The list that a definition names counts only with its signature."""

    @pytest.fixture
    def digest(self, tmp_path):
        folder = tmp_path / "image"
        shutil.copytree(SIGNED, folder)

        def digest(**source):
            fetcher = Fetcher(tmp_path / "cache", folder, lambda _: None)
            return fetcher.digest_and_check(Source(url="disk.qcow2", **source))

        return digest

    @pytest.mark.parametrize(
        "source",
        [
            {"checksums": "SUMS", "signature": "SUMS.asc"},
            {"checksums": "SUMS.signed"},
        ],
        ids=["detached", "clear-signed"],
    )
    def test_signed(self, digest, source):
        found, about = digest(keyring="vendor.asc", **source)
        assert (found.kind, found.hex) == ("sha256", "a" * 64)
        assert about.startswith("list of digests over a path, signed by ")

    def test_signed_by_another(self, digest):
        with pytest.raises(ImageError, match="SUMS has no good signature by a key in vendor.gpg"):
            digest(checksums="SUMS", signature="SUMS.stranger", keyring="vendor.gpg")

    def test_without_a_keyring_no_signature_is_looked_at(self, digest):
        assert digest(checksums="SUMS")[1] == "list of digests over a path"
