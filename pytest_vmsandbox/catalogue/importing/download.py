"""Downloads over http(s). A download goes on where it broke off, and never waits without end."""

from __future__ import annotations

import http.client
import re
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

from pytest_vmsandbox.core import deadline
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.spec import GIB, KIB, MIB, format_size
from pytest_vmsandbox.core.text import printable

_CHUNK = 256 * KIB
_MAX_BYTES, _MAX_TEXT = 256 * GIB, 4 * MIB
_FINAL = range(400, 500)  # statuses that a further attempt does not change, but for these:
_PASSING = (408, 425, 429)
_REMEDY = "check the address. Proxies are taken from https_proxy and no_proxy, certificates from SSL_CERT_FILE"


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds.

    Attributes:
        connect: for the answer to a request.
        read: for the next byte.
        window: in which at least `least` bytes must come.
        least: see `window`.
        pauses: before each further attempt.
        tell: between two lines of progress.
    """

    connect: float = 60.0
    read: float = 30.0
    window: float = 60.0
    least: int = 64 * KIB
    pauses: tuple[float, ...] = (1.0, 3.0, 10.0)
    tell: float = 15.0


PATIENCE = Patience()


class _Broken(Exception):
    """An attempt failed, and a further one may not."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        _check_redirect(newurl, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> IO[bytes] | None:
        for name in ("location", "uri"):
            if ":" in (headers.get(name) or "").partition("/")[0]:
                _check_redirect(headers[name], fp)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def shown(url: str) -> str:
    """A URL for people: without passwords and tokens."""
    parts = urlsplit(url)
    netloc = parts.netloc.rpartition("@")[2]
    return printable(urlunsplit((parts.scheme, netloc, parts.path, "", "")))


def is_url(place: str) -> bool:
    """Whether a place is an http(s) URL; otherwise it is a path."""
    return re.match(r"(?i)https?://", place) is not None


def fetch(
    url: str, target: Path, progress: Callable[[str], None], patience: Patience = PATIENCE
) -> bool:
    """Write what is at a URL to a file that is made.

    Returns:
        Whether it came in more than one piece. If its digest is wrong, try again from the start.

    Raises:
        ImageError: it cannot be downloaded.
    """
    attempt = _Attempt(url, target, progress, patience)
    target.touch(exist_ok=False)
    for pause in (*patience.pauses, None):
        try:
            attempt.run()
        except _Broken as error:
            if pause is None:
                raise _failed(url, str(error)) from error
            progress(f"trying again: {error}")
            Deadline(pause).pause(pause)
        else:
            break
    return attempt.resumed


def read_text(url: str, patience: Patience = PATIENCE) -> str:
    """A small text.

    Raises:
        ImageError: it cannot be downloaded, is larger than 4 MiB, or is redirected from https to http.
    """
    for pause in (*patience.pauses, None):
        try:
            with _opened(url, {}, patience) as response:
                _check_not_weaker(url, response.url)
                return _text(url, response, patience)
        except _Broken as error:
            if pause is None:
                raise _failed(url, str(error)) from error
            Deadline(pause).pause(pause)
    raise AssertionError("the last attempt returns or raises")


def _text(url: str, response: http.client.HTTPResponse, patience: Patience) -> str:
    data, limit = b"", Deadline(patience.window)
    while piece := _read(response):
        data += piece
        if len(data) > _MAX_TEXT or limit.expired:
            raise _failed(url, "this is too much for a list of digests")
    if response.length:
        raise _Broken("the connection was closed early")
    return data.decode("utf-8", errors="replace")


