"""Averaged weights for validation, sampling and the final model; also where the parameters are sharded."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mvar_lightning.compat import lerp_each
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer.codebook import take_replaced_codes
from mvar_lightning.training.distributed import load_whole, local, whole


class EMA(pl.Callback):
    """Exponential moving average of the trained weights; validation, pictures and the final model use it.

    Differs from Lightning's ``EMAWeightAveraging`` in that
    - only trained parameters are averaged: frozen ones and all buffers are the module's own, bit by bit;
    - the decay can rise from 0.1 to its value as (1 + n) / (10 + n) after n updates;
    - before ``start_step`` the average follows the weights instead of staying at their random start;
    - the averaged weights stay in place to the end of validation, so that callbacks see them in
      ``on_validation_epoch_end`` whatever their place in the list;
    - a checkpoint written while they are in place, or after training, still keeps both sets of weights;
    - codes that a remedy replaced (`CodebookRemedy`) are taken over as they are;
    - of sharded parameters (`FullySharded`) each process averages its part.

    Args:
        decay: of the average at each optimizer step.
        warmup: let the decay rise.
        start_step: optimizer steps before averaging starts.
        device: where the average is kept, ``cpu`` to save GPU memory; the model's device if not given.
    """

    def __init__(
        self, decay: float = 0.999, warmup: bool = True, start_step: int = 0, device: str | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA decay {decay}: must be in [0, 1); usual values are 0.99 to 0.9999")
        super().__init__()
        self.decay = decay
        self.warmup = warmup
        self.start_step = start_step
        self.device = torch.device(device) if device is not None else None
        self.updates = 0
        self._latest_step = 0
        self._parked: dict[str, Tensor] | None = None  # the average; the raw weights while the average is in place
        self._in_place = False
        self._restore_after_validation = False

    def current_decay(self) -> float:
        """Rises with the number of updates, so that a short run is not averaged with its random start."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    @property
    def _weights(self) -> dict[str, Tensor]:
        assert self._parked is not None, "used before fit"
        return self._parked

    def _pairs(self, module: nn.Module) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Name, parameter and parked weights of all that is averaged."""
        parameters = dict(module.named_parameters())
        return [(name, parameters[name], parked) for name, parked in self._weights.items()]

    # -- the average's life

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._parked, self.updates, self._latest_step = None, 0, 0
            self._in_place = self._restore_after_validation = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # a resumed run may have its average already; where parameters are sharded, checkpoints are read after this hook
        if self._parked is None:
            self._begin(pl_module)
        for name, parameter, parked in self._pairs(pl_module):
            self._weights[name] = parked.to(self.device or parameter.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step <= self._latest_step:  # gradients are being accumulated: no step was taken
            return
        self._latest_step = trainer.global_step
        if trainer.global_step <= self.start_step:
            self._begin(pl_module)
        else:
            self._update(pl_module)

    def _begin(self, pl_module: pl.LightningModule) -> None:
        """Start at the weights as they are."""
        trained = ((name, p) for name, p in pl_module.named_parameters() if p.requires_grad)
        self._parked = {name: local(p).clone().to(self.device or p.device) for name, p in trained}

    @torch.no_grad()
    def _update(self, pl_module: pl.LightningModule) -> None:
        pairs = [(parked, local(parameter).to(parked.device)) for _, parameter, parked in self._pairs(pl_module)]
        averages, currents = zip(*pairs, strict=True)
        lerp_each(averages, currents, 1 - self.current_decay())
        self.updates += 1
        for name, codes in take_replaced_codes(pl_module):  # they have no past to average with
            self._weights[name][codes] = pl_module.get_parameter(name)[codes].to(self._weights[name].device)

    # -- in place of the weights, and back

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._parked is not None and not self._in_place:
            self._swap(pl_module)
            self._restore_after_validation = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not at the epoch's end: later callbacks draw samples in that hook
        if self._restore_after_validation:
            self._swap(pl_module)
            self._restore_after_validation = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._in_place:
            self._swap(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where there was nothing left to train: a run resumed at its end has no ``on_train_end``."""
        self.on_train_end(trainer, pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: pl.LightningModule) -> None:
        for _, parameter, parked in self._pairs(pl_module):
            # copies: once training is over the strategy may have taken the module to another device
            current = local(parameter)
            taken = current.clone()
            current.copy_(parked)
            parked.copy_(taken)
        self._in_place = not self._in_place

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest_step = state_dict["latest_update_step"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """``state_dict`` gets the averaged weights, ``current_model_state`` those that training goes on from."""
        if self._parked is None:
            return
        module_state = checkpoint["state_dict"]
        parked = {name: whole(weight, like=parameter) for name, parameter, weight in self._pairs(pl_module)}
        # where parameters are sharded, all ranks gather and rank zero alone has a state dict
        other = {name: parked.get(name, tensor) for name, tensor in module_state.items()}
        if self._in_place:
            checkpoint["current_model_state"] = other
        else:
            checkpoint["state_dict"], checkpoint["current_model_state"] = other, module_state
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.updates)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Both sets of weights come back; a checkpoint without averages starts them at its weights."""
        if trainer.state.fn != "fit":
            return
        self._begin(pl_module)  # by now the module has ``state_dict``, the averaged weights
        if "current_model_state" in checkpoint:
            for name, parameter, _ in self._pairs(pl_module):
                load_whole(parameter, checkpoint["current_model_state"][name])
            self.updates = int(checkpoint["averaging_state"]["n_averaged"])
