"""How broadly a layer looks back: which layers should be `ScaleKV`'s drafters, that keep nearly all.

The selectivity index of the paper (arXiv 2505.19602) could not be read; this one is ours. Of one query, with p_j its
attention on the T tokens before its scale and m their sum:

    breadth = m exp(H),   H = - sum_j (p_j / m) log(p_j / m)

the share of attention that looks back, times the number of tokens that it is as good as evenly spread over: T where a
query looks at all of the history evenly and at nothing else, 0 where it looks at the own map alone. A layer that looks
at few tokens loses little when few keys stay.

B images, H heads, l tokens of one scale, S tokens of its keys, T of them before the scale, K scales.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mvar_lightning.tools.console import table_of

DRAFTERS = 16
"""One layer of so many drafts, as in the published models (2 of 32, 3 of 40)."""


def breadth_of(share_BHlS: Tensor, own: int) -> Tensor:
    """The sum over images of the mean over heads and queries, from their attention; 0 where nothing is looked back at.

    ``own`` is the number of keys of the query's own scale, the last ones.
    """
    history_BHlT = share_BHlS[..., : share_BHlS.shape[-1] - own].double()
    if not history_BHlT.shape[-1]:
        return torch.zeros((), dtype=torch.float64)
    mass_BHl = history_BHlT.sum(dim=-1)
    safe_BHl = mass_BHl.clamp_min(torch.finfo(torch.float64).tiny)
    spread_BHl = (safe_BHl.log() - history_BHlT.xlogy(history_BHlT).sum(dim=-1) / safe_BHl).exp()
    return (mass_BHl * spread_BHl).mean(dim=(1, 2)).sum().cpu()


def mean_of_scales(breadth_NK: Tensor) -> Tensor:
    """Of each of N layers, over the scales at which any looks back (N,): the late ones, where keys are many, count most
    by themselves."""
    looking_K = (breadth_NK > 0).any(dim=0)
    return breadth_NK[:, looking_K].mean(dim=1)


def drafters_of(breadth_NK: Tensor) -> list[int]:
    """The layers that look most broadly, one of 16; none where no layer looks back."""
    if not (breadth_NK > 0).any():
        return []
    count = max(1, round(len(breadth_NK) / DRAFTERS))
    order_N = mean_of_scales(breadth_NK).argsort(descending=True, stable=True)
    return sorted(order_N[:count].tolist())


def breadth_markdown(breadth_NK: Tensor, names: list[str]) -> str:
    """A row for each layer, and which to choose; nothing where no layer looks back."""
    drafters = drafters_of(breadth_NK)
    if not drafters:
        return ""
    shown = [scale for scale in range(len(names)) if (breadth_NK[:, scale] > 0).any()]
    rows = [
        [str(layer), *(f"{breadth_NK[layer, scale]:.1f}" for scale in shown), f"{mean:.1f}"]
        for layer, mean in enumerate(mean_of_scales(breadth_NK).tolist())
        if not math.isnan(mean)
    ]
    table = table_of(["layer", *(names[scale] for scale in shown), "mean"], rows)
    chosen = ",".join(map(str, drafters))
    return (
        "\nHow broadly each layer looks back: attention on earlier scales times how many tokens it is spread over:"
        f"\n\n{table}\nAs drafters of a smaller cache take the broadest: --cache-drafters {chosen}\n"
    )
