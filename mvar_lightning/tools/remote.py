"""What lies elsewhere: the one door to http, s3, gs, az and hf addresses, by fsspec. Nothing is executed.

A transfer that breaks off goes on where it stopped, by a range; of a server without ranges it is read again and what
was had is passed over. What comes then must continue what was there: size, version and the last bytes are compared.
Credentials are found by each service's own rules (``AWS_...``, ``~/.aws``, ``~/.netrc``,
``HF_TOKEN``, fsspec's configuration).
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from mvar_lightning.compat import unread
from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import in_a_line

log = logging.getLogger(__name__)

SCHEMES = {"http": "", "https": "", "s3": "s3", "gs": "gs", "az": "az", "hf": "hf"}
"""Addresses that are opened, and the extra of this package that each needs. No others are."""

WAITS = (1.0, 5.0, 15.0)
"""Seconds before each new try. Tries are counted anew after each `PROGRESS` bytes."""
PROGRESS = 1 << 20

SILENCE = 120.0
"""Seconds of waiting in which at least `LEAST` bytes must come."""
LEAST = 1 << 16

TAIL = 64
"""Bytes that are asked for again where a transfer goes on, and compared."""

BUFFER = 1 << 18
MOST_BLOCK = 1 << 23
FOR_THE_MOMENT = (408, 425, 429)
"""What a server answers that may answer otherwise soon; and all from 500 on."""


class TransferError(OSError):
    """A transfer that broke off for good; the message says why."""


class NotThere(UserError):
    """Nothing is at an address."""


class _Trouble(Exception):
    """What may pass; worth another try."""


def is_url(path: str | Path) -> bool:
    return "://" in str(path) or str(path).startswith("pipe:")


def plain(path: str) -> str:
    """The path that a ``file://`` address names; anything else as it is."""
    if not path.startswith("file://"):
        return path
    parts = urlsplit(path)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{path}: is a file of the machine {parts.netloc!r}; give a local path, or file:///PATH")
    return unquote(parts.path)


def check_address(url: str) -> str:
    """The scheme of an address that is opened. Raises `UserError` for all others."""
    scheme, _, rest = url.partition("://")
    if url.startswith("pipe:"):
        raise UserError(f"{url}: runs a command, which is not done any more; give an address, or a file that it wrote")
    if scheme not in SCHEMES or "::" in rest or re.search(r"[\s\0]", url):
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"{url!r}: addresses of this kind are not opened; give a local path, or one of {known}")
    try:
        urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url!r}: is no address ({error})") from None
    if not rest.strip("/"):
        raise UserError(f"{url!r}: is no address (nothing after {scheme}://)")
    return scheme


@dataclass(frozen=True)
class About:
    """What a server tells of a file: bytes, None where it does not say; and what changes when the file does."""

    size: int | None
    version: str


def about(url: str, what: str = "") -> About:
    """What the server tells of a file. Raises `UserError` where it cannot be had."""
    patience = _Patience(url, what)
    while True:
        try:
            info = _files(url).info(url)
        except Exception as error:  # the libraries behind fsspec raise whatever they like
            patience.after(_judged(error, url, what))
        else:
            told_by = (info.get(name) for name in ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "md5Hash"))
            return About(info.get("size"), str(next((value for value in told_by if value), "")))


def _files(url: str) -> Any:
    """The file system of an address. Raises `UserError` where its package is missing, and for no address of ours."""
    import fsspec

    scheme, options = check_address(url), dict[str, Any]()
    if scheme in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE / 4, sock_read=SILENCE)
        # the bytes as they lie there (a .tar.gz is often called an encoding), proxies and .netrc as others take them
        options["client_kwargs"] = dict(timeout=limits, auto_decompress=False, trust_env=True, read_bufsize=PROGRESS)
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        way_out = f"pip install 'mvar-lightning[{SCHEMES[scheme]}]'"
        raise UserError(f"{url}: {scheme}:// needs another package ({in_a_line(error)}); {way_out}") from None


