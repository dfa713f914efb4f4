"""`mvar edit`: paints a part of a picture anew (in-painting, out-painting, class-conditional editing)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.commands import options
from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mvar_lightning.tokenizer import MultiScaleTokenizer

STRIPS = 6
TINT = (0.88, 0.22, 0.16)


def add_parser(subparsers: Any) -> None:
    """Add `edit` to the parser of `mvar`."""
    parser = subparsers.add_parser("edit", help="paint a part of a picture anew")
    options.add_source(parser)
    options.add_settings(parser)
    parser.add_argument("--image", required=True, metavar="FILE", help="JPEG, PNG or WebP; its middle square is used")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mask", metavar="FILE", help="picture of the image's size: white is painted, black stays")
    where.add_argument("--box", type=_box, metavar="x0,y0,x1,y1", help="painted box, in pixels or fractions of 1")
    parser.add_argument("--outpaint", action="store_true", help="paint outside of the mask or box instead")
    parser.add_argument("--class", dest="class_", default="none", metavar="N", help="index or name (none: in-painting)")
    parser.add_argument("--count", type=int, default=4, help="results, each with its own seed (4)")
    parser.add_argument("--out", default="edits", metavar="FOLDER", help="where results and pictures go (edits)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the results, a before-and-after grid and coarse-to-fine strips."""
    from mvar_lightning.sampling import edit
    from mvar_lightning.sampling.jobs import list_jobs, peak_bytes
    from mvar_lightning.tools.compute import choose_device, choose_precision, computing
    from mvar_lightning.tools.drawing import to_png
    from mvar_lightning.transformer.acceleration import prepare

    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")
    source, settings = options.source_of(args), options.settings_of(args)
    device = choose_device(args.device)
    model, tokenizer = source.load(device)
    names = options.class_names(args.data, model.num_classes)
    labels = options.class_indices(args.class_, model.num_classes, names)
    if len(labels) != 1:
        raise UserError(f"--class {args.class_}: give one class")
    picture = open_picture(args.image)
    image_13HW = to_square(picture, tokenizer.image_size).to(device)
    mask_HW = read_mask(args, picture, tokenizer).to(device)
    jobs = list_jobs(labels, args.count, args.seed)
    precision = choose_precision(args.precision, device)
    prepare(model, precision)
    with computing(precision, device):
        result_B3HW, idx_BL = edit(
            model, tokenizer, image_13HW, mask_HW, labels[0], seeds=[job.seed for job in jobs], **settings
        )
    folder = Path(args.out)
    for job, result_3HW in zip(jobs, result_B3HW, strict=True):
        to_png(result_3HW, folder / job.file)
    to_png(before_and_after(image_13HW, mask_HW, result_B3HW), folder / "before_after.png")
    to_png(coarse_to_fine(tokenizer, idx_BL[:STRIPS]), folder / "coarse_to_fine.png")
    print(f"{folder}: {len(jobs)} results, before_after.png, coarse_to_fine.png")
    print(f"peak memory {peak_bytes(device) / 2**30:.2f} GiB")
    return 0


def open_picture(file: str) -> Image.Image:
    """An upright RGB picture. Raises `UserError` where the file is none."""
    from mvar_lightning.data.images import ImageError, decode_rgb

    try:
        return decode_rgb(Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"picture {file}: cannot be read ({error.strerror})") from error
    except ImageError as error:
        raise UserError(f"picture {file}: {error}") from error


def to_square(picture: Image.Image, size: int) -> Tensor:
    """The middle square at ``size`` pixels: (1, 3, H, W) in [-1, 1]."""
    from mvar_lightning.data.transforms import center_crop, resize_shorter, to_batch

    return to_batch([center_crop(resize_shorter(picture, size), size)])


def read_mask(args: argparse.Namespace, picture: Image.Image, tokenizer: MultiScaleTokenizer) -> Tensor:
    """What to paint, in [0, 1], on the same middle square (H, W).

    Raises:
        UserError: a mask of another size than the picture, a box outside of it, or nothing left to paint.
    """
    from PIL import Image

    from mvar_lightning.sampling import inpaint_mask
    from mvar_lightning.sampling.editing import kept

    if args.mask is not None:
        mask = open_picture(args.mask)
        if mask.size != picture.size:
            raise UserError(
                f"mask {args.mask}: is {mask.width} x {mask.height} pixels, the picture {picture.width} x "
                f"{picture.height}; make it the same size"
            )
    else:
        inside = inpaint_mask(_fractions(args.box, picture), (picture.height, picture.width))
        mask = Image.fromarray(inside.byte().mul(255).numpy()).convert("RGB")
    mask_HW = to_square(mask, tokenizer.image_size).add(1).div(2).clamp(0, 1).mean(dim=(0, 1))
    if args.outpaint:
        mask_HW = 1 - mask_HW
    if kept(mask_HW, tokenizer).all():
        side = tokenizer.pyramid.last_side
        raise UserError(
            f"{'mask ' + args.mask if args.mask else 'box'}: paints no token of the picture's middle square "
            f"({side} x {side} tokens); make the painted part larger"
        )
    return mask_HW


def before_and_after(image_13HW: Tensor, mask_HW: Tensor, result_B3HW: Tensor) -> Tensor:
    """One picture: the image, the image with its mask in red, and the results."""
    import torch

    from mvar_lightning.tools.drawing import enlarge, make_grid

    before_3HW = image_13HW[0].add(1).div(2)
    tint_311 = torch.tensor(TINT, device=mask_HW.device)[:, None, None]
    masked_3HW = before_3HW + 0.6 * mask_HW * (tint_311 - before_3HW)
    return make_grid(enlarge(torch.cat([before_3HW[None], masked_3HW[None], result_B3HW])))


def coarse_to_fine(tokenizer: MultiScaleTokenizer, idx_BL: Tensor) -> Tensor:
    """One picture: a row for each result, its image after each scale."""
    import torch

    from mvar_lightning.tools.drawing import make_strips

    return make_strips(torch.stack([image.add(1).div(2) for image in tokenizer.progressive(idx_BL)], dim=1))


def _box(text: str) -> tuple[float, ...]:
    try:
        box = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give four numbers with commas between them") from None
    if len(box) != 4:
        raise argparse.ArgumentTypeError(f"{text!r}: give four numbers, x0,y0,x1,y1")
    return box


def _fractions(box: tuple[float, ...], picture: Image.Image) -> tuple[float, ...]:
    """Pixels to fractions; numbers that are all at most 1 are fractions already."""
    if max(box) <= 1:
        return box
    width, height = picture.size
    if min(box) < 0 or max(box[::2]) > width or max(box[1::2]) > height:
        raise UserError(f"box {list(box)}: lies outside of the picture's {width} x {height} pixels")
    return tuple(edge / (width, height)[index % 2] for index, edge in enumerate(box))
