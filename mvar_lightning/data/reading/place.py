"""Where shards lie: a folder, a URL, or names with brace ranges.

Local files are opened here. URLs go through webdataset's openers, which run a program each (`curl` for http, https and
sftp, `gsutil` for gs, `aws` for s3) and read its output. `pipe:` URLs run any command and are refused unless allowed,
and so are schemes that are not in `SCHEMES`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import select
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

from braceexpand import braceexpand
from webdataset.gopen import Pipe, gopen, gopen_schemes, rewrite_url

from mvar_lightning.data.index import (
    CHECK,
    INDEX_NAME,
    ShardIndex,
    ShardInfo,
    SplitIndex,
    parse_index,
    presence_problem,
    read_index,
)
from mvar_lightning.data.tar import TarDamage, read_samples
from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import JSON_BYTES

log = logging.getLogger(__name__)

UNKNOWN = 0
"""Samples or bytes of a shard that no index tells."""

WAITS = (1.0, 5.0, 15.0)
"""Seconds before each new try. `curl` itself repeats what a server refuses for the moment (5xx, 30 times)."""

SILENCE = 120.0
"""Seconds without a byte after which a transfer counts as broken."""

REFUSED = 22
"""Status of `curl --fail` for an HTTP error; it is final."""


def is_url(path: str) -> bool:
    return "://" in path or path.startswith("pipe:")


@dataclass(frozen=True)
class ShardPlace:
    """Opens shards. `root` is a folder or URL that their names are joined to; empty where names say all."""

    root: str = ""
    allow_pipe: bool = False

    def location(self, name: str) -> str:
        """Path or URL of a shard."""
        if is_url(self.root):
            return f"{self.root.rstrip('/')}/{name}"
        return str(Path(self.root) / name) if self.root else name

    def open(self, shard: ShardInfo) -> IO[bytes]:
        """The shard's bytes in order. Raises UserError when they cannot be had, and where `pipe:` is not allowed."""
        where = self.location(shard.name)
        # by the root: a name in the index of a local folder is never taken for a URL
        if is_url(self.root or where):
            return open_remote(where, shard.bytes, self.allow_pipe)
        try:
            return Path(where).open("rb")
        except OSError as error:
            raise UserError(f"shard {where}: cannot be opened ({error.strerror}); {CHECK}") from None

    def problem(self, shard: ShardInfo) -> str | None:
        """What is wrong with a shard, as far as can be told at no cost: a local file's length. None for URLs."""
        where = self.location(shard.name)
        if is_url(where) or not shard.bytes:
            return None
        return presence_problem(shard, {shard.name: Path(where)})


SCHEMES = ("http", "https", "ftps", "sftp", "scp", "s3", "gs", "hf", "htgs", "ais")
"""Addresses that are opened; and `pipe` where it is allowed. No others are."""


def check_address(url: str, allow_pipe: bool) -> None:
    """Judge an address as the opener will see it: `gopen` rewrites it (GOPEN_REWRITE), then drops spaces and the like
    from what it takes for the scheme. Raises UserError."""
    try:
        seen = rewrite_url(url)
        scheme = urlparse(seen).scheme
    except (ValueError, re.error) as error:
        raise UserError(f"shards {url!r}: are no address ({error})") from None
    if scheme == "pipe" and not allow_pipe:
        raise UserError(f"shards {url}: runs a command; set data.allow_pipe to true if you trust the recipe")
    if scheme not in (*SCHEMES, "pipe") or not seen.startswith(f"{scheme}:"):
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"shards {url!r}: addresses of this kind are not opened; give a local path, or one of {known}")


def index_at(path: str | Path) -> ShardIndex:
    """Index of a shard folder or of a URL that holds one.

    Raises:
        UserError: no index there, or not a valid one.
    """
    path = str(path)
    if not is_url(path):
        return read_index(path)
    if path.startswith("pipe:"):
        raise UserError(f"data {path}: a command is no folder; give it as train_shards and val_shards")
    where = f"{path.rstrip('/')}/{INDEX_NAME}"
    try:
        with open_remote(where) as file:
            content = file.read(JSON_BYTES + 1)
    except (UserError, OSError) as error:
        problem = error if isinstance(error, UserError) else f"{where}: {error}"
        way_out = f"shards are read from a URL with the {INDEX_NAME} that `mvar shards make` wrote"
        raise UserError(f"{problem}; {way_out}") from None
    return parse_index(content, where, "copy the shards anew")


