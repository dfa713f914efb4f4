"""How much of the codebook each scale uses, accumulated over many batches.

B batch, L all tokens, l tokens of one scale, K scales, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from mvar_lightning.pyramid import ScalePyramid


class CodebookUsage(Metric):
    """Usage and perplexity of the codebook per scale, over every token seen since the last reset, on all processes.

    Usage is the share of codes seen among those that could have been, min(V, tokens seen): a scale of one token cannot
    show more codes than there were images. Perplexity is exp(entropy) of the code frequencies, from 1 to V.
    """

    full_state_update = False
    higher_is_better = True
    counts_KV: Tensor

    def __init__(self, pyramid: ScalePyramid, vocab_size: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        counts = torch.zeros(pyramid.num_scales, vocab_size, dtype=torch.int64)
        self.add_state("counts_KV", default=counts, dist_reduce_fx="sum")

    def update(self, idx_BL: Tensor) -> None:
        """Count the tokens (B, L) of a batch."""
        for scale, idx_Bl in enumerate(self.pyramid.split(idx_BL)):
            self.counts_KV[scale] += torch.bincount(idx_Bl.flatten(), minlength=self.counts_KV.shape[1])

    def compute(self) -> dict[str, Tensor]:
        """``usage_K`` in [0, 1] and ``perplexity_K``; both are 0 before the first token."""
        tokens_K = self.counts_KV.sum(dim=1)
        could_K = tokens_K.clamp(max=self.counts_KV.shape[1])
        usage_K = (self.counts_KV > 0).sum(dim=1) / could_K.clamp(min=1)
        share_KV = self.counts_KV / tokens_K.clamp(min=1).unsqueeze(1)
        perplexity_K = torch.special.entr(share_KV).sum(dim=1).exp() * (tokens_K > 0)
        return {"usage_K": usage_K, "perplexity_K": perplexity_K}
