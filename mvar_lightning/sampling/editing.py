"""Zero-shot editing: in-painting, out-painting, class-conditional editing (VAR, section 5.3; `demo_zero_shot_edit`).

Inside the mask tokens come from the model, outside from the image, at every scale.

B batch, l tokens of one scale, L all tokens, Z code dim, HW pixels, hw latent map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mvar_lightning.attention import CachePolicy
from mvar_lightning.checkpoints.source import Source
from mvar_lightning.data.images import ImageError, decode, form_of
from mvar_lightning.data.transforms import center_crop, resize_shorter, to_batch, window_of
from mvar_lightning.errors import UserError, check_counts, check_kind
from mvar_lightning.pyramid import ScalePyramid, Size, height_width, times
from mvar_lightning.sampling.class_choice import class_indices, class_names, owner_of
from mvar_lightning.sampling.draws import ImageNoise, check_seeds, listed
from mvar_lightning.sampling.generated import Generated
from mvar_lightning.sampling.guidance import GuidanceSchedule, as_schedule
from mvar_lightning.sampling.jobs import list_jobs
from mvar_lightning.sampling.sampler import (
    Replace,
    SamplingSettings,
    check_finite,
    check_labels,
    decode_in_chunks,
    repeated,
    sample_pyramid,
)
from mvar_lightning.sampling.selectors import Selector
from mvar_lightning.sampling.stages import Drawers, Stages, load_stages
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import choose_device, choose_precision, computing, evaluating
from mvar_lightning.tools.drawing import as_rgb, enlarge, make_grid, make_strips, to_png, to_unit
from mvar_lightning.transformer.acceleration import prepare

KEPT_TOKENS = 3
"""Scales with at most so many tokens keep the image's: they decide the whole picture."""

STRIPS = 6
"""Results that are shown after each scale."""

TINT = (0.88, 0.22, 0.16)
"""Color of the mask over the picture."""


@torch.no_grad()
def edit(
    model: Drawers | Stages,
    tokenizer: MultiScaleTokenizer,
    image_B3HW: Tensor,
    mask_BHW: Tensor,
    label_B: Tensor | Sequence[int] | int = -1,
    cfg: float | GuidanceSchedule | None = 1.5,
    top_k: int | None = 900,
    top_p: float | None = 0.96,
    seeds: Sequence[int] | Tensor | int | None = None,
    temperature: float = 1.0,
    more_smooth: bool = False,
    decode_chunk: int | None = None,
    cache_policy: CachePolicy | None = None,
    replace: Replace | None = None,
    selector: Selector | None = None,
) -> Generated:
    """Paint parts of images anew.

    Args:
        model: one, or several with their scales, as for `generate`.
        image_B3HW: in [-1, 1], of the tokenizer's size. One image with several labels or seeds is repeated.
        mask_BHW: what the model paints: 1 or True there, 0 or False where the image stays; one for all images (H, W)
            or one for each (B, H, W); of the image's size, or of the last token map's.
        label_B: what to paint; -1 ("no class") in-paints, another class edits towards it.
        cfg, top_k, top_p, seeds, temperature, more_smooth, decode_chunk, cache_policy, replace, selector: as for
            `generate`; maps are judged with the image's tokens in them.

    Returns:
        As `generate`; where the mask is 0 the tokens are the image's, though pixels near its border may change.

    Raises:
        UserError: as for `generate`; a mask or image of the wrong size.
    """
    stages = Stages.of(model)
    stages.check_together(tokenizer)
    for name, tensor in (("image_B3HW", image_B3HW), ("mask_BHW", mask_BHW)):
        check_kind(name, tensor, Tensor, "a tensor")
    settings = SamplingSettings(as_schedule(cfg), top_k, top_p, temperature, more_smooth, cache_policy, selector)
    stages.check_policy(cache_policy)
    images = max(len(image_B3HW), len(listed(seeds) or [0]), len(repeated(label_B, 1)))
    label_B = check_labels(repeated(label_B, images), stages.first)
    if len(label_B) != images or len(image_B3HW) not in (1, images):
        raise UserError(f"{len(image_B3HW)} images, {len(label_B)} labels, {images} results: give as many of each")
    noise = ImageNoise(check_seeds(seeds, images), stages.pyramid, label_B.device)
    keep_BHW = kept(mask_BHW, tokenizer).to(label_B.device)
    if len(keep_BHW) not in (1, images):
        raise UserError(f"mask of shape {tuple(mask_BHW.shape)}: {images} images need one mask for all or one for each")
    with evaluating(*stages.models, tokenizer):
        given_BL = tokenizer.encode(image_B3HW.to(label_B.device)).expand(images, -1)
        keep = keeping(given_BL, keep_BHW, tokenizer, replace)
        f_hat_BZhw, idx_BL = sample_pyramid(stages, tokenizer, label_B, settings, noise, keep)
        result_B3HW = decode_in_chunks(tokenizer, f_hat_BZhw, decode_chunk)
    check_finite(torch.isfinite(result_B3HW).all(), "pixels", "tokenizer")
    return Generated(result_B3HW, idx_BL)


