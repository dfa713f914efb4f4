"""Weights for other scales: what a transformer learnt of its token maps, moved to maps of other sides.

A map of n x n tokens always covers the whole image, so what stands for a place of it is found by the map's side, not by
its number among the scales: from the scale whose side is nearest, as a ratio. Token positions are resized as a picture
(bicubic, as ViT's: arXiv 2010.11929, section 3.2, and DeiT's code); a level's vector lies between those of the next
smaller and next larger side, by the logarithm of the side. Beyond the first and last side the nearest is taken. Of maps
that are no squares the nearest is so in height and width together, and the side is that of a square of equal area.

C width, K scales; i rows and j columns of a map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid

RULES = ("resize", "fresh")
POSITIONS = "positions."
START, TOKEN, LEVEL = "positions.start", "positions.token", "positions.level.weight"


def for_scales(
    state: Mapping[str, Tensor], there: ScalePyramid, here: ScalePyramid, own: Mapping[str, Tensor], rule: str | None
) -> tuple[dict[str, Tensor], str]:
    """A state dict on other scales, and what was done, in words.

    Args:
        state: of a model with scales ``there``. Models that rotate by positions (Markov-VAR) make their angles anew;
            their levels go by a scale's number, not by its side, and stay with it, whatever side it has here.
        here: the scales that are wanted.
        own: the new model's state dict, for what is fresh.
        rule: ``resize``, or ``fresh``: positions and levels as initialized, also of models that rotate.

    Raises:
        UserError: no rule, or an unknown one.
    """
    if rule not in RULES:
        raise UserError(
            f"scales ({here.scales} here, {there.scales} there): say how positions become these, "
            f"init_scales: {' or '.join(RULES)}"
        )
    moved = dict(state)
    if rule == "fresh":
        moved |= {name: tensor for name, tensor in own.items() if name.startswith(POSITIONS)}
        return moved, f"scales {there} to {here}: positions and levels fresh"
    if TOKEN not in state:
        return moved, f"scales {there} to {here}: rotary positions made anew, levels by a scale's number as they were"
    maps = [part.unflatten(1, shape) for part, shape in zip(there.split(state[TOKEN]), there.shapes, strict=True)]
    nearest = [min(range(there.num_scales), key=lambda k: _ratio(there.shapes[k], shape)) for shape in here.shapes]
    tokens = [resized(maps[source], shape) for source, shape in zip(nearest, here.shapes, strict=True)]
    moved[TOKEN] = torch.cat([part.flatten(1, 2) for part in tokens], dim=1)
    sides = _sides(there)
    moved[LEVEL] = torch.stack([_level(state[LEVEL], sides, side) for side in _sides(here)])
    moved[START] = resized(state[START].unflatten(1, there.shapes[0]), here.shapes[0]).flatten(1, 2)
    return moved, f"scales {there} to {here}: positions and levels resized by the nearest side"


def resized(map_1ijC: Tensor, shape: tuple[int, int]) -> Tensor:
    """A map of positions (1, i, j, C) of another height and width, bicubic."""
    if tuple(map_1ijC.shape[1:3]) == shape:
        return map_1ijC
    image_1Cij = map_1ijC.permute(0, 3, 1, 2).float()
    made = F.interpolate(image_1Cij, size=shape, mode="bicubic", align_corners=False, antialias=True)
    return made.permute(0, 2, 3, 1).to(map_1ijC.dtype)


def _ratio(one: tuple[int, int], other: tuple[int, int]) -> float:
    """How far apart two maps are: the logarithms of the ratios of their heights and of their widths, added."""
    return sum(abs(math.log(a / b)) for a, b in zip(one, other, strict=True))


def _sides(pyramid: ScalePyramid) -> list[float]:
    """Of each map the side of a square of equal area; of squares exactly their own."""
    return [math.sqrt(height * width) for height, width in pyramid.shapes]


def _level(level_KC: Tensor, sides: list[float], side: float) -> Tensor:
    """The vector of a level of so many tokens a side."""
    smaller = [k for k, other in enumerate(sides) if other <= side]
    larger = [k for k, other in enumerate(sides) if other >= side]
    if not smaller or not larger:
        return level_KC[0 if not smaller else -1]
    low, high = smaller[-1], larger[0]
    if low == high:
        return level_KC[low]
    share = math.log(side / sides[low]) / math.log(sides[high] / sides[low])
    return torch.lerp(level_KC[low].float(), level_KC[high].float(), share).to(level_KC.dtype)
