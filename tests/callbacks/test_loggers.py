"""Loggers: pictures and the report go to each that takes them, best checkpoints stay, missing packages are one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from faults.small_models import small_model, small_tokenizer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from mvar_lightning import UserError, VARModule
from mvar_lightning.callbacks import LastCheckpoint, ScaleCharts
from mvar_lightning.callbacks.base import publish
from mvar_lightning.callbacks.best import BestCheckpoints
from mvar_lightning.callbacks.loggers import log_report
from mvar_lightning.checkpoints import save
from mvar_lightning.checkpoints.folder import open_checkpoint
from mvar_lightning.cli import main

IMAGES, LABELS = torch.rand(6, 3, 6, 6) * 2 - 1, torch.arange(6) % 3


class Weights:
    """What Lightning's WandbLogger offers for pictures."""

    def __init__(self) -> None:
        self.pictures: list[Any] = []

    def log_image(self, key: str, images: list[Any]) -> None:
        self.pictures.append((key, images))


class MLFlowLogger:
    run_id = "r"

    def __init__(self) -> None:
        self.logged: list[Any] = []
        self.experiment = SimpleNamespace(log_image=lambda *given: self.logged.append(given))


def test_a_picture_goes_to_each_logger_as_it_takes_it(tmp_path: Path) -> None:
    board, csv = TensorBoardLogger(tmp_path, "board", ""), CSVLogger(tmp_path, "csv", "")
    weights, flow = Weights(), MLFlowLogger()
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        loggers=[board, csv, weights, flow],
        global_step=7,
        default_root_dir=tmp_path,
        fast_dev_run=0,
    )
    picture = torch.linspace(0, 1, 3 * 4 * 5).view(3, 4, 5)
    publish(trainer, picture, "pictures/samples", "samples.png")
    board.experiment.flush()
    assert EventAccumulator(str(tmp_path / "board")).Reload().Tags()["images"] == ["pictures/samples"]
    (tag, (pixels,)), (run, same, name) = weights.pictures[0], flow.logged[0]
    assert tag == "pictures/samples" and (run, name) == ("r", "pictures_samples/00000007.png")
    assert pixels.shape == (4, 5, 3) and pixels.dtype == "uint8" and (pixels == same).all()
    assert pixels[0, 0, 0] == 0 and pixels[3, 4, 2] == 255 and (tmp_path / "samples.png").is_file()


def module(tmp_path: Path) -> VARModule:
    save(tmp_path / "start", small_model(), small_tokenizer())
    return VARModule.load_from_checkpoint(tmp_path / "start", base_lr=0.5)


def fit(tmp_path: Path, keeps: LastCheckpoint, epochs: int, resume: Path | None = None, **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=tmp_path / "run", callbacks=[keeps, ScaleCharts()],
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    data = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3)
    trainer.fit(module(tmp_path), data, data, ckpt_path=resume, weights_only=None if resume is None else True)
    return trainer


def test_the_best_checkpoints_stay_beside_the_last_and_in_the_report(tmp_path: Path) -> None:
    board, csv = TensorBoardLogger(tmp_path, "board", ""), CSVLogger(tmp_path, "csv", "")
    keeps = LastCheckpoint(monitor="val/loss", top_k=2, mode="max")  # it falls: the first two are the largest
    trainer = fit(tmp_path, keeps, 3, logger=[board, csv])
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best-step=2.ckpt", "best-step=4.ckpt", "last.ckpt"]
    values = [value for value, _ in keeps.best.kept]
    assert values == sorted(values, reverse=True) and trainer.callback_metrics["val/loss"] < min(values)
    assert open_checkpoint(folder / "best-step=2.ckpt").training["global_step"] == 2
    again = VARModule.load_from_checkpoint(folder / "best-step=2.ckpt")  # the weights that were judged
    with torch.no_grad():
        judged = again._evaluated({"image": IMAGES, "label": LABELS})[0].loss
    assert float(judged) == pytest.approx(values[0], rel=1e-4)
    report = {"steps": 6, "recipe": "r", **keeps.best.report(folder)}
    assert report["best"]["step"] == 2 and Path(report["best"]["checkpoint"]).is_file()
    log_report(trainer, report)
    assert "report/best_val_loss" in (tmp_path / "csv" / "metrics.csv").read_text()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert "report/steps" in events.Tags()["scalars"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    # it goes on from there, and knows what was best
    resumed = LastCheckpoint(monitor="val/loss", top_k=2, mode="max")
    fit(tmp_path, resumed, 4, folder / "last.ckpt", logger=False)
    assert resumed.best.kept == keeps.best.kept


def test_which_way_a_metric_is_better() -> None:
    names = ("val/psnr", "val/accuracy", "val/loss", "val/fid_classifier", None)
    assert [BestCheckpoints(name).large for name in names] == [True, True, False, False, False]


def test_mistakes_of_a_monitor_are_told(tmp_path: Path) -> None:
    for mistake, words in (({"top_k": 0}, "top_k 0"), ({"mode": "best"}, "mode best")):
        with pytest.raises(UserError, match=words):
            LastCheckpoint(monitor="val/loss", **mistake)
    with pytest.raises(UserError, match=r"val/fid: the validation logs none of this name, but .*val/loss"):
        fit(tmp_path, LastCheckpoint(monitor="val/fid"), 1, logger=False)


RECIPE = """
model:
  class_path: mvar_lightning.VARModule
  init_args: {{tokenizer: digits, depth: 1, width: 32, heads: 2}}
data:
  class_path: mvar_lightning.ShardsDataModule
  init_args: {{path: {shards}, image_size: 16, batch_size: 8, num_workers: 0}}
trainer:
  max_steps: 1
  limit_val_batches: 1
  logger: {logger}
"""


def test_a_logger_whose_package_is_missing_is_one_line(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    (tmp_path / "r.yaml").write_text(
        RECIPE.format(shards=shards, logger="{class_path: lightning.pytorch.loggers.WandbLogger}")
    )
    assert main(["train", str(tmp_path / "r.yaml"), "--run-folder", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mvar: error")]
    assert "cannot be made" in line and not (tmp_path / "run").exists()


def test_a_run_with_another_logger_keeps_curves_for_its_sweep(tmp_path: Path, shards: Path) -> None:
    csv = f"{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {tmp_path / 'logs'}}}}}"
    (tmp_path / "r.yaml").write_text(RECIPE.format(shards=shards, logger=csv))
    assert main(["train", str(tmp_path / "r.yaml"), "--run-folder", str(tmp_path / "run")]) == 0
    assert list((tmp_path / "run" / "tensorboard").glob("events*")) and list((tmp_path / "logs").rglob("metrics.csv"))
    assert "best" not in json.loads((tmp_path / "run" / "metrics.json").read_text())
