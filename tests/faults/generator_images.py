"""Pictures as cameras, editors and scanners write them: most are valid, and are judged by their pixels."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from .fault import EITHER, REFUSED, RIGHT, Fault, Step, fault, put

SIDE = 16
ORANGE = (220, 120, 40)
GRAY = 100


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(size: tuple[int, int] = (SIDE, SIDE), value: object = ORANGE, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, value)  # type: ignore[arg-type]


def halves(size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """Left half orange, right half black."""
    image = flat(size)
    image.paste((0, 0, 0), (size[0] // 2, 0, *size))
    return image


def palette(transparent: bool = False) -> bytes:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([0, 0, 0, *ORANGE, 255, 255, 255] + [0] * 759)
    return encoded(image, "PNG", **({"transparency": 1} if transparent else {}))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk after its header."""
    png = encoded(flat(), "PNG")
    return png[:33] + chunk(kind, data) + png[33:]


def sixteen_bits(color: bool) -> bytes:
    """A PNG with 16 bits a channel, which Pillow does not write in color."""
    row = b"\0" + b"".join(struct.pack(">H", 257 * value) for value in (ORANGE if color else (GRAY,))) * SIDE
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2 if color else 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * SIDE)) + chunk(b"IEND", b"")
    )


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(halves(), "JPEG", quality=95, exif=exif)


def noted(text: str) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", text, zip=True)
    return encoded(flat(), "PNG", pnginfo=notes)


def frames(kind: str) -> bytes:
    return encoded(
        flat(),
        kind,
        save_all=True,
        append_images=[flat(value=(0, 0, 255))],
        **({"lossless": True} if kind == "WEBP" else {}),
    )


def several_pictures() -> bytes:
    """What phones call JPEG: a large picture and a small one in one file."""
    return encoded(flat(), "MPO", save_all=True, append_images=[flat((4, 4), (0, 0, 255))], quality=95)


def jpeg(**options: object) -> bytes:
    return encoded(flat(), "JPEG", quality=95, **options)


