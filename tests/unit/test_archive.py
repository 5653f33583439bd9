"""What an archive has now, asked over HTTP on this machine."""

from __future__ import annotations

import hashlib
import lzma
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pytest_vmsandbox.catalogue import archive as archive_module
from pytest_vmsandbox.catalogue.archive import newer_packages
from pytest_vmsandbox.core.errors import ImageError

PATH = "main/binary-amd64/Packages.xz"
PACKAGES = ["openssl 3.0.15-1", "systemd 257-1", "own 9"]


class Archive:
    """A folder that a server shows, with suites in it."""

    def __init__(self, folder):
        self.folder = folder
        self.url = ""
        self.asked = []

    def suite(self, name, date, digest=None, architectures="", **versions):
        """Write a suite, and return the line that an image's record has of it."""
        text = "\n\n".join(
            f"Package: {package}\nArchitecture: amd64\nVersion: {version}\nSize: 3"
            for package, version in versions.items()
        )
        packed = lzma.compress(text.encode())
        place = self.folder / "dists" / name
        (place / PATH).parent.mkdir(parents=True, exist_ok=True)
        (place / PATH).write_bytes(packed)
        digest = digest or hashlib.sha256(packed).hexdigest()
        (place / "InRelease").write_text(
            f"-----BEGIN PGP SIGNED MESSAGE-----\nDate: {date}\n{architectures}SHA256:\n"
            f" {'0' * 64} 3 main/binary-arm64/Packages.xz\n {digest} {len(packed)} {PATH}\n"
        )
        return f"{self.url} {name} 2026-01-01T00:00:00Z"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Archive(tmp_path)

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            found.asked.append(self.path)

        def log_error(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        found.url = f"http://127.0.0.1:{server.server_port}"
        yield found
        server.shutdown()
        thread.join()


OLD, NEW = "Thu, 01 Jan 2026 00:00:00 UTC", "Fri, 02 Jan 2026 00:00:00 +0000"


def test_the_newest_of_all_suites_counts(archive):
    lines = [
        archive.suite("stable", OLD, openssl="3.0.15-1", systemd="257-1", other="1"),
        archive.suite("updates", NEW, openssl="3.0.16~rc1", systemd="256"),
        archive.suite("security", NEW, openssl="3.0.15-1+deb13u2"),
    ]
    assert newer_packages(lines, PACKAGES, "x86_64") == [("openssl 3.0.15-1", "openssl 3.0.16~rc1")]


def test_no_list_is_downloaded_if_no_suite_has_changed(archive):
    line = archive.suite("stable", OLD, openssl="4")
    assert newer_packages([line], PACKAGES, "x86_64") == []
    assert archive.asked == ["/dists/stable/InRelease"]


def test_an_older_package_is_no_change(archive):
    line = archive.suite("stable", NEW, openssl="3.0.14", systemd="257-1")
    assert newer_packages([line], PACKAGES, "x86_64") == []


@pytest.mark.parametrize(
    ("date", "more", "says"),
    [
        ("yesterday", {}, "has no date"),
        (NEW, {"digest": "f" * 64}, "does not fit the release file"),
    ],
)
def test_a_damaged_archive(archive, date, more, says):
    line = archive.suite("stable", date, **more, openssl="4")
    with pytest.raises(ImageError, match=says) as caught:
        newer_packages([line], PACKAGES, "x86_64")
    assert "--offline" in caught.value.remedy


def test_another_architecture_that_it_lacks(archive):
    line = archive.suite("stable", NEW, openssl="4")
    with pytest.raises(ImageError, match="does not list main/binary-s390x"):
        newer_packages([line], PACKAGES, "s390x")


def test_a_suite_without_the_architecture_does_not_count(archive):
    """Security suites of old releases have fewer architectures than the release."""
    lines = [
        archive.suite("stable", NEW, architectures="Architectures: all amd64 arm64\n", openssl="4"),
        archive.suite("security", NEW, architectures="Architectures: all arm64\n", openssl="5"),
    ]
    assert newer_packages(lines, PACKAGES, "x86_64") == [("openssl 3.0.15-1", "openssl 4")]
    assert not any(path.startswith("/dists/security/main") for path in archive.asked)


def test_it_is_gone(archive):
    line = archive.suite("stable", NEW).replace("stable", "unstable")
    with pytest.raises(ImageError, match="/dists/unstable/InRelease.*404"):
        newer_packages([line], PACKAGES, "x86_64")


def test_only_the_web_is_asked(tmp_path):
    with pytest.raises(ImageError, match="only http and https"):
        newer_packages([f"file://{tmp_path} stable 2026-01-01T00:00:00Z"], PACKAGES, "x86_64")


def test_a_list_without_end_is_refused(archive, monkeypatch):
    line = archive.suite("stable", NEW, openssl="4")
    monkeypatch.setattr(archive_module, "_UNPACKED_LIMIT", 50)
    with pytest.raises(ImageError, match="too large"):
        newer_packages([line], PACKAGES, "x86_64")


def test_an_image_without_an_archive():
    assert newer_packages([], PACKAGES, "x86_64") == []
