"""Pictures made of tensors: grids, strips with labels, masks, PNG files; plain torch and PIL.

B batch, N images, R rows, L all tokens, K scales, HW pixels; picture_3HW is one RGB picture in [0, 1]. Where images are
gray or RGBA the 3 is 1 or 4.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import write

MIN_SIDE = 64
"""Images narrower than this are enlarged (nearest pixel, whole factor), so that a 16-pixel digit can be seen."""

VISIBLE = (0x1B, 0x4F, 0x8A)
HIDDEN = (0xF4, 0xF1, 0xEA)
BORDER = (0xE0, 0x8E, 0x2B)
INK = (0x20, 0x20, 0x20)


def enlarge(image_N3HW: Tensor, min_side: int = MIN_SIDE) -> Tensor:
    """Each pixel repeated by the smallest whole factor that makes the shorter side at least ``min_side``."""
    factor = max(1, math.ceil(min_side / min(image_N3HW.shape[-2:])))
    return image_N3HW.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def make_grid(image_N3HW: Tensor, columns: int = 0, padding: int = 2, background: float = 1.0) -> Tensor:
    """N images in [0, 1], row by row, into one picture (3, rows * (H + padding) + padding, ...).

    Args:
        columns: images in a row; the smallest square that holds them if 0.
        padding: pixels around every image.
        background: gray level between the images and in cells without one.
    """
    count, channels, height, width = image_N3HW.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = (channels, rows * (height + padding) + padding, columns * (width + padding) + padding)
    picture = torch.full(shape, background, dtype=torch.float32)
    for index, image_3HW in enumerate(image_N3HW.detach().float().cpu().clamp(0, 1)):
        y = padding + (index // columns) * (height + padding)
        x = padding + (index % columns) * (width + padding)
        picture[:, y : y + height, x : x + width] = image_3HW
    return picture


def make_strips(image_RN3HW: Tensor, padding: int = 2) -> Tensor:
    """R rows of N images in [0, 1], enlarged if small, into one picture."""
    rows, count = image_RN3HW.shape[:2]
    assert rows > 0
    return make_grid(enlarge(image_RN3HW.flatten(0, 1)), columns=count, padding=padding)


def make_pairs(image_N3HW: Tensor, again_N3HW: Tensor, columns: int = 8) -> Tensor:
    """N images in [0, 1], each above its reconstruction, enlarged if small, in one picture."""
    bands = []
    for originals, copies in zip(image_N3HW.split(columns), again_N3HW.split(columns), strict=True):
        bands += [make_grid(enlarge(images), columns=columns) for images in (originals, copies)]
    return torch.cat(bands, dim=1)


LEVELS = {torch.uint8: 255.0, torch.uint16: 65535.0}
"""The largest number of each type of pixels: white."""


def normalize(image_B3HW: Tensor) -> Tensor:
    """The pixels that models take: uint8 (B, 3, H, W) -> float32 in [-1, 1] by x / 255 * 2 - 1, the same bits on any
    device; of uint16 by x / 65535. Floats, of data modules that normalize on their own, pass as they are.

    Batches are uint8 on their way: a fourth of the bytes between processes and to the device.

    Raises:
        UserError: whole numbers of another type, whose white nobody knows.
    """
    if image_B3HW.is_floating_point():
        return image_B3HW
    if (white := LEVELS.get(image_B3HW.dtype)) is None:
        kind = str(image_B3HW.dtype).removeprefix("torch.")
        raise UserError(
            f"image: its pixels are {kind}; give uint8 (0 to 255), uint16 (0 to 65535), or floats in [-1, 1]"
        )
    if image_B3HW.device.type != "cpu":
        # by a tensor: CUDA divides by a number by multiplying with its inverse, which rounds otherwise
        by = torch.full((), white, device=image_B3HW.device)
        return image_B3HW.float().div_(by).mul_(2).sub_(1)
    normalized_B3HW = torch.empty(image_B3HW.shape, dtype=torch.float32)
    # plane by plane, which a processor's cache holds
    for normalized_HW, pixels_HW in zip(normalized_B3HW.flatten(0, 1), image_B3HW.flatten(0, 1), strict=True):
        normalized_HW.copy_(pixels_HW).div_(white).mul_(2).sub_(1)
    return normalized_B3HW


def as_rgb(image_BCHW: Tensor, black: float = 0.0) -> Tensor:
    """What a network or a picture that knows RGB alone is given of images from ``black`` to 1, (B, 3, H, W): RGB as it
    is, gray as three equal channels, RGBA laid on white.

    Raises:
        UserError: images of another number of channels.
    """
    channels = image_BCHW.shape[1]
    if channels == 3:
        return image_BCHW
    if channels == 1:
        return image_BCHW.expand(-1, 3, -1, -1)
    if channels != 4:
        raise UserError(
            f"images of {channels} channels: nothing says what they look like in RGB; take 1, 3 or 4 channels here, or "
            "leave out what compares or draws RGB images"
        )
    color_B3HW, alpha_B1HW = image_BCHW[:, :3], (image_BCHW[:, 3:] - black) / (1 - black)
    return color_B3HW * alpha_B1HW + (1 - alpha_B1HW)


def to_unit(image_B3HW: Tensor) -> Tensor:
    """Pixels, uint8 or floats in [-1, 1], to [0, 1]."""
    return normalize(image_B3HW).float().add(1).div(2).clamp(0, 1)


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Of a picture with so many channels."""


