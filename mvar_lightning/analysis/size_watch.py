"""Notices images that had to be enlarged: figures of such images say little, and nothing else would tell."""

from __future__ import annotations

import random

import torch
from PIL import Image

from mvar_lightning.data.transforms import Transform


class SizeWatch:
    """A transform that remembers whether any image was smaller than what it is cut to; also in loading processes."""

    def __init__(self, transform: Transform, image_size: int) -> None:
        self.transform = transform
        self.image_size = image_size
        self._smaller = torch.zeros(1, dtype=torch.bool).share_memory_()

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        if min(image.size) < self.image_size:
            self._smaller.fill_(True)
        return self.transform(image, rng)

    @property
    def enlarged(self) -> bool:
        return bool(self._smaller)
