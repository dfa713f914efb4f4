"""Averaged weights for validation and sampling: Lightning's weight averaging, made exact for our modules."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mvar_lightning.errors import UserError


class _TrainedAverage(AveragedModel):
    """An average over what is trained; everything else is copied.

    ``AveragedModel`` averages all there is. Of a frozen tensor that is only nearly the tensor itself, which would
    give the tokenizer another hash, and integer buffers are truncated (a 7 becomes a 6).
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool, device: torch.device | None) -> None:
        super().__init__(model, device=device)
        self.decay = decay
        self.warmup = warmup
        # a plain number: reading ``n_averaged`` off a GPU would wait for it at every step
        self.updates = 0

    def current_decay(self) -> float:
        """Rises with the number of updates, so that a short run is not averaged with its random start."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """One step of the average; what is not trained waits for ``copy_untrained``."""
        pairs = [(average, current) for average, current in self._pairs(model) if _is_trained(current)]
        averages = [average for average, _ in pairs]
        currents = [current.to(average.device) for average, current in pairs]
        torch._foreach_lerp_(averages, currents, 1 - self.current_decay())
        self.updates += 1

    @torch.no_grad()
    def copy_all(self, model: nn.Module) -> None:
        """Become the model, before averaging starts."""
        for average, current in self._pairs(model):
            average.copy_(current)

    @torch.no_grad()
    def copy_untrained(self, model: nn.Module) -> None:
        """Take over frozen parameters and buffers as they are."""
        for average, current in self._pairs(model):
            if not _is_trained(current):
                average.copy_(current)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        ours = [*self.module.parameters(), *self.module.buffers()]
        theirs = [*model.parameters(), *model.buffers()]
        return list(zip(ours, theirs, strict=True))


def _is_trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


class EMA(WeightAveraging):
    """Exponential moving average of the trained weights; validation, pictures and the final model use it.

    Differs from Lightning's ``EMAWeightAveraging`` in that
    - frozen parameters and all buffers are copied, bit by bit, instead of averaged;
    - the decay can rise from 0.1 to its value as (1 + n) / (10 + n) after n updates;
    - before ``start_step`` the average follows the weights instead of staying at their random start;
    - the averaged weights stay in place to the end of validation, so that callbacks see them in
      ``on_validation_epoch_end`` whatever their place in the list;
    - a checkpoint written while they are in place, or after training, still keeps both sets of weights;
    - the average lives on the device of the model (Lightning makes it before the model gets there).

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
        super().__init__(device=device)
        self.decay = decay
        self.warmup = warmup
        self.start_step = start_step
        self._in_place = False
        self._restore_after_validation = False

    @property
    def average(self) -> _TrainedAverage:
        assert isinstance(self._average_model, _TrainedAverage), "used before fit"
        return self._average_model

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            device = torch.device(self._device) if self._device is not None else None
            self._average_model = _TrainedAverage(pl_module, self.decay, self.warmup, device)
            self._in_place = self._restore_after_validation = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._device is None:
            self.average.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step <= self._latest_update_step:
            return
        if trainer.global_step <= self.start_step:
            self.average.copy_all(pl_module)
        else:
            self.average.update_parameters(pl_module)
        self._latest_update_step = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Steps count, epochs do not."""

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average_model is not None and not self._in_place:
            self._swap(pl_module)
            self._restore_after_validation = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not yet: later callbacks draw samples in this hook."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._restore_after_validation:
            self._swap(pl_module)
            self._restore_after_validation = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._in_place:
            self._swap(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where there was nothing left to train: a run resumed at its end has no ``on_train_end``."""
        self.on_train_end(trainer, pl_module)

    def _swap(self, pl_module: pl.LightningModule) -> None:
        if not self._in_place:
            self.average.copy_untrained(pl_module)
        self._swap_models(pl_module)
        self._in_place = not self._in_place

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """``state_dict`` gets the averaged weights, ``current_model_state`` those that training goes on from."""
        if self._average_model is None:
            return
        if not self._in_place:
            self.average.copy_untrained(pl_module)
        other = self.average.module.state_dict()
        if self._in_place:
            checkpoint["current_model_state"] = other
        else:
            checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], other
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.average.updates)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Both sets of weights come back; a checkpoint without averages starts them at its weights."""
        if self._average_model is None:
            return
        strict = pl_module.strict_loading
        self.average.module.load_state_dict(checkpoint["state_dict"], strict=strict)
        if "current_model_state" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=strict)
            self.average.updates = int(checkpoint["averaging_state"]["n_averaged"])
