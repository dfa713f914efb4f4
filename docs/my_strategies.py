"""The worked example of adding_a_strategy.md: a strategy that lives outside of the package."""

from __future__ import annotations

from mvar_lightning import AttentionStrategy, ScalePyramid, UserError


class CoarseFullAttention(AttentionStrategy):
    """Full attention among the first ``until`` scales, where it is cheap; every later scale sees itself alone."""

    def __init__(self, until: int = 4) -> None:
        if until < 1:
            raise UserError(f"CoarseFullAttention: until={until}; the number of scales must be at least 1")
        self.until = until

    def first_key_scale(self, scale: int, pyramid: ScalePyramid) -> int:
        return 0 if scale < self.until else scale
