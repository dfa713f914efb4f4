"""The worked example of adding_a_selector.md: a selector that lives outside of the package."""

from __future__ import annotations

from torch import Tensor

from mvar_lightning import Selector
from mvar_lightning.sampling import Drawn


class MostVaried(Selector):
    """The map that repeats the fewest codes."""

    def scores(self, drawn: Drawn) -> Tensor:
        sorted_BMl = drawn.idx_BMl.sort(dim=-1).values
        return (sorted_BMl[..., 1:] != sorted_BMl[..., :-1]).sum(dim=-1).float()
