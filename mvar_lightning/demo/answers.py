"""What the page shows, computed: samples as they grow, edits, models side by side, tokens and attention.

All of it is done by the functions that commands call; here their results become events of PNG pictures in base64.

B images, L all tokens, K scales, HW pixels; of images that are not RGB the 3 is 1 or 4.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mvar_lightning.checkpoints.source import NO_CLASS
from mvar_lightning.data.images import ImageError
from mvar_lightning.demo.asked import (
    Attention,
    Compared,
    Edited,
    Masked,
    Sampled,
    Tokens,
    class_of,
    command_of,
    from_base64,
    python_of,
)
from mvar_lightning.demo.shelf import Shelf, Shown
from mvar_lightning.demo.turns import Tell
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.papers.attention_mass import attention_from
from mvar_lightning.metrics.quality import psnr
from mvar_lightning.pyramid import Size
from mvar_lightning.sampling.editing import as_mask, edit, to_window
from mvar_lightning.sampling.generated import Generated
from mvar_lightning.sampling.jobs import Job
from mvar_lightning.sampling.sampler import generate
from mvar_lightning.tools.compute import computing, evaluating, forget_peak_memory, peak_memory_bytes
from mvar_lightning.tools.drawing import mask_picture, to_image, to_unit


def png(picture: Any) -> str:
    """A PIL image, or (3, H, W) in [0, 1], as PNG in base64: the bytes that `mvar sample` writes."""
    stream = io.BytesIO()
    (to_image(picture) if isinstance(picture, Tensor) else picture).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def window(picture: Image.Image, size: Size, what: str = "picture") -> Tensor:
    """The middle at the model's size: (1, 3, H, W) in [-1, 1]. Raises `UserError` for a long, thin picture."""
    try:
        return to_window(picture, size)
    except ImageError as error:
        raise UserError(f"{what}: {error}") from error


class Growing:
    """A `Replace` that exchanges nothing: it shows the images after each scale but the last, whose image is the result,
    and looks whether to go on."""

    def __init__(self, shown: Shown, tell: Tell, decoded: bool) -> None:
        self.tokenizer, self.tell, self.decoded = shown.tokenizer, tell, decoded
        self.f_hat_BZhw: Tensor | None = None

    def __call__(self, scale: int, idx_Bl: Tensor, codes_BlZ: Tensor) -> tuple[Tensor, Tensor]:
        last = scale + 1 == self.tokenizer.pyramid.num_scales
        self.tell({"event": "scale", "scale": scale, "at": time.time()})
        if self.decoded and not last:
            quantizer = self.tokenizer.quantizer
            before = quantizer.empty_f_hat(len(idx_Bl)) if self.f_hat_BZhw is None else self.f_hat_BZhw
            self.f_hat_BZhw = quantizer.accumulate(before, codes_BlZ, scale)
            images = [png(image) for image in to_unit(self.tokenizer.decode_latent(self.f_hat_BZhw))]
            self.tell({"event": "grown", "scale": scale, "images": images})
        return idx_Bl, codes_BlZ


def warm(shelf: Shelf) -> None:
    """Read the first model and draw one image: what is made on first use is made before anybody waits for it."""
    answer_sampled(shelf, Sampled(next(iter(shelf.paths)), count=1, label="none"), lambda event: None)


def _get(shelf: Shelf, name: str, precision: str, tell: Tell) -> Shown:
    """A model; who stopped meanwhile is told so once its weights are read."""
    tell({})
    shown = shelf.get(name, precision)
    tell({})
    return shown


def answer_sampled(shelf: Shelf, asked: Sampled, tell: Tell) -> None:
    """Images of a class, each scale shown as it is drawn, or all of them at the end."""
    shown = _get(shelf, asked.model, asked.precision, tell)
    jobs = asked.jobs(shown)
    start = time.perf_counter()
    made = _generate(shown, asked, jobs, Growing(shown, tell, asked.grow))
    _show(shown, asked, jobs, made, time.perf_counter() - start, tell)


def _generate(shown: Shown, asked: Sampled, jobs: Sequence[Job], growing: Growing) -> Generated:
    labels, seeds = [job.label for job in jobs], [job.seed for job in jobs]
    with computing(shown.autocast, shown.device):
        return generate(
            shown.stages, shown.tokenizer, labels, seeds=seeds, replace=growing, **asked.settings().arguments()
        )


def answer_edited(shelf: Shelf, asked: Edited, tell: Tell) -> None:
    """A picture painted anew where the mask says so."""
    shown = _get(shelf, asked.model, asked.precision, tell)
    jobs = asked.jobs(shown)
    picture = from_base64(asked.image, "picture", shown.tokenizer.image_channels)
    mask = from_base64(asked.mask, "mask")
    if picture.size != mask.size:
        raise UserError(f"mask: is {mask.width} x {mask.height} pixels, the picture {picture.width} x {picture.height}")
    image_13HW = window(picture, shown.tokenizer.image_size).to(shown.device)
    mask_HW = as_mask(mask, shown.tokenizer, asked.outpaint).to(shown.device)
    start = time.perf_counter()
    with computing(shown.autocast, shown.device):
        made = edit(
            shown.stages,
            shown.tokenizer,
            image_13HW,
            mask_HW,
            jobs[0].label,
            seeds=[job.seed for job in jobs],
            replace=Growing(shown, tell, asked.grow),
            **asked.settings().arguments(),
        )
    _show(shown, asked, jobs, made, time.perf_counter() - start, tell)