@dataclass
class _Attempt:
    """One download, which may need several attempts."""

    url: str
    target: Path
    progress: Callable[[str], None]
    patience: Patience
    validator: str = ""
    resumed: bool = False

    def run(self) -> None:
        """Go on where the last attempt ended, or from the start."""
        have = self.target.stat().st_size if self.validator else 0
        headers = {"Range": f"bytes={have}-", "If-Range": self.validator} if have else {}
        with _opened(self.url, headers, self.patience) as response:
            if response.status == 206 and have:
                self._check_range(response, have)
                self.resumed = True
            else:
                have = 0
            tag = response.headers.get("ETag", "")
            weak = tag.startswith("W/")
            self.validator = "" if weak else tag or response.headers.get("Last-Modified", "")
            total = have + (response.length or 0)
            self._check_room(response.length or 0, total)
            with self.target.open("r+b") as out:
                out.truncate(have)
                out.seek(have)
                self._copy(response, out, have, total)

    def _check_range(self, response: http.client.HTTPResponse, have: int) -> None:
        found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != have:
            self.validator = ""  # from the start, the next time
            raise _Broken("the server sent another part than it was asked for")

    def _check_room(self, length: int, total: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if length > free:
            raise ImageError(
                f"{shown(self.url)} has {format_size(total)}; only {format_size(free)} are free",
                remedy="make room, or set the environment variable VMSANDBOX_CACHE to a folder on a larger disk",
            )

    def _copy(
        self, response: http.client.HTTPResponse, out: IO[bytes], have: int, total: int
    ) -> None:
        patience, of = self.patience, f" of {format_size(total)}" if response.length else ""
        window, counted = Deadline(patience.window), have
        told = Deadline(patience.tell)
        while piece := _read(response):
            out.write(piece)
            have += len(piece)
            if have > _MAX_BYTES:
                raise _failed(self.url, f"more than {format_size(_MAX_BYTES)} came")
            if window.expired:
                if have - counted < patience.least:
                    raise _Broken(f"only {have - counted} bytes came in {patience.window:.0f} s")
                window, counted = Deadline(patience.window), have
            if told.expired:
                self.progress(f"fetched {format_size(have)}{of}")
                told = Deadline(patience.tell)
        if response.length:  # what is still missing
            raise _Broken(f"the connection was closed after {format_size(have)}{of}")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK)
    except TimeoutError as error:
        raise _Broken("the server stopped sending") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Broken(f"the connection broke: {_why(error)}") from error


def _opened(url: str, headers: dict[str, str], patience: Patience) -> http.client.HTTPResponse:
    """The answer to a request.

    Raises:
        ImageError: the server refuses, and will the next time.
        _Broken: a further attempt may work.
    """
    _check_no_password(url)
    # Nothing but http(s): a redirect must not read a file of this machine.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(  # noqa: S310  # the opener knows http(s) only
        url, headers={"User-Agent": "vmsandbox", "Accept-Encoding": "identity", **headers}
    )
    answer: list[http.client.HTTPResponse] = []

    def ask() -> None:
        answer.append(opener.open(request, timeout=patience.read))

    try:
        # A server can send its answer byte by byte, so the timeout of the socket is not enough.
        if not deadline.within(patience.connect, ask):
            raise _Broken(f"no answer in {patience.connect:.0f} s")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _FINAL and error.code not in _PASSING:
            raise _failed(url, f"{error.code} {error.reason}") from error
        raise _Broken(f"{error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise _failed(url, f"its certificate is not trusted ({error.reason})") from error
        raise _Broken(_why(error.reason)) from error
    except TimeoutError as error:
        raise _Broken(f"no answer in {patience.read:.0f} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Broken(_why(error)) from error
    return answer[0]


def _check_no_password(url: str) -> None:
    if "@" in urlsplit(url).netloc:
        raise _failed(url, "a user or a password in an address is not supported")


def _check_not_weaker(url: str, final: str) -> None:
    """Check that nobody on the way could change what came over https.

    Raises:
        ImageError: the server redirected to http.
    """
    if url.lower().startswith("https:") and not final.lower().startswith("https:"):
        raise _failed(url, f"it redirects to {shown(final)}, where anybody could change it")


def _check_redirect(url: str, answer: IO[bytes]) -> None:
    if not is_url(url):
        answer.close()
        raise ImageError(
            f"the server redirects to {printable(url)[:80]!r}, which is not http(s)",
            remedy="do not use this server, or give the final address",
        )


def _why(error: object) -> str:
    return printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _failed(url: str, why: str) -> ImageError:
    remedy = _REMEDY
    if why.startswith(("404", "410")):
        remedy = "look for its new address: vendors remove dated images after some months"
    return ImageError(f"{shown(url)} cannot be fetched: {printable(why)}", remedy=remedy)
