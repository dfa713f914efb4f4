"""Two short runs of the whole way, tokenizer and transformer, as `python -m benchmarks gpu` takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from mvar_lightning import ShardsDataModule, save
from mvar_lightning.callbacks import EMA
from mvar_lightning.data.making.embedded import digits
from mvar_lightning.data.making.shards import ShardLimits, ShardsRequest, make_shards
from mvar_lightning.data.making.sources import Source
from mvar_lightning.tokenizer.adversarial import AdversarialLoss
from mvar_lightning.tokenizer.discriminator import PatchDiscriminator
from mvar_lightning.training.next_scale import VARModule
from mvar_lightning.training.tokenizer import TokenizerModule

SIZES: dict[str, Any] = {"channels": 16, "channel_multipliers": [1, 1, 2], "num_res_blocks": 1, "norm_groups": 4}


class Losses(L.Callback):
    """Every step's loss, read at the end."""

    def __init__(self) -> None:
        self.each: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.each.append(loss.detach().clone())

    def read(self) -> list[float]:
        return [float(loss) for loss in self.each]


def fit_digits(folder: Path, device: torch.device, small: bool) -> Iterator[tuple[str, list[float]]]:
    """Losses of a tokenizer's run and of a transformer's, which is cut in two and taken up again, as they come."""
    whole, steps, batch = digits(), 2 if small else 60, 4 if small else 16
    few = Source(whole.class_names, whole.train[: 4 * batch if small else 1024], whole.val[:batch])
    make_shards(ShardsRequest(few, folder / "shards", ShardLimits(samples=64)))

    def data() -> ShardsDataModule:
        settings: dict[str, Any] = {"image_size": 16, "batch_size": batch, "num_workers": 0, "resize_ratio": 1.125}
        return ShardsDataModule(str(folder / "shards"), **settings)

    def trainer(count: int, *callbacks: L.Callback, checkpoints: bool = False) -> L.Trainer:
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return L.Trainer(
            default_root_dir=folder,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            max_steps=count,
            num_sanity_val_steps=0,
            enable_checkpointing=checkpoints,
            callbacks=list(callbacks),
            **quiet,
        )

    L.seed_everything(0, verbose=False)
    of_tokenizer = Losses()
    adversarial = AdversarialLoss(PatchDiscriminator(channels=8, layers=1, norm_groups=4), start=0)
    tokenizer = TokenizerModule([1, 2, 4], vocab_size=64, code_dim=8, **SIZES, adversarial=adversarial)
    trainer(steps, of_tokenizer).fit(tokenizer, datamodule=data())
    yield "tokenizer with a discriminator", of_tokenizer.read()
    save(folder / "tokenizer", None, tokenizer.tokenizer)

    of_model, checkpoint = Losses(), folder / "half.ckpt"
    for what, count, resume in (("VAR", steps - 1, None), ("VAR, resumed", 2 * steps, str(checkpoint))):
        module = VARModule(
            str(folder / "tokenizer"), num_classes=10, depth=2, base_lr=1e-2, compile_blocks=device.type == "cuda"
        )
        fitted = trainer(count, of_model, EMA(decay=0.9))
        fitted.fit(module, datamodule=data(), ckpt_path=resume, weights_only=True)
        fitted.save_checkpoint(checkpoint)
        yield what, of_model.read()
