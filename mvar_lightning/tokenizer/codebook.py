"""Remedies against unused codes: codes that start where the residuals are, and dead codes that start again there.

Shapes: B images of one process, L all tokens, l tokens of one scale, K scales, V vocabulary, Z code dim; N rows, or
images of all processes and batches, n rows or codes chosen, R rows of the reservoir; HW pixels, hw latent map.
"""

from __future__ import annotations

import logging
from abc import ABC
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer.nearest import CodeMetric, NearestCode
from mvar_lightning.tokenizer.quantizer import MultiScaleQuantizer
from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer, TokenizerOutput
from mvar_lightning.tools.processes import gather_rows, sum_over_ranks, take_from_first, tell

log = logging.getLogger(__name__)


class CodebookRemedy(nn.Module, ABC):
    """Looks after the codebook of a tokenizer in training, through hooks of a step.

    The hooks run on every process, in training only. Collectives are inside; afterwards the codebook is the same on all
    processes, and the one that a single process would have whose batch is theirs one after the other. State lives in
    buffers, so that it is in the checkpoint and a resume is exact.
    """

    def attach(self, tokenizer: MultiScaleTokenizer) -> None:
        """Called once, when the tokenizer is there: make the buffers that depend on its sizes."""

    def before_step(
        self, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor, optimizer: Optimizer | None = None
    ) -> None:
        """Called before the forward of a batch, with the tokenizer's optimizer."""

    def between_batches(self, tokenizer: MultiScaleTokenizer, output: TokenizerOutput) -> None:
        """Called after each batch of an accumulated step but the last, with its output."""

    def after_step(self, tokenizer: MultiScaleTokenizer, output: TokenizerOutput, optimizer: Optimizer) -> None:
        """Called after the step of the tokenizer's optimizer, with the last forward's output.

        May rewrite codes, and then resets their moments in the optimizer.
        """

    def after_fit(self) -> None:
        """Called at the end of the run: tell what there was no occasion to do."""


# What the remedies do to a codebook: choose codes among rows, and write them.
def shared_generator(*key: int) -> torch.Generator:
    """A generator that is the same on all processes and after a resume: a function of the key (step, scale) alone."""
    return torch.Generator().manual_seed(hash(key) % 2**63)  # hashes of whole numbers do not vary between runs


def draw_distinct(rows_NZ: Tensor, number: int, generator: torch.Generator, apart_from: Tensor | None = None) -> Tensor:
    """At most ``number`` rows, no two equal and none equal to a row of ``apart_from``; fewer if there are no more."""
    shuffled_NZ = rows_NZ[torch.randperm(len(rows_NZ), generator=generator).to(rows_NZ.device)]
    taken_nZ = rows_NZ[:0] if apart_from is None else apart_from
    if not len(rows_NZ):
        return rows_NZ
    _, group_N = torch.unique(torch.cat([taken_nZ, shuffled_NZ]), dim=0, return_inverse=True)
    index_N = torch.arange(len(group_N), device=group_N.device)
    # of each group of equal rows the first; where that is one of the rows apart, the group gives nothing new
    first_n = torch.full((int(group_N.max()) + 1,), len(group_N), device=group_N.device)
    first_n.scatter_reduce_(0, group_N, index_N, "amin")
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
    tokenizer: MultiScaleTokenizer, index_n: Tensor, codes_nZ: Tensor, optimizer: Optimizer | None
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


