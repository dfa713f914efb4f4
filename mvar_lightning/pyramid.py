"""The one piece of vocabulary that everything shares: which token sits where.

A token pyramid lists square maps from coarse to fine. Its tokens are laid out scale after scale,
row by row: token ``t`` of the sequence belongs to one scale and one ``(y, x)`` of that scale's map.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mvar_lightning.errors import UserError

LARGEST_SIDE = 1024
"""Of a token map: images of 16,384 pixels. More is a mistake, which would be noticed by the memory it takes."""

PUBLISHED_SIDES: dict[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Side lengths of the published models by image size (VAR section 4; Markov-VAR for 1024)."""


@dataclass(frozen=True)
class ScalePyramid:
    """Side lengths of the token maps, coarse to fine, and the geometry that follows from them."""

    sides: tuple[int, ...]

    def __init__(self, sides: Iterable[int]) -> None:
        given = list(sides)
        try:
            sides = tuple(map(int, given))
        except (TypeError, ValueError, OverflowError):
            sides = ()
        if not given:
            raise UserError("scales: the list is empty; give side lengths such as [1, 2, 3, 4]")
        if list(sides) != given or max(sides) > LARGEST_SIDE:
            raise UserError(f"scales {reprlib.repr(given)}: give whole numbers of at most {LARGEST_SIDE}")
        if sides[0] < 1 or any(a >= b for a, b in pairwise(sides)):
            raise UserError(f"scales {list(sides)}: side lengths must be positive and strictly increasing")
        object.__setattr__(self, "sides", sides)

    @classmethod
    def from_num_tokens(cls, num_tokens: int) -> ScalePyramid:
        """The published pyramid with this many tokens (680, 2240 or 9451)."""
        for sides in PUBLISHED_SIDES.values():
            if sum(side * side for side in sides) == num_tokens:
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

    @property
    def last_side(self) -> int:
        return self.sides[-1]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Index of the first token of each scale, and last the number of tokens (K + 1 numbers)."""
        return (0, *accumulate(side * side for side in self.sides))

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]

    @property
    def first_tokens(self) -> int:
        """Tokens of the first scale, the ones that have no teacher-forced input."""
        return self.offsets[1]

    def tokens_of(self, scale: int) -> int:
        return self.sides[scale] ** 2

    def slice_of(self, scale: int) -> slice:
        return slice(self.offsets[scale], self.offsets[scale + 1])

    def span(self, scales: range) -> slice:
        """Tokens of a contiguous range of scales."""
        return slice(self.offsets[scales.start], self.offsets[scales.stop])

    def scale_of_tokens(self) -> Tensor:
        """Scale index of every token, int64 of shape (L,)."""
        counts = torch.tensor([side * side for side in self.sides], device="cpu")
        return torch.arange(self.num_scales, device="cpu").repeat_interleave(counts)

    def coordinates(self) -> Tensor:
        """(y, x) of every token in its own map, int64 of shape (L, 2)."""
        grids = [torch.cartesian_prod(torch.arange(s), torch.arange(s)) for s in self.sides]
        return torch.cat([grid.reshape(-1, 2) for grid in grids])

    def split(self, tokens_BL: Tensor) -> tuple[Tensor, ...]:
        """Views of a (B, L, ...) tensor, one (B, l, ...) for each scale."""
        if tokens_BL.shape[1] != self.num_tokens:
            raise UserError(
                f"token sequence of length {tokens_BL.shape[1]}: scales {list(self.sides)} have {self.num_tokens}"
            )
        return tokens_BL.split([side * side for side in self.sides], dim=1)

    def __str__(self) -> str:
        return " ".join(str(side) for side in self.sides)
