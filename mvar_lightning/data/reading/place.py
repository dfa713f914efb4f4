"""Where shards lie: a folder, an address, or names with brace ranges. Addresses go through `tools.remote`."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from braceexpand import braceexpand

from mvar_lightning.data.index import CHECK, INDEX_NAME, ShardIndex, ShardInfo, SplitIndex, presence_problem
from mvar_lightning.data.tar import TarDamage, read_samples
from mvar_lightning.errors import UserError
from mvar_lightning.tools.remote import check_address, is_url, open_remote, plain

log = logging.getLogger(__name__)

UNKNOWN = 0
"""Samples or bytes of a shard that no index tells."""


@dataclass(frozen=True)
class ShardPlace:
    """Opens shards. `root` is a folder or address that their names are joined to; empty where names say all."""

    root: str = ""

    def location(self, name: str) -> str:
        """Path or address of a shard."""
        root = plain(self.root)
        if is_url(root):
            return f"{root.rstrip('/')}/{name}"
        return str(Path(root) / name) if root else plain(name)

    def open(self, shard: ShardInfo) -> IO[bytes]:
        """The shard's bytes in order. Raises UserError when they cannot be had."""
        where = self.location(shard.name)
        # by the root: a name in the index of a local folder is never taken for an address
        if is_url(plain(self.root) or where):
            return open_remote(where, shard.bytes, "shard")
        try:
            return Path(where).open("rb")
        except OSError as error:
            raise UserError(f"shard {where}: cannot be opened ({error.strerror}); {CHECK}") from None

    def problem(self, shard: ShardInfo) -> str | None:
        """What is wrong with a shard, as far as can be told at no cost: a local file's length. None for addresses."""
        where = self.location(shard.name)
        if is_url(where) or not shard.bytes:
            return None
        return presence_problem(shard, {shard.name: Path(where)})


MOST_NAMES = 1_000_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_LIST = re.compile(r"\{([^{}]*)\}")


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Names of shards: `{000..127}` and `{a,b}` expanded, and the lines of list files (.txt, .lst; relative to them).

    Raises UserError for braces that do not close, more than MOST_NAMES, and a list that cannot be read.
    """
    names: list[str] = []
    for one in [patterns] if isinstance(patterns, str) else patterns:
        if Path(one).suffix in (".txt", ".lst") and not is_url(plain(one)):
            names += _listed(Path(plain(one)))
        elif one.startswith("pipe:"):  # a command may hold braces of its own
            names.append(one)
        else:
            names += _braces(one)
    return names


def _braces(pattern: str) -> list[str]:
    ranges = (abs(int(last[:12]) - int(first[:12])) + 1 for first, last in _RANGE.findall(pattern))
    lists = (1 + inside.count(",") for inside in _LIST.findall(pattern))
    if math.prod((*ranges, *lists)) > MOST_NAMES:  # told at once: to expand so many takes minutes
        raise UserError(f"shards {pattern}: are more than {MOST_NAMES} names; check the range, and lists in braces")
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


def index_of_names(train: str | Sequence[str], val: str | Sequence[str], num_classes: int) -> ShardIndex:
    """An index for shards that come without one.

    Validation shards are counted, for each sample must be read exactly once: local ones by their headers, remote ones
    by reading them. Training shards are counted where that is cheap (local files), else their number is UNKNOWN.

    Raises:
        UserError: a shard that is missing or not a tar file, an address that is not opened.
    """
    place = ShardPlace()
    splits = {
        "train": SplitIndex(tuple(_counted(place, name, remote=False) for name in expand(train))),
        "val": SplitIndex(tuple(_counted(place, name, remote=True) for name in expand(val))),
    }
    return ShardIndex(tuple(map(str, range(num_classes))), splits)


def _counted(place: ShardPlace, name: str, remote: bool) -> ShardInfo:
    name = plain(name)
    if is_url(name):
        try:
            check_address(name)
        except UserError as error:
            raise UserError(f"shards {error.marked}") from None
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