def _show(shown: Shown, asked: Sampled, jobs: Sequence[Job], made: Generated, seconds: float, tell: Tell) -> None:
    """The finished images first; where they did not grow, then what they were after each scale."""
    tell(
        {
            "event": "made",
            "images": [png(image) for image in made.images],
            "files": [job.file for job in jobs],
            "tokens": made.tokens.tolist(),
            "label": jobs[0].label,
            "seconds": round(seconds, 3),
            "command": command_of(asked, shown, jobs),
            "python": python_of(asked, shown, jobs),
        }
    )
    if not asked.grow:
        for scale, image_B3HW in enumerate(_after_scales(shown, made.tokens, tell, last=False)):
            tell({"event": "grown", "scale": scale, "images": [png(image) for image in image_B3HW]})


def _after_scales(shown: Shown, idx_BL: Tensor, tell: Tell, last: bool = True) -> list[Tensor]:
    """Images in [0, 1] after each scale, or each but the last, (B, 3, H, W) each; a stop ends it between two."""
    images, scales = [], shown.tokenizer.pyramid.num_scales - (not last)
    with evaluating(shown.tokenizer), computing(shown.autocast, shown.device):
        for image_B3HW in islice(shown.tokenizer.after_scales(idx_BL), scales):
            tell({})
            images.append(to_unit(image_B3HW))
    return images


def answer_compared(shelf: Shelf, asked: Compared, tell: Tell) -> None:
    """The same classes and seeds by several models, one after the other, with what each takes."""
    fresh = [not shelf.holds(*each) for each in asked.each()]
    models = [_get(shelf, *each, tell) for each in asked.each()]
    for shown in models[1:]:
        _check_agree(models[0], shown)
    for number, (shown, new) in enumerate(zip(models, fresh, strict=True)):
        jobs, growing = asked.jobs(shown), Growing(shown, tell, decoded=False)
        if new:  # what is made on first use is no part of its time
            _generate(shown, replace(asked, count=1), jobs[:1], growing)
        forget_peak_memory(shown.device)
        begin_bytes, start = peak_memory_bytes(shown.device), time.perf_counter()
        made = _generate(shown, asked, jobs, growing)
        seconds = time.perf_counter() - start
        tell(
            {
                "event": "compared",
                "number": number,
                "name": shown.name,
                "precision": shown.precision,
                "attention": repr(shown.model.strategy),
                "images": [png(image) for image in made.images],
                "files": [job.file for job in jobs],
                "seconds": round(seconds, 3),
                "weight_bytes": shown.weight_bytes,
                "cache_bytes": shown.cache_bytes * (1 if asked.cfg == 0 else 2),
                "begin_bytes": begin_bytes,
                "peak_bytes": peak_memory_bytes(shown.device),
                "command": command_of(asked, shown, jobs),
            }
        )


def _check_agree(first: Shown, other: Shown) -> None:
    """Raise `UserError` for models whose images cannot be compared, before any is drawn."""
    for what, ours, theirs in (
        ("scales", first.model.pyramid, other.model.pyramid),
        ("classes", first.model.num_classes, other.model.num_classes),
    ):
        if ours != theirs:
            raise UserError(f"compare: {first.name} has {what} {ours}, {other.name} {theirs}; take models that agree")
    for index, (our, their) in enumerate(zip(first.class_names, other.class_names, strict=False)):
        if our != their:
            raise UserError(
                f"compare: class {index} of {first.name} is {our[:80]!r}, of {other.name} {their[:80]!r}; "
                "take models that agree"
            )


# Looking inside


def answer_mask(shelf: Shelf, asked: Masked, tell: Tell) -> None:
    """The attention mask of a model's strategy, as a picture."""
    shown = _get(shelf, asked.model, "", tell)
    tell({"event": "mask", "image": png(mask_picture(shown.model.mask(), shown.model.pyramid.sides))})


def answer_tokens(shelf: Shelf, asked: Tokens, tell: Tell) -> None:
    """Token maps of a picture, the picture after each scale, and how near that is to the original (PSNR in dB)."""
    shown = _get(shelf, asked.model, asked.precision, tell)
    original_13HW = None
    if asked.tokens:
        idx_1L = torch.tensor([asked.tokens], device=shown.device)
    else:
        picture = from_base64(asked.image, "picture", shown.tokenizer.image_channels)
        original_13HW = window(picture, shown.tokenizer.image_size).to(shown.device)
        with evaluating(shown.tokenizer):
            idx_1L = shown.tokenizer.encode(original_13HW)
    for scale, after_13HW in enumerate(_after_scales(shown, idx_1L, tell)):
        decibel = None if original_13HW is None else round(float(psnr(to_unit(original_13HW), after_13HW)[0]), 1)
        tell({"event": "grown", "scale": scale, "images": [png(after_13HW[0])], "psnr": decibel})
    tell({"event": "tokens", "tokens": idx_1L[0].tolist()})


def answer_attention(shelf: Shelf, asked: Attention, tell: Tell) -> None:
    """Where a token looks in each block."""
    shown = _get(shelf, asked.model, asked.precision, tell)
    idx_1L = torch.tensor([asked.tokens], device=shown.device)
    label = class_of(asked.label, shown)
    label = shown.model.num_classes if label == NO_CLASS else label
    with computing(shown.autocast, shown.device):
        share_NL = attention_from(shown.model, shown.tokenizer, idx_1L, label, asked.query)
    blocks = [[round(share, 5) for share in row] for row in share_NL.tolist()]
    tell({"event": "attention", "query": asked.query, "blocks": blocks})
