"""A network that is used in training but neither trained nor saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Frozen(Generic[M]):
    """Holds such a network outside of the module tree, and loads it when it is first asked for.

    A submodule would be in every checkpoint, in the averaged copy of the weights (EMA), in DDP's broadcasts and on the
    meta device where recipes are only checked. Deep copies share the network.

    Args:
        load: makes the network, on the CPU.
    """

    def __init__(self, load: Callable[[], M]) -> None:
        self._load = load
        self._network: M | None = None
        self._device = torch.device("cpu")

    def on(self, device: torch.device) -> M:
        """The network on a device: in evaluation mode, without gradients of its own (they pass through it)."""
        # validation may be the first to ask: tensors made in inference mode could not be trained through
        with torch.inference_mode(False), torch.no_grad():
            if self._network is None:
                self._network = self._load().eval()
                for parameter in self._network.parameters():  # TorchScript has no requires_grad_ of its own
                    parameter.requires_grad_(False)
            if device != self._device:
                self._network, self._device = self._network.to(device), device
        return self._network

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen[M]:
        return self
