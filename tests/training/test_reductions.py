"""Gradients travel between processes once a step: not for each accumulated batch, backward pass or loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from small_run import MODEL_SIZES, TOKENIZER_SIZES, data_module, plain, trainer

from mvar_lightning import AdversarialLoss, MarkovVARModule, PatchDiscriminator, TokenizerModule, VARModule
from tests.faults.harness import call, start_ranks

BATCHES, ACCUMULATED = 5, 2
STEPS = 3  # the last of one batch


def modules(tokenizer: str) -> dict[str, tuple[L.LightningModule, int]]:
    """Each with what its trainer accumulates."""
    adversarial = AdversarialLoss(PatchDiscriminator(channels=8, layers=1, norm_groups=4), start=0)
    settings: dict[str, Any] = {**plain(), "adversarial": adversarial, "accumulate_grad_batches": ACCUMULATED}
    groups: Any = [[0], [1], [2]]
    return {
        "whole": (VARModule(tokenizer, **MODEL_SIZES), ACCUMULATED),
        "groups": (MarkovVARModule(tokenizer, **MODEL_SIZES, scale_groups=groups), ACCUMULATED),
        "two losses": (TokenizerModule(**TOKENIZER_SIZES, **settings), 1),
    }


class Counted(L.Callback):
    """The buckets of gradients that DDP reduces."""

    def __init__(self) -> None:
        self.buckets: list[int] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        replicas: Any = trainer.strategy.model
        replicas.register_comm_hook(self.buckets, reduce)  # Lightning's own argument is for GPUs


def reduce(buckets, bucket):  # without types: torch compares them, and these would be their names
    buckets.append(bucket.index())
    work: Any = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def on_a_rank(tokenizer: str, shards: str, folder: str) -> None:
    for name, (module, accumulated) in modules(tokenizer).items():
        counted, strategy = Counted(), DDPStrategy(gradient_as_bucket_view=True)
        settings: dict[str, Any] = {"devices": 2, "strategy": strategy, "max_epochs": 1, "limit_val_batches": 0}
        settings |= {"accumulate_grad_batches": accumulated, "limit_train_batches": BATCHES}
        run = trainer(Path(folder), counted, **settings)
        run.fit(module, datamodule=data_module(Path(shards), batch_size=8))
        print(name, run.global_step, len(counted.buckets), len(set(counted.buckets)), flush=True)


def test_gradients_are_reduced_once_a_step(tokenizer: Path, shards: Path, tmp_path: Path) -> None:
    for process in start_ranks(2, code=call(on_a_rank, str(tokenizer), str(shards), str(tmp_path)), seconds=120):
        answer = process.finish()
        assert answer.status == 0, answer.err[-3000:]
        told = [line.rsplit(maxsplit=3) for line in answer.out.splitlines()]
        for name in ("whole", "groups", "two losses"):
            steps, reduced, buckets = next(map(int, numbers) for first, *numbers in told if first == name)
            assert (steps, reduced) == (STEPS, STEPS * buckets) and buckets > 0, (name, answer.out)
