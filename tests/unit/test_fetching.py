"""Fetching from servers that are slow, broken or hostile; and what is kept."""

import hashlib
import http.server
import os
import random
import socket
import threading
import time

import pytest

from pytest_vmsandbox.cache.store import DOWNLOADS
from pytest_vmsandbox.catalogue.importing import download, fetch
from pytest_vmsandbox.catalogue.importing.checksums import Digest
from pytest_vmsandbox.catalogue.importing.source import opened
from pytest_vmsandbox.catalogue.origin import Source
from pytest_vmsandbox.core.errors import ImageError

DATA = random.Random(1).randbytes(300_000)  # the same each time, and a change in it is one
SHA256 = Digest("sha256", hashlib.sha256(DATA).hexdigest())
SHA512 = Digest("sha512", hashlib.sha512(DATA).hexdigest())
QUICK = download.Patience(connect=2, read=0.3, window=0.2, least=1000, pauses=(0, 0), tell=0)
SECRET = "HOST-SECRET"


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next one of the test's answers; the last one is repeated."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self):
        self.close_connection = True
        self.server.requests.append((self.path, dict(self.headers)))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        answer(self)

    def log_message(self, *_):
        pass

    def say(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": len(data)} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    block_on_close = True
    requests: list
    answers: list
    gone: threading.Event


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Answers)
    server.requests, server.gone = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.gone.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_port}/disk.qcow2?token=secret"


@pytest.fixture
def lines():
    return []


@pytest.fixture
def fetcher(tmp_path, lines):
    def make(**how):
        how.setdefault("patience", QUICK)
        return fetch.Fetcher(tmp_path / "cache", tmp_path, lines.append, **how)

    return make


@pytest.fixture(autouse=True)
def nothing_half_made(tmp_path):
    yield
    left = [path.name for path in (tmp_path / "cache" / DOWNLOADS.folder).glob(".*")]
    assert left == []


def whole(answer):
    answer.say(200, DATA)


def got(fetcher, url, digest=SHA256):
    with fetcher.opened(url, digest) as file:
        return b"".join(file.chunks())


def test_it_is_fetched_once_and_kept(server, url, fetcher, lines):
    server.answers = [whole]
    assert got(fetcher(), url) == DATA
    assert got(fetcher(offline=True), url) == DATA
    assert (
        got(fetcher(), url.replace("disk", "other")) == DATA
    )  # its digest counts, not its address
    assert len(server.requests) == 1
    assert lines[0] == f"fetching {url.partition('?')[0]}"
    assert any("fetched" in line and "of 293KiB" in line for line in lines)
    assert got(fetcher(), url, SHA512) == DATA


def test_offline(url, fetcher):
    with pytest.raises(ImageError, match="the network must not be used") as caught:
        got(fetcher(offline=True), url)
    assert "token" not in str(caught.value)


def test_a_wrong_digest(server, url, fetcher, tmp_path):
    server.answers = [lambda answer: answer.say(200, DATA[:-1] + b"x")]
    with pytest.raises(ImageError, match="does not have its digest") as caught:
        got(fetcher(), url)
    assert SHA256.hex in caught.value.details
    assert list((tmp_path / "cache" / "downloads").glob("[!.]*/*")) == []