def _judged(error: Exception, url: str, what: str) -> _Trouble:
    """What went wrong, where it may pass. Raises `UserError` where it will not."""
    if isinstance(error, UserError | _Trouble):
        if isinstance(error, _Trouble):
            return error
        raise UserError(f"{what} {error.marked}".strip()) from None
    if url.startswith("http") and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec's `info` calls whatever goes wrong a missing file
    status = getattr(error, "status", None)
    status = status if isinstance(status, int) and status >= 400 else None
    if url.startswith("http") and isinstance(error, FileNotFoundError):
        status = 404
    if status is not None:
        words = f"HTTP error {status}"
    elif isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        words = f"no byte for {SILENCE:.0f} seconds"
    else:
        words = in_a_line(error)
    missing = isinstance(error, FileNotFoundError) or status in (404, 410)
    final = isinstance(error, PermissionError | ValueError | ImportError) or "Credential" in type(error).__name__
    if missing or final or (status is not None and status < 500 and status not in FOR_THE_MOMENT):
        message = f"{url}: cannot be read ({words}); check the address, its server and your credentials"
        raise (NotThere if missing else UserError)(f"{what} {message}".strip()) from None
    return _Trouble(words)


class _Patience:
    """Counts tries, and waits before each."""

    def __init__(self, url: str, what: str) -> None:
        self.url, self.what, self.tries = url, what, 0

    def after(self, trouble: _Trouble, given: int = 0) -> None:
        """Raises `UserError` where nothing was ever had, `TransferError` after that, once there are no more tries."""
        name = f"{self.what} {self.url}".strip()
        if self.tries == len(WAITS):
            if not given:
                words = f"({trouble}, {self.tries + 1} tries)"
                raise UserError(f"{name}: cannot be read {words}; check the address and its server")
            raise TransferError(f"transfer broke off: {trouble}, {self.tries + 1} tries")
        log.warning("%s: %s; trying again in %.0f s", name, trouble, WAITS[self.tries])
        time.sleep(WAITS[self.tries])
        self.tries += 1


@dataclass
class _Stream:
    """A transfer that has begun: its bytes, where they begin in the file, and what the server says of it."""

    file: Any
    begins: int
    size: int | None
    version: str
    left: bytes = b""
    """Bytes that came before it broke."""
    error: Exception | None = None

    def read(self, most: int) -> bytes:
        """Some bytes, or none at the end. Raises whatever the library does."""
        if not self.left and self.error is None:
            try:
                return self.file.read(most)  # type: ignore[no-any-return]
            except Exception as error:
                self.error, self.left = error, unread(self.file.r.content) if hasattr(self.file, "r") else b""
        if not self.left and self.error is not None:
            raise self.error
        data, self.left = self.left[:most], self.left[most:]
        return data