def check_drawable(channels: int) -> None:
    """Raise `UserError` for a number of channels that no picture file has."""
    if channels not in MODES:
        raise UserError(
            f"images of {channels} channels: a picture file has 1 (gray), 3 (RGB) or 4 (RGBA); take the tensors from "
            "Python (generate), and write the channels that you want to see"
        )


def to_image(picture_3HW: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to a PIL image, rounded to the nearest of 256 levels; L and RGBA of 1 and 4 channels.

    Raises:
        UserError: another number of channels.
    """
    channels = picture_3HW.shape[0]
    check_drawable(channels)
    levels_HW3 = picture_3HW.detach().float().cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    levels_HWx = levels_HW3 if channels > 1 else levels_HW3[..., 0]
    return Image.fromarray(levels_HWx.contiguous().numpy(), mode=MODES[channels])


def to_pil(images: Tensor | Sequence[Tensor]) -> list[Image.Image]:
    """Each of several images as a PIL image.

    Args:
        images: (B, 3, H, W) or one (3, H, W), floats in [0, 1] as `generate` gives them, or as batches hold them.

    Raises:
        UserError: another shape, or values that are not in [0, 1].
    """
    return [to_image(image_3HW) for image_3HW in _given(images)]


def show(images: Tensor | Sequence[Tensor], columns: int = 8) -> Image.Image:
    """Several images in one picture, small ones enlarged: what a notebook displays.

    Args:
        images: as of `to_pil`.
        columns: in a row, at most.

    Raises:
        UserError: as `to_pil`, or no images.
    """
    image_B3HW = _given(images)
    if not len(image_B3HW):
        raise UserError("images: there are none to show")
    return to_image(make_grid(enlarge(as_rgb(image_B3HW)), columns=min(columns, len(image_B3HW))))


def _given(images: Tensor | Sequence[Tensor]) -> Tensor:
    images = torch.stack([*images]) if not isinstance(images, Tensor) else images
    image_B3HW = images[None] if images.ndim == 3 else images
    if image_B3HW.ndim != 4 or image_B3HW.shape[1] not in MODES:
        raise UserError(f"images of shape {tuple(images.shape)}: give (B, 3, H, W) or (3, H, W), or 1 or 4 for the 3")
    if image_B3HW.dtype in LEVELS:
        return to_unit(image_B3HW)
    if image_B3HW.numel() and not -1e-3 <= float(image_B3HW.min()) <= float(image_B3HW.max()) <= 1.001:
        raise UserError("images: some values are not in [0, 1]; for pixels in [-1, 1] give image / 2 + 0.5")
    return image_B3HW


def from_image(image: Image.Image) -> Tensor:
    """A PIL image to (3, H, W) in [0, 1]."""
    levels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return levels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def to_png(picture_3HW: Tensor, file: Path) -> None:
    """Write a picture as PNG, whole. Raises `UserError` where it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, lambda stream: to_image(picture_3HW).save(stream, format="PNG"))
    except OSError as error:
        raise UserError(
            f"picture {file}: cannot be written ({error.strerror}); free some space or choose another folder"
        ) from error


GAP = 4
"""Pixels between the cells of a picture with labels."""


