"""Fits tokenizers on one or two processes and writes what came of it: run by `test_tokenizer_processes.py`.

python tokenizer_processes_run.py OUT.pt PROCESSES
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_run import TOKENIZER_SIZES, trainer

from mvar_lightning import AdversarialLoss, NonSaturatingLoss, PatchDiscriminator, TokenizerModule, UserError

GLOBAL_BATCH, BATCHES = 8, 5


class Images(L.LightningDataModule):
    """Fixed images; of n processes each takes every n-th, so that n small batches join to the same large one."""

    def __init__(self, batch_size: int, bad: bool = False) -> None:
        super().__init__()
        self.batch_size, self.bad = batch_size, bad

    def train_dataloader(self) -> DataLoader[Any]:
        coarse = torch.rand(GLOBAL_BATCH * BATCHES, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
        images = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
        if self.bad:
            images[3 * GLOBAL_BATCH + 1] = torch.nan  # the fourth batch, on the last process
        own = [{"image": image} for image in images][self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(own, batch_size=self.batch_size)


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


def module(adversarial: bool, accumulate: int) -> TokenizerModule:
    L.seed_everything(0)
    return TokenizerModule(
        **TOKENIZER_SIZES,
        lr=3e-3,
        adversarial=gan() if adversarial else None,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
    )


def main(out: str, processes: int) -> None:
    settings: dict[str, Any] = {"devices": processes, "use_distributed_sampler": False, "max_epochs": 1}
    settings["strategy"] = "ddp" if processes > 1 else "auto"
    result: dict[str, Any] = {}
    for name, adversarial, accumulate in (("plain", False, 1), ("gan", True, 1), ("accumulated gan", True, 2)):
        fitted, losses = module(adversarial, accumulate), Losses()
        run = trainer(Path(out).parent, losses, **settings)
        run.fit(fitted, datamodule=Images(GLOBAL_BATCH // processes))
        result[name] = {"losses": losses.values, "steps": run.global_step, "state": fitted.state_dict()}
    try:
        trainer(Path(out).parent, **settings).fit(
            module(True, 1), datamodule=Images(GLOBAL_BATCH // processes, bad=True)
        )
    except UserError as error:
        result["stopped"] = str(error)
    Path(f"{out}.{run.global_rank}.txt").write_text(result["stopped"])
    if run.is_global_zero:
        torch.save(result, out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