MOST_NAMES = 1_000_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Names of shards: `{000..127}` and `{a,b}` expanded, and the lines of list files (.txt, .lst; relative to them).

    Raises UserError for braces that do not close, more than MOST_NAMES, and a list that cannot be read.
    """
    names: list[str] = []
    for one in [patterns] if isinstance(patterns, str) else patterns:
        if Path(one).suffix in (".txt", ".lst") and not is_url(one):
            names += _listed(Path(one))
        elif one.startswith("pipe:"):  # a command may hold braces of its own
            names.append(one)
        else:
            names += _braces(one)
    return names


def _braces(pattern: str) -> list[str]:
    if math.prod(abs(int(last[:12]) - int(first[:12])) + 1 for first, last in _RANGE.findall(pattern)) > MOST_NAMES:
        raise UserError(f"shards {pattern}: are more than {MOST_NAMES} names; check the range")
    try:
        names = list(islice(braceexpand(pattern), MOST_NAMES + 1))
    except ValueError:
        raise UserError(f"shards {pattern}: a brace is not closed; write for example train/{{000..127}}.tar") from None
    if len(names) > MOST_NAMES:  # lists such as {a,b}{a,b} multiply
        raise UserError(f"shards {pattern}: are more than {MOST_NAMES} names; check the lists in braces")
    return names


def _listed(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
        raise UserError(f"list of shards {path}: cannot be read ({reason}); give one name a line") from None
    return [line if is_url(line) else str(path.parent / line) for line in lines if line]


def index_of_names(
    train: str | Sequence[str], val: str | Sequence[str], num_classes: int, allow_pipe: bool = False
) -> ShardIndex:
    """An index for shards that come without one.

    Validation shards are counted, for each sample must be read exactly once: local ones by their headers, remote ones
    by reading them. Training shards are counted where that is cheap (local files), else their number is UNKNOWN.

    Raises:
        UserError: a shard that is missing or not a tar file, a `pipe:` that is not allowed.
    """
    place = ShardPlace("", allow_pipe)
    splits = {
        "train": SplitIndex(tuple(_counted(place, name, remote=False) for name in expand(train))),
        "val": SplitIndex(tuple(_counted(place, name, remote=True) for name in expand(val))),
    }
    return ShardIndex(tuple(map(str, range(num_classes))), splits)


def _counted(place: ShardPlace, name: str, remote: bool) -> ShardInfo:
    if is_url(name):
        check_address(name, place.allow_pipe)
        if remote:
            log.info("counting the samples of %s; an %s beside the shards would spare that", name, INDEX_NAME)
        return ShardInfo(name, _count(place, name) if remote else UNKNOWN, UNKNOWN, "")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"shard {name}: missing; check the range, and the folder that it is relative to")
    return ShardInfo(name, _count(place, name), path.stat().st_size, "")


def _count(place: ShardPlace, name: str) -> int:
    """Samples of a shard that no index tells. Raises UserError where it is damaged, or none of them is whole."""
    samples = broken = 0
    try:
        with place.open(ShardInfo(name, UNKNOWN, UNKNOWN, "")) as file:
            for raw in read_samples(file, name, load=False):
                samples, broken = samples + 1, broken + bool(raw.fault)
    except TarDamage as damage:
        raise UserError(f"shard {name}: {damage}; {CHECK}") from None
    if broken == samples:
        raise UserError(f"shard {name}: no usable sample, {raw.key} {raw.fault}; {CHECK}")
    return samples


# Bytes of a URL through webdataset's openers, and what they lack: a length that is checked, another try, a time
# limit. The openers are pipes to a program. A server that breaks off or falls silent in the middle is asked again, and
# what was had before is read past, so that the reader above notices nothing.


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

    def __init__(self, url: str, expected: int = 0, allow_pipe: bool = False) -> None:
        check_address(url, allow_pipe)
        self.url, self.expected = url, expected
        self.given = self._tries = 0
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
        if data := os.read(stream.fileno(), size):  # past Python's buffer, for which `select` does not know
            return data, None
        command = self._pipe.args[0][0]
        program = command if isinstance(command, str) else command[0]
        try:
            status = self._pipe.proc.wait(SILENCE)
        except subprocess.TimeoutExpired:
            return b"", f"{program} does not end"
        message = f"{program} status {status}{', an HTTP error' if status == REFUSED else ''}"
        if self.expected and self.given < self.expected:
            return b"", f"ended after {self.given} of {self.expected} bytes, {message}"
        return b"", None if status in self._pipe.ignore_status else message

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


def open_remote(url: str, expected: int = 0, allow_pipe: bool = False) -> IO[bytes]:
    """The URL's bytes as a file. Raises UserError for an address that is not opened; reading, as `RemoteFile` does."""
    return io.BufferedReader(RemoteFile(url, expected, allow_pipe), 1 << 18)
