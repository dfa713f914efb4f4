"""How samples of tar shards are read and decoded; which samples, and in which order, is `order`'s.

`tar` reads the shards; members other than images and labels are never read, and nothing is unpickled.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvar_lightning.data.images import RGB, PixelForm, SampleError, decode
from mvar_lightning.data.index import CHECK, ShardInfo
from mvar_lightning.data.reading.place import ShardPlace
from mvar_lightning.data.tar import RawSample, TarDamage, label_of, read_samples
from mvar_lightning.data.transforms import Transform, planes
from mvar_lightning.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]


class Sample(NamedTuple):
    pixels_CSS: np.ndarray
    label: int


MAX_SHARE = 0.01
"""Share of damaged samples, and of damaged shards, above which a run stops."""

MIN_SAMPLES = 10
"""So many damaged samples never stop a run."""

NAMED = 20
"""Damaged samples named one by one; after that every hundredth."""


class Faults:
    """What one pass of one worker skipped: counted and named. Raises UserError when there is too much."""

    def __init__(self, num_shards: int) -> None:
        self.num_shards = num_shards
        self.seen = 0
        self.samples = 0
        self.reason = ""
        """Of the last sample."""
        self.shards: set[str] = set()

    def sample(self, shard: str, key: str, reason: str) -> None:
        self.samples += 1
        self.reason = f"{key} of shard {shard}: {reason}"
        if self.samples <= NAMED or self.samples % 100 == 0:
            log.warning("skipped sample %s of shard %s: %s (%d skipped so far)", key, shard, reason, self.samples)
        if self.samples > max(MIN_SAMPLES, MAX_SHARE * self.seen):
            raise UserError(
                f"{self.samples} of {self.seen} samples are damaged, last {key} of shard {shard} ({reason}); {CHECK}"
            )

    def shard(self, shard: str, reason: str) -> None:
        if shard in self.shards:
            return
        self.shards.add(shard)
        log.warning("shard %s is damaged: %s; going on with what it still gives", shard, reason)
        if len(self.shards) > MAX_SHARE * self.num_shards:
            raise UserError(
                f"shard {shard} is damaged: {reason} ({len(self.shards)} of {self.num_shards} shards so far); {CHECK}"
            )


class ImageReader:
    """Tar shards of images: batches of `image` uint8 or uint16 (B, C, S, S) and `label` int64 (B,).

    Small sets stay in memory: the encoded samples, and decoded pictures as far as 4 x `limit` bytes reach.

    Args:
        place: where the shards lie.
        total_bytes: of all shards together; 0 where it is not known.
        transform: picture to S x S picture.
        num_classes: labels are below it.
        draft_side: pictures at least twice that large may be decoded at a fraction of their size; None: never.
        limit: sets of more bytes are streamed, as are those of unknown size, and nothing is kept.
        form: of the pictures; to RGB every kind is converted.
    """

    def __init__(
        self,
        place: ShardPlace,
        total_bytes: int,
        transform: Transform,
        num_classes: int,
        draft_side: int | None = None,
        limit: int = 16 * 1024**2,
        form: PixelForm = RGB,
    ) -> None:
        self.form = form
        self.place, self.transform, self.num_classes, self.draft_side = place, transform, num_classes, draft_side
        self.keeps = 0 < total_bytes <= limit
        self.room = 4 * limit
        self._samples: dict[str, list[RawSample]] = {}
        self._pictures: dict[tuple[str, int], Image.Image] = {}  # by the place in the shard: keys may come again

    def read(self, shard: ShardInfo, faults: Faults) -> Iterable[RawSample]:
        """Raw samples of a shard in order; damage goes to `faults`."""
        if not self.keeps:
            return read_shard(self.place, shard, faults)
        if shard.name not in self._samples:
            self._samples[shard.name] = list(read_shard(self.place, shard, faults))
        return self._samples[shard.name]

    def decode(self, raw: RawSample, rng: random.Random) -> Sample:
        """A finished sample. Raises SampleError when it cannot be used."""
        label = self.label(raw)
        return Sample(planes(self.transform(self.picture(raw), rng)), label)

    def picture(self, raw: RawSample) -> Image.Image:
        """The decoded picture, not to be changed in place. Raises ImageError."""
        name = (raw.shard, raw.number)
        if name in self._pictures:
            return self._pictures[name]
        picture = decode(raw.image, self.form, self.draft_side)
        size = self.form.channels * self.form.bits // 8 * picture.width * picture.height
        if self.keeps and size <= self.room:
            self.room -= size
            self._pictures[name] = picture
        return picture

    def label(self, raw: RawSample) -> int:
        """Raises SampleError where it is no number or the sample none, UserError where it is no class."""
        if raw.fault:
            raise SampleError(raw.fault)
        label = label_of(raw.label)
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"shard {raw.shard}, sample {raw.key}: label {label} is outside 0..{self.num_classes - 1} "
                f"of the {self.num_classes} classes in the index; make the shards anew"
            )
        return label

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Finished samples to a batch."""
        labels_B = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        pixels_BCSS = np.stack([sample.pixels_CSS for sample in samples])
        return {"image": torch.from_numpy(pixels_BCSS), "label": labels_B}


def read_shard(place: ShardPlace, shard: ShardInfo, faults: Faults) -> Iterator[RawSample]:
    """Samples of one tar file in order; what is damaged is counted, a vanished file is an error."""

    given = 0
    with place.open(shard) as file:
        try:
            for sample in read_samples(file, shard.name):
                given += 1
                yield sample
        except TarDamage as damage:
            faults.shard(shard.name, str(damage))
    if shard.samples and given != shard.samples:
        faults.shard(shard.name, f"{given} samples instead of {shard.samples}")
