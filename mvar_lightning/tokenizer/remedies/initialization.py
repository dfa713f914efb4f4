"""Codes that start where the residuals are.

Shapes: B images of one process, N images of all processes and batches, l tokens of one scale, V vocabulary,
Z code dim, n codes, HW pixels, hw latent map.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer.nearest import NearestCode
from mvar_lightning.tokenizer.ranks import gather_rows, take_from_first, tell
from mvar_lightning.tokenizer.remedies.base import CodebookRemedy
from mvar_lightning.tokenizer.remedies.codes import k_means, replace_codes, shared_generator
from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer

log = logging.getLogger(__name__)


class DataDependentInit(CodebookRemedy):
    """Before the first steps, makes codes of the residuals that the first images leave at every scale.

    Each scale in turn gets an equal share of the codes that are left: k-means centers of the residuals that remain
    after the coarser scales were quantized with the codes chosen so far. Images of all processes are gathered.

    Args:
        batches: number of first batches whose images are gathered; a run resumed inside them gathers anew.
        iterations: of k-means; 0 draws residuals.
    """

    done: Tensor

    def __init__(self, batches: int = 1, iterations: int = 10) -> None:
        super().__init__()
        if batches < 1:
            raise UserError(f"DataDependentInit: batches {batches}: must be at least 1")
        if iterations < 0:
            raise UserError(f"DataDependentInit: iterations {iterations}: must be 0 or more")
        self.batches, self.iterations = batches, iterations
        self.register_buffer("done", torch.tensor(False))
        self._latents: list[Tensor] = []

    @torch.no_grad()
    def before_step(
        self, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        if self.done:
            return
        latent_NZhw = gather_rows(tokenizer.latent(image_B3HW).float())
        if not torch.isfinite(latent_NZhw).all():
            raise UserError(
                "DataDependentInit: the latents of the first images are not finite; check the images for NaN"
            )
        self._latents.append(latent_NZhw)
        if len(self._latents) == self.batches:
            self._initialize(tokenizer, torch.cat(self._latents), optimizer)
            self._latents = []
            self.done.fill_(True)

    def after_fit(self) -> None:
        if not self.done:
            tell(
                log,
                f"DataDependentInit: batches {self.batches}: the run ended after {len(self._latents)} and codes kept "
                "their random start; give fewer",
            )

    def _initialize(
        self, tokenizer: MultiScaleTokenizer, latent_NZhw: Tensor, optimizer: torch.optim.Optimizer | None
    ) -> None:
        codes_nZ = self._choose(tokenizer, latent_NZhw)
        missing = tokenizer.vocab_size - len(codes_nZ)
        if missing:
            tell(
                log,
                f"DataDependentInit: {len(latent_NZhw)} images left only {len(codes_nZ)} different residuals for "
                f"{tokenizer.vocab_size} codes; {missing} codes keep their random start: give more batches, or take a "
                "smaller vocab_size",
            )
        replace_codes(tokenizer, torch.arange(len(codes_nZ), device=codes_nZ.device), codes_nZ, optimizer)
        # on a GPU the sums of k-means differ in rounding from process to process
        take_from_first(tokenizer.quantizer.codebook.weight)

    def _choose(self, tokenizer: MultiScaleTokenizer, latent_NZhw: Tensor) -> Tensor:
        quantizer, num_scales = tokenizer.quantizer, tokenizer.pyramid.num_scales
        codes_nZ = latent_NZhw.new_zeros(0, tokenizer.code_dim)
        f_hat_NZhw = torch.zeros_like(latent_NZhw)
        for scale in range(num_scales):
            rows_NlZ = quantizer.next_input(latent_NZhw - f_hat_NZhw, scale)
            rows_Z = rows_NlZ.flatten(0, 1)
            number = (tokenizer.vocab_size - len(codes_nZ)) // (num_scales - scale)
            centers_nZ = k_means(rows_Z, number, quantizer.metric, self.iterations, shared_generator(scale))
            codes_nZ = torch.cat([codes_nZ, centers_nZ])
            idx_Nl = NearestCode(codes_nZ, quantizer.metric)(rows_Z).view(rows_NlZ.shape[:2])
            f_hat_NZhw = quantizer.accumulate(f_hat_NZhw, codes_nZ[idx_Nl], scale)
        return codes_nZ