@pytest.mark.parametrize("times_set_back", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_what_was_compared_is_what_was_used(
    kept, times_set_back, server, url, fetcher, tmp_path, monkeypatch
):
    """Whoever writes to a file between its digest and its use changes no image."""
    server.answers = [whole]
    (tmp_path / "disk").write_bytes(DATA)
    if kept:
        got(fetcher(), url)
    (data,) = tmp_path.glob("cache/downloads/*/data" if kept else "disk")
    data.chmod(0o600)
    os.utime(data, ns=(1, 1))
    compare = fetch.check

    def then_write(file, digest):
        compare(file, digest)
        time.sleep(0.02)  # the clock of a file system may have coarse steps
        data.write_bytes(b"x" + DATA[1:])
        if times_set_back:
            os.utime(data, ns=(1, 1))

    monkeypatch.setattr(fetch, "check", then_write)
    with pytest.raises(ImageError, match="was changed while it was imported"):
        got(fetcher(), url if kept else "disk")


def test_what_is_kept_and_damaged_is_not_used(server, url, fetcher, tmp_path):
    server.answers = [whole]
    got(fetcher(), url)
    (data,) = tmp_path.glob("cache/downloads/*/data")
    data.chmod(0o600)
    data.write_bytes(b"x" + DATA[1:])
    with pytest.raises(ImageError, match="does not have its digest"):
        got(fetcher(), url)
    assert got(fetcher(), url) == DATA  # fetched again


def cut(answer):
    answer.say(200, DATA[:100_000], Content_Length=len(DATA), ETag='"one"')


def rest(answer):
    assert answer.headers["Range"] == "bytes=100000-"
    assert answer.headers["If-Range"] == '"one"'
    answer.say(206, DATA[100_000:], Content_Range=f"bytes 100000-299999/{len(DATA)}", ETag='"one"')


def test_a_connection_that_breaks_goes_on_where_it_was(server, url, fetcher, lines):
    server.answers = [cut, rest]
    assert got(fetcher(), url) == DATA
    assert any("the connection was closed after" in line for line in lines)


@pytest.mark.parametrize(
    "second",
    [
        whole,  # it has no ranges
        lambda answer: answer.say(206, DATA[5:], Content_Range="bytes 5-299999/300000"),
        lambda answer: answer.say(206, DATA, Content_Length=len(DATA)),
        lambda answer: answer.say(503, b"busy"),
        lambda answer: answer.say(429),
    ],
)
def test_or_from_the_start(second, server, url, fetcher):
    server.answers = [cut, second, whole]
    assert got(fetcher(), url) == DATA


def test_pieces_of_two_files_are_not_put_together(server, url, fetcher, lines):
    other = bytes(100_000)
    server.answers = [
        lambda answer: answer.say(200, other, Content_Length=len(DATA), ETag='"one"'),
        rest,
        whole,
    ]
    assert got(fetcher(), url) == DATA
    assert "the pieces do not fit: fetching it again from the start" in lines


def hang(answer):
    answer.server.gone.wait(20)


def hang_later(answer):
    answer.send_response(200)
    answer.send_header("Content-Length", "1000000")
    answer.end_headers()
    answer.wfile.write(b"x" * 100)
    answer.server.gone.wait(20)


def trickle(answer):
    answer.send_response(200)
    answer.send_header("Content-Length", "1000000")
    answer.end_headers()
    while not answer.server.gone.wait(0.05):
        try:
            answer.wfile.write(b"x")
        except OSError:
            return


def reset(answer):
    answer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    answer.connection.close()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (hang, "no answer in"),
        (hang_later, "the server stopped sending"),
        (trickle, "bytes came in"),
        (reset, "cannot be fetched"),
        (lambda answer: answer.say(200, DATA[:-1], Content_Length=len(DATA)), "was closed after"),
        (lambda answer: answer.say(404, b"<html>"), "404"),
        (lambda answer: answer.say(403), "403"),
        (lambda answer: answer.say(500), "500"),
        (lambda answer: answer.say(302, Location="file:///etc/passwd"), "which is not http"),
        (lambda answer: answer.say(301, Location="ftp://example.org/x"), "which is not http"),
        (lambda answer: answer.say(307, Location="data:,x"), "which is not http"),
        (lambda answer: answer.say(302, Location="/again"), "infinite loop"),
        (lambda answer: answer.say(200, b"", Content_Length=1 << 60), "are free"),
        (lambda answer: answer.say(200, b"x", Content_Length="-1"), "digest"),
        (lambda answer: answer.wfile.write(b"SSH-2.0-OpenSSH\r\n"), "cannot be fetched"),
        (
            lambda answer: answer.say(200, b"zz", Transfer_Encoding="chunked", Content_Length=None),
            "broke",
        ),
    ],
)
def test_a_bad_server(answer, why, server, url, fetcher):
    server.answers = [answer]
    with pytest.raises(ImageError, match=why) as caught:
        got(fetcher(patience=download.Patience(2, 0.2, 0.2, 1000, (0,), 60)), url)
    assert caught.value.remedy
    assert "token" not in str(caught.value)
    assert "root:" not in str(caught.value)


