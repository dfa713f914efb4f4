"""Weights & Biases (offline) and MLflow (a file store), really run: scalars, pictures and the report arrive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
model:
  class_path: mvar_lightning.VARModule
  init_args: {tokenizer: digits, depth: 1, width: 32, heads: 2}
data:
  class_path: mvar_lightning.ShardsDataModule
  init_args: {path: data/digits, image_size: 16, batch_size: 64, num_workers: 0, resize_ratio: 1.0}
checkpoint: {monitor: val/loss}
trainer:
  max_epochs: 1
  log_every_n_steps: 5
  callbacks:
    - class_path: mvar_lightning.callbacks.SampleGrid
  logger:
    - class_path: lightning.pytorch.loggers.CSVLogger
      init_args: {save_dir: logs, name: csv}
    - class_path: lightning.pytorch.loggers.WandbLogger
      init_args: {save_dir: logs, project: mvar, offline: true}
    - class_path: lightning.pytorch.loggers.MLFlowLogger
      init_args: {experiment_name: mvar, tracking_uri: "file:logs/mlruns"}
"""

pytestmark = pytest.mark.ship


def test_all_loggers_at_once(tmp_path: Path) -> None:
    pytest.importorskip("wandb"), pytest.importorskip("mlflow")
    (tmp_path / "r.yaml").write_text(RECIPE)
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    command = [sys.executable, "-m", "mvar_lightning", "train", "r.yaml", "--run-folder", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = tmp_path / "logs"
    (table,) = logs.glob("csv/**/metrics.csv")
    assert "val/loss" in table.read_text()
    assert list(logs.glob("wandb/offline-run-*/files/media/images/pictures/samples_*.png"))
    (run,) = [path.parent for path in logs.glob("mlruns/*/*/artifacts")]
    assert [path.name for path in run.glob("artifacts/pictures_samples/*.png")] == ["00000022.png"]
    assert (run / "metrics" / "report" / "steps").read_text().split()[1] == "22.0"
    assert (run / "metrics" / "val" / "loss").is_file()
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
