"""Precision and recall (how many images lie where real ones lie, and the reverse), and the Inception score.

Kynkaanniemi et al., arXiv 1904.06991: a set covers the balls around its feature vectors that reach to the k-th nearest
other one. C classes, N real and M generated images, F features, P and Q rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mvar_lightning.errors import UserError

NEIGHBORS = 3
BLOCK = 4096
SPLITS = 10


def precision_recall(
    real_NF: Tensor,
    generated_MF: Tensor,
    neighbors: int = NEIGHBORS,
    block: int = BLOCK,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Share of generated images in a real one's ball, and share of real images in a generated one's ball.

    Published: at most 10,000 real and 50,000 generated images, k = 3. Distances are computed in float64 from blocks of
    ``block`` x ``block`` pairs, so no matrix over all pairs is ever held.

    Args:
        real_NF, generated_MF: rows of features, any floating dtype; they stay where they are, blocks go to ``device``.
        neighbors: k.

    Raises:
        UserError: sets of no more than k images, or of different features.
    """
    if real_NF.shape[1:] != generated_MF.shape[1:]:
        raise UserError(f"precision, recall: {real_NF.shape[1]} features a real image, {generated_MF.shape[1]} a "
                        "generated one; take both from one extractor")  # fmt: skip
    if min(len(real_NF), len(generated_MF)) <= neighbors:
        raise UserError(f"precision, recall: {len(real_NF)} real and {len(generated_MF)} generated images; "
                        f"{neighbors} neighbors need more of each")  # fmt: skip
    center_F = real_NF.double().mean(dim=0)  # distances stay, and rounding gets small
    real, generated = (partial(_blocks, rows, center_F, block, device) for rows in (real_NF, generated_MF))
    radius_N, radius_M = (_radii(blocks, neighbors) for blocks in (real, generated))
    inside_N = torch.zeros(len(real_NF), dtype=torch.bool)
    inside_M = torch.zeros(len(generated_MF), dtype=torch.bool)
    for p, rows_PF in real():
        for q, rows_QF in generated():
            squared_PQ = squared_distances(rows_PF, rows_QF)
            inside_N[p] |= (squared_PQ <= radius_M[q].to(device)).any(dim=1).cpu()
            inside_M[q] |= (squared_PQ <= radius_N[p, None].to(device)).any(dim=0).cpu()
    return float(inside_M.double().mean()), float(inside_N.double().mean())


def _blocks(
    rows_NF: Tensor, center_F: Tensor, block: int, device: torch.device | str
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of features in float64, block by block, each with its range."""
    for first in range(0, len(rows_NF), block):
        range_P = slice(first, first + block)
        yield range_P, (rows_NF[range_P].double() - center_F).to(device)


def _radii(blocks: Callable[[], Iterator[tuple[slice, Tensor]]], neighbors: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other one."""
    radii = []
    for p, rows_PF in blocks():
        nearest_Pk = rows_PF.new_empty(len(rows_PF), 0)
        for q, rows_QF in blocks():
            squared_PQ = squared_distances(rows_PF, rows_QF)
            if p == q:
                squared_PQ.fill_diagonal_(torch.inf)  # a row is not its own neighbor
            # only the k nearest so far are kept: a row of the whole matrix never exists
            candidates = torch.cat([nearest_Pk, squared_PQ], dim=1)
            nearest_Pk = candidates.topk(min(neighbors, candidates.shape[1]), dim=1, largest=False).values
        radii.append(nearest_Pk.amax(dim=1).cpu())
    return torch.cat(radii)


def squared_distances(rows_PF: Tensor, rows_QF: Tensor) -> Tensor:
    """(P, Q), of each row to each; rounding is small where rows lie around 0."""
    norms_P, norms_Q = rows_PF.square().sum(dim=1), rows_QF.square().sum(dim=1)
    return torch.addmm(norms_P[:, None] + norms_Q, rows_PF, rows_QF.T, alpha=-2).clamp_min_(0)


def inception_score(logits_NC: Tensor, splits: int = SPLITS, seed: int | None = 0) -> tuple[float, float]:
    """Inception score: exp of the mean divergence between an image's class probabilities and those of its split.

    Salimans et al., arXiv 1606.03498. Mean and standard deviation over equal splits, in float64.

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
    scores = []
    for part_NC in logits_NC.tensor_split(min(splits, count)):
        log_probability_NC = part_NC.double().log_softmax(dim=1)
        probability_NC = log_probability_NC.exp()
        # a class that no image has would make 0 * -inf
        log_mean_C = probability_NC.mean(dim=0).clamp_min(torch.finfo(torch.float64).tiny).log()
        scores.append((probability_NC * (log_probability_NC - log_mean_C)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))
