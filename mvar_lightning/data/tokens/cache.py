"""What a token cache holds: `tokens.json` and, for each image shard, two arrays in numpy's own format.

    DST/tokens.json               settings, class names; per split and part: samples, bytes, SHA-256, damaged images
    DST/train/000000.npy          uint16 (v, n, L), uint32 past 65,536 codes: one slab for each view
    DST/train/000000.labels.npy   int32 (n,)

Plain arrays are mapped into memory and sliced without a call for each sample, numpy checks their headers, and nothing
is unpickled. The index is written last, so a folder with an index is complete.

Legend: n samples of a part, v views, L tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mvar_lightning.data.index import (
    CHECK,
    ENTRY,
    ShardInfo,
    check_once,
    class_names_of,
    content_problem,
    not_listed,
    parse,
    presence_problem,
    read_bytes,
    read_remote,
    typed,
)
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid, Size, as_size, as_written, height_width
from mvar_lightning.tools.copies import local_copy, local_root
from mvar_lightning.tools.files import write
from mvar_lightning.tools.remote import is_url, plain

INDEX_NAME = "tokens.json"
FORMAT = "mvar-tokens-1"
DRAWN = "drawn"  # in place of a crop: a model drew the tokens (`mvar tokens draw`)
MAKE = "`mvar tokens make --checkpoint TOKENIZER --data SHARDS --out"
_SAFE_NAME = re.compile(r"(train|val)/\d{6,}")


@dataclass(frozen=True)
class CacheSettings:
    """Everything that the bytes of a cache follow from, beside the device: two caches with equal settings are equal.

    Args:
        tokenizer_hash, scales, vocab_size, code_dim: the tokenizer's fingerprint and sizes.
        data_sha256: of the image shards, see `content_hash`.
        image_size, resize_ratio, crop, val_crop, flip: as in `ShardsDataModule`; with `flip`, odd views are mirrored.
        views: of each training image; validation images have one.
        seed: of the crops.
        batch_size, precision: of the encoding; either may move a float in its last bit, and with it a token.
    """

    tokenizer_hash: str
    scales: tuple[Size, ...]
    vocab_size: int
    code_dim: int
    data_sha256: str
    image_size: Size
    resize_ratio: float
    crop: str
    val_crop: str
    flip: bool
    views: int
    seed: int
    batch_size: int
    precision: str

    @cached_property
    def num_tokens(self) -> int:
        return ScalePyramid(self.scales).num_tokens

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.vocab_size <= 65_536 else "<u4")

    @property
    def drawn(self) -> bool:
        """Whether a model drew the tokens, and they are not of images."""
        return self.crop == DRAWN

    def views_of(self, split: str) -> int:
        return self.views if split == "train" else 1

    def to_plain(self) -> dict[str, Any]:
        return asdict(self) | {"scales": list(map(as_written, self.scales)), "image_size": as_written(self.image_size)}

    @classmethod
    def from_plain(cls, plain: Any) -> CacheSettings:
        """Raises KeyError, TypeError or ValueError where an entry is missing or of a wrong kind."""
        kinds = {"tuple[Size, ...]": list, "int": int, "float": float, "bool": bool, "str": str}
        named = [field for field in fields(cls) if field.name != "image_size"]
        values = {field.name: typed(plain, field.name, kinds[str(field.type)]) for field in named}
        size = plain["image_size"]
        values["image_size"] = as_size(size) if type(size) in (int, list) else None
        values["scales"] = ScalePyramid(values["scales"]).sides
        numbers = {name: (values[name],) for name in ("vocab_size", "code_dim", "views", "batch_size")}
        for name, given in (numbers | {"image_size": height_width(values["image_size"] or 0)}).items():
            if not all(type(number) is int and 1 <= number < 2**32 for number in given):
                raise ValueError(f"{name} {str(plain[name])[:40]}")
        if not 0 < values["resize_ratio"] < 1000:
            raise ValueError(f"resize_ratio {values['resize_ratio']}")
        return cls(**values)


@dataclass(frozen=True)
class PartInfo(ShardInfo):
    """The tokens of one image shard: `name` is SPLIT/NUMBER; `bytes` and `sha256` are of both files in a row."""

    damaged: tuple[str, ...] = ()

    @classmethod
    def from_plain(cls, plain: Any) -> PartInfo:
        """Raises KeyError, TypeError or ValueError where it is none."""
        entry = {name: typed(plain, name, kind) for name, kind in ENTRY}
        part = cls(**entry, damaged=tuple(map(str, typed(plain, "damaged", list))))
        if not _SAFE_NAME.fullmatch(part.name) or part.samples < 0:
            raise ValueError(f"part {part.name!r} with {part.samples} samples")
        return part


@dataclass(frozen=True)
class TokenCache:
    """A complete cache, as its index tells it."""

    folder: Path
    settings: CacheSettings
    class_names: tuple[str, ...]
    parts: tuple[PartInfo, ...]
    remote: str = ""
    """The address that it is at; ``folder`` then holds copies of the parts that were asked for."""
    version: str = ""
    """Of the index at the address."""

    def split(self, name: str) -> tuple[PartInfo, ...]:
        """Parts of a split that have samples."""
        return tuple(part for part in self.parts if part.name.startswith(f"{name}/") and part.samples)

    def samples(self, split: str) -> int:
        return sum(part.samples for part in self.split(split))

    @property
    def damaged(self) -> int:
        """Images that could not be read when the cache was made."""
        return sum(len(part.damaged) for part in self.parts)

    def to_json(self) -> str:
        splits = {}
        for name in ("train", "val"):
            parts = [part for part in self.parts if part.name.startswith(f"{name}/")]
            splits[name] = {
                "samples": self.samples(name),
                "views": self.settings.views_of(name),
                "bytes": sum(part.bytes for part in parts),
                "parts": [asdict(part) for part in parts],
            }
        content = {
            "format": FORMAT,
            "settings": self.settings.to_plain(),
            "class_names": list(self.class_names),
            "splits": splits,
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_cache(folder: str | Path) -> TokenCache:
    """The index of a cache, here or at an address. Raises UserError when folder, index or content is missing or
    wrong."""
    if is_url(root := plain(str(folder)).rstrip("/")):
        where = f"{root}/{INDEX_NAME}"
        content = read_remote(where, "token cache", f"give the address of what {MAKE} DIR` wrote")
        version = hashlib.sha256(content).hexdigest()
        cache = partial(_cache_of, local_root(root, version), remote=root, version=version)
        return parse(content, cache, f"token cache {where}", "copy it there anew")
    folder = Path(root)
    path = folder / INDEX_NAME
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_no_index(folder)) from None
    except OSError as error:
        raise UserError(f"token cache {path}: cannot be read ({error.strerror})") from None
    return parse(content, partial(_cache_of, folder), f"token cache {path}", f"make it anew with {MAKE} NEW`")


def _cache_of(folder: Path, content: Any, remote: str = "", version: str = "") -> TokenCache:
    """Raises KeyError, TypeError or ValueError where the content is no index, or its numbers contradict one another."""
    names, settings = class_names_of(content, FORMAT), CacheSettings.from_plain(content["settings"])
    splits = typed(content, "splits", dict)
    parts = tuple(PartInfo.from_plain(part) for split in splits.values() for part in typed(split, "parts", list))
    check_once(part.name for part in parts)
    for part in parts:
        row = settings.views_of(part.name.split("/")[0]) * settings.num_tokens * settings.dtype.itemsize + 4
        if part.samples * row > part.bytes:
            raise ValueError(f"part {part.name} of {part.samples} samples does not fit in {part.bytes} bytes")
    return TokenCache(folder, settings, names, parts, remote, version)


def _no_index(folder: Path) -> str:
    if not folder.exists():
        return f"token cache {folder}: does not exist; make it with {MAKE} {folder}`"
    if not folder.is_dir():
        return f"token cache {folder}: is a file; give the folder that {MAKE} DIR` wrote"
    if (folder / "index.json").is_file():
        return f"token cache {folder}: holds images, not tokens; encode them with {MAKE} DIR`"
    return f"token cache {folder}: has no {INDEX_NAME}; if `mvar tokens make` was interrupted, run it again"


def part_files(folder: Path, name: str) -> dict[str, Path]:
    """The files of tokens and of labels, by their names in the cache."""
    return {file: folder / file for file in (f"{name}.npy", f"{name}.labels.npy")}


def open_part(cache: TokenCache, part: PartInfo) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (v, n, L) and labels (n,) of a part, mapped into memory.

    Raises:
        UserError: a missing or damaged file, or one of another type or shape than the index tells.
    """
    settings = cache.settings
    views = settings.views_of(part.name.split("/")[0])
    wanted = ((settings.dtype, (views, part.samples, settings.num_tokens)), (np.dtype("<i4"), (part.samples,)))
    arrays = []
    _fetch(cache, part)
    for path, (dtype, shape) in zip(part_files(cache.folder, part.name).values(), wanted, strict=True):
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except OSError as error:
            raise UserError(f"token cache: {path} cannot be opened ({error.strerror}); {REPAIR}") from None
        except Exception:  # numpy's many answers to a file that is none of its own, or cut off
            raise UserError(f"token cache: {path} is cut off or no array file; {REPAIR}") from None
        if array.dtype != dtype or array.shape != shape:
            raise UserError(
                f"token cache: {path} holds {array.dtype} {array.shape} instead of {dtype} {shape}; {REPAIR}"
            )
        arrays.append(array)
    return arrays[0], arrays[1]


