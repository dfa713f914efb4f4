"""Masked refinement inside a scale: a head that draws some of a map's tokens anew, knowing the others (HMAR, arXiv
2506.04421; written from its description alone).

    W area-down(f_hat before the scale) + W area-down(phi(up(codes of the scale))) + bias, positions, level
      masked places of the second term are a learnt vector
    --first blocks of the model, frozen--> --copies of its last blocks, trained--> --copy of its head--> logits

Attention stays inside the scale. What differs: codes of masked places are left out before the map is enlarged, or
their neighbors would tell them; and the first term is the model's own input, so that any history is a part of it.

B images, l tokens of one scale, C width, Z code dim, V vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.errors import UserError
from mvar_lightning.tools.compute import exact_float32
from mvar_lightning.transformer.blocks import AdaLNBlock
from mvar_lightning.transformer.transformer import NextScaleTransformer, _to_compute_dtype

COPIED = 8
"""Blocks that are copied, as published."""


@dataclass(frozen=True)
class Conditions:
    """What blocks and head read of the class."""

    modulations: list[Tensor]
    head_modulation: Tensor


class Refinement(nn.Module):
    """Copies of a model's last blocks and head, and what stands for a masked token.

    The model itself is no part of it: it is given with each call, and its first blocks are run as they are.

    Args:
        model: whose weights are copied.
        blocks: so many of its last; 8, or all that it has, if not given.

    Raises:
        UserError: more blocks than the model has, or one with quantized weights.

    Attributes:
        sizes: of the model, by what they are called.
        beside: hash of the weights it was trained beside, and their tokenizer's; None where it was not loaded.
        known: models that it certainly belongs to, also once they are quantized or rounded.
    """

    def __init__(self, model: NextScaleTransformer, blocks: int | None = None) -> None:
        super().__init__()
        blocks = min(COPIED, model.depth) if blocks is None else blocks
        if not 1 <= blocks <= model.depth:
            raise UserError(f"refined_blocks {blocks}: the model has {model.depth}; copy 1 to {model.depth} of them")
        if model.quantized is not None:
            raise UserError(f"refinement: the model is in {model.quantized}; take the weights it was made of")
        self.blocks = nn.ModuleList(deepcopy(block) for block in model.blocks[model.depth - blocks :])
        self.head = deepcopy(model.head)
        self.mask = nn.Parameter(torch.zeros(model.width))
        self.requires_grad_(True)  # also where the model is frozen already
        self.sizes = sizes_of(model)
        self.beside: tuple[str, str] | None = None
        self.known = [ref(model)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "known": []}  # a copy's model may be a copy, too, and no such reference is pickled

    @property
    def config(self) -> dict[str, Any]:
        """Plain values that say, beside the model, what its parts are."""
        return {"blocks": len(self.blocks)}

    def no_weight_decay(self) -> set[str]:
        return {"mask"}

    def conditions(self, model: NextScaleTransformer, label_B: Tensor) -> Conditions:
        """Of these classes, for all scales."""
        class_BC = model.class_embedding(label_B)
        condition = model.condition(class_BC)
        modulations = [_to_compute_dtype(block.modulation(condition)) for block in self._run(model)]
        return Conditions(modulations, self.head.modulation(class_BC))

    def forward(
        self,
        model: NextScaleTransformer,
        conditions: Conditions,
        scale: int,
        x_BlC: Tensor,
        codes_BlZ: Tensor,
        masked_Bl: Tensor,
    ) -> Tensor:
        """Logits (B, l, V), float32.

        Args:
            x_BlC: the model's own input of the scale (`NextScaleTransformer.step_input`).
            codes_BlZ: map of the codes that are known, averaged down (`MultiScaleQuantizer.next_input`), float32.
            masked_Bl: the places to be told.
        """
        with exact_float32(x_BlC.device):  # as the model's own inputs
            known_BlC = F.linear(codes_BlZ.to(model.word_embedding.weight.dtype), model.word_embedding.weight)
            h_BlC = x_BlC + torch.where(masked_Bl[..., None], self.mask.to(known_BlC.dtype), known_BlC)
        h_BlC = _to_compute_dtype(h_BlC)
        model.backend.prepare(h_BlC.device)
        for block, modulation in zip(self._run(model), conditions.modulations, strict=True):
            # without a cache a scale reads itself alone, whatever else the strategy would let it see
            h_BlC = block(h_BlC, modulation, range(scale, scale + 1))
        return self.head.classify(self.head.features(h_BlC, conditions.head_modulation))

    def _run(self, model: NextScaleTransformer) -> list[AdaLNBlock]:
        shared = list(model.blocks)[: model.depth - len(self.blocks)]
        return cast(list[AdaLNBlock], [*shared, *self.blocks])


def sizes_of(model: NextScaleTransformer) -> dict[str, object]:
    """What a refinement's model has to have as well."""
    return {"scales": model.pyramid, **{name: getattr(model, name) for name in ("vocab_size", "width", "heads")}}
