"""What a shard folder holds: `index.json` with counts, sizes, checksums and class names.

Layout: DST/train/000000.tar ..., DST/val/000000.tar ..., DST/index.json. The index is written last, so a folder with
an index is complete.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from mvar_lightning.data.images import RGB, PixelForm
from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import JSON_BYTES, parse_json, sha256_of
from mvar_lightning.tools.remote import is_url, open_remote, plain

T = TypeVar("T")

INDEX_NAME = "index.json"
FORMAT = "mvar-shards-1"
CHECK = "copy it again or make it anew (where there is an index.json, `mvar shards check` names all that is wrong)"
LEAST_BYTES = 1024
"""Of a sample in a shard: the headers of two members."""

# A name is joined to the folder and opened, so it may neither leave the folder nor carry a scheme such as pipe:
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*\.tar")


@dataclass(frozen=True)
class ShardInfo:
    """One tar file: `name` relative to the shard folder, `bytes` of the file."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @classmethod
    def from_json(cls, row: Any) -> ShardInfo:
        """Raises KeyError, TypeError or ValueError where it is none."""
        shard = cls(*(typed(row, name, kind) for name, kind in ENTRY))
        if not _SAFE_NAME.fullmatch(shard.name) or not 1 <= shard.samples <= shard.bytes // LEAST_BYTES:
            raise ValueError(
                f"shard {shard.name!r} of {shard.samples} samples in {shard.bytes} bytes is not a shard of this folder"
            )
        return shard


ENTRY: tuple[tuple[str, type], ...] = (("name", str), ("samples", int), ("bytes", int), ("sha256", str))


@dataclass(frozen=True)
class SplitIndex:
    shards: tuple[ShardInfo, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class ShardIndex:
    """What the shards of a folder hold; ``form`` is in the file where pictures are not RGB of 8 bits."""

    class_names: tuple[str, ...]
    splits: dict[str, SplitIndex]
    form: PixelForm = RGB

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def split(self, name: str) -> SplitIndex:
        return self.splits.get(name, SplitIndex(()))

    def to_json(self) -> str:
        splits = {
            name: {"samples": split.samples, "bytes": split.bytes, "shards": [asdict(shard) for shard in split.shards]}
            for name, split in self.splits.items()
        }
        form = {} if self.form == RGB else asdict(self.form)
        content = {"format": FORMAT, **form, "class_names": list(self.class_names), "splits": splits}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, content: Any) -> ShardIndex:
        """Raises KeyError, TypeError or ValueError where the content is not an index."""
        names = class_names_of(content, FORMAT)
        splits = {
            name: SplitIndex(tuple(ShardInfo.from_json(row) for row in typed(split, "shards", list)))
            for name, split in typed(content, "splits", dict).items()
        }
        check_once(shard.name for split in splits.values() for shard in split.shards)
        if "train" in splits and not splits["train"].shards:
            raise ValueError("split train has no shards")
        return cls(names, splits, _form_of(content))


def _form_of(content: Any) -> PixelForm:
    return PixelForm(*(typed(content, name, int) for name in ("channels", "bits"))) if "channels" in content else RGB


# What an index of ours may hold, of shards or of tokens. KeyError, TypeError and ValueError say that it is none.


def typed(content: Any, name: str, kind: type) -> Any:
    """An entry of an object, which must be of that very type (True is no number; a float may be whole)."""
    value = content[name]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"{name} {str(value)[:40]!r} is no {kind.__name__}")
    return value


def class_names_of(content: Any, form: str) -> tuple[str, ...]:
    """The class names of an index of that format."""
    if content["format"] != form:
        raise ValueError(f"format {str(content['format'])[:40]!r} is not {form!r}")
    names = typed(content, "class_names", list)
    if not names or not all(type(name) is str for name in names):
        raise ValueError("class_names are not a list of names")
    return tuple(names)


def check_once(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name} is listed twice")
        seen.add(name)


def read_index(folder: str | Path) -> ShardIndex:
    """Index of a shard folder, local or at an address. Raises UserError when the folder, the index or its content is
    missing or wrong."""
    if is_url(folder := plain(str(folder))):
        where = f"{folder.rstrip('/')}/{INDEX_NAME}"
        way_out = f"shards are read from an address with the {INDEX_NAME} that `mvar shards make` wrote"
        return parse_index(read_remote(where, "shard index", way_out), where, "copy the shards anew")
    path = Path(folder) / INDEX_NAME
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_no_index(Path(folder))) from None
    except OSError as error:
        raise UserError(f"shard index {path}: cannot be read ({error.strerror})") from None
    return parse_index(content, path, "make the shards anew with `mvar shards make SRC DST`")


def parse_index(content: bytes, where: str | Path, way_out: str) -> ShardIndex:
    """Raises UserError where the content is not an index; `way_out` says what to do."""
    return parse(content, ShardIndex.from_json, f"shard index {where}", way_out)


def read_bytes(path: Path) -> bytes:
    """As far as an index may be long. Raises OSError, for what is no plain file, too."""
    if not path.is_file() and path.exists():
        raise OSError(errno.EINVAL, "not a plain file")
    with path.open("rb") as file:
        return file.read(JSON_BYTES + 1)


def read_remote(where: str, what: str, way_out: str) -> bytes:
    """The same of an address. Raises UserError."""
    try:
        with open_remote(where, what=what) as file:
            return file.read(JSON_BYTES + 1)
    except (UserError, OSError) as error:
        problem = error.marked if isinstance(error, UserError) else f"{what} {where}: {error}"
        raise UserError(f"{problem}; {way_out}") from None


def parse(content: bytes, make: Callable[[Any], T], what: str, way_out: str) -> T:
    """What `make` makes of JSON. Raises UserError where it is no JSON, or none that `make` takes."""
    try:
        return make(parse_json(content, parse_constant=_refuse))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{what}: not a valid index ({reason}); {way_out}") from None


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _no_index(folder: Path) -> str:
    if not folder.exists():
        return f"data folder {folder}: does not exist; make it with `mvar shards make SRC {folder}`"
    if not folder.is_dir():
        return f"data folder {folder}: is a file; give the folder that `mvar shards make SRC DST` wrote"
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"data folder {folder}: cannot be read (Permission denied)"
    if not any(folder.iterdir()):
        return f"data folder {folder}: is empty; fill it with `mvar shards make SRC {folder}`"
    return f"data folder {folder}: has no {INDEX_NAME}; if it holds images, run `mvar shards make {folder} DST`"


# Whether files are what an index says of them; also for the parts of a token cache, which are two files each: `bytes`
# and `sha256` are of all files of an entry in a row.


def presence_problem(entry: ShardInfo, files: Mapping[str, Path]) -> str | None:
    """The check that costs nothing: are the files (by the names in messages) there, and as long as they should be?"""
    for name, path in files.items():
        if not path.is_file():
            return f"{name}: missing"
    size = sum(path.stat().st_size for path in files.values())
    if size != entry.bytes:
        return f"{entry.name}: {size} bytes instead of {entry.bytes} (cut off or replaced)"
    return None


def content_problem(entry: ShardInfo, files: Mapping[str, Path], index_name: str) -> str | None:
    """Presence, and the checksum. Raises OSError for a file that cannot be read."""
    problem = presence_problem(entry, files)
    if problem is None and sha256_of(*files.values()) != entry.sha256:
        problem = f"{entry.name}: damaged (its content does not match the checksum in {index_name})"
    return problem


def not_listed(found: set[str], listed: set[str], index_name: str) -> list[str]:
    return [f"{name}: not in {index_name}" for name in sorted(found - listed)]
