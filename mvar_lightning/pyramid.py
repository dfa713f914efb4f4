"""The one piece of vocabulary that everything shares: which token sits where.

A token pyramid lists maps from coarse to fine, square ones by their side and others by height and width. Its tokens
are laid out scale after scale, row by row: token ``t`` of the sequence belongs to one scale and one ``(y, x)`` of that
scale's map. Nothing else in the suite derives a map's shape from a number of tokens.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from mvar_lightning.errors import UserError

Size = int | tuple[int, int]
"""Of a map or an image: the side of a square, or (height, width) where the two differ."""

Scales = Sequence[int | Sequence[int]]
"""Of token maps as recipes give them: for each the side of a square, or [height, width]."""

LARGEST_SIDE = 1024
"""Of a token map: images of 16,384 pixels. More is a mistake, which would be noticed by the memory it takes."""

PUBLISHED_SIDES: dict[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Side lengths of the published models by image size (VAR section 4; Markov-VAR for 1024)."""


def height_width(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def size_of(height: int, width: int) -> Size:
    """The size as it is written: one number where it is a square."""
    return height if height == width else (height, width)


def as_written(size: Size) -> int | list[int]:
    """The plain value that recipes and files hold: a number, or [height, width]."""
    return size if isinstance(size, int) else list(size)


def as_size(given: Any) -> Size | None:
    """The size that a number, or a list or tuple of height and width, stands for; None where it is neither."""
    numbers = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given, given]
    if any(isinstance(number, bool) for number in numbers):
        return None
    try:
        whole = [int(number) for number in numbers]
    except (TypeError, ValueError, OverflowError):
        return None
    return size_of(*whole) if len(whole) == 2 and whole == numbers else None


def times(size: Size, sign: str = " x ") -> str:
    """Height times width, for messages and labels: 16 x 32."""
    return sign.join(map(str, height_width(size)))


def short(size: Size) -> str:
    """Of a square its side, 16; of others 16x32."""
    return str(size) if isinstance(size, int) else times(size, "x")


@dataclass(frozen=True)
class ScalePyramid:
    """Sizes of the token maps, coarse to fine, and the geometry that follows from them.

    Args:
        sides: of each map the side, or [height, width]. Squares grow strictly; of other maps neither axis shrinks and
            no two are the same.

    Attributes:
        sides: the same, a number for each square map and (height, width) for each other.
    """

    sides: tuple[Size, ...]

    def __init__(self, sides: Iterable[int | Sequence[int]]) -> None:
        given = list(sides)
        if not given:
            raise UserError("scales: the list is empty; give side lengths such as [1, 2, 3, 4]")
        sizes = [size for size in map(as_size, given) if size is not None]
        if len(sizes) != len(given) or max(max(height_width(size)) for size in sizes) > LARGEST_SIDE:
            raise UserError(
                f"scales {reprlib.repr(given)}: give whole numbers of at most {LARGEST_SIDE}, or pairs of such for "
                "maps that are no squares: [[1, 1], [1, 2], [2, 4]]"
            )
        shapes = [height_width(size) for size in sizes]
        grows = all(a != b and a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(shapes))
        if min(shapes[0]) < 1 or not grows:
            if all(isinstance(size, int) for size in sizes):
                raise UserError(f"scales {sizes}: side lengths must be positive and strictly increasing")
            raise UserError(
                f"scales {list(map(as_written, sizes))}: heights and widths must be positive, and from map to map "
                "neither may shrink and one must grow"
            )
        object.__setattr__(self, "sides", tuple(sizes))

    @classmethod
    def from_num_tokens(cls, num_tokens: int) -> ScalePyramid:
        """The published pyramid with this many tokens (680, 2240 or 9451)."""
        for sides in PUBLISHED_SIDES.values():
            if cls(sides).num_tokens == num_tokens:
                return cls(sides)
        raise UserError(
            f"{num_tokens} tokens: not one of the published pyramids (680, 2240, 9451); "
            "say which scales it has with patch_nums=(...)"
        )

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def num_scales(self) -> int:
        return len(self.sides)

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each map."""
        return tuple(map(height_width, self.sides))

    @property
    def scales(self) -> list[int | list[int]]:
        """The plain values of a recipe or a saved configuration: a side, or [height, width]."""
        return list(map(as_written, self.sides))

    @property
    def last_side(self) -> Size:
        """Size of the last map, which is the latent's."""
        return self.sides[-1]

    @property
    def last_shape(self) -> tuple[int, int]:
        return self.shapes[-1]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Index of the first token of each scale, and last the number of tokens (K + 1 numbers)."""
        return (0, *accumulate(height * width for height, width in self.shapes))

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]

    @property
    def first_tokens(self) -> int:
        """Tokens of the first scale, the ones that have no teacher-forced input."""
        return self.offsets[1]

    def tokens_of(self, scale: int) -> int:
        height, width = self.shapes[scale]
        return height * width

    def slice_of(self, scale: int) -> slice:
        return slice(self.offsets[scale], self.offsets[scale + 1])

    def span(self, scales: range) -> slice:
        """Tokens of a contiguous range of scales."""
        return slice(self.offsets[scales.start], self.offsets[scales.stop])

    def scale_of_tokens(self) -> Tensor:
        """Scale index of every token, int64 of shape (L,)."""
        counts = torch.tensor([height * width for height, width in self.shapes], device="cpu")
        return torch.arange(self.num_scales, device="cpu").repeat_interleave(counts)

    def coordinates(self) -> Tensor:
        """(y, x) of every token in its own map, int64 of shape (L, 2)."""
        grids = [torch.cartesian_prod(torch.arange(height), torch.arange(width)) for height, width in self.shapes]
        return torch.cat([grid.reshape(-1, 2) for grid in grids])

    def split(self, tokens_BL: Tensor) -> tuple[Tensor, ...]:
        """Views of a (B, L, ...) tensor, one (B, l, ...) for each scale."""
        if tokens_BL.shape[1] != self.num_tokens:
            raise UserError(
                f"token sequence of length {tokens_BL.shape[1]}: scales {self.scales} have {self.num_tokens}"
            )
        return tokens_BL.split([height * width for height, width in self.shapes], dim=1)

    def __str__(self) -> str:
        return " ".join(map(short, self.sides))