def _begin(url: str, start: int, expected: int) -> _Stream:
    files = _files(url)
    if not url.startswith("http"):
        # blocks, each a request; small against the file, as what came of a block is lost when it breaks
        block = min(MOST_BLOCK, max(BUFFER, expected // 10)) if expected else MOST_BLOCK // 2
        file = files.open(url, "rb", block_size=block, cache_type="readahead")
        file.seek(start)
        details = file.details if isinstance(file.details, dict) else {}
        return _Stream(file, start, file.size, str(details.get("ETag") or details.get("etag") or ""))
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    file = files.open(url, "rb", block_size=0, size=1, headers=headers)  # a size spares the question for it
    answer = file.r.headers
    found = re.match(r"bytes (\d+)-\d+/(\d+|\*)", answer.get("Content-Range", "")) if file.r.status == 206 else None
    begins, size = (int(found[1]), found[2]) if found else (0, answer.get("Content-Length", "*"))
    version = answer.get("ETag") or answer.get("Last-Modified") or ""
    return _Stream(file, begins, int(size) if size.isdecimal() else None, version)


class RemoteFile(io.RawIOBase):
    """The bytes behind an address, in order.

    Args:
        url: one of `SCHEMES`.
        expected: bytes that there must be; 0 where nobody knows.
        what: word before the address in messages.
        start: bytes that were had before.
        tail: the last `TAIL` of them.

    Raises:
        UserError: no such address; from the first read, when there is nothing to be had, or another length of it.
        TransferError: when the transfer broke off for good, or goes on with another file.
    """

    def __init__(self, url: str, expected: int = 0, what: str = "", start: int = 0, tail: bytes = b"") -> None:
        self.url, self.expected, self.what, self.given = url, expected, what, start
        try:
            check_address(url)
        except UserError as error:
            raise UserError(f"{what} {error.marked}".strip()) from None
        self._tail = tail
        self._stream: _Stream | None = None
        self._known: tuple[int | None, str] | None = None
        self._ranges = True
        self._patience = _Patience(url, what)
        self._tried_at = start
        self._waited, self._came = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._end()
        super().close()

    def _next(self, most: int) -> bytes:
        while True:
            try:
                if self._stream is None:
                    self._stream = self._opened()
                data = self._received(self._stream, most)
            except TransferError:
                raise
            except Exception as error:  # the libraries behind fsspec raise whatever they like
                self._end()
                self._tried_at = self.given
                self._patience.after(_judged(error, self.url, self.what), self.given)
                continue
            self.given += len(data)
            self._tail = (self._tail + data[-TAIL:])[-TAIL:]
            if self.given - self._tried_at >= PROGRESS:
                self._patience.tries = 0
            return data

    def _received(self, stream: _Stream, most: int) -> bytes:
        """Some bytes, or none at the end."""
        begun = time.monotonic()
        data = stream.read(most)
        self._waited, self._came = self._waited + time.monotonic() - begun, self._came + len(data)
        if self._waited > SILENCE:
            if self._came < LEAST:
                raise _Trouble(f"{self._came} bytes in {self._waited:.0f} seconds")
            self._waited, self._came = 0.0, 0
        end = self.expected or stream.size
        if not data and end is not None and self.given < end:
            raise _Trouble(f"ended after {self.given} of {end} bytes")
        return data

    def _opened(self) -> _Stream:
        """A transfer that begins where the last one ended. Raises `_Trouble` where it does not."""
        wanted = self.given - len(self._tail) if self._ranges else 0
        stream = _begin(self.url, wanted, self.expected)
        try:
            self._compare(stream, wanted)
        except BaseException:
            stream.file.close()
            raise
        self._waited, self._came = 0.0, 0
        return stream

    def _compare(self, stream: _Stream, wanted: int) -> None:
        name = f"{self.what} {self.url}".strip()
        if self.expected and stream.size not in (None, self.expected):
            raise UserError(f"{self.url}: has {stream.size} bytes instead of {self.expected}; copy it there anew")
        if self._known not in (None, (stream.size, stream.version)):
            sizes = f"{self._known[0]} bytes at first, {stream.size} now"  # type: ignore[index]
            raise TransferError(f"transfer broke off: {name} was changed while it was read ({sizes})")
        self._known = stream.size, stream.version
        if stream.begins not in (0, wanted):
            self._ranges = False
            raise _Trouble(f"the server sends from byte {stream.begins} on where {wanted} was asked for")
        behind, tail = self.given - stream.begins, b""
        while behind:
            data = stream.read(min(behind, PROGRESS))
            if not data:
                raise _Trouble(f"ended before byte {self.given}, where it ended before")
            behind, tail = behind - len(data), (tail + data)[-TAIL:]
        if not tail.endswith(self._tail):
            if not stream.begins:
                raise TransferError("transfer broke off: the server sends other bytes than before")
            self._ranges = False
            raise _Trouble(f"the server sends other bytes than those from {wanted} on")

    def _end(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(Exception):
                self._stream.file.close()
            self._stream = None


def open_remote(url: str, expected: int = 0, what: str = "") -> IO[bytes]:
    """The bytes of an address as a file. Raises as `RemoteFile` does."""
    return io.BufferedReader(RemoteFile(url, expected, what), BUFFER)
