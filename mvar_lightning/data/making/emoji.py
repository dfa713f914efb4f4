"""Emoji as a data set for the eye: drawn from a color font, in the groups that Unicode puts them into."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from mvar_lightning.data.making.sources import Example, Source
from mvar_lightning.errors import UserError

FONT, TABLE = "NotoColorEmoji.ttf", "emoji-test.txt"
PLACES = {FONT: Path("/usr/share/fonts/truetype/noto"), TABLE: Path("/usr/share/unicode/emoji")}
"""Where Debian's packages put the files."""

OWN_PLACE = Path("data/emoji-files")
"""Where those who have them from elsewhere may."""

STRIKE = 109
"""Size that the font has bitmaps at: of 136 x 128 pixels."""

SIDE = 48
VAL_SHARE = 0.1

_LINE = re.compile(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)")
_PERSON = re.compile(r"\b(?:man|woman|men|women|person|people)\b ?")


class Emoji(NamedTuple):
    group: str
    text: str
    name: str

    @property
    def kin(self) -> str:
        """What its variants of skin, hair and sex have in common; they look alike, so they share a split."""
        name = self.name if self.group == "Flags" else self.name.partition(":")[0]
        return _PERSON.sub("", name).strip() or "person"


def emoji() -> Source:
    """Every emoji of Unicode's table that the font has, as PNG of 48 x 48 pixels on white; nine groups are the classes.

    About a tenth is for validation, always the same ones, all variants of one emoji (skin, hair, sex) on one side.

    Raises:
        UserError: font or table are not there or are none; a Pillow that cannot join code points.
    """
    font, table = (_find(name) for name in (FONT, TABLE))
    if not features.check("raqm"):
        raise UserError("data set emoji: this Pillow has no Raqm, which joins code points to one emoji; pip install "
                        "--force-reinstall pillow, and libfribidi0 of the system")  # fmt: skip
    found = list(read_table(table))
    if not found:
        raise UserError(f"data set emoji: {table} has no line of a fully-qualified emoji; give Unicode's {TABLE}")
    nothing = _drawn(font, "\U0010ffff").tobytes()
    groups = tuple(dict.fromkeys(each.group for each in found))
    train, val, missing = [], [], []
    for each in found:
        example = Example(f"emoji {each.name}", groups.index(each.group), partial(_png, font, each.text))
        if not _is_one(font, each.text) or _drawn(font, each.text).tobytes() == nothing:
            missing.append(each.name)
        elif random.Random(each.kin).random() < VAL_SHARE:
            val.append(example)
        else:
            train.append(example)
    told = (f"{len(missing)} emoji that {FONT} does not have are left out",) if missing else ()
    return Source(groups, tuple(train), tuple(val), told)


def _find(name: str) -> Path:
    places = (PLACES[name], OWN_PLACE)
    for place in places:
        if (path := place / name).is_file():
            return path
    raise UserError(
        f"data set emoji: {name} is not in {places[0]}; apt-get install fonts-noto-color-emoji unicode-data "
        f"(Debian, Ubuntu), or put {FONT} and {TABLE} into {OWN_PLACE}"
    )


def read_table(path: Path) -> Iterator[Emoji]:
    """The fully-qualified emoji of Unicode's ``emoji-test.txt``, with the group that they stand under.

    Raises:
        UserError: a file that cannot be read, or is no UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data set emoji: {path} cannot be read ({error})") from None
    group = ""
    for line in lines:
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        elif (found := _LINE.match(line)) is not None:
            yield Emoji(group, "".join(chr(int(point, 16)) for point in found[1].split()), found[2].strip())


@lru_cache(maxsize=1)
def _font(path: Path) -> ImageFont.FreeTypeFont:
    try:  # given a path, Pillow would take a font of that name from elsewhere where this one is damaged
        content = io.BytesIO(path.read_bytes())
        return ImageFont.truetype(content, STRIKE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:  # another file, or a font with bitmaps of other sizes alone
        raise UserError(f"data set emoji: {path} is no font of {STRIKE} pixels ({error})") from None


def _is_one(path: Path, text: str) -> bool:
    """Whether the font joins the code points to one picture; else they would stand side by side."""
    return _font(path).getlength(text) <= 1.5 * STRIKE


def _drawn(path: Path, text: str) -> Image.Image:
    """In the middle of a white square as large as the picture is, margins of the font included."""
    left, top, right, bottom = _font(path).getbbox(text)
    width, height = right - left, bottom - top
    side = max(1, round(max(width, height)))
    image = Image.new("RGB", (side, side), "white")
    place = ((side - width) / 2 - left, (side - height) / 2 - top)
    ImageDraw.Draw(image).text(place, text, font=_font(path), fill="black", embedded_color=True)
    return image


def _png(path: Path, text: str) -> bytes:
    buffer = io.BytesIO()
    _drawn(path, text).resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(buffer, "PNG")
    return buffer.getvalue()
