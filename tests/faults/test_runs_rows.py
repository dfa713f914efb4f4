"""Rows of a run: what it reports when it was killed, whose folder it is, which recipe it takes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.harness import Answer, ask
from small_run import MODEL_SIZES

Recipe = dict[str, Any]
TESTS = Path(__file__).parents[1]
PATHS = "import sys; sys.path.insert(0, {path!r}); from mvar_lightning.cli import main; sys.exit(main({argv!r}))"


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path, shards: Path) -> Recipe:
    """Content of ``recipes/var.yaml``: three epochs of six steps, measured after the second and the third."""
    sizes = {name: value for name, value in MODEL_SIZES.items() if name != "num_classes"}
    data = {"path": str(shards), "image_size": 16, "batch_size": 16, "num_workers": 0}
    return {
        "seed_everything": 0,
        "model": {"class_path": "mvar_lightning.VARModule", "init_args": {"tokenizer": str(tokenizer), **sizes}},
        "data": {"class_path": "mvar_lightning.ShardsDataModule", "init_args": data},
        "trainer": {
            "max_epochs": 3,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def to(content: Recipe, name: str = "var") -> Path:
        path = tmp_path / "recipes" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return to


def train(folder: Path, *argv: str, **settings: Any) -> Answer:
    """`mvar train` with the classes of `tests` at hand."""
    code = PATHS.format(path=str(TESTS), argv=["train", *argv])
    return ask(code=code, cwd=folder, seconds=90, **settings)


def report_of(run: Path) -> Any:
    """What a run reports, but for times and memory."""
    report = json.loads((run / "metrics.json").read_text())
    for name in ("seconds", "seconds_per_step", "peak_memory_bytes"):
        report.pop(name)
    report["metrics"] = {n: v for n, v in report["metrics"].items() if not n.startswith(("speed/", "memory/"))}
    return report


@pytest.mark.slow
def test_a_run_killed_at_several_points_reports_what_one_run_reports(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    """In the second epoch, after its validation, and after the last step; the floor among the numbers."""
    colors = {"class_path": "sabotage.Colors"}
    metrics = {"extractor": colors, "consistency": False, "num_images": 8, "batch_size": 8, "every_n_epochs": 2}
    recipe["trainer"]["callbacks"] = [
        {"class_path": "sabotage.Sabotage"},
        {"class_path": "mvar_lightning.callbacks.SampleMetrics", "init_args": metrics},
    ]
    recipe["checkpoint"] = {"every_steps": 2, "every_minutes": None}
    path = str(write(recipe))
    whole = train(tmp_path, path, "--run-folder", "runs/whole", env={"SABOTAGE": None})
    assert whole.status == 0, whole.err
    for order in ("SIGKILL@8", "SIGKILL@13", "validation:SIGKILL@18", "end:SIGKILL@18"):
        killed = train(tmp_path, path, env={"SABOTAGE": order})
        assert killed.status == -signal.SIGKILL, (order, killed.err)
    assert train(tmp_path, path, env={"SABOTAGE": None}).status == 0
    found, expected = report_of(tmp_path / "runs/var"), report_of(tmp_path / "runs/whole")
    assert {"train/loss", "loss", "val/fid_colors_floor"} < set(expected["metrics"])
    assert found == expected
