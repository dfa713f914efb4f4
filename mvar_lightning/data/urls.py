"""Where shards lie: a folder, a URL, or names with brace ranges.

Local files are opened here. URLs go through webdataset's openers, which run a program each (`curl` for http, https and
sftp, `gsutil` for gs, `aws` for s3) and read its output. `pipe:` URLs run any command and are refused unless allowed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from braceexpand import braceexpand

from mvar_lightning.data.embedded import ensure
from mvar_lightning.data.faults import CHECK
from mvar_lightning.data.index import (
    INDEX_NAME,
    ShardIndex,
    ShardInfo,
    SplitIndex,
    count_samples,
    presence_problem,
)
from mvar_lightning.data.remote import open_remote, read_remote
from mvar_lightning.errors import UserError

log = logging.getLogger(__name__)

UNKNOWN = 0
"""Samples or bytes of a shard that no index tells."""


def is_url(path: str) -> bool:
    return "://" in path or path.startswith("pipe:")


@dataclass(frozen=True)
class ShardPlace:
    """Opens shards. `root` is a folder or URL that their names are joined to; empty where names say all."""

    root: str = ""
    allow_pipe: bool = False

    @classmethod
    def of(cls, place: ShardPlace | Path) -> ShardPlace:
        return place if isinstance(place, ShardPlace) else cls(str(place))

    def location(self, name: str) -> str:
        """Path or URL of a shard."""
        if not self.root:
            return name
        return f"{self.root.rstrip('/')}/{name}" if is_url(self.root) else str(Path(self.root) / name)

    def open(self, shard: ShardInfo) -> IO[bytes]:
        """The shard's bytes in order. Raises UserError when they cannot be had, and where `pipe:` is not allowed."""
        where = self.location(shard.name)
        # by the root: a name in the index of a local folder is never taken for a URL
        if is_url(self.root or where):
            refuse_pipe(where, self.allow_pipe)
            return open_remote(where, shard.bytes)
        try:
            return Path(where).open("rb")
        except OSError as error:
            raise UserError(f"shard {where}: cannot be opened ({error.strerror}); {CHECK}") from None

    def problem(self, shard: ShardInfo) -> str | None:
        """What is wrong with a shard, as far as can be told at no cost: a local file's length. None for URLs."""
        where = self.location(shard.name)
        if is_url(where) or not shard.bytes:
            return None
        return presence_problem(Path(where), shard)


def refuse_pipe(url: str, allowed: bool) -> None:
    if url.startswith("pipe:") and not allowed:
        raise UserError(f"shards {url}: runs a command; set data.allow_pipe to true if you trust the recipe")


def index_at(path: str, allow_pipe: bool = False) -> ShardIndex:
    """Index of a shard folder or of a URL that holds one; a missing embedded data set is made.

    Raises:
        UserError: no index there, or not a valid one.
    """
    if not is_url(path):
        return ensure(path)
    if path.startswith("pipe:"):
        raise UserError(f"data {path}: a command is no folder; give it as train_shards and val_shards")
    where = f"{path.rstrip('/')}/{INDEX_NAME}"
    data = read_remote(where, f"shards are read from a URL with the {INDEX_NAME} that `mvar shards make` wrote")
    try:
        return ShardIndex.from_json(json.loads(data))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"shard index {where}: not a valid index ({reason}); copy the shards anew") from None


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Names of shards: `{000..127}` and `{a,b}` expanded. Raises UserError for braces that do not close."""
    try:
        given = [patterns] if isinstance(patterns, str) else list(patterns)
        # a command may hold braces of its own
        return [name for one in given for name in ([one] if one.startswith("pipe:") else braceexpand(one))]
    except ValueError:
        raise UserError(f"shards {patterns}: a brace is not closed; write for example train/{{000..127}}.tar") from None


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
    return ShardIndex(tuple(str(label) for label in range(num_classes)), splits)


def _counted(place: ShardPlace, name: str, remote: bool) -> ShardInfo:
    if is_url(name):
        refuse_pipe(name, place.allow_pipe)
        samples = _count_remote(place, name) if remote else UNKNOWN
        return ShardInfo(name, samples, UNKNOWN, "")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"shard {name}: missing; check the range, and the folder that it is relative to")
    samples = count_samples(path)
    if samples < 1:
        raise UserError(f"shard {name}: not a tar file with KEY.cls labels; {CHECK}")
    return ShardInfo(name, samples, path.stat().st_size, "")


def _count_remote(place: ShardPlace, name: str) -> int:
    import tarfile

    log.info("counting the samples of %s; an %s beside the shards would spare that", name, INDEX_NAME)
    try:
        with (
            place.open(ShardInfo(name, UNKNOWN, UNKNOWN, "")) as file,
            tarfile.open(fileobj=file, mode="r|*") as tar,
        ):
            return sum(member.name.endswith(".cls") for member in tar)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"shard {name}: cannot be counted ({error}); {CHECK}") from None
