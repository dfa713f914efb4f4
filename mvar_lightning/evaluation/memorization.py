"""Are generated images copies of training images? Distances to the nearest ones, in feature and in pixel space, beside
those of held-out images (`metrics.copying`).

N images, F features or numbers of a shrunk image, HW pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mvar_lightning.evaluation.image_sources import ImageSource
from mvar_lightning.evaluation.images import ImageSide
from mvar_lightning.evaluation.reports import Memorization
from mvar_lightning.metrics.copying import Nearest, cells_of, copying_test, nearest
from mvar_lightning.tools.drawing import make_pairs

COMPARED = 2_000
"""Generated, and held-out, images that are looked at; a fixed random choice where there are more."""
FITTED = 10_000
"""Training images that the partition into cells is fitted to; a fixed random choice where there are more."""
PIXEL_SIDE = 32
"""Larger images are shrunk to it (areas' means) for the distance between pixels."""
PAIRS = 8
"""The closest pairs of each space in the picture."""
BATCH = 256


class Memorized(NamedTuple):
    """The numbers, and a picture (3, H, W) in [0, 1] of the closest pairs: by features, then by pixels; each generated
    image stands above its nearest training image."""

    numbers: Memorization
    picture_3HW: Tensor


def measure_memorization(generated: ImageSide, held_out: ImageSide, training: ImageSide) -> Memorized:
    """Both tests, on sides whose features are all there.

    Raises:
        UserError: fewer than 20 images, or an image that cannot be read.
    """
    chosen = {side: _choice(len(side.source)) for side in (generated, held_out)}
    rows = {side: _features(side)[chosen[side]] for side in chosen}
    some_NF = _features(training)[_choice(len(training.source), FITTED)]
    cells = cells_of(some_NF, rows[generated], rows[held_out])
    by_features = {side: nearest(rows[side].to(side.device), _blocks(training)) for side in chosen}
    shrunk = {side: _shrunk(_picked(side.source, chosen[side])) for side in chosen}
    by_pixels = {side: nearest(shrunk[side].to(side.device), _pixels(training.source)) for side in chosen}
    pairs = [_closest(generated.source, chosen[generated], found[generated], training.source)
             for found in (by_features, by_pixels)]  # fmt: skip
    tests = [copying_test(found[generated].distance_N, found[held_out].distance_N, *cells)
             for found in (by_features, by_pixels)]  # fmt: skip
    numbers = Memorization(training.source.name, len(training.source), *tests)
    images, copies = (torch.cat(each) for each in zip(*pairs, strict=True))
    return Memorized(numbers, make_pairs(images, copies, columns=PAIRS))


def _choice(count: int, at_most: int = COMPARED) -> Tensor:
    """All numbers below ``count``, or a random choice of them that is always the same; in order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:at_most].sort().values


def _features(side: ImageSide) -> Tensor:
    rows_NF = side.rows("features")
    assert rows_NF is not None
    return rows_NF


def _blocks(side: ImageSide) -> Iterator[Tensor]:
    return side.store.rows("features", side.parts)


def _pixels(source: ImageSource) -> Iterator[Tensor]:
    for part in range(len(source.parts)):
        yield from map(_shrunk, source.read(part, BATCH))


def _shrunk(pixels_N3HW: Tensor) -> Tensor:
    """Pixels in [0, 1] as rows (N, F)."""
    image_N3HW = pixels_N3HW.float().div(255)
    height, width = (min(side, PIXEL_SIDE) for side in image_N3HW.shape[-2:])
    return F.adaptive_avg_pool2d(image_N3HW, (height, width)).flatten(start_dim=1)


def _picked(source: ImageSource, numbers: Tensor | Sequence[int]) -> Tensor:
    """Images (N, 3, H, W), uint8, by their numbers in the source, in the order asked for."""
    wanted = torch.as_tensor(numbers)
    found: dict[int, Tensor] = {}
    first = 0
    for part, count in enumerate(source.parts):
        inside = set(wanted[(wanted >= first) & (wanted < first + count)].tolist())
        at = first
        for batch_B3HW in source.read(part, BATCH) if inside else ():
            for number, image_3HW in enumerate(batch_B3HW, start=at):
                if number in inside:
                    found[number] = image_3HW.clone()
            at += len(batch_B3HW)
        first += count
    return torch.stack([found[number] for number in wanted.tolist()])


def _closest(source: ImageSource, chosen: Tensor, found: Nearest, training: ImageSource) -> tuple[Tensor, Tensor]:
    """The images of the smallest distances, and their nearest training images, in [0, 1]."""
    order = found.distance_N.argsort()[:PAIRS]
    images = _picked(source, chosen[order]), _picked(training, found.index_N[order])
    return images[0].float() / 255, images[1].float() / 255