def without_waiting(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``; a GPU takes it when it comes to it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class DataDependentInit(CodebookRemedy):
    """Before the first steps, makes codes of the residuals that the first images leave at every scale.

    Each scale in turn gets an equal share of the codes that are left: k-means centers of the residuals that remain
    after the coarser scales were quantized with the codes chosen so far. Images of all processes are gathered.

    Args:
        batches: number of first batches whose images are gathered; a run resumed inside them gathers anew.
        iterations: of k-means; 0 draws residuals.
    """

    def __init__(self, batches: int = 1, iterations: int = 10) -> None:
        super().__init__()
        if batches < 1:
            raise UserError(f"DataDependentInit: batches {batches}: must be at least 1")
        if iterations < 0:
            raise UserError(f"DataDependentInit: iterations {iterations}: must be 0 or more")
        self.batches, self.iterations = batches, iterations
        self.done = nn.Buffer(torch.tensor(False))
        self._known_done = False
        self._latents: list[Tensor] = []

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._known_done = False

    @torch.no_grad()
    def before_step(
        self, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor, optimizer: Optimizer | None = None
    ) -> None:
        # the buffer is on the device, and reading it would make every step wait: once it is set that is remembered
        if self._known_done or self.done:
            self._known_done = True
            return
        device = image_B3HW.device.type
        # what autocast would keep of the weights here, without a gradient, it would give to the step's own pass
        # (torch 2.11, pytorch 165068)
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            latent_NZhw = gather_rows(tokenizer.latent(image_B3HW).float())
        if not torch.isfinite(latent_NZhw).all():
            raise UserError(
                "DataDependentInit: the latents of the first images are not finite; check the images for NaN"
            )
        self._latents.append(latent_NZhw)
        if len(self._latents) < self.batches:
            return
        latent_NZhw, self._latents = torch.cat(self._latents), []
        with torch.autocast(latent_NZhw.device.type, cache_enabled=False, enabled=False):
            codes_nZ = self._choose(tokenizer, latent_NZhw)
        if missing := tokenizer.vocab_size - len(codes_nZ):
            message = (
                f"DataDependentInit: {len(latent_NZhw)} images left only {len(codes_nZ)} different residuals for "
                f"{tokenizer.vocab_size} codes; {missing} codes keep their random start: give more batches, or take a "
                "smaller vocab_size"
            )
            tell(log, message)
        replace_codes(tokenizer, torch.arange(len(codes_nZ), device=codes_nZ.device), codes_nZ, optimizer)
        # on a GPU the sums of k-means differ in rounding from process to process
        take_from_first(tokenizer.quantizer.codebook.weight)
        self.done.fill_(True)
        self._known_done = True

    def after_fit(self) -> None:
        if not self.done:
            ended = f"DataDependentInit: batches {self.batches}: the run ended after {len(self._latents)}"
            tell(log, f"{ended} and codes kept their random start; give fewer")

    def _choose(self, tokenizer: MultiScaleTokenizer, latent_NZhw: Tensor) -> Tensor:
        quantizer, num_scales = tokenizer.quantizer, tokenizer.pyramid.num_scales
        codes_nZ, f_hat_NZhw = latent_NZhw.new_zeros(0, tokenizer.code_dim), torch.zeros_like(latent_NZhw)
        # coarse to fine: what a scale has to code depends on the codes that the coarser ones got
        for scale in range(num_scales):
            rows_NlZ = quantizer.next_input(latent_NZhw - f_hat_NZhw, scale)
            rows_Z = rows_NlZ.flatten(0, 1)
            number = (tokenizer.vocab_size - len(codes_nZ)) // (num_scales - scale)
            centers_nZ = k_means(rows_Z, number, quantizer.metric, self.iterations, shared_generator(scale))
            codes_nZ = torch.cat([codes_nZ, centers_nZ])
            idx_Nl = NearestCode(codes_nZ, quantizer.metric)(rows_Z).view(rows_NlZ.shape[:2])
            f_hat_NZhw = quantizer.accumulate(f_hat_NZhw, codes_nZ[idx_Nl], scale)
        return codes_nZ


class DeadCodeRestart(CodebookRemedy):
    """Replaces codes that were nearly unused at every scale by recent residuals, equally many of each scale.

    Args:
        every: steps between two looks at the codebook.
        threshold: a code is dead where its hits stay below this share of an even use, at every scale.
        until: last step at which codes are replaced; None goes on to the end.
        rows: residuals kept for each scale, the most recent ones.
        rows_per_image: residuals that an image adds to each scale at each step.
    """

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
        self._warned = False
        self.steps = nn.Buffer(torch.tensor(0))
        self._step: int | None = None

    def attach(self, tokenizer: MultiScaleTokenizer) -> None:
        K, like = tokenizer.pyramid.num_scales, tokenizer.quantizer.codebook.weight
        self.hits_KV = nn.Buffer(torch.zeros(K, tokenizer.vocab_size, device=like.device))
        self.reservoir_KRZ = nn.Buffer(torch.zeros(K, self.rows, tokenizer.code_dim, device=like.device))
        self.filled_K = nn.Buffer(torch.zeros(K, dtype=torch.int64, device=like.device))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._step = None

    @torch.no_grad()
    def between_batches(self, tokenizer: MultiScaleTokenizer, output: TokenizerOutput) -> None:
        self._count(tokenizer, output.idx_BL)

    @torch.no_grad()
    def after_step(self, tokenizer: MultiScaleTokenizer, output: TokenizerOutput, optimizer: Optimizer) -> None:
        # counted beside the buffer, which is on the device: reading it would make every step wait
        step = self._step = (int(self.steps) if self._step is None else self._step) + 1
        self.steps.add_(1)
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
            idx_N = idx_Bl.flatten()
            new_V.scatter_add_(0, idx_N, torch.ones_like(idx_N, dtype=new_V.dtype))  # `bincount` waits for the device
        self.hits_KV.add_(sum_over_ranks(new_KV))

    def _remember(self, output: TokenizerOutput, step: int) -> None:
        """Rows of some positions, the same ones in all images and on all processes, replace the oldest."""
        for scale, rows_BlZ in enumerate(output.residuals_BlZ):
            generator = shared_generator(step, scale)
            chosen = torch.randperm(rows_BlZ.shape[1], generator=generator)[: self.rows_per_image]
            new_NZ = gather_rows(rows_BlZ[:, without_waiting(chosen, rows_BlZ.device)].flatten(0, 1))[-self.rows :]
            # a ring: new rows go where the oldest are
            index_N = (self.filled_K[scale] + torch.arange(len(new_NZ), device=new_NZ.device)) % self.rows
            old_NZ = self.reservoir_KRZ[scale, index_N]
            finite_N1 = torch.isfinite(new_NZ).all(dim=1, keepdim=True)
            self.reservoir_KRZ[scale, index_N] = torch.where(finite_N1, new_NZ, old_NZ)
            self.filled_K[scale] += len(new_NZ)

    def _restart(self, tokenizer: MultiScaleTokenizer, optimizer: Optimizer, step: int) -> None:
        even_K1 = self.hits_KV.sum(dim=1, keepdim=True) / tokenizer.vocab_size
        dead_n = (self.hits_KV < self.threshold * even_K1).all(dim=0).nonzero().flatten()
        if not len(dead_n):
            return
        tokens = int(self.hits_KV.sum())
        # most codes would look dead for want of tokens
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
        if not self._warned:
            self._warned = True
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