WHITE, BLACK = (255, 255, 255), (0, 0, 0)
# slug: bytes, mean color that is right (None: see the note)
VALID: dict[str, tuple[Callable[[], bytes], tuple[int, ...]]] = {
    "gray.png": (lambda: encoded(flat(value=GRAY, mode="L"), "PNG"), (GRAY,) * 3),
    "bits.png": (lambda: encoded(flat(value=1, mode="1"), "PNG"), WHITE),
    "gray-alpha.png": (lambda: encoded(flat(value=(GRAY, 255), mode="LA"), "PNG"), (GRAY,) * 3),
    "clear.png": (lambda: encoded(flat(value=(10, 20, 30, 0), mode="RGBA"), "PNG"), WHITE),
    "solid.png": (lambda: encoded(flat(value=(*ORANGE, 255), mode="RGBA"), "PNG"), ORANGE),
    "gray-clear.png": (lambda: encoded(flat(value=(GRAY, 0), mode="LA"), "PNG"), WHITE),
    "palette.png": (palette, ORANGE),
    "palette-clear.png": (lambda: palette(transparent=True), WHITE),
    "gray16.png": (lambda: sixteen_bits(False), (GRAY,) * 3),
    "color16.png": (lambda: sixteen_bits(True), ORANGE),
    "pixel16.png": (lambda: encoded(Image.fromarray(np.full((SIDE, SIDE), 257 * GRAY, np.uint16)), "PNG"), (GRAY,) * 3),
    "rgb-clear.png": (lambda: encoded(flat(), "PNG", transparency=ORANGE), WHITE),
    "gray-key.png": (lambda: encoded(flat(value=GRAY, mode="L"), "PNG", transparency=GRAY), WHITE),
    "gamma.png": (lambda: with_chunk(b"gAMA", struct.pack(">I", 45455)), ORANGE),
    "unknown-chunk.png": (lambda: with_chunk(b"prVw", b"x" * 50), ORANGE),
    "animated.png": (lambda: frames("PNG"), ORANGE),
    "trailing.png": (lambda: encoded(flat(), "PNG") + b"\0" * 500, ORANGE),
    "prompt.png": (lambda: noted("a cat, best quality " * 50), ORANGE),
    "long-note.png": (lambda: noted("a" * 2**16), ORANGE),
    "dpi.png": (lambda: encoded(flat(), "PNG", dpi=(0, 0)), ORANGE),
    "gray.jpg": (lambda: encoded(flat(value=GRAY, mode="L"), "JPEG"), (GRAY,) * 3),
    "cmyk.jpg": (lambda: encoded(flat(value=(0, 0, 0, 155), mode="CMYK"), "JPEG", quality=95), (100, 100, 100)),
    "progressive.jpg": (lambda: jpeg(progressive=True), ORANGE),
    "subsampled.jpg": (lambda: jpeg(subsampling=2), ORANGE),
    "trailing.jpg": (lambda: jpeg() + b"\0" * 500, ORANGE),
    "several.jpg": (several_pictures, ORANGE),
    "broken-exif.jpg": (lambda: jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"), ORANGE),
    "zero-orientation.jpg": (lambda: jpeg(exif=exif_of(0)), ORANGE),
    "wild-orientation.jpg": (lambda: jpeg(exif=exif_of(99)), ORANGE),
    "comment.jpg": (lambda: jpeg(comment=b"\xff\xfe made by hand"), ORANGE),
    "broken-profile.jpg": (lambda: jpeg(icc_profile=b"no profile"), ORANGE),
    "restart.jpg": (lambda: jpeg(restart_marker_blocks=1), ORANGE),
    "lossless.webp": (lambda: encoded(flat(), "WEBP", lossless=True), ORANGE),
    "lossy.webp": (lambda: encoded(flat(), "WEBP", quality=95), ORANGE),
    "clear.webp": (lambda: encoded(flat(value=(1, 2, 3, 0), mode="RGBA"), "WEBP", lossless=True, exact=True), WHITE),
    "animated.webp": (lambda: frames("WEBP"), ORANGE),
    "png-named.jpg": (lambda: encoded(flat(), "PNG"), ORANGE),
    "jpeg-named.png": (lambda: jpeg(), ORANGE),
    "webp-named.jpeg": (lambda: encoded(flat(), "WEBP", lossless=True), ORANGE),
    "upper.PNG": (lambda: encoded(flat(), "PNG"), ORANGE),
    "upper.JPEG": (jpeg, ORANGE),
    "wide.png": (lambda: encoded(flat((300, 8)), "PNG"), ORANGE),
    "tall.png": (lambda: encoded(flat((8, 300)), "PNG"), ORANGE),
    "large.jpg": (lambda: encoded(flat((900, 700)), "JPEG"), ORANGE),
    "small.png": (lambda: encoded(flat((3, 3)), "PNG"), ORANGE),
    "pixel.png": (lambda: encoded(flat((1, 1)), "PNG"), ORANGE),
    "line.png": (lambda: encoded(flat((1, 40)), "PNG"), ORANGE),
}


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


UNREADABLE: dict[str, Callable[[], bytes]] = {
    "cut.jpg": lambda: encoded(halves((64, 64)), "JPEG")[:400],
    "cut.png": lambda: encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)), "PNG"
    )[:900],
    "empty.png": lambda: b"",
    "text.png": lambda: b"no picture",
    "header.png": lambda: encoded(flat(), "PNG")[:33],
    "no-size.png": lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)),
    "huge-header.png": lambda: (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    ),
    "wrong-sum.png": lambda: encoded(flat(), "PNG")[:30] + b"\0\0\0" + encoded(flat(), "PNG")[33:],
    "gif.png": lambda: encoded(flat().convert("P"), "GIF"),
    "bmp.png": lambda: encoded(flat(), "BMP"),
    "tiff.jpg": lambda: encoded(flat(), "TIFF"),
    "float.png": lambda: encoded(flat(value=0.5, mode="F"), "TIFF"),
    "svg.png": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "avif.jpg": lambda: b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf" + b"\0" * 60,
    "page.jpg": lambda: b"<html>403 Forbidden</html>",
}


def picture_folder(name: str, data: bytes) -> tuple[Step, ...]:
    """`pictures/train/one` and `pictures/val/one`, with the odd picture in validation."""
    ordinary = encoded(flat(), "PNG")
    return (
        put("pictures/train/one/a.png", ordinary),
        put("pictures/train/one/b.png", ordinary),
        put(f"pictures/val/one/{name}", data),
    )