def keeping(given_BL: Tensor, keep_Bhw: Tensor, tokenizer: MultiScaleTokenizer, then: Replace | None) -> Replace:
    """Puts the image's tokens where the mask says so, and does ``then``; a selector judges maps after both."""
    given = tokenizer.pyramid.split(given_BL)

    def keep(scale: int, idx_Bl: Tensor, codes_BlZ: Tensor) -> tuple[Tensor, Tensor]:
        keep_Bl = keep_at(scale, keep_Bhw, tokenizer.pyramid)
        given_codes_BlZ = tokenizer.quantizer.lookup(given[scale])
        codes_BlZ = torch.where(keep_Bl[..., None], given_codes_BlZ, codes_BlZ.to(given_codes_BlZ.dtype))
        idx_Bl = torch.where(keep_Bl, given[scale], idx_Bl)
        return (idx_Bl, codes_BlZ) if then is None else then(scale, idx_Bl, codes_BlZ)

    return keep


def keep_at(scale: int, keep_Bhw: Tensor, pyramid: ScalePyramid) -> Tensor:
    """Boolean (B, l): which tokens of ``scale`` stay the image's (the reference's `replace_embedding`)."""
    tokens = pyramid.tokens_of(scale)
    if tokens <= KEPT_TOKENS:
        return torch.ones(len(keep_Bhw), tokens, dtype=torch.bool, device=keep_Bhw.device)
    shape = pyramid.shapes[scale]
    resized = F.interpolate(keep_Bhw[:, None].float(), size=shape, mode="bilinear", align_corners=False)
    return resized.flatten(1).gt(0.5)


def kept(mask_BHW: Tensor, tokenizer: MultiScaleTokenizer) -> Tensor:
    """The mask's complement on the last token map, boolean (B or 1, h, w).

    A mask in pixels becomes one of tokens by area: a token is painted where at least half of it is.
    """
    image, last = tokenizer.image_shape[1:], tokenizer.pyramid.last_shape
    if mask_BHW.ndim not in (2, 3) or tuple(mask_BHW.shape[-2:]) not in (image, last):
        raise UserError(
            f"mask of shape {tuple(mask_BHW.shape)}: must have the image's size {image} "
            f"or the last token map's {last}, or be a batch of such"
        )
    paint_BHW = mask_BHW.detach().float().reshape(-1, *mask_BHW.shape[-2:])
    if not (paint_BHW.isfinite() & (paint_BHW >= 0) & (paint_BHW <= 1)).all():
        raise UserError("mask: values must be from 0 (keep the image) to 1 (paint)")
    return (1 - F.adaptive_avg_pool2d(paint_BHW, last)).gt(0.5)


