"""Residual-feature alignment between scales (RFA; Markov-VAR, arXiv 2511.23334, figure 2).

For scale k and every scale j <= k, the mean over images and positions of

    RFA(k, j) = cos( r_k - mean(r_k), up(x_j) - mean(x_j) )

with x_j the input features of scale j (the transformer's input stream there), r_k = y_k - x_k the residual feature that
the blocks have added at scale k (y_k: output of the last block), `up` the nearest-neighbor enlargement of a map to the
size of scale k, and mean(.) the mean over all positions and images: features share a large common direction (the class,
the level embedding), and without its removal every pair looks aligned. The figure shows sign(s) * sqrt(|s|).
The paper also projects both features; its projection is not published, so none is used here.

B batch, l tokens of one scale, C width, K scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid, Size
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import evaluating
from mvar_lightning.tools.ranks import ALONE, Ranks
from mvar_lightning.transformer import NextScaleTransformer


@dataclass(frozen=True)
class Alignment:
    """``rfa_KK[k, j]`` in [-1, 1] for j <= k, NaN elsewhere."""

    images: int
    sides: tuple[Size, ...]
    rfa_KK: Tensor

    @property
    def signed_sqrt_KK(self) -> Tensor:
        """The figure's numbers, with the two digits that table and picture show, and no -0.00."""
        return (self.rfa_KK.sign() * self.rfa_KK.abs().sqrt()).round(decimals=2) + 0.0

    def content(self) -> dict[str, Any]:
        """Plain values, for JSON: row k holds scales 0 .. k."""
        rows = [[round(float(self.rfa_KK[k, j]), 6) for j in range(k + 1)] for k in range(len(self.sides))]
        return {"images": self.images, "scales": list(self.sides), "rfa": rows}


@torch.no_grad()
def residual_feature_alignment(
    model: NextScaleTransformer,
    tokenizer: MultiScaleTokenizer,
    batches: Iterable[tuple[Tensor, Tensor] | None],
    ranks: Ranks = ALONE,
) -> Alignment | None:
    """RFA of a model on images (B, 3, H, W) in [-1, 1] with labels (B,), teacher-forced, in evaluation mode.

    ``batches`` and ``ranks`` are as of `attention_mass`.

    Raises:
        UserError: fewer than two images.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def streams(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        image_B3HW, label_B = batch
        model(tokenizer.teacher_input(tokenizer.encode(image_B3HW)), label_B)
        return inputs.pop(), outputs.pop()

    with evaluating(model, tokenizer), _streams(model, inputs, outputs):
        found = list(ranks.each(streams, batches))
    if not ranks.is_first:
        return None
    images = sum(len(x_BLC) for x_BLC, _ in found)
    if images < 2:
        raise UserError(f"alignment: {images} images; means over images need at least two")
    x_BLC, y_BLC = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Alignment(images, model.pyramid.sides, alignment_of(x_BLC, y_BLC - x_BLC, model.pyramid))


def alignment_of(x_BLC: Tensor, residual_BLC: Tensor, pyramid: ScalePyramid) -> Tensor:
    """The formula above: float32 (K, K)."""
    scales = pyramid.num_scales
    rfa_KK = torch.full((scales, scales), torch.nan)
    inputs = [_centered(part) for part in pyramid.split(x_BLC)]
    residuals = [_centered(part) for part in pyramid.split(residual_BLC)]
    for k in range(scales):
        for j in range(k + 1):
            rows, columns = (  # nearest neighbor
                torch.arange(larger, device=x_BLC.device) * side // larger
                for side, larger in zip(pyramid.shapes[j], pyramid.shapes[k], strict=True)
            )
            x_BlC = inputs[j].unflatten(1, pyramid.shapes[j])[:, rows][:, :, columns].flatten(1, 2)
            rfa_KK[k, j] = F.cosine_similarity(residuals[k], x_BlC, dim=-1).mean()
    return rfa_KK


def _centered(x_BlC: Tensor) -> Tensor:
    return x_BlC - x_BlC.mean(dim=(0, 1))


@contextmanager
def _streams(model: NextScaleTransformer, inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[None]:
    """Collects what enters the first block and what leaves the last, float32 on the CPU."""
    handles = [
        model.blocks[0].register_forward_pre_hook(lambda module, entering: inputs.append(entering[0].float().cpu())),
        model.blocks[-1].register_forward_hook(lambda module, _, leaving: outputs.append(leaving.float().cpu())),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
