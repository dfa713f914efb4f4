"""Codes that nobody takes start again where residuals are.

Shapes: B images, K scales, l tokens of one scale, R rows of the reservoir, V vocabulary, Z code dim, n codes.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer.ranks import gather_rows, sum_over_ranks, tell
from mvar_lightning.tokenizer.remedies.base import CodebookRemedy
from mvar_lightning.tokenizer.remedies.codes import draw_distinct, replace_codes, shared_generator
from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer, TokenizerOutput

log = logging.getLogger(__name__)


class DeadCodeRestart(CodebookRemedy):
    """Replaces codes that were nearly unused at every scale by recent residuals, equally many of each scale.

    Args:
        every: steps between two looks at the codebook.
        threshold: a code is dead where its hits stay below this share of an even use, at every scale.
        until: last step at which codes are replaced; None goes on to the end.
        rows: residuals kept for each scale, the most recent ones.
        rows_per_image: residuals that an image adds to each scale at each step.
    """

    hits_KV: Tensor
    reservoir_KRZ: Tensor
    filled_K: Tensor
    steps: Tensor

    def __init__(
        self,
        every: int = 50,
        threshold: float = 0.02,
        until: int | None = None,
        rows: int = 1024,
        rows_per_image: int = 4,
    ) -> None:
        super().__init__()
        if every < 1:
            raise UserError(f"DeadCodeRestart: every {every}: must be at least 1")
        if not 0 <= threshold < 1:
            raise UserError(f"DeadCodeRestart: threshold {threshold}: must be in [0, 1)")
        if rows < 1 or rows_per_image < 1:
            raise UserError(f"DeadCodeRestart: rows {rows}, rows_per_image {rows_per_image}: must be at least 1")
        self.every, self.threshold, self.until = every, threshold, until
        self.rows, self.rows_per_image = rows, rows_per_image
        self._told = False
        self.register_buffer("steps", torch.tensor(0))

    def attach(self, tokenizer: MultiScaleTokenizer) -> None:
        num_scales, device = tokenizer.pyramid.num_scales, tokenizer.quantizer.codebook.weight.device
        self.register_buffer("hits_KV", torch.zeros(num_scales, tokenizer.vocab_size, device=device))
        shape = (num_scales, self.rows, tokenizer.code_dim)
        self.register_buffer("reservoir_KRZ", torch.zeros(shape, device=device))
        self.register_buffer("filled_K", torch.zeros(num_scales, dtype=torch.int64, device=device))

    @torch.no_grad()
    def between_batches(self, tokenizer: MultiScaleTokenizer, output: TokenizerOutput) -> None:
        self._count(tokenizer, output.idx_BL)

    @torch.no_grad()
    def after_step(
        self, tokenizer: MultiScaleTokenizer, output: TokenizerOutput, optimizer: torch.optim.Optimizer
    ) -> None:
        self.steps += 1
        step = int(self.steps)
        self._count(tokenizer, output.idx_BL)
        self._remember(output, step)
        if step % self.every == 0:
            if self.until is None or step <= self.until:
                self._restart(tokenizer, optimizer, step)
            self.hits_KV.zero_()

    def _count(self, tokenizer: MultiScaleTokenizer, idx_BL: Tensor) -> None:
        """Hits of all processes at once: DDP copies the buffers of rank zero to the others."""
        new_KV = torch.zeros_like(self.hits_KV)
        for new_V, idx_Bl in zip(new_KV, tokenizer.pyramid.split(idx_BL), strict=True):
            new_V += torch.bincount(idx_Bl.flatten(), minlength=len(new_V))
        self.hits_KV += sum_over_ranks(new_KV)

    def _remember(self, output: TokenizerOutput, step: int) -> None:
        """Rows of some positions, the same ones in all images and on all processes, replace the oldest."""
        for scale, rows_BlZ in enumerate(output.residuals_BlZ):
            generator = shared_generator(step, scale)
            chosen = torch.randperm(rows_BlZ.shape[1], generator=generator)[: self.rows_per_image]
            new_NZ = gather_rows(rows_BlZ[:, chosen.to(rows_BlZ.device)].flatten(0, 1))[-self.rows :]
            place_N = (self.filled_K[scale] + torch.arange(len(new_NZ), device=new_NZ.device)) % self.rows
            old_NZ = self.reservoir_KRZ[scale, place_N]
            finite_N1 = torch.isfinite(new_NZ).all(dim=1, keepdim=True)
            self.reservoir_KRZ[scale, place_N] = torch.where(finite_N1, new_NZ, old_NZ)
            self.filled_K[scale] += len(new_NZ)

    def _restart(self, tokenizer: MultiScaleTokenizer, optimizer: torch.optim.Optimizer, step: int) -> None:
        even_K1 = self.hits_KV.sum(dim=1, keepdim=True) / tokenizer.vocab_size
        dead_n = (self.hits_KV < self.threshold * even_K1).all(dim=0).nonzero().flatten()
        if not len(dead_n):
            return
        tokens = int(self.hits_KV.sum())
        if tokens < tokenizer.vocab_size:
            self._tell_once(
                f"{tokens} tokens in {self.every} steps cannot show which of {tokenizer.vocab_size} codes are dead, "
                "none is replaced; raise every or the batch, or take a smaller vocab_size"
            )
            return
        rows_nZ = self._draw(tokenizer, len(dead_n), step)
        if len(rows_nZ) < len(dead_n):
            self._tell_once(
                f"{len(dead_n)} of {tokenizer.vocab_size} codes are unused and recent images left only {len(rows_nZ)} "
                "different residuals to replace them; a smaller vocab_size would do"
            )
        replace_codes(tokenizer, dead_n[: len(rows_nZ)], rows_nZ, optimizer)

    def _tell_once(self, message: str) -> None:
        if not self._told:
            self._told = True
            tell(log, f"DeadCodeRestart: {message} (said once)")

    def _draw(self, tokenizer: MultiScaleTokenizer, number: int, step: int) -> Tensor:
        """At most so many different rows of the reservoir that are no codes yet, in a random order.

        Of each scale equally many, as far as there are.
        """
        codes_VZ = tokenizer.quantizer.codebook.weight.float()
        num_scales, chosen_nZ = len(self.filled_K), codes_VZ
        for scale, filled in enumerate(self.filled_K.clamp(max=self.rows).tolist()):
            share = (number + len(codes_VZ) - len(chosen_nZ)) // (num_scales - scale)
            known_RZ = self.reservoir_KRZ[scale, :filled]
            new_nZ = draw_distinct(known_RZ, share, shared_generator(step, scale, 1), apart_from=chosen_nZ)
            chosen_nZ = torch.cat([chosen_nZ, new_nZ])
        new_nZ = chosen_nZ[len(codes_VZ) :]
        return new_nZ[torch.randperm(len(new_nZ), generator=shared_generator(step)).to(new_nZ.device)]