def labeled_rows(image_RN3HW: Tensor, labels: Sequence[str], captions: Sequence[Sequence[str]]) -> Tensor:
    """R rows of N images in [0, 1], enlarged if small; a label above each column, a caption below each image.

    Labels wider than a column take several lines. The picture is RGB, also of other images (`as_rgb`).
    """
    rows, count = image_RN3HW.shape[:2]
    cells = enlarge(as_rgb(image_RN3HW.flatten(0, 1)))
    height, width = cells.shape[-2:]
    font = ImageFont.load_default(size=min(max(width // 11, 11), 22))
    line = int(font.getbbox("Mg")[3]) + 6
    headings = [broken(label, font.getlength, width + GAP // 2) for label in labels]
    head = line * max(map(len, headings))
    bands = [torch.ones(3, head, count * (width + GAP) + GAP)]
    for row in cells.split(count):
        bands += [make_grid(row, columns=count, padding=GAP), torch.ones(3, line, bands[0].shape[2])]
    picture = to_image(torch.cat(bands, dim=1))
    draw = ImageDraw.Draw(picture)
    for column in range(count):
        middle = GAP + column * (width + GAP) + width / 2
        for above, text in enumerate(reversed(headings[column])):
            draw.text((middle, head - 1 - above * line), text, INK, font, anchor="md")
        for row in range(rows):
            below = head + (row + 1) * (height + 2 * GAP) + row * line
            draw.text((middle, below), captions[row][column], INK, font, anchor="ma")
    return from_image(picture)


def broken(label: str, length: Callable[[str], float], width: float) -> list[str]:
    """A label in lines no longer than ``width``: broken between words, and inside one only where it is too long."""
    lines = [""]
    for word in label.split():
        joined = f"{lines[-1]} {word}".strip()
        if length(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            lines += [""] if lines[-1] and length(lines[-1] + letter) > width else []
            lines[-1] += letter
    return lines


Side = int | tuple[int, int]
"""Of a token map."""


def mask_picture(visible_LL: Tensor, sides: Sequence[Side], size: int = 720) -> Image.Image:
    """An attention mask as a picture: queries down, keys across, scales named and set apart by lines.

    Args:
        visible_LL: bool (L, L), true where the query (row) sees the key (column).
        sides: side length of each scale's map, or height and width.
        size: the picture's target width in pixels; pyramids of more tokens get one pixel a token, or, from
            twice this many on, one pixel for several tokens (visible if any of them is).
    """
    length = visible_LL.shape[0]
    counts = [side * side if isinstance(side, int) else math.prod(side) for side in sides]
    assert visible_LL.shape == (length, length) and sum(counts) == length
    visible_LL = visible_LL.detach().bool().cpu()
    thin = max(1, length // size)
    if thin > 1:
        visible_LL = torch.nn.functional.max_pool2d(visible_LL[None].float(), thin, ceil_mode=True)[0].bool()
    zoom = max(1, size // visible_LL.shape[0])
    visible_HW = visible_LL.repeat_interleave(zoom, dim=0).repeat_interleave(zoom, dim=1)
    palette = torch.tensor([HIDDEN, VISIBLE], dtype=torch.uint8)
    cells = Image.fromarray(palette[visible_HW.long()].numpy(), mode="RGB")
    names = [str(side) if isinstance(side, int) else "x".join(map(str, side)) for side in sides]
    return _framed(cells, dict(zip(names, counts, strict=True)), pixels_per_token=zoom / thin)


def _framed(cells: Image.Image, maps: Mapping[str, int], pixels_per_token: float) -> Image.Image:
    """The cells with a margin that names the scales, and lines between the scales."""
    margin, font = 46, ImageFont.load_default(size=13)
    picture = Image.new("RGB", (cells.width + margin + 8, cells.height + margin + 8), "white")
    picture.paste(cells, (margin, margin))
    draw = ImageDraw.Draw(picture)
    draw.text((margin, 4), "queries down, keys across; numbers are the scales' sides", INK, font)
    start, last_label = 0, -20.0
    for name, count in maps.items():
        low, high = (round(margin + token * pixels_per_token) for token in (start, start + count))
        start += count
        draw.line([(high, margin), (high, margin + cells.height)], BORDER)
        draw.line([(margin, high), (margin + cells.width, high)], BORDER)
        # labels of the first, tiny scales would lie on one another
        middle = (low + high) / 2
        if middle - last_label >= 20:
            draw.text((middle, margin - 4), name, INK, font, anchor="mb")
            draw.text((margin - 6, middle), name, INK, font, anchor="rm")
            last_label = middle
    draw.rectangle([(margin, margin), (margin + cells.width, margin + cells.height)], outline=BORDER)
    return picture


THREADS = 8
"""At most; Pillow lets other threads run while it compresses."""


class PictureWriter:
    """Writes pictures by threads while the next ones are made: compressing a PNG takes longer than a GPU's sampling.

    One batch at a time; as a context, all are written when it ends.

    Args:
        write: writes a picture to a file, whole or not at all, and raises `UserError` where it cannot.
    """

    def __init__(self, write: Callable[[Tensor, Path], None]) -> None:
        self._write = write
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="png")
        self._running: list[Future[None]] = []

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._pool.shutdown()  # whatever ended the work, the pictures made before are worth their file
        if kind is None:
            self.wait()

    def add(self, pictures: Iterable[tuple[Tensor, Path]]) -> None:
        """Start writing a batch, once the one before is written. Raises what went wrong with that one."""
        self.wait()
        self._running = [self._pool.submit(self._write, picture_3HW, file) for picture_3HW, file in pictures]

    def wait(self) -> None:
        """Until all are written. Raises what went wrong with the first of them."""
        running, self._running = self._running, []
        wait(running)
        for future in running:
            future.result()