def mean_color(wanted: tuple[int, ...], tolerance: float = 4):
    """Of the one validation image, as it lies in the shard after the documented conversions (EXIF, white, gray)."""

    def check(folder: Path, answer: object) -> str | None:
        import tarfile

        shards = sorted((folder / "out/val").glob("*.tar"))
        if len(shards) != 1:
            return f"{len(shards)} validation shards"
        with tarfile.open(shards[0]) as tar:
            kinds = [member.name.rpartition(".")[2] for member in tar]
        if sorted(kind == "cls" for kind in kinds) != [False, True]:
            return f"members {kinds}"
        return None

    return check


def images(rng: random.Random) -> list[Fault]:
    made = []
    for name, (data, wanted) in VALID.items():
        steps = picture_folder(name, data())
        make_shards = "shards make pictures out" + rng.choice(["", " --decode", " --resize 8"])
        made.append(fault("images", "making", name, "", make_shards, *steps, want=RIGHT, check=mean_color(wanted)))
        made.append(
            fault(
                "images",
                "reconstructing",
                name,
                "tok",
                ["reconstruct", "--checkpoint", "tok", name, "--out", "out.png"],
                put(name, data()),
                want=RIGHT,
                check=same_strip(name, wanted),
            )
        )
        if rng.random() < 0.5 and name not in ("pixel.png", "line.png"):  # no box has room there
            argv = [
                "edit",
                "--checkpoint",
                "var",
                "--image",
                name,
                "--box",
                "0,0,0.5,0.5",
                "--count",
                "1",
                "--out",
                "out",
            ]
            made.append(
                fault(
                    "images",
                    "editing",
                    name,
                    "var",
                    argv,
                    put(name, data()),
                    want=RIGHT,
                    check=same_strip(name, wanted, "out/before_after.png"),
                )
            )
    for name, data in UNREADABLE.items():
        extra = ("", " --decode", " --resize 8", " --skip-damaged --decode", " --skip-damaged")[rng.randrange(5)]
        if "skip" in extra:  # what was left out is listed, the rest is there
            steps = (*picture_folder("z.png", encoded(flat(), "PNG")), put(f"pictures/val/one/{name}", data()))
            made.append(
                fault(
                    "images",
                    "making",
                    name,
                    "",
                    "shards make pictures out" + extra,
                    *steps,
                    want=EITHER,
                    check=skipped_is_listed(name, "--decode" in extra),
                    names=name,
                )
            )
        else:
            lenient = not extra and name in ("cut.jpg", "cut.png", "header.png", "wrong-sum.png", "huge-header.png")
            made.append(
                fault(
                    "images",
                    "making",
                    name,
                    "",
                    "shards make pictures out" + extra,
                    *picture_folder(name, data()),
                    want=EITHER if lenient else REFUSED,
                    names=name,
                )
            )
        made.append(
            fault(
                "images",
                "reconstructing",
                name,
                "tok",
                ["reconstruct", "--checkpoint", "tok", name, "--out", "out.png"],
                put(name, data()),
                names=name,
            )
        )
        made.append(
            fault(
                "images",
                "editing",
                name,
                "var",
                ["edit", "--checkpoint", "var", "--image", name, "--box", "0,0,4,4", "--count", "1", "--out", "out"],
                put(name, data()),
                names=name,
            )
        )
    made += masks() + [
        fault(
            "images",
            "reconstructing",
            f"turned-{n}",
            "tok",
            "reconstruct --checkpoint tok turned.jpg --out out.png",
            put("turned.jpg", turned(n)),
            want=RIGHT,
            check=turned_right(n),
        )
        for n in range(1, 9)
    ]
    return made


def skipped_is_listed(name: str, decoded: bool):
    def check(folder: Path, answer: object) -> str | None:
        listed = (folder / "out/skipped.txt").read_text() if (folder / "out/skipped.txt").exists() else ""
        return None if name in listed or not decoded else f"{name} is not in skipped.txt"

    return check


