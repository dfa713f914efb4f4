"""One wrong token at one scale: what it does to the image (Markov-VAR's perturbation study, arXiv 2511.23334).

While image i is sampled, one token of scale k, at a random place, is replaced by another random code; sampling goes on
with the same noise. The damage is measured against the same image sampled undisturbed.

B batch, l tokens of one scale, V vocabulary, Z code dim, HW pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.metrics.frechet import FrechetDistance
from mvar_lightning.sampling.draws import ImageNoise, check_seeds
from mvar_lightning.sampling.sampler import SamplingSettings, check_labels, decode_in_chunks, sample_pyramid
from mvar_lightning.sampling.stages import Stages
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import evaluating
from mvar_lightning.tools.ranks import ALONE, Ranks
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
            index = int(torch.randint(idx_Bl.shape[1], (), generator=generator))
            shift = int(torch.randint(1, self.tokenizer.vocab_size, (), generator=generator))
            idx_Bl[image, index] = (idx_Bl[image, index] + shift) % self.tokenizer.vocab_size  # never the same code
        return idx_Bl, self.tokenizer.quantizer.lookup(idx_Bl)


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
    ranks: Ranks = ALONE,
) -> tuple[list[Damage], list[Tensor]]:
    """Damage of every scale, and pictures: for the undisturbed run and each scale, the first ``keep`` images.

    Image i has class i modulo the number of classes and seed ``seed + i``. The first `Damage` (scale None) is the
    undisturbed run's: zero but for its FID.

    Args:
        distance: holds the real images already; without it there is no FID. Of several processes each has one, and only
            the first one's must hold them.
        ranks: that share the work; only what the first is given holds the numbers of all.

    Raises:
        UserError: fewer than one image, or a model and tokenizer that do not belong together.
    """
    if count < 1:
        raise UserError(f"{count} images: perturb at least one")
    Stages.of(model).check_together(tokenizer)
    clean: dict[int, Tensor] = {}  # in main memory: sampled once, compared with at every scale
    turns = ranks.turns([range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)])
    found = []

    def damaged(scale: int | None, numbers: range) -> tuple[dict[str, float], Tensor | None, Tensor]:
        image_B3HW = _sample(model, tokenizer, settings, numbers, seed, scale)
        if scale is None:
            clean[numbers.start] = image_B3HW.cpu()
        values = _damages(image_B3HW, clean[numbers.start].to(image_B3HW.device), perceptual)
        features_BF = None if distance is None else distance.features(image_B3HW).cpu()
        kept_B3HW = image_B3HW[: max(0, keep - numbers.start)].cpu()
        return {name: float(values_B.double().sum()) for name, values_B in values.items()}, features_BF, kept_B3HW

    with evaluating(model, tokenizer):
        for scale in (None, *range(model.pyramid.num_scales)):
            sums, kept = dict.fromkeys(("mse", "l1", "lpips"), 0.0), []
            for values, features_BF, kept_B3HW in ranks.each(partial(damaged, scale), turns):
                for name, value in values.items():
                    sums[name] += value
                if distance is not None and features_BF is not None:
                    distance.add(features_BF, real=False)
                kept.append(kept_B3HW)
            with ranks.agreed():
                if ranks.is_first:
                    fid = None if distance is None else distance.compute()
                    lpips = None if perceptual is None else sums["lpips"] / count
                    found.append((Damage(scale, sums["mse"] / count, sums["l1"] / count, lpips, fid), torch.cat(kept)))
            if distance is not None:
                distance.reset_generated()
    return [damage for damage, _ in found], [picture for _, picture in found]


def _sample(
    model: NextScaleTransformer,
    tokenizer: MultiScaleTokenizer,
    settings: SamplingSettings,
    numbers: range,
    seed: int,
    scale: int | None,
) -> Tensor:
    """The images of these numbers, in [0, 1], perturbed at a scale or not at all."""
    seeds = [seed + number for number in numbers]
    label_B = check_labels([number % model.num_classes for number in numbers], model)
    noise = ImageNoise(check_seeds(seeds, len(label_B)), model.pyramid, label_B.device)
    replace = None if scale is None else Perturbation(tokenizer, scale, seeds)
    f_hat_BZhw, _ = sample_pyramid(model, tokenizer, label_B, settings, noise, replace=replace)
    return decode_in_chunks(tokenizer, f_hat_BZhw, None)


def _damages(image_B3HW: Tensor, clean_B3HW: Tensor, perceptual: Perceptual | None) -> dict[str, Tensor]:
    """Each measure of each image: (B,)."""
    difference_B3HW = image_B3HW - clean_B3HW
    found = {"mse": difference_B3HW.square().mean(dim=(1, 2, 3)), "l1": difference_B3HW.abs().mean(dim=(1, 2, 3))}
    if perceptual is not None:
        found["lpips"] = perceptual(image_B3HW * 2 - 1, clean_B3HW * 2 - 1)
    return found
