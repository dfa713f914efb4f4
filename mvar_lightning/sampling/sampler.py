"""Sampling: one loop over the scales for every strategy, history and block (VAR's `autoregressive_infer_cfg`).

    label --model--> logits --guidance, filters, draw--> tokens --codebook, phi--> f_hat --area down--> next input

Below the loop: the filters and the draw, and the random numbers that an image's seed stands for.

B batch, l tokens of one scale, L all tokens, K scales, V vocabulary, Z code dim, HW pixels, hw latent map.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mvar_lightning.errors import UserError, check_kind
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.sampling.generated import Generated
from mvar_lightning.sampling.guidance import GuidanceSchedule, LinearGuidance, as_schedule
from mvar_lightning.sampling.stages import Drawers, StagedRows, Stages
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import evaluating, exact_float32, plain_numbers, runs_behind
from mvar_lightning.transformer import NextScaleTransformer

Replace = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(scale, idx_Bl, codes_BlZ) -> both, as sampling shall go on with them."""

Observe = Callable[[int, Tensor], None]
"""(scale, guided logits_BlV): look, but leave them as they are."""

NUM_SEEDS = 2**32
"""A CPU generator reads no more than 32 bits of its seed."""

LOGITS_AT_ONCE = 2**28
"""So many logits (1 GiB in float32) are held at a time, unless somebody looks at those of all images."""

DECODED_PIXELS = 2**18
"""Decoded at a time by default, four images of 256: else the decoder, some 2 kB a pixel in bf16, would be the peak."""


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen: what every way of sampling shares. Validated when made.

    Attributes:
        guidance: strength of classifier-free guidance at each scale.
        top_k, top_p: filters; None is off. A top_k above the vocabulary keeps all.
        temperature: divides the guided logits before they are filtered.
        more_smooth: feed mixtures of codes back instead of the codes drawn; for looks only (VAR).
    """

    guidance: GuidanceSchedule = field(default_factory=LinearGuidance)
    top_k: int | None = 900
    top_p: float | None = 0.96
    temperature: float = 1.0
    more_smooth: bool = False

    def __post_init__(self) -> None:
        check_filters(self.top_k, self.top_p, self.temperature)

    def arguments(self) -> dict[str, Any]:
        """The same as arguments of `generate` and `edit`."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"cfg": settings.pop("guidance"), **settings}


@torch.no_grad()
def generate(
    model: Drawers | Stages,
    tokenizer: MultiScaleTokenizer,
    label_B: Tensor | Sequence[int] | int,
    cfg: float | GuidanceSchedule | None = 1.5,
    top_k: int | None = 900,
    top_p: float | None = 0.96,
    seeds: Sequence[int] | Tensor | int | None = None,
    return_tokens: bool = True,
    temperature: float = 1.0,
    more_smooth: bool = False,
    decode_chunk: int | None = None,
    replace: Replace | None = None,
) -> Generated:
    """Images of the given classes, and their tokens.

    Runs on the model's device, in its precision (or that of an autocast around the call), in evaluation mode;
    each module's own mode is restored afterwards.

    Args:
        model: the transformer; or several, each with the scales that it draws, counted from 0:
            ``[(range(0, 8), drafter), (range(8, 10), refiner)]`` (`Stages`, CoDe).
        label_B: class indices; -1 or num_classes means "no class". One number with several seeds is repeated.
        cfg: guidance strength; a number is the published linear schedule, 0 or None computes no unconditional half.
        top_k: keep the k most probable tokens; 1 is greedy, None is off, more than V keeps all.
        top_p: of these, keep the most probable ones up to this share; None is off.
        seeds: one from 0 to 2^32 - 1 for each image (of one image a bare number will do); an image depends on its
            seed, not on its batch. None draws fresh ones, governed by `torch.manual_seed`.
        return_tokens: False gives the images alone, with a warning, in this version for the last time.
        temperature: divides the logits before they are filtered.
        more_smooth: mix codes by Gumbel softmax (VAR's option for looks; not for FID).
        decode_chunk: images decoded at a time; None is about 260,000 pixels.
        replace: look at what was drawn at each scale, or exchange it, before it is used (`sample_pyramid`).

    Raises:
        UserError: a label, seed or setting out of range, a pair that does not fit, or weights that give no numbers.
    """
    stages = Stages.of(model)
    stages.check_together(tokenizer)
    settings = SamplingSettings(as_schedule(cfg), top_k, top_p, temperature, more_smooth)
    label_B = check_labels(repeated(label_B, len(listed(seeds) or [0])), stages.first)
    noise = ImageNoise(check_seeds(seeds, len(label_B)), stages.pyramid, label_B.device)
    with evaluating(*stages.models, tokenizer):
        f_hat_BZhw, idx_BL = sample_pyramid(stages, tokenizer, label_B, settings, noise, replace)
        images_B3HW = decode_in_chunks(tokenizer, f_hat_BZhw, decode_chunk)
    check_finite(torch.isfinite(images_B3HW).all(), "pixels", "tokenizer")
    if not return_tokens:  # stacklevel: the line that called, past the wrapper of no_grad
        warnings.warn("return_tokens=False goes with the next version; take .images", FutureWarning, stacklevel=3)
        return cast(Any, images_B3HW)
    return Generated(images_B3HW, idx_BL)