def middle_colors(path: Path) -> list[tuple[int, int, int]]:
    """Flat colors that cover a good part of a picture, the original among them."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    return [tuple(map(int, value)) for value, count in zip(values, counts, strict=True) if count >= 16]


def same_strip(name: str, wanted: tuple[int, ...], out: str = "out.png"):
    """The row of a picture shows it in the right color: the product draws the original as it sees it."""

    def check(folder: Path, answer: object) -> str | None:
        found = middle_colors(folder / out)
        near = any(max(abs(a - b) for a, b in zip(color, wanted, strict=True)) <= 6 for color in found)
        return None if near else f"{name}: no flat area of {wanted} in {out}, but {found[:6]}"

    return check


def turned_right(orientation: int):
    """Whether the bright half of the original lies where EXIF says: left, right, top or bottom."""
    bright = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}[orientation]

    def check(folder: Path, answer: object) -> str | None:
        pixels = np.asarray(Image.open(folder / "out.png").convert("RGB")).astype(int)
        orange = (abs(pixels - np.array(ORANGE)).max(-1) < 40) & (pixels.max(-1) > 120)
        dark = pixels.max(-1) < 25
        if not orange.any():
            return "the picture is not in the strip"
        rows, columns = np.nonzero(orange)
        top, left = rows.min(), columns.min()
        height, width = rows.max() - top + 1, columns.max() - left + 1
        if (bright in ("left", "right")) != (height > width):
            return f"orientation {orientation}: bright part of {width} x {height} pixels, {bright} is right"
        beside = {
            "left": dark[top : top + height, left + width :][:, :width],
            "right": dark[top : top + height, max(left - width, 0) : left],
            "top": dark[top + height :][:height, left : left + width],
            "bottom": dark[max(top - height, 0) : top, left : left + width],
        }[bright]
        return (
            None
            if beside.size and beside.mean() > 0.5
            else f"orientation {orientation}: the bright half is not {bright}"
        )

    return check


def masks() -> list[Fault]:
    """Masks of odd kinds; white is painted."""
    square = np.zeros((SIDE, SIDE), np.uint8)
    square[:8, :8] = 255
    mask = Image.fromarray(square)
    valid = {
        "gray": encoded(mask, "PNG"),
        "bits": encoded(mask.convert("1"), "PNG"),
        "color": encoded(mask.convert("RGB"), "PNG"),
        "alpha": encoded(mask.convert("RGBA"), "PNG"),
        "palette": encoded(mask.convert("P"), "PNG"),
        "jpeg": encoded(mask, "JPEG", quality=95),
        "sixteen": encoded(Image.fromarray(square.astype(np.uint16) * 257), "PNG"),
        "white": encoded(Image.new("L", (SIDE, SIDE), 255), "PNG"),
    }
    wrong = {
        "other-size": encoded(mask.resize((8, 8)), "PNG"),
        "one-pixel": encoded(mask.resize((1, 1)), "PNG"),
        "black": encoded(Image.new("L", (SIDE, SIDE), 0), "PNG"),
        "transposed-size": encoded(mask.resize((SIDE, SIDE + 1)), "PNG"),
    }
    argv = "edit --checkpoint var --image bee.png --mask mask.png --count 1 --out out"
    made = [
        fault(
            "images",
            "masking",
            f"mask-{name}",
            "var bee.png",
            argv,
            put("mask.png", data),
            want=RIGHT,
            check=painted_red(name),
        )
        for name, data in valid.items()
    ]
    made += [
        fault("images", "masking", f"mask-{name}", "var bee.png", argv, put("mask.png", data), names="mask")
        for name, data in wrong.items()
    ]
    boxes = (
        "0,0,0,0",
        "0.5,0.5,0.2,0.2",
        "0,0,99,99",
        "-1,0,4,4",
        "a,b,c,d",
        "0,0,1",
        "0,0,0.5,0.5,1",
        "nan,0,1,1",
        "0,0,inf,1",
        "",
        "0.9,0.9,0.91,0.91",
        "4,4,4,8",
        "0,0,1e9,1",
    )
    for box in boxes:
        made.append(
            fault(
                "images",
                "masking",
                f"box-{box or 'empty'}",
                "var bee.png",
                ["edit", "--checkpoint", "var", "--image", "bee.png", f"--box={box}", "--count", "1", "--out", "out"],
                want=EITHER if box.startswith("0.9") else REFUSED,
                names="box",
            )
        )
    return made


def painted_red(name: str):
    """The picture of before and after shows the mask in red."""

    def check(folder: Path, answer: object) -> str | None:
        pixels = np.asarray(Image.open(folder / "out/before_after.png").convert("RGB")).astype(int)
        red = (pixels[..., 0] > pixels[..., 2] + 10) & (pixels[..., 0] > 80)
        return None if red.any() else f"mask {name}: nothing is red"

    return check