def _fetch(cache: TokenCache, part: PartInfo) -> None:
    """Copy a part from the cache's address, unless it was. Raises UserError where it cannot be had or is damaged."""
    files = part_files(cache.folder, part.name)
    if not cache.remote or presence_problem(part, files) is None:
        return
    for name in files:
        local_copy(cache.remote, name, "token cache", cache.version)
    if problem := content_problem(part, files, INDEX_NAME):
        for path in files.values():
            path.unlink(missing_ok=True)
        raise UserError(f"token cache {cache.remote}: {problem}; {CHECK.replace('shards', 'tokens')}")


REPAIR = "run the same `mvar tokens` command again, it mends what is damaged"


def check_cache(folder: str | Path) -> list[str]:
    """One line for each part that is missing, damaged, not as the index tells, or not listed; empty when sound. Of a
    cache at an address the copies are looked at, and parts that were not copied yet are."""
    cache = read_cache(folder)
    problems = [problem for part in cache.parts if (problem := _problem_of(cache, part))]
    listed = {file for part in cache.parts for file in part_files(cache.folder, part.name)}
    found = {path.relative_to(cache.folder).as_posix() for path in cache.folder.glob("*/*.npy")}
    return problems + not_listed(found, listed, INDEX_NAME)


def _problem_of(cache: TokenCache, part: PartInfo) -> str | None:
    try:
        _fetch(cache, part)
    except UserError as error:
        return f"{part.name}: {error}"
    if problem := content_problem(part, part_files(cache.folder, part.name), INDEX_NAME):
        return problem
    if not part.samples:
        return None
    try:
        tokens_vnL, labels_n = open_part(cache, part)
    except UserError as error:
        return str(error)
    if int(tokens_vnL.max()) >= cache.settings.vocab_size:
        return f"{part.name}: token {int(tokens_vnL.max())} of {cache.settings.vocab_size} codes"
    if not 0 <= int(labels_n.min()) <= int(labels_n.max()) < len(cache.class_names):
        return f"{part.name}: label {int(labels_n.max())} of {len(cache.class_names)} classes"
    return None


def write_array(path: Path, array: np.ndarray) -> None:
    """An array in numpy's format, whole and on the disk."""
    contiguous = np.ascontiguousarray(array)
    write(path, lambda file: np.lib.format.write_array(file, contiguous, allow_pickle=False), durable=True)
