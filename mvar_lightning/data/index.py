"""What a shard folder holds: `index.json` with counts, sizes, checksums and class names.

Layout: DST/train/000000.tar ..., DST/val/000000.tar ..., DST/index.json. The index is written last, so a folder with
an index is complete.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvar_lightning.data.images import SUFFIXES, ImageError, decode_rgb
from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import sha256_of

INDEX_NAME = "index.json"
FORMAT = "mvar-shards-1"
CHECK = "run `mvar shards check` on its folder and make the shards anew"
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
        shard = ShardInfo(str(row["name"]), int(row["samples"]), int(row["bytes"]), str(row["sha256"]))
        if not _SAFE_NAME.fullmatch(shard.name) or shard.samples < 1:
            raise ValueError(f"shard {shard.name!r} with {shard.samples} samples is not a shard of this folder")
        return shard


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
    class_names: tuple[str, ...]
    splits: dict[str, SplitIndex]

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
        content = {"format": FORMAT, "class_names": list(self.class_names), "splits": splits}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, content: Any) -> ShardIndex:
        """Raises KeyError, TypeError or ValueError where the content is not an index."""
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not {FORMAT!r}")
        names = tuple(str(name) for name in content["class_names"])
        splits = {
            name: SplitIndex(tuple(ShardInfo.from_json(row) for row in split["shards"]))
            for name, split in content["splits"].items()
        }
        if not names:
            raise ValueError("no class names")
        return cls(names, splits)


def read_index(folder: str | Path) -> ShardIndex:
    """Index of a shard folder. Raises UserError when the folder, the index or its content is missing or wrong."""
    path = Path(folder) / INDEX_NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_no_index(Path(folder))) from None
    except OSError as error:
        raise UserError(f"shard index {path}: cannot be read ({error.strerror})") from None
    return parse_index(content, path, "make the shards anew with `mvar shards make SRC DST`")


def parse_index(content: bytes, where: str | Path, way_out: str) -> ShardIndex:
    """Raises UserError where the content is not an index; `way_out` says what to do."""
    try:
        return ShardIndex.from_json(json.loads(content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"shard index {where}: not a valid index ({why_invalid(error)}); {way_out}") from None


def why_invalid(error: Exception) -> str:
    """What a reader of JSON tripped over, in words."""
    return f"no entry {error}" if isinstance(error, KeyError) else str(error)


def _no_index(folder: Path) -> str:
    if not folder.exists():
        return f"data folder {folder}: does not exist; make it with `mvar shards make SRC {folder}`"
    if not folder.is_dir():
        return f"data folder {folder}: is a file; give the folder that `mvar shards make SRC DST` wrote"
    if not any(folder.iterdir()):
        return f"data folder {folder}: is empty; fill it with `mvar shards make SRC {folder}`"
    return f"data folder {folder}: has no {INDEX_NAME}; if it holds images, run `mvar shards make {folder} DST`"


def check(
    folder: str | Path, workers: int = 1, decode: bool = False, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Compare shards with the index: one line for each that is missing, damaged or not listed; empty when sound.

    Args:
        folder: what `mvar shards make` wrote.
        workers: shards that are read at a time.
        decode: also decode every image and label, and name those that cannot be.
        progress: given the number of shards just checked.
    """
    folder = Path(folder)
    index = read_index(folder)
    listed = [shard for split in index.splits.values() for shard in split.shards]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.tar")}
    problems = []
    classes = index.num_classes if decode else None
    with ThreadPoolExecutor(max(1, workers)) as pool:  # hashing and decoding let other threads run
        for of_shard in pool.map(lambda shard: _problems(folder / shard.name, shard, classes), listed):
            problems += of_shard
            if progress is not None:
                progress(1)
    return problems + not_listed(found, {shard.name for shard in listed}, INDEX_NAME)


def _problems(path: Path, shard: ShardInfo, classes: int | None) -> list[str]:
    """What is wrong with a shard; its samples are decoded where the number of classes is given."""
    try:
        if problem := content_problem(shard, {shard.name: path}, INDEX_NAME):
            return [problem]
        samples = count_samples(path)
        if samples != shard.samples:
            return [f"{shard.name}: {samples} samples instead of {shard.samples}"]
        return [] if classes is None else list(_undecodable(path, shard, classes))
    except OSError as error:
        return [f"{shard.name}: cannot be read ({error.strerror})"]


def _undecodable(path: Path, shard: ShardInfo, classes: int) -> Iterator[str]:
    with tarfile.open(path) as tar:
        for member in tar:
            suffix = member.name.rpartition(".")[2]
            if suffix not in (*SUFFIXES, "cls") or (file := tar.extractfile(member)) is None:
                continue
            data = file.read()
            if suffix == "cls" and not (data.isdigit() and int(data) < classes):
                yield f"{shard.name}, {member.name}: label {data[:20]!r} is not one of {classes} classes"
            elif suffix != "cls":
                try:
                    decode_rgb(data)
                except ImageError as error:
                    yield f"{shard.name}, {member.name}: {error}"


def count_samples(path: Path) -> int:
    """Labels in a tar file; -1 when it cannot be read to its end."""
    try:
        with tarfile.open(path) as tar:
            return sum(member.name.endswith(".cls") for member in tar)
    except (tarfile.TarError, OSError):
        return -1


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
