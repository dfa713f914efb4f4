"""Fits tokenizers on one or two processes and writes what came of it: run by `test_tokenizer_processes.py`.

python tokenizer_processes_run.py OUT.pt PROCESSES
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_run import TOKENIZER_SIZES, plain, trainer

from mvar_lightning import (
    AdversarialLoss,
    DataDependentInit,
    DeadCodeRestart,
    NonSaturatingLoss,
    PatchDiscriminator,
    TokenizerModule,
    UserError,
)
from mvar_lightning.tokenizer import CodebookRemedy

GLOBAL_BATCH, BATCHES = 8, 5


class Images(L.LightningDataModule):
    """Fixed images; of n processes each takes the n-th part of a batch: in the order of ranks they join to it."""

    def __init__(self, batch_size: int, bad: bool = False) -> None:
        super().__init__()
        self.batch_size, self.bad = batch_size, bad

    def train_dataloader(self) -> DataLoader[Any]:
        coarse = torch.rand(GLOBAL_BATCH * BATCHES, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
        images = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
        if self.bad:
            images[4 * GLOBAL_BATCH - 1] = torch.nan  # the fourth batch, on the last process
        parts = images.unflatten(0, (BATCHES, self.trainer.world_size, self.batch_size))
        own = parts[:, self.trainer.global_rank].flatten(0, 1)
        return DataLoader([{"image": image} for image in own], batch_size=self.batch_size)


class Losses(L.Callback):
    """Every logged number of the joined batch, batch by batch."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        self.values.append({n: float(trainer.strategy.reduce(v, reduce_op="mean")) for n, v in sorted(logged.items())})


def gan() -> AdversarialLoss:
    return AdversarialLoss(
        PatchDiscriminator(8, layers=2), loss=NonSaturatingLoss(1.0, 2), start=1, ramp=2, lecam=0.1, lecam_decay=0.5
    )


def remedies() -> list[CodebookRemedy]:
    return [DataDependentInit(), DeadCodeRestart(every=2, threshold=0.5, rows=64)]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gan": {"adversarial": gan},
    "accumulated gan": {"adversarial": gan, "accumulate_grad_batches": 2},
    "remedies": {"losses": lambda: None, "remedies": remedies},
    "remedies, dropout and gan": {
        "losses": lambda: None,
        "remedies": remedies,
        "adversarial": gan,
        "scales": [1, 2, 3, 4],
        "scale_dropout": 0.5,
        "accumulate_grad_batches": 2,
    },
}
"""What differs from the plain form; what is called makes objects of its own for each run."""


class PlainSteps(TokenizerModule):
    """Gradient descent. AdamW divides by the gradient's size: where that is rounding, so is the whole step."""

    def configure_optimizers(self) -> Any:
        made: Any = super().configure_optimizers()
        for each in made if isinstance(made, tuple) else [made]:
            groups = [{"params": group["params"]} for group in each["optimizer"].param_groups]
            each["optimizer"] = torch.optim.SGD(groups, lr=0.05)
            each["lr_scheduler"] = {"scheduler": torch.optim.lr_scheduler.ConstantLR(each["optimizer"], 1.0)}
        return made


def module(kind: type[TokenizerModule] = TokenizerModule, **changes: Any) -> TokenizerModule:
    L.seed_everything(0)
    made = {name: value() if callable(value) else value for name, value in changes.items()}
    return kind(**{**TOKENIZER_SIZES, **plain(), "lr": 3e-3, "gradient_clip_val": 0.5, **made})


def main(out: str, processes: int) -> None:
    settings: dict[str, Any] = {"devices": processes, "use_distributed_sampler": False, "max_epochs": 1}
    strategy = partial(DDPStrategy, gradient_as_bucket_view=True) if processes > 1 else lambda: "auto"
    result: dict[str, Any] = {}
    for name, changes in CASES.items():
        for kind in (TokenizerModule, PlainSteps):
            fitted, losses = module(kind, **changes), Losses()
            run = trainer(Path(out).parent, losses, strategy=strategy(), **settings)
            run.fit(fitted, datamodule=Images(GLOBAL_BATCH // processes))
            state = {key: value.clone() for key, value in fitted.state_dict().items()}
            result[f"{name}, {kind.__name__}"] = {"losses": losses.values, "steps": run.global_step, "state": state}
    try:
        trainer(Path(out).parent, strategy=strategy(), **settings).fit(
            module(adversarial=gan), datamodule=Images(GLOBAL_BATCH // processes, bad=True)
        )
    except UserError as error:
        result["stopped"] = str(error)
    Path(f"{out}.{run.global_rank}.txt").write_text(result["stopped"])
    if run.is_global_zero:
        torch.save(result, out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
