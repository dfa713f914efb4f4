"""Sampling: one loop over the scales for every strategy, history and block (VAR's `autoregressive_infer_cfg`).

    label --model--> logits --guidance, filters, draw--> tokens --codebook, phi--> f_hat --area down--> next input

B batch, l tokens of one scale, L all tokens, K scales, V vocabulary, Z code dim, HW pixels, hw latent map.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mvar_lightning.attention import CachePolicy
from mvar_lightning.errors import UserError, check_kind
from mvar_lightning.sampling.draws import ImageNoise, check_filters, check_seeds, filter_logits, listed, sample_tokens
from mvar_lightning.sampling.generated import Generated
from mvar_lightning.sampling.guidance import GuidanceSchedule, LinearGuidance, as_schedule
from mvar_lightning.sampling.refinement import Filters, InPasses, Refining
from mvar_lightning.sampling.selectors import Selection, Selector
from mvar_lightning.sampling.stages import Drawers, StagedRows, Stages
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import evaluating, exact_float32, plain_numbers
from mvar_lightning.transformer import NextScaleTransformer

Replace = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(scale, idx_Bl, codes_BlZ) -> both, as sampling shall go on with them."""

Observe = Callable[[int, Tensor], None]
"""(scale, guided logits_BlV): look, but leave them as they are."""

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
        cache_policy: which keys and values are kept from scale to scale; None is `KeepAll`.
        selector: draw several maps of a scale, and go on with one of them.
    """

    guidance: GuidanceSchedule = field(default_factory=LinearGuidance)
    top_k: int | None = 900
    top_p: float | None = 0.96
    temperature: float = 1.0
    more_smooth: bool = False
    cache_policy: CachePolicy | None = None
    selector: Selector | None = None

    def __post_init__(self) -> None:
        if self.cache_policy is not None:
            check_kind("cache_policy", self.cache_policy, CachePolicy, "KeepAll() or ScaleKV(0.1)")
        check_filters(self.top_k, self.top_p, self.temperature)
        if self.selector is not None:
            check_kind("selector", self.selector, Selector, "a selector such as MostLikely(4)")
            if self.top_k == 1 or self.more_smooth:
                why = (
                    "top_k 1 draws the same map each time"
                    if self.top_k == 1
                    else "more_smooth goes on with no map's codes"
                )
                raise UserError(f"``selector``: {why}; leave one of them out")

    @property
    def filters(self) -> Filters:
        return Filters(self.top_k, self.top_p, self.temperature)

    def arguments(self) -> dict[str, Any]:
        """The same as arguments of `generate` and `edit`."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.selector is None:
            del settings["selector"]
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
    cache_policy: CachePolicy | None = None,
    replace: Replace | None = None,
    selector: Selector | None = None,
    refinement: InPasses | None = None,
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
        return_tokens, temperature: False gives the images alone, with a warning, for the last time; divides the logits.
        more_smooth: mix codes by Gumbel softmax (VAR's option for looks; not for FID).
        decode_chunk: images decoded at a time; None is about 260,000 pixels.
        cache_policy: which keys and values are kept from scale to scale, where the model keeps any: all (`KeepAll`), or
            `ScaleKV`, an approximation in a fraction of the memory.
        replace: see what was drawn at a scale, or exchange it, before it is used; each map where a selector chooses.
        selector: of several maps drawn for a scale, which one goes on, such as ``MostLikely(4)``; None draws one.
        refinement: draws some maps' least probable tokens anew, knowing the others (`InPasses`).

    Raises:
        UserError: a label, seed or setting out of range, a pair that does not fit, or weights that give no numbers.
    """
    stages = Stages.of(model)
    stages.check_together(tokenizer)
    settings = SamplingSettings(as_schedule(cfg), top_k, top_p, temperature, more_smooth, cache_policy, selector)
    stages.check_policy(cache_policy)
    if refinement is not None:
        check_kind("refinement", refinement, InPasses, "InPasses(load_refinement(...))")
        refinement.check(stages, more_smooth)
    label_B = check_labels(repeated(label_B, len(listed(seeds) or [0])), stages.first)
    noise = ImageNoise(check_seeds(seeds, len(label_B)), stages.pyramid, label_B.device)
    with evaluating(*stages.models, tokenizer, *(() if refinement is None else (refinement.refinement,))):
        f_hat_BZhw, idx_BL = sample_pyramid(stages, tokenizer, label_B, settings, noise, replace, refinement=refinement)
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
    refinement: InPasses | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop itself, for modules in evaluation mode: f_hat (B, Z, h, w) and tokens (B, L).

    Args:
        label_B: int64 on the model's device (`check_labels`).
        replace: exchange what was drawn at a scale before it is used (editing, perturbation).
        observe, refinement: see the guided logits of each scale; draw parts of some maps anew.

    Raises:
        UserError: logits that are NaN or infinite, or a selector that does not fit.
    """
    stages = Stages.of(model)
    quantizer, pyramid = tokenizer.quantizer, stages.pyramid
    rows = StagedRows(stages, label_B, settings.guidance, settings.cache_policy)
    refining = Refining(refinement, stages, tokenizer, label_B, settings.filters, noise)
    f_hat_BZhw, tokens = quantizer.empty_f_hat(len(label_B)), list[Tensor]()
    sound = torch.ones((), dtype=torch.bool, device=label_B.device)  # read once: each time a GPU would have to wait
    x_BlZ, selection = None, None
    if settings.selector is not None:
        selection = Selection(settings.selector, stages.first, tokenizer, label_B, noise, settings.filters, replace)
    for scale in range(pyramid.num_scales):
        selects = selection is not None and selection.chooses_at(scale)
        h_RlC, chosen = rows.features(scale, x_BlZ), []
        # both halves' logits of so many images stay bounded, unless those of all are needed together
        together = observe is not None or settings.more_smooth or (selects and replace is not None)
        bounded = max(1, LOGITS_AT_ONCE // (2 * pyramid.tokens_of(scale) * stages.first.vocab_size))
        at_once = len(label_B) if together else bounded
        for start in range(0, len(label_B), at_once):
            images = slice(start, start + at_once)
            logits_blV = rows.logits(h_RlC, scale, images)
            sound &= torch.isfinite(logits_blV.sum())
            if observe is not None:
                observe(scale, logits_blV)
            if selection is not None and selects:
                chosen.append(selection.choose(logits_blV, scale, images, f_hat_BZhw))
            else:
                chosen.append(choose(logits_blV, scale, settings, noise, tokenizer, images))
            refining.see(scale, logits_blV, chosen[-1][0])
            del logits_blV  # not held while the next ones are computed
        drawn = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        idx_Bl, codes_BlZ = refining.refine(scale, x_BlZ, *drawn)
        if replace is not None and (not selects or scale in refining.passes):  # a selection's maps were judged with it
            idx_Bl, codes_BlZ = replace(scale, idx_Bl, codes_BlZ)
        tokens.append(idx_Bl)
        f_hat_BZhw = quantizer.accumulate(f_hat_BZhw, codes_BlZ, scale)
        if scale + 1 < pyramid.num_scales:
            x_BlZ = quantizer.next_input(f_hat_BZhw, scale + 1)
    check_finite(sound, "logits", "model")
    if selection is not None:
        check_finite(selection.sound, "scores", "selector")
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
    channels, height, width = tokenizer.image_shape
    chunk = chunk or max(1, DECODED_PIXELS // (height * width))
    shape = (len(f_hat_BZhw), channels, height, width)
    images_B3HW = torch.empty(shape, dtype=torch.float32, device=f_hat_BZhw.device)
    for target, part in zip(images_B3HW.split(chunk), f_hat_BZhw.split(chunk), strict=True):
        target.copy_(tokenizer.decode_latent(part))
    return images_B3HW.add_(1).mul_(0.5)


# What is given, checked.


def check_finite(sound: Tensor, what: str, whose: str) -> None:
    """Raise `UserError` where numbers are not ``sound``, for which finite weights must be damaged or diverged."""
    if not sound:  # the weights are damaged, or training diverged
        raise UserError(f"{whose}: some {what} are NaN or infinite; its weights are bad, take an earlier checkpoint")


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