def test_a_redirect_to_another_server(server, url, fetcher):
    server.answers = [lambda answer: answer.say(302, Location="/moved"), whole]
    assert got(fetcher(), url) == DATA
    assert server.requests[1][0] == "/moved"


def test_a_password_is_neither_used_nor_shown(fetcher):
    with pytest.raises(ImageError, match="a user or a password") as caught:
        got(fetcher(), "http://somebody:secret@127.0.0.1/disk")
    assert "secret" not in str(caught.value)


def test_no_server(fetcher):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(ImageError, match="Connection refused"):
        got(fetcher(), f"http://127.0.0.1:{port}/x")


def test_a_proxy_is_used(server, fetcher, monkeypatch):
    server.answers = [whole]
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "")
    assert got(fetcher(), "http://example.invalid/disk") == DATA
    assert server.requests[0][0] == "http://example.invalid/disk"


# -- paths, and lists of digests --------------------------------------------------------------------


def test_a_path_is_relative_to_the_definition(fetcher, tmp_path):
    (tmp_path / "disk.raw").write_bytes(DATA)
    assert got(fetcher(offline=True), "disk.raw") == DATA
    assert not (tmp_path / "cache").exists()
    (tmp_path / "disk.raw").write_bytes(DATA[1:])
    with pytest.raises(ImageError, match=r"disk\.raw does not have its digest"):
        got(fetcher(), "disk.raw")
    (tmp_path / "disk.raw").unlink()
    with pytest.raises(ImageError, match=r"disk\.raw is not there"):
        got(fetcher(), "disk.raw")


def test_a_file_that_was_kept_needs_no_path(fetcher, tmp_path):
    (tmp_path / "disk.raw").write_bytes(DATA)
    with opened(tmp_path / "disk.raw") as file:
        digest = fetcher().keep(file)
    (tmp_path / "disk.raw").unlink()
    assert got(fetcher(), "disk.raw", digest) == DATA


def test_a_list_of_digests(server, url, fetcher, tmp_path):
    text = f"{SHA256.hex}  disk.qcow2\n".encode()
    server.answers = [lambda answer: answer.say(200, text)]
    source = Source(url=url, checksums=url.replace("disk.qcow2", "SHA256SUMS"))
    assert fetcher().digest(source) == SHA256
    with pytest.raises(ImageError, match="the network must not be used"):
        fetcher(offline=True).digest(source)
    (tmp_path / "SUMS").write_bytes(text)
    assert fetcher().digest(Source(url=url, checksums="SUMS")) == SHA256
    assert fetcher().digest(Source(url=url, sha512=SHA512.hex)) == SHA512


@pytest.mark.parametrize("ending", ["sha256", "SHA256SUM", "sha512", "CHECKSUM"])
def test_a_list_for_one_file(ending, server, url, fetcher):
    server.answers = [lambda answer: answer.say(200, f"{SHA256.hex}  disk-Build7.qcow2\n".encode())]
    source = Source(url=url, checksums=url.replace("disk.qcow2", f"disk.qcow2.{ending}"))
    assert fetcher().digest(source) == SHA256


def test_a_list_is_not_taken_over_http_instead_of_https(monkeypatch, fetcher):
    class Answer:
        url = "http://example.org/SUMS"
        length = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read1(self, _):
            return b""

    monkeypatch.setattr(download, "_opened", lambda *_: Answer())
    with pytest.raises(ImageError, match="redirects to http://example.org/SUMS"):
        download.read_text("https://example.org/SUMS?x")
    assert download.read_text("http://example.org/SUMS") == ""


def test_an_endless_list(server, url, fetcher):
    server.answers = [lambda answer: answer.say(200, bytes(5 << 20))]
    with pytest.raises(ImageError, match="too much for a list of digests"):
        fetcher().digest(Source(url=url, checksums=url))
