"""What autograd keeps for the backward pass, in bytes.

L tokens of the pyramid, l tokens of some scales, Z code dim, C width.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor, nn

from mvar_lightning.transformer import NextScaleTransformer

MEASURED_TOKENS = 64
"""At least so many tokens of one image, if there are as many, stand for all."""


class KeptForBackward:
    """Bytes that autograd keeps for the backward pass while this context lasts, weights left out: now, and the peak."""

    def __init__(self, model: nn.Module) -> None:
        self.now = self.peak = 0
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._holders: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> KeptForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._weights:
            self._holders[place] = self._holders.get(place, 0) + 1
            if self._holders[place] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(kept, self._drop, place, size)
        return kept

    def _unpack(self, kept: _Kept) -> Tensor:
        return kept.tensor

    def _drop(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        self.now -= size if self._holders[place] == 0 else 0


class _Kept:
    """A tensor in the graph; it goes when the graph lets it go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_of_token(model: NextScaleTransformer) -> float:
    """Bytes kept by all blocks for one token of one image, in the precision and mode of the moment.

    Measured on the first scales of one image: what is kept grows with the tokens. What the scales share (embeddings,
    history, modulations) is left out, as no grouping spares it. Draws no random numbers, leaves no gradients.
    """
    pyramid, device = model.pyramid, next(model.parameters()).device
    enough = min(MEASURED_TOKENS, pyramid.num_tokens)
    scales = range(next(count for count, tokens in enumerate(pyramid.offsets) if tokens >= enough))
    x_1LZ = torch.zeros(1, pyramid.num_tokens - pyramid.first_tokens, model.code_dim, device=device)
    label_1 = torch.zeros(1, dtype=torch.int64, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        inputs = model.inputs(x_1LZ, label_1)
        x_1lC = inputs.x_BlC[:, pyramid.span(scales)].clone()  # a view would keep the whole
        with KeptForBackward(model) as kept:
            model.features(replace(inputs, x_BlC=x_1lC), scales)
    return kept.peak / x_1lC.shape[1]
