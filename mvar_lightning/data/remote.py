"""Bytes of a URL through webdataset's openers, and what they lack: a length that is checked, another try, a time limit.

The openers are pipes to a program. A server that breaks off or falls silent in the middle is asked again, and what was
had before is read past, so that the reader above notices nothing.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import subprocess
import time
from typing import IO, Any

from webdataset.gopen import Pipe, gopen, gopen_schemes

from mvar_lightning.errors import UserError

log = logging.getLogger(__name__)

WAITS = (1.0, 5.0, 15.0)
"""Seconds before each new try. `curl` itself repeats what a server refuses for the moment (5xx, 30 times)."""

SILENCE = 120.0
"""Seconds without a byte after which a transfer counts as broken."""

REFUSED = 22
"""Status of `curl --fail` for an HTTP error; it is final."""


def _open_s3(url: str, mode: str = "rb", bufsize: int = 8192) -> Pipe:
    return Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode=mode, bufsize=bufsize, ignore_status=[141])


# webdataset has no opener for s3 unless USE_AIS_FOR names one
gopen_schemes.setdefault("s3", _open_s3)


class RemoteFile(io.RawIOBase):
    """The bytes behind a URL, in order; `expected` of them, or 0 where nobody knows.

    Raises:
        UserError: from the first read, when there is nothing to be had.
        OSError: when the transfer broke off for good.
    """

    def __init__(self, url: str, expected: int = 0) -> None:
        self.url, self.expected = url, expected
        self.given = 0
        self._tries = 0
        self._pipe = self._open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data, trouble = self._receive(len(buffer))
            if trouble is None:
                buffer[: len(data)] = data
                self.given += len(data)
                return len(data)
            self._again(trouble)

    def close(self) -> None:
        if not self.closed:
            self._end_program()
        super().close()

    def _open(self) -> Pipe:
        try:
            pipe = gopen(self.url)
        except FileNotFoundError as error:
            raise UserError(f"shard {self.url}: needs the program `{error.filename}`; install it") from None
        except (ValueError, ImportError) as error:
            raise UserError(f"shard {self.url}: cannot be opened ({error})") from None
        assert isinstance(pipe, Pipe), self.url
        return pipe

    def _receive(self, size: int) -> tuple[bytes, str | None]:
        """Some bytes, or none at the end; or what went wrong."""
        stream = self._pipe.stream
        assert stream is not None
        if not select.select([stream], [], [], SILENCE)[0]:
            return b"", f"no byte for {SILENCE:.0f} seconds"
        data = os.read(stream.fileno(), size)  # past Python's buffer, for which `select` does not know
        if data:
            return data, None
        try:
            status = self._pipe.proc.wait(SILENCE)
        except subprocess.TimeoutExpired:
            return b"", f"{_program(self._pipe)} does not end"
        told = f"{_program(self._pipe)} status {status}{', an HTTP error' if status == REFUSED else ''}"
        if self.expected and self.given < self.expected:
            return b"", f"ended after {self.given} of {self.expected} bytes, {told}"
        if status not in self._pipe.ignore_status:
            return b"", told
        return b"", None

    def _again(self, trouble: str) -> None:
        """Ask once more and read past what was had; give up after as many tries as there are WAITS."""
        refused = self.given == 0 and self._pipe.proc.poll() == REFUSED
        if refused or self._tries == len(WAITS):
            if self.given == 0:
                raise UserError(f"shard {self.url}: cannot be read ({trouble}); check the address and its server")
            raise OSError(f"transfer broke off: {trouble}, {self._tries + 1} tries")
        log.warning("shard %s: %s; trying again in %.0f s", self.url, trouble, WAITS[self._tries])
        time.sleep(WAITS[self._tries])
        self._tries += 1
        self._end_program()
        self._pipe = self._open()
        behind = self.given
        while behind:
            data, trouble_again = self._receive(min(behind, 1 << 20))
            if trouble_again is not None or not data:
                return self._again(trouble_again or "shorter than before")
            behind -= len(data)
        return None

    def _end_program(self) -> None:
        """At once: left to itself a silent program is waited for two hours."""
        self._pipe.proc.kill()
        self._pipe.ignore_errors = True
        with contextlib.suppress(OSError):
            self._pipe.close()


def _program(pipe: Pipe) -> str:
    command = pipe.args[0][0]
    return str(command if isinstance(command, str) else command[0])


def open_remote(url: str, expected: int = 0) -> IO[bytes]:
    """The URL's bytes as a file. Reading raises as `RemoteFile` does."""
    return io.BufferedReader(RemoteFile(url, expected), 1 << 18)


def read_remote(url: str, advice: str) -> bytes:
    """All bytes of a small file. Raises UserError, with `advice`, when it cannot be had."""
    try:
        with open_remote(url) as file:
            return file.read()
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None
    except OSError as error:
        raise UserError(f"{url}: {error}; {advice}") from None
