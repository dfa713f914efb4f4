"""What the remedies do to a codebook: choose codes among rows, put them in place.

Shapes: N rows, n rows or codes chosen, V vocabulary, Z code dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mvar_lightning.tokenizer.nearest import CodeMetric, NearestCode
from mvar_lightning.tokenizer.quantizer import MultiScaleQuantizer
from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer


def shared_generator(*place: int) -> torch.Generator:
    """A generator that is the same on all processes and after a resume: a function of the place alone."""
    generator = torch.Generator()
    generator.manual_seed(hash(place) % 2**63)  # hashes of whole numbers do not vary between runs
    return generator


def draw_distinct(rows_NZ: Tensor, number: int, generator: torch.Generator, apart_from: Tensor | None = None) -> Tensor:
    """At most ``number`` rows, no two equal and none equal to a row of ``apart_from``; fewer if there are no more."""
    shuffled_NZ = rows_NZ[torch.randperm(len(rows_NZ), generator=generator).to(rows_NZ.device)]
    taken_nZ = rows_NZ[:0] if apart_from is None else apart_from
    if not len(rows_NZ):
        return rows_NZ
    _, group_N = torch.unique(torch.cat([taken_nZ, shuffled_NZ]), dim=0, return_inverse=True)
    place_N = torch.arange(len(group_N), device=group_N.device)
    first_n = torch.full((int(group_N.max()) + 1,), len(group_N), device=group_N.device)
    first_n.scatter_reduce_(0, group_N, place_N, "amin")
    new_n = first_n[first_n >= len(taken_nZ)].sort().values - len(taken_nZ)
    return shuffled_NZ[new_n[:number]]


def k_means(rows_NZ: Tensor, number: int, metric: CodeMetric, iterations: int, generator: torch.Generator) -> Tensor:
    """At most ``number`` centers of the rows (Lloyd's algorithm from distinct rows); no two start equal.

    With cosine codes rows are grouped by direction; a center is the mean of its rows, length included.
    """
    centers_nZ = draw_distinct(rows_NZ, number, generator)
    for _ in range(iterations):
        nearest_N = NearestCode(centers_nZ, metric)(rows_NZ)
        sums_nZ = torch.zeros_like(centers_nZ).index_add_(0, nearest_N, rows_NZ)
        counts_n1 = torch.bincount(nearest_N, minlength=len(centers_nZ)).unsqueeze(1)
        centers_nZ = torch.where(counts_n1 > 0, sums_nZ / counts_n1.clamp_min(1), centers_nZ)
    return centers_nZ


@torch.no_grad()
def replace_codes(
    tokenizer: MultiScaleTokenizer, index_n: Tensor, codes_nZ: Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write codes into the codebook. They have no past: their moments in the optimizer become zero, and weight
    averaging takes them as they are (``take_replaced_codes``)."""
    weight_VZ = tokenizer.quantizer.codebook.weight
    weight_VZ[index_n] = codes_nZ.to(weight_VZ)
    tokenizer.quantizer.replaced_codes.update(index_n.tolist())
    for moment in (optimizer.state.get(weight_VZ, {}) if optimizer is not None else {}).values():
        if isinstance(moment, Tensor) and moment.shape == weight_VZ.shape:
            moment[index_n] = 0


def take_replaced_codes(module: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """Names of codebooks below ``module`` and their codes that were replaced since this was last asked."""
    for name, part in module.named_modules():
        if isinstance(part, MultiScaleQuantizer) and part.replaced_codes:
            index, part.replaced_codes = sorted(part.replaced_codes), set()
            yield f"{name}.codebook.weight".removeprefix("."), index
