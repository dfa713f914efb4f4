"""Fits two steps and writes what came of them: run by `test_two_processes.py`, once for each number of processes.

python two_process_run.py TOKENIZER OUT.pt PROCESSES
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_run import MODEL_SIZES, trainer

from mvar_lightning import MarkovVARModule

GLOBAL_BATCH, STEPS = 16, 2


class Images(L.LightningDataModule):
    """Fixed images; of n processes each takes every n-th, so that n small batches join to the same large one."""

    image_size = 16

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(5)
        images = torch.rand(GLOBAL_BATCH * STEPS, 3, 16, 16, generator=generator) * 2 - 1
        samples = [{"image": image, "label": torch.tensor(n % 10)} for n, image in enumerate(images)]
        own = samples[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(own, batch_size=self.batch_size)


class Losses(L.Callback):
    """The loss of the joined batch, step by step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(trainer.strategy.reduce(outputs["loss"], reduce_op="mean")))


def main(tokenizer: str, out: str, processes: int) -> None:
    L.seed_everything(0)
    module = MarkovVARModule(tokenizer, **MODEL_SIZES, base_lr=0.01, drop_path=0.0, label_drop=0.0)
    losses = Losses()
    strategy = "ddp" if processes > 1 else "auto"
    run = trainer(
        Path(out).parent, losses, max_epochs=1, devices=processes, strategy=strategy, use_distributed_sampler=False
    )
    run.fit(module, datamodule=Images(GLOBAL_BATCH // processes))
    if run.is_global_zero:
        lr = run.optimizers[0].param_groups[0]["initial_lr"]
        result = {"losses": losses.values, "lr": lr, "steps": run.global_step, "state": module.model.state_dict()}
        torch.save(result, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
