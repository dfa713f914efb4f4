"""One tar file to raw samples, and a memory that spares small sets from being read and decoded again and again.

webdataset reads the tar files. Nothing is handed to its openers (which run `pipe:` commands) nor to its decoders
(which unpickle): shards are opened as local files, and members other than images and labels are never read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from mvar_lightning.data.faults import CHECK, Faults
from mvar_lightning.data.images import SUFFIXES, decode_rgb
from mvar_lightning.data.index import ShardInfo
from mvar_lightning.errors import UserError


class RawSample(NamedTuple):
    """A sample as it lies in the shard: encoded image and label bytes."""

    shard: str
    key: str
    image: bytes
    label: bytes


def read_shard(folder: Path, shard: ShardInfo, faults: Faults) -> Iterator[RawSample]:
    """Samples of one tar file in order; what is damaged is counted, a vanished file is an error."""

    def handler(error: Exception) -> bool:
        faults.shard(shard.name, str(error.args[0]) if error.args else type(error).__name__)
        return True

    try:
        file = (folder / shard.name).open("rb")
    except OSError as error:
        raise UserError(f"shard {folder / shard.name}: cannot be opened ({error.strerror}); {CHECK}") from None
    given = 0
    with file:
        source = iter([{"url": shard.name, "stream": file}])
        members = tar_file_expander(source, handler=handler, select_files=_is_ours)
        for member in group_by_keys(members, handler=handler):
            given += 1
            yield _raw(shard.name, member)
    if given != shard.samples:
        faults.shard(shard.name, f"{given} samples instead of {shard.samples}")


def _is_ours(name: str) -> bool:
    suffix = base_plus_ext(name)[1]
    return suffix is not None and suffix.lower() in (*SUFFIXES, "cls")


def _raw(shard: str, member: dict[str, Any]) -> RawSample:
    """An incomplete sample keeps its place with empty bytes, which decoding reports as damaged."""
    image = next((member[suffix] for suffix in SUFFIXES if suffix in member), b"")
    return RawSample(shard, member["__key__"], image, member.get("cls", b""))


class SmallSetMemory:
    """Keeps encoded samples and decoded pictures of a split whose shards together have at most `limit` bytes.

    Decoded pictures are kept up to 4 x `limit` bytes. Larger splits are streamed, and nothing is kept.
    """

    def __init__(self, folder: Path, total_bytes: int, limit: int = 16 * 1024**2) -> None:
        self.folder = folder
        self.keeps = total_bytes <= limit
        self.room = 4 * limit
        self._samples: dict[str, list[RawSample]] = {}
        self._pictures: dict[tuple[str, str], Image.Image] = {}

    def samples(self, shard: ShardInfo, faults: Faults) -> Iterable[RawSample]:
        if not self.keeps:
            return read_shard(self.folder, shard, faults)
        if shard.name not in self._samples:
            self._samples[shard.name] = list(read_shard(self.folder, shard, faults))
        return self._samples[shard.name]

    def picture(self, raw: RawSample) -> Image.Image:
        """The decoded picture, not to be changed in place. Raises ImageError."""
        name = (raw.shard, raw.key)
        if name in self._pictures:
            return self._pictures[name]
        picture = decode_rgb(raw.image)
        size = 3 * picture.width * picture.height
        if self.keeps and size <= self.room:
            self.room -= size
            self._pictures[name] = picture
        return picture
