"""Inception score: exp of the mean divergence between an image's class probabilities and those of its split.

Salimans et al., arXiv 1606.03498. N images, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvar_lightning.errors import UserError

SPLITS = 10


def inception_score(logits_NC: Tensor, splits: int = SPLITS, seed: int | None = 0) -> tuple[float, float]:
    """Mean and standard deviation over equal splits, in float64.

    Args:
        logits_NC: of the classifier, any floating dtype; published ones are Inception's without the last bias.
        splits: published: ten (5,000 of 50,000 images each); as many as images where those are fewer.
        seed: images are put into a random order first, the same for one seed; None keeps theirs. A split of images
            sorted by class would have only some of the classes, and a score that is too low.

    Raises:
        UserError: not one image, or fewer than one split.
    """
    count = len(logits_NC)
    if count < 1 or splits < 1:
        raise UserError(f"Inception score: {count} images in {splits} splits; give at least one of each")
    if seed is not None:
        logits_NC = logits_NC[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    scores = torch.stack([_score(part_NC) for part_NC in logits_NC.tensor_split(min(splits, count))])
    return float(scores.mean()), float(scores.std(correction=0))


def _score(logits_NC: Tensor) -> Tensor:
    log_probability_NC = logits_NC.double().log_softmax(dim=1)
    probability_NC = log_probability_NC.exp()
    # a class that no image has would make 0 * -inf
    log_mean_C = probability_NC.mean(dim=0).clamp_min(torch.finfo(torch.float64).tiny).log()
    return (probability_NC * (log_probability_NC - log_mean_C)).sum(dim=1).mean().exp()