def inpaint_mask(box: Sequence[float], size: int | tuple[int, int]) -> Tensor:
    """Boolean (H, W): True, to be painted, inside the box.

    Args:
        box: x0, y0, x1, y1 as fractions of width and height, from the upper left corner.
        size: side, or height and width, of the image or of the last token map (as the reference's `get_edit_mask`).

    Raises:
        UserError: a box outside [0, 1], or with nothing inside.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if len(box) != 4 or not all(0 <= edge <= 1 for edge in box):
        raise UserError(f"box {list(box)}: give x0, y0, x1, y1 as fractions from 0 to 1")
    (x0, x1), (y0, y1) = ([round(edge * n) for edge in edges] for edges, n in ((box[::2], width), (box[1::2], height)))
    if x0 >= x1 or y0 >= y1:
        raise UserError(
            f"box {list(box)}: holds nothing of {width} x {height}; x1 must lie right of x0, and y1 below y0"
        )
    mask_HW = torch.zeros(height, width, dtype=torch.bool)
    mask_HW[y0:y1, x0:x1] = True
    return mask_HW


def outpaint_mask(box: Sequence[float], size: int | tuple[int, int]) -> Tensor:
    """Boolean (H, W): True, to be painted, outside the box; see `inpaint_mask`."""
    return ~inpaint_mask(box, size)


# A picture file edited into a folder.


@dataclass(frozen=True)
class EditRequest:
    """Which picture of which model, what of it is painted anew, and where results go.

    Args:
        source: of the model.
        image: JPEG, PNG or WebP; its middle square is used, or what the model's shape covers in the middle. Of the
            tokenizer's channels, where these are not RGB's.
        mask: picture of the image's size, white where it is painted; or
        box: x0, y0, x1, y1, in pixels, or in fractions where none is above 1.
        outpaint: paint outside of the mask or box instead.
        class_: index or name of what to paint; ``none`` in-paints.
        count: results, each with its own seed.
        settings, seed, data, device, precision, quantize: as of `SampleRequest`; a refinement has no part.
        out: folder of the results and pictures.

    Raises:
        UserError: a number below 1.
    """

    source: Source
    image: str
    mask: str | None = None
    box: tuple[float, ...] | None = None
    outpaint: bool = False
    class_: str | int = "none"
    count: int = 4
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    data: str | None = None
    device: str = "auto"
    precision: str = "auto"
    quantize: str | None = None
    out: str | Path = "edits"

    def __post_init__(self) -> None:
        check_counts(count=self.count)


def edit_picture(request: EditRequest) -> list[Path]:
    """Write the results, a before-and-after grid and coarse-to-fine strips; the last two end the list.

    Raises:
        UserError: a file that is no picture, a mask of another size, a box outside, nothing to paint, or no such class.
    """
    device = choose_device(request.device)
    stages, tokenizer = load_stages(request.source, device)
    model = stages.first
    names = class_names(request.data, model.num_classes, request.source)
    labels = class_indices(str(request.class_), model.num_classes, names, owner_of(request.data))
    if len(labels) != 1:
        raise UserError(f"``class_`` {request.class_}: give one class")
    picture = open_picture(request.image, tokenizer.image_channels)
    size = tokenizer.image_size
    if picture.size != window_of(size):
        print(f"{request.image}: {_cut_in_words(picture, size)}")
    image_13HW = to_window(picture, size).to(device)
    mask_HW = read_mask(request, picture, tokenizer).to(device)
    jobs = list_jobs(labels, request.count, request.seed)
    precision = choose_precision(request.precision, device)
    for each in stages.models:
        prepare(each, precision, quantized=request.quantize)
    with computing(precision, device):
        seeds = [job.seed for job in jobs]
        arguments = request.settings.arguments()
        result_B3HW, idx_BL = edit(stages, tokenizer, image_13HW, mask_HW, labels[0], seeds=seeds, **arguments)
    pictures = {job.file: result_3HW for job, result_3HW in zip(jobs, result_B3HW, strict=True)}
    before_3HW = as_rgb(image_13HW.add(1).div(2))[0]
    tint_311 = torch.tensor(TINT, device=device)[:, None, None]
    masked_3HW = before_3HW + 0.6 * mask_HW * (tint_311 - before_3HW)
    shown_N3HW = torch.cat([before_3HW[None], masked_3HW[None], as_rgb(result_B3HW)])
    pictures["before_after.png"] = make_grid(enlarge(shown_N3HW))
    after_NK3HW = torch.stack([to_unit(image) for image in tokenizer.progressive(idx_BL[:STRIPS])], dim=1)
    pictures["coarse_to_fine.png"] = make_strips(after_NK3HW)
    folder = Path(request.out)
    for name, picture_3HW in pictures.items():
        to_png(picture_3HW, folder / name)
    return [folder / name for name in pictures]


def open_picture(file: str, channels: int = 3) -> Image.Image:
    """An upright picture of so many channels. Raises `UserError` where the file is none."""
    try:
        data = Path(file).read_bytes()
        return decode(data, form_of(data, channels))
    except OSError as error:
        raise UserError(f"picture {file}: cannot be read ({error.strerror})") from error
    except ImageError as error:
        raise UserError(f"picture {file}: {error}") from error


def _cut_in_words(picture: Image.Image, size: Size) -> str:
    """Which part of a picture is used."""
    height, width = height_width(size)
    given = f"{picture.width} x {picture.height} pixels"
    if height == width:
        return f"{given}; its middle square of {min(picture.size)} is used, at {size} x {size}"
    share = min(picture.width / width, picture.height / height)
    used = f"{round(share * width)} x {round(share * height)}"
    return f"{given}; the middle {used} (width x height) are used, at {width} x {height}"


def to_window(picture: Image.Image, size: Size) -> Tensor:
    """The middle square at ``size`` pixels, or the largest middle part of that shape: (1, 3, H, W) in [-1, 1]."""
    side = window_of(size)
    return to_batch([center_crop(resize_shorter(picture, side), side)])


def read_mask(request: EditRequest, picture: Image.Image, tokenizer: MultiScaleTokenizer) -> Tensor:
    """What to paint, in [0, 1], on the same middle part (H, W)."""
    if request.mask is not None:
        mask = open_picture(request.mask)
        if mask.size != picture.size:
            raise UserError(
                f"mask {request.mask}: is {mask.width} x {mask.height} pixels, the picture {picture.width} x "
                f"{picture.height}; make it the same size"
            )
    elif request.box is not None:
        box, (width, height) = request.box, picture.size
        if max(box) > 1:  # in pixels
            if min(box) < 0 or max(box[::2]) > width or max(box[1::2]) > height:
                raise UserError(f"box {list(box)}: lies outside of the picture's {width} x {height} pixels")
            box = tuple(edge / (width, height)[index % 2] for index, edge in enumerate(box))
        inside = inpaint_mask(box, (height, width))
        mask = Image.fromarray(inside.byte().mul(255).numpy()).convert("RGB")
    else:
        raise UserError("nothing to paint: give ``mask`` or ``box``")
    return as_mask(mask, tokenizer, request.outpaint, "mask " + request.mask if request.mask else "box")


def as_mask(mask: Image.Image, tokenizer: MultiScaleTokenizer, outpaint: bool = False, what: str = "mask") -> Tensor:
    """A picture, white where it is painted, as a mask (H, W) in [0, 1] of its middle at the tokenizer's size.

    Raises:
        UserError: it paints no token; ``what`` says what it came from.
    """
    mask_HW = to_window(mask, tokenizer.image_size).add(1).div(2).clamp(0, 1).mean(dim=(0, 1))
    if outpaint:
        mask_HW = 1 - mask_HW
    if kept(mask_HW, tokenizer).all():
        part = "middle square" if isinstance(tokenizer.image_size, int) else "middle"
        raise UserError(
            f"{what}: paints no token of the picture's {part} "
            f"({times(tokenizer.pyramid.last_side)} tokens); make the painted part larger"
        )
    return mask_HW
