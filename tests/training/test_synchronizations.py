"""No step of a training run reads a number back from its device, but where it logs: on a GPU each would wait.

Reading is counted as the operator that `.item()`, `int`, `float` and `bool` come to; the suite is told that its device
runs behind, as a GPU does.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from small_run import DEVICES, MODEL_SIZES, TOKENIZER_SIZES, data_module, trainer
from torch.utils._python_dispatch import TorchDispatchMode

from mvar_lightning import TokenizerModule, UserError, VARModule
from mvar_lightning.callbacks import EMA, GradientNorm, LastCheckpoint, NonFiniteLossGuard
from mvar_lightning.tokenizer.adversarial import AdversarialLoss
from mvar_lightning.tokenizer.discriminator import PatchDiscriminator


@pytest.fixture(autouse=True)
def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks, tokenizer = ("callbacks.last_checkpoint", "callbacks.monitors"), ("quantizer", "tokenizer")
    rooms = *callbacks, "training.manual_steps", "transformer.transformer", *(f"tokenizer.{name}" for name in tokenizer)
    for room in rooms:
        monkeypatch.setattr(f"mvar_lightning.{room}.runs_behind", lambda device: True)


class Reads(L.Callback):
    """Numbers read from float and integer tensors from each batch's start to the next one's, but for the first, which
    makes what is made once, and for the one that logs."""

    def __init__(self) -> None:
        self.of_step: list[list[str]] = []
        self.shown: list[dict[str, float]] = []
        self._counting = contextlib.ExitStack()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._counting.close()
        self.shown.append(trainer.progress_bar_metrics.copy())
        if not trainer.is_last_batch and batch_idx > 0 and (batch_idx + 1) % trainer.log_every_n_steps != 0:
            self.of_step.append([])
            counting = on_a_gpu if module.device.type == "cuda" else on_a_cpu
            self._counting.enter_context(counting(self.of_step[-1]))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._counting.close()


@contextlib.contextmanager
def on_a_cpu(found: list[str]) -> Iterator[None]:
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default:
                found.append(where())
            return func(*args, **(kwargs or {}))

    with Counting():
        yield


@contextlib.contextmanager
def on_a_gpu(found: list[str]) -> Iterator[None]:
    """torch warns of each wait."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [f"{each.filename}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]


def where() -> str:
    frames = traceback.extract_stack()[-12:-2]
    return "; ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)


def modules(tokenizer: Path) -> dict[str, L.LightningModule]:
    adversarial = AdversarialLoss(PatchDiscriminator(channels=8, layers=1, norm_groups=4), start=0)
    return {
        "VAR": VARModule(str(tokenizer), **MODEL_SIZES),
        "tokenizer": TokenizerModule(**TOKENIZER_SIZES, adversarial=adversarial, scale_dropout=0.0),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "bar"),
    [("VAR", RichProgressBar), ("VAR", TQDMProgressBar), ("VAR", None), ("tokenizer", RichProgressBar)],
)
def test_steps_between_logs_read_nothing(
    name: str, bar: Any, device: str, shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    reads, callbacks = Reads(), [EMA(), GradientNorm(), NonFiniteLossGuard(), LastCheckpoint()]
    settings: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 4, "enable_checkpointing": True}
    settings |= {"accelerator": device, "limit_train_batches": 6, "limit_val_batches": 0}
    settings |= {"enable_progress_bar": bar is not None, "precision": "bf16-mixed"}
    run = trainer(tmp_path, reads, *callbacks, *([] if bar is None else [bar()]), **settings)
    run.fit(modules(tokenizer)[name], datamodule=data_module(shards))
    assert reads.of_step == [[]] * 3, reads.of_step
    loss = "loss" if name == "VAR" else "train/loss"
    assert [loss in shown for shown in reads.shown] == [False] * 4 + [True] * 2, "shown from the step that logs on"


@pytest.mark.parametrize("name", ["VAR", "tokenizer"])
def test_a_loss_that_is_not_finite_still_ends_the_run_before_a_checkpoint(
    name: str, shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                part = module.tokenizer.decoder if name == "tokenizer" else module.model
                next(part.parameters()).data.fill_(torch.nan)

    keep = LastCheckpoint()
    settings: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 50, "enable_checkpointing": True}
    run = trainer(tmp_path, Spoil(), NonFiniteLossGuard(), keep, **settings)
    with pytest.raises(UserError, match="at step 1"):
        run.fit(modules(tokenizer)[name], datamodule=data_module(shards))
    assert not list(tmp_path.rglob("*.ckpt"))