@torch.no_grad()
def sample_pyramid(
    model: Drawers | Stages,
    tokenizer: MultiScaleTokenizer,
    label_B: Tensor,
    settings: SamplingSettings,
    noise: ImageNoise,
    replace: Replace | None = None,
    observe: Observe | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop itself, for modules in evaluation mode: f_hat (B, Z, h, w) and tokens (B, L).

    Args:
        label_B: int64 on the model's device (`check_labels`).
        replace: exchange what was drawn at a scale before it is used (editing, perturbation).
        observe: see the guided logits of each scale.

    Raises:
        UserError: logits that are NaN or infinite.
    """
    stages = Stages.of(model)
    quantizer, pyramid = tokenizer.quantizer, stages.pyramid
    rows = StagedRows(stages, label_B, settings.guidance)
    f_hat_BZhw = quantizer.empty_f_hat(len(label_B))
    tokens: list[Tensor] = []
    sound = torch.ones((), dtype=torch.bool, device=label_B.device)  # read once: each time a GPU would have to wait
    x_BlZ = None
    for scale in range(pyramid.num_scales):
        h_RlC = rows.features(scale, x_BlZ)
        chosen = []
        # both halves' logits of so many images stay bounded, unless those of all are needed together
        at_once = max(1, LOGITS_AT_ONCE // (2 * pyramid.tokens_of(scale) * stages.first.vocab_size))
        if observe is not None or settings.more_smooth:
            at_once = len(label_B)
        for start in range(0, len(label_B), at_once):
            images = slice(start, start + at_once)
            logits_blV = rows.logits(h_RlC, scale, images)
            sound &= torch.isfinite(logits_blV.sum())
            if observe is not None:
                observe(scale, logits_blV)
            chosen.append(choose(logits_blV, scale, settings, noise, tokenizer, images))
            del logits_blV  # not held while the next ones are computed
        idx_Bl, codes_BlZ = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        if replace is not None:
            idx_Bl, codes_BlZ = replace(scale, idx_Bl, codes_BlZ)
        tokens.append(idx_Bl)
        f_hat_BZhw = quantizer.accumulate(f_hat_BZhw, codes_BlZ, scale)
        if scale + 1 < pyramid.num_scales:
            x_BlZ = quantizer.next_input(f_hat_BZhw, scale + 1)
    check_finite(sound, "logits", "model")
    return f_hat_BZhw, torch.cat(tokens, dim=1)


def choose(
    logits_BlV: Tensor,
    scale: int,
    settings: SamplingSettings,
    noise: ImageNoise,
    tokenizer: MultiScaleTokenizer,
    images: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Tokens (B, l) of one scale and the codes (B, l, Z) that go on: those tokens' own, or mixtures.

    ``images`` says which of the noise's images these logits are of; mixtures need all of them.
    """
    filters = settings.top_k, settings.top_p
    idx_Bl = sample_tokens(logits_BlV, noise.uniform(scale)[images], *filters, settings.temperature)
    if not settings.more_smooth:
        return idx_Bl, tokenizer.quantizer.lookup(idx_Bl)
    # Gumbel softmax of the filtered logits, colder and sharper scale by scale (VAR)
    ratio = scale / max(1, tokenizer.pyramid.num_scales - 1)
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    filtered_BlV = filter_logits(logits_BlV / settings.temperature, *filters)
    noisy_BlV = filtered_BlV * (1 + ratio) + noise.gumbel(scale, tokenizer.vocab_size)
    with exact_float32(logits_BlV.device):
        return idx_Bl, (noisy_BlV / temperature).softmax(dim=-1) @ tokenizer.quantizer.codebook.weight.float()


def decode_in_chunks(tokenizer: MultiScaleTokenizer, f_hat_BZhw: Tensor, chunk: int | None) -> Tensor:
    """Images (B, 3, H, W), float32 in [0, 1], decoded ``chunk`` at a time into one tensor."""
    if chunk is not None and chunk < 1:
        raise UserError(f"decode_chunk {chunk}: must be at least 1, or None for about 260,000 pixels at a time")
    size = tokenizer.image_size
    chunk = chunk or max(1, DECODED_PIXELS // size**2)
    images_B3HW = torch.empty(len(f_hat_BZhw), 3, size, size, dtype=torch.float32, device=f_hat_BZhw.device)
    for target, part in zip(images_B3HW.split(chunk), f_hat_BZhw.split(chunk), strict=True):
        target.copy_(tokenizer.decode_latent(part))
    return images_B3HW.add_(1).mul_(0.5)


# What is given, checked.


def check_finite(sound: Tensor, what: str, whose: str) -> None:
    """Raise `UserError` where numbers are not ``sound``, for which finite weights must be damaged or diverged."""
    if not sound:  # the weights are damaged, or training diverged
        raise UserError(f"{whose}: some {what} are NaN or infinite; its weights are bad, take an earlier checkpoint")


def listed(seeds: Sequence[int] | Tensor | int | None) -> Sequence[int] | None:
    """Seeds as a sequence; a bare number is one of them. Raises `UserError` for anything else."""
    given: Any = seeds.tolist() if isinstance(seeds, (Tensor, np.ndarray)) else plain_numbers(seeds)
    given = [given] if isinstance(given, numbers.Number) else given
    if given is not None and not isinstance(given, Sequence):
        raise UserError(f"seeds {given!r}: give a list of whole numbers")
    return given


def repeated(label_B: Tensor | Sequence[int] | int, images: int) -> Tensor | Sequence[int]:
    """One label, of whatever library's kind of number, for as many images; several as they are."""
    labels: Any = plain_numbers(label_B)
    return [int(labels)] * images if isinstance(labels, int | np.integer) else labels


def check_labels(label_B: Tensor | Sequence[int], model: NextScaleTransformer) -> Tensor:
    """Labels as int64 (B,) on the model's device, -1 turned into "no class".

    Raises:
        UserError: labels of another shape, none at all, not whole numbers, or out of range.
    """
    try:
        label_B = torch.as_tensor(np.asarray(plain_numbers(label_B)) if isinstance(label_B, (list, tuple)) else label_B)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"labels {label_B!r}: give a list of class indices, (B,)") from error
    if label_B.ndim != 1 or len(label_B) == 0:
        raise UserError(f"labels of shape {tuple(label_B.shape)}: give a list of at least one class index, (B,)")
    if label_B.is_floating_point() or label_B.dtype == torch.bool:
        raise UserError(f"labels of type {label_B.dtype}: give whole numbers")
    last, label_B = model.num_classes, label_B.to(next(model.parameters()).device, torch.int64)
    for label in (int(label_B.min()), int(label_B.max())):
        if not -1 <= label <= last:
            raise UserError(f"label {label}: the model knows classes 0 to {last - 1} (and {last} or -1 for no class)")
    return torch.where(label_B < 0, model.num_classes, label_B)


# Top-k, top-p and the draw (VAR's `sample_with_top_k_top_p_`). Both filters come to one threshold for each token, which
# needs a sort of the k largest logits only; the draw runs in the order of the vocabulary, so that two almost equal
# logits which swap places under another batch size move no boundary of the distribution.


def check_filters(top_k: int | None, top_p: float | None, temperature: float = 1.0) -> None:
    """Raise `UserError` for values that mean nothing."""
    for name, value in (("top_k", top_k), ("top_p", top_p), ("temperature", temperature)):
        if value is not None or name == "temperature":
            check_kind(name, value, numbers.Real, "a number")
    if top_k is not None and (isinstance(top_k, bool) or top_k != int(top_k) or top_k < 1):
        raise UserError(f"top_k {top_k}: must be a whole number of at least 1 (1 is greedy), or None to switch it off")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: must be in (0, 1], or None to switch it off")
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature {temperature}: must be positive (1 leaves the logits alone); greedy is top_k=1")


def filter_logits(logits_BlV: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits with -inf where a token is filtered out.

    Args:
        logits_BlV: any leading shape; left as they are.
        top_k: keep the k largest; more than V means all. None: off.
        top_p: of these, keep the most probable ones until their share reaches p. None or 1: off.

    Logits equal to the last one kept are kept too (the reference does so for top-k; for top-p it breaks such ties by
    the order of its sort).

    Raises:
        UserError: top_k below 1 or top_p outside (0, 1].
    """
    check_filters(top_k, top_p)
    vocab_size = logits_BlV.shape[-1]
    candidates = vocab_size if top_k is None else min(int(top_k), vocab_size)
    share = 1.0 if top_p is None else top_p
    if candidates == vocab_size and share == 1:
        return logits_BlV
    largest_Blk = logits_BlV.topk(min(candidates + 1, vocab_size), dim=-1).values
    largest_Blk, beyond_Bl1 = largest_Blk[..., :candidates], largest_Blk[..., candidates:]
    last_Bl1 = largest_Blk[..., -1:]
    if share < 1:  # a token stays while the probability of those before it is below p
        p_Blk = largest_Blk.float().softmax(dim=-1)
        if runs_behind(logits_BlV.device) or (beyond_Bl1 == last_Bl1).any():  # a GPU would wait for the question
            # equals of the last one beyond the k stay, too, and so have a part in the sum
            ties = [(part == last_Bl1).sum(-1, keepdim=True) for part in (logits_BlV, largest_Blk)]
            p_Blk /= 1 + (ties[0] - ties[1]) * p_Blk[..., -1:]
        before_Blk = p_Blk.cumsum(dim=-1) - p_Blk
        kept_Bl1 = (before_Blk < share).sum(dim=-1, keepdim=True).clamp_min(1)
        last_Bl1 = largest_Blk.gather(-1, kept_Bl1 - 1)
    return logits_BlV.masked_fill(logits_BlV < last_Bl1, -torch.inf)


def sample_tokens(
    logits_BlV: Tensor,
    uniform_Bl: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Token indices, int64 (B, l): one draw for each token.

    Args:
        logits_BlV: float32.
        uniform_Bl: one number in [0, 1) for each token; the draw is a function of it and the logits.
        top_k, top_p: see `filter_logits`; top_k=1 is the argmax.
        temperature: divides the logits before they are filtered.

    Raises:
        UserError: a filter or temperature out of range.
    """
    check_filters(top_k, top_p, temperature)
    if top_k == 1:
        return logits_BlV.argmax(dim=-1)
    scaled = logits_BlV if temperature == 1.0 else logits_BlV / temperature
    cumulative_BlV = filter_logits(scaled, top_k, top_p).float().softmax(dim=-1).cumsum_(dim=-1)
    # the first token whose share exceeds the number; scaled by the sum as rounded: a number below 1 finds a token
    target_Bl1 = uniform_Bl[..., None] * cumulative_BlV[..., -1:]
    # of logits that are no numbers there is no such token: `sample_pyramid` tells
    return torch.searchsorted(cumulative_BlV, target_Bl1, right=True)[..., 0].clamp_(max=logits_BlV.shape[-1] - 1)


# One random generator for each image, so that image i depends on its seed alone: not on batch size, order or processes.
# Numbers are drawn on the CPU and moved, but for Gumbel noise, a number for every code: it depends on the device.


class ImageNoise:
    """The random numbers of B images.

    Args:
        seed_B: one for each image.
        pyramid: how many numbers each scale takes.
        device: where they are needed.
    """

    def __init__(self, seed_B: Sequence[int], pyramid: ScalePyramid, device: torch.device) -> None:
        self.pyramid = pyramid
        self.device = device
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seed_B]
        uniform = [torch.rand(pyramid.num_tokens, generator=g, device="cpu") for g in self._generators]
        self._uniform_BL = torch.stack(uniform).to(device)

    def uniform(self, scale: int) -> Tensor:
        """Numbers in [0, 1) for the tokens of ``scale``, float32 (B, l)."""
        return self._uniform_BL[:, self.pyramid.slice_of(scale)]

    def gumbel(self, scale: int, vocab_size: int) -> Tensor:
        """Gumbel noise for the tokens of ``scale``, float32 (B, l, V); to be asked for in the order of the scales."""
        shape = (self.pyramid.tokens_of(scale), vocab_size)
        own = self._generators
        if self.device.type != "cpu":  # millions of numbers: drawn there, from a seed that the image's generator gives
            seeds = [int(torch.randint(2**62, (), generator=g, device="cpu")) for g in own]
            own = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        exponential = [torch.empty(shape, device=self.device).exponential_(generator=g) for g in own]
        return torch.stack(exponential).log_().neg_()


def check_seeds(seeds: Sequence[int] | Tensor | int | None, batch: int) -> list[int]:
    """One seed for each image; fresh ones, governed by `torch.manual_seed`, where none are given.

    Raises:
        UserError: another number of seeds, or one that is not a whole number from 0 to 2^32 - 1.
    """
    each = listed(seeds)
    if each is None:
        return torch.randint(NUM_SEEDS, (batch,), device="cpu").tolist()
    if len(each) != batch:
        given = f"({len(each)} of them)" if isinstance(seeds, Sequence) else str(seeds)
        raise UserError(f"seeds {given}: give one for each of the {batch} images, e.g. range({batch})")
    for seed in each:
        if not isinstance(seed, numbers.Real) or not 0 <= seed < NUM_SEEDS or int(seed) != seed:
            raise UserError(f"seed {seed}: must be a whole number from 0 to {NUM_SEEDS - 1}")
    return [int(seed) for seed in each]
