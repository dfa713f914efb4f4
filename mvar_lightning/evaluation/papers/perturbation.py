"""One wrong token at one scale: what it does to the image (Markov-VAR's perturbation study, arXiv 2511.23334).

While image i is sampled, one token of scale k, at a random place, is replaced by another random code; sampling goes on
with the same noise. The damage is measured against the same image sampled undisturbed.

B batch, l tokens of one scale, V vocabulary, Z code dim, HW pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.metrics.frechet import FrechetDistance
from mvar_lightning.sampling.sampler import (
    ImageNoise,
    SamplingSettings,
    check_labels,
    check_seeds,
    check_together,
    decode_in_chunks,
    sample_pyramid,
)
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import evaluating
from mvar_lightning.transformer import NextScaleTransformer

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distances (B,) of two batches of images in [-1, 1], such as LPIPS."""


@dataclass
class Damage:
    """Means over images of one perturbed scale; images in [0, 1]. ``fid`` compares with the real images given."""

    scale: int | None
    mse: float = 0.0
    l1: float = 0.0
    lpips: float | None = None
    fid: float | None = None

    def content(self) -> dict[str, Any]:
        return {"scale": self.scale, "mse": self.mse, "l1": self.l1, "lpips": self.lpips, "fid": self.fid}


class Perturbation:
    """Replaces one token of each image at one scale; for `sample_pyramid`'s ``replace``.

    Place and code are functions of the image's seed alone, so neither batch nor scale order changes them.
    """

    def __init__(self, tokenizer: MultiScaleTokenizer, scale: int, seeds: Sequence[int]) -> None:
        self.tokenizer, self.scale, self.seeds = tokenizer, scale, list(seeds)

    def __call__(self, scale: int, idx_Bl: Tensor, codes_BlZ: Tensor) -> tuple[Tensor, Tensor]:
        if scale != self.scale:
            return idx_Bl, codes_BlZ
        idx_Bl = idx_Bl.clone()
        for image, seed in enumerate(self.seeds):
            generator = torch.Generator().manual_seed(seed)
            place = int(torch.randint(idx_Bl.shape[1], (), generator=generator))
            shift = int(torch.randint(1, self.tokenizer.vocab_size, (), generator=generator))
            idx_Bl[image, place] = (idx_Bl[image, place] + shift) % self.tokenizer.vocab_size  # never the same code
        return idx_Bl, self.tokenizer.quantizer.lookup(idx_Bl)


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, values_B: Tensor) -> None:
        self.total += float(values_B.double().sum())
        self.count += len(values_B)

    @property
    def value(self) -> float:
        return self.total / self.count


@dataclass
class _Measured:
    mse: _Mean = field(default_factory=_Mean)
    l1: _Mean = field(default_factory=_Mean)
    lpips: _Mean = field(default_factory=_Mean)


@torch.no_grad()
def perturb(
    model: NextScaleTransformer,
    tokenizer: MultiScaleTokenizer,
    settings: SamplingSettings,
    count: int,
    seed: int = 0,
    batch_size: int = 16,
    perceptual: Perceptual | None = None,
    distance: FrechetDistance | None = None,
    keep: int = 8,
) -> tuple[list[Damage], list[Tensor]]:
    """Damage of every scale, and pictures: for the undisturbed run and each scale, the first ``keep`` images.

    Image i has class i modulo the number of classes and seed ``seed + i``. The first `Damage` (scale None) is the
    undisturbed run's: zero but for its FID.

    Args:
        distance: holds the real images already; without it there is no FID.

    Raises:
        UserError: fewer than one image, or a model and tokenizer that do not belong together.
    """
    if count < 1:
        raise UserError(f"{count} images: perturb at least one")
    check_together(model, tokenizer)
    damages, pictures = [], []
    clean: list[Tensor] = []  # in main memory: sampled once, compared with at every scale
    with evaluating(model, tokenizer):
        for scale in (None, *range(model.pyramid.num_scales)):
            measured = _Measured()
            kept: list[Tensor] = []
            for batch, image_B3HW in enumerate(_sampled(model, tokenizer, settings, count, seed, batch_size, scale)):
                if scale is None:
                    clean.append(image_B3HW.cpu())
                _measure(measured, image_B3HW, clean[batch].to(image_B3HW.device), perceptual)
                if distance is not None:
                    distance.update(image_B3HW, real=False)
                kept.append(image_B3HW[: max(0, keep - sum(len(part) for part in kept))].cpu())
            fid = None if distance is None else distance.compute()
            lpips = measured.lpips.value if perceptual is not None else None
            damages.append(Damage(scale, measured.mse.value, measured.l1.value, lpips, fid))
            pictures.append(torch.cat(kept))
            if distance is not None:
                distance.reset_generated()
    return damages, pictures


def _sampled(
    model: NextScaleTransformer,
    tokenizer: MultiScaleTokenizer,
    settings: SamplingSettings,
    count: int,
    seed: int,
    batch_size: int,
    scale: int | None,
) -> Iterator[Tensor]:
    """Batches of images in [0, 1], perturbed at a scale or not at all."""
    for first in range(0, count, batch_size):
        numbers = range(first, min(first + batch_size, count))
        seeds = [seed + number for number in numbers]
        label_B = check_labels([number % model.num_classes for number in numbers], model)
        yield _sample(model, tokenizer, settings, label_B, seeds, scale)


def _sample(
    model: NextScaleTransformer,
    tokenizer: MultiScaleTokenizer,
    settings: SamplingSettings,
    label_B: Tensor,
    seeds: list[int],
    scale: int | None,
) -> Tensor:
    noise = ImageNoise(check_seeds(seeds, len(label_B)), model.pyramid, label_B.device)
    replace = None if scale is None else Perturbation(tokenizer, scale, seeds)
    f_hat_BZhw, _ = sample_pyramid(model, tokenizer, label_B, settings, noise, replace=replace)
    return decode_in_chunks(tokenizer, f_hat_BZhw, None)


def _measure(measured: _Measured, image_B3HW: Tensor, clean_B3HW: Tensor, perceptual: Perceptual | None) -> None:
    difference_B3HW = image_B3HW - clean_B3HW
    measured.mse.add(difference_B3HW.square().mean(dim=(1, 2, 3)))
    measured.l1.add(difference_B3HW.abs().mean(dim=(1, 2, 3)))
    if perceptual is not None:
        measured.lpips.add(perceptual(image_B3HW * 2 - 1, clean_B3HW * 2 - 1))
