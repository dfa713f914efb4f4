"""Trains and measures on one or two processes, and writes what came of it: run by `test_two_processes.py`.

python two_process_run.py TOKENIZER SHARDS OUT.pt one|ddp|sharded [groups]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_run import MODEL_SIZES, TOKENIZER_SIZES, data_module, plain, trainer

from mvar_lightning import MarkovVARModule, TokenizerModule, load, save
from mvar_lightning.callbacks import EMA, GradientNorm, ReconstructionMetrics, SampleMetrics
from mvar_lightning.metrics.features import FeatureExtractor
from mvar_lightning.training import FullySharded
from mvar_lightning.training.distributed import gathered

GLOBAL_BATCH, ACCUMULATED, STEPS, EPOCHS = 8, 2, 2, 2
BATCHES = 3  # so that the last step of an epoch has one


class Images(L.LightningDataModule):
    """Fixed images; of n processes each takes every n-th, so that n small batches join to the same large one.

    Validates on the shards' own stream, in batches of seven.
    """

    image_size, num_classes = 16, 10

    def __init__(self, batch_size: int, shards: Path) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.path = str(shards)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(5)
        images = torch.rand(GLOBAL_BATCH * BATCHES, 3, 16, 16, generator=generator) * 2 - 1
        samples = [{"image": image, "label": torch.tensor(n % 10)} for n, image in enumerate(images)]
        own = samples[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(own, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return data_module(Path(self.path), batch_size=7).val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        return {}


class Pixels(FeatureExtractor):
    """Mean colors of four quarters."""

    def __init__(self) -> None:
        super().__init__("pixels", 12)

    def extract(self, image_B3HW: Tensor) -> Tensor:
        return adaptive_avg_pool2d(image_B3HW, 2)


class Losses(L.Callback):
    """The loss of the joined batch, batch by batch, and the norm of each step's gradient before clipping."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(trainer.strategy.reduce(outputs["loss"], reduce_op="mean")))
        self.norms.append(float(trainer.callback_metrics.get("train/gradient_norm", 0.0)))


def numbers(run: L.Trainer) -> dict[str, float]:
    """What validation has logged; the floor's images are drawn by each rank from its own."""
    kept = {name: float(value) for name, value in run.callback_metrics.items() if "floor" not in name}
    kept.pop("loss", None)  # the bar's: rank zero's own batch
    return {name: value for name, value in kept.items() if not name.startswith("train/")}


def main(tokenizer: str, shards: str, out: str, kind: str, grouped: str = "") -> None:
    processes = 1 if kind == "one" else 2
    in_buckets = DDPStrategy(gradient_as_bucket_view=True)  # as a run of a recipe has it
    strategy: Any = {"one": "auto", "ddp": in_buckets, "sharded": FullySharded()}[kind]
    settings = {"devices": processes, "use_distributed_sampler": False, "max_epochs": EPOCHS, "log_every_n_steps": 1}
    settings |= {"accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": 0.3}
    data, losses = Images(GLOBAL_BATCH // processes, Path(shards)), Losses()
    measures = SampleMetrics(Pixels(), consistency=False, num_images=7, batch_size=3)

    def module() -> MarkovVARModule:
        L.seed_everything(0)
        chance = {"drop_path": 0.0, "label_drop": 0.0}
        groups: Any = [["0..1"], [2]] if grouped else None
        return MarkovVARModule(
            tokenizer, **MODEL_SIZES, **chance, base_lr=0.01, checkpoint_activations=True, scale_groups=groups
        )

    first, model = (
        trainer(Path(out).parent, losses, EMA(0.5), GradientNorm(), measures, strategy=strategy, **settings),
        module(),
    )
    first.fit(model, datamodule=data)
    result: dict[str, Any] = {"losses": losses.values, "norms": losses.norms, "sampled": numbers(first)}
    result["lr"], result["steps"] = first.optimizers[0].param_groups[0]["initial_lr"], first.global_step
    whole = gathered(model.model)
    if first.is_global_zero:
        save(Path(out).with_suffix(""), whole, model.tokenizer)
        result["state"] = load(Path(out).with_suffix(""))[0].state_dict()  # type: ignore[union-attr]

    tokenizer_run = trainer(
        Path(out).parent,
        ReconstructionMetrics(Pixels(), consistency=False, num_images=7),
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
    )
    L.seed_everything(1)
    tokenizer_run.validate(TokenizerModule(**TOKENIZER_SIZES, **plain()), datamodule=data, verbose=False)
    result["reconstructed"] = numbers(tokenizer_run)
    if first.is_global_zero:
        torch.save(result, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
