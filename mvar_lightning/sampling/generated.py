"""What sampling and editing give: images and their tokens, which a notebook shows as a picture.

B images, L all tokens, HW pixels.
"""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from mvar_lightning.tools.drawing import show, to_pil


class Generated(NamedTuple):
    """Images (B, 3, H, W), float32 in [0, 1], and their tokens, int64 (B, L), coarse to fine."""

    images: Tensor
    tokens: Tensor

    def to_pil(self) -> list[Image.Image]:
        """Each image as a PIL image."""
        return to_pil(self.images)

    def _repr_png_(self) -> bytes:
        """All of them in one picture, for notebooks."""
        stream = io.BytesIO()
        show(self.images).save(stream, format="PNG")
        return stream.getvalue()
