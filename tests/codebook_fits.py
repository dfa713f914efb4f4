"""Small tokenizers, images and fits on which codes fall out of use: for the tests of the remedies.

B batch, HW pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.metrics.quality import CodebookUsage
from mvar_lightning.tokenizer import (
    L2Loss,
    LossPart,
    MultiScaleTokenizer,
    QuantizerLoss,
    draw_kept_scales,
)
from mvar_lightning.tokenizer.codebook import CodebookRemedy
from mvar_lightning.tokenizer.losses import WeightedLoss


def tiny(seed: int = 0, **changes: Any) -> MultiScaleTokenizer:
    """8 x 8 pixels, scales 1 2 4, 32 codes of length 4; a linear encoder and decoder, so that a fit takes a second."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "scales": [1, 2, 4],
        "vocab_size": 32,
        "code_dim": 4,
        "channels": 2,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "norm_groups": 2,
    }
    tokenizer = MultiScaleTokenizer(**{**sizes, **changes})
    patch = {"kernel_size": 2, "stride": 2}
    tokenizer.encoder = torch.nn.Conv2d(3, tokenizer.code_dim, **patch)  # type: ignore[assignment]
    tokenizer.decoder = torch.nn.ConvTranspose2d(tokenizer.code_dim, 3, **patch)  # type: ignore[assignment]
    return tokenizer


def smooth_images(count: int = 64, seed: int = 1) -> Tensor:
    """Random colors on a 3 x 3 grid, enlarged: float (count, 3, 8, 8) in [-1, 1]."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=(8, 8), mode="bilinear")


def dull_images(seed: int = 1) -> Tensor:
    """Residuals of the coarse scales differ little from their mean: all of them take a few codes."""
    return 0.5 + 0.3 * smooth_images(seed=seed)


def fit(
    tokenizer: MultiScaleTokenizer,
    images: Tensor,
    steps: int,
    remedies: Sequence[CodebookRemedy] = (),
    losses: Sequence[LossPart] = (),
    batch: int = 32,
    scale_dropout: float = 0.0,
    lr: float = 5e-3,
) -> torch.optim.AdamW:
    """A plain loop over the images in their order; gives the optimizer."""
    loss = WeightedLoss([L2Loss(), QuantizerLoss(), *losses])
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for remedy in remedies:
        remedy.attach(tokenizer)
    for step in range(steps):
        image = images[torch.arange(step * batch, (step + 1) * batch) % len(images)]
        for remedy in remedies:
            remedy.before_step(tokenizer, image)
        output = tokenizer(image, draw_kept_scales(len(image), tokenizer.pyramid.num_scales, scale_dropout, first=1))
        optimizer.zero_grad()
        loss(output, image)[0].backward()
        optimizer.step()
        for remedy in remedies:
            remedy.after_step(tokenizer, output, optimizer)
    return optimizer


@torch.no_grad()
def usage(tokenizer: MultiScaleTokenizer, images: Tensor) -> list[float]:
    """Share of the codes that each scale uses, of what it could."""
    metric = CodebookUsage(tokenizer.pyramid, tokenizer.vocab_size)
    metric.update(tokenizer.encode(images))
    return metric.compute()["usage_K"].tolist()


def mean_usage(
    steps: int,
    make: Callable[[int], MultiScaleTokenizer] = tiny,
    images: Callable[[int], Tensor] = lambda seed: smooth_images(seed=seed),
    remedies: Callable[[], Sequence[CodebookRemedy]] = list,
    seeds: int = 4,
    **settings: Any,
) -> list[float]:
    """Usage of each scale after a fit, the mean of several starts on images of their own.

    One fit alone is a lottery: where codes die, the rounding of a CPU's kernels decides on many of them.
    """
    found = []
    for seed in range(seeds):
        tokenizer, seen = make(seed), images(seed + 1)
        fit(tokenizer, seen, steps, remedies=remedies(), **settings)
        found.append(torch.tensor(usage(tokenizer, seen)))
    return torch.stack(found).mean(dim=0).tolist()
