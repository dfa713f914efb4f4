"""`mvar train RECIPE --rehearse`: every part runs once on the real configuration, and nothing stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mvar_lightning.callbacks import SampleMetrics
from mvar_lightning.cli import main
from mvar_lightning.runs import rehearse
from tests.faults.harness import start_ranks

Recipe = dict[str, Any]


@pytest.fixture
def rehearsed(recipe: Recipe, rewrite: Callable[[Recipe], None]) -> Recipe:
    """Accumulation, metrics with a floor, and pictures."""
    features = torch.jit.script(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()))
    torch.jit.save(features, "pixels.pt")
    extractor = {"class_path": "mvar_lightning.metrics.TorchScriptFeatures", "init_args": {"path": "pixels.pt"}}
    metrics = {"extractor": extractor, "consistency": False, "num_images": 16, "batch_size": 4}
    recipe["trainer"] |= {
        "max_epochs": 3,
        "accumulate_grad_batches": 2,
        "callbacks": [
            {"class_path": "mvar_lightning.callbacks.EMA"},
            {"class_path": "mvar_lightning.callbacks.SampleMetrics", "init_args": metrics},
            {"class_path": "mvar_lightning.callbacks.SampleGrid", "init_args": {"rows": 1}},
        ],
    }
    rewrite(recipe)
    return recipe


def test_a_rehearsal_runs_all_parts_and_leaves_nothing(
    rehearsed: Recipe, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(workplace.rglob("*"))
    assert main(["train", "recipes/var.yaml", "--rehearse"]) == 0
    told = capsys.readouterr().out
    for part in ("batch of training", "batch of validation", "checkpoint written", "checkpoint read",
                 "SampleMetrics", "SampleGrid", "peak memory", "a whole run"):  # fmt: skip
        assert part in told, told
    assert "9 steps" in told, "96 images: 6 batches, 3 steps an epoch"
    assert {path for path in workplace.rglob("*") if path.is_file()} <= before


def test_what_lies_in_the_place_of_a_rehearsal_is_not_touched(
    rehearsed: Recipe, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "mine.rehearsal").mkdir()
    (workplace / "mine.rehearsal" / "keep.txt").write_text("mine")
    assert main(["train", "recipes/var.yaml", "--rehearse", "--run-folder", "mine"]) == 2
    assert "mine.rehearsal: is there already" in capsys.readouterr().err
    assert (workplace / "mine.rehearsal" / "keep.txt").read_text() == "mine"


def test_what_is_done_but_once_is_counted_once() -> None:
    """The first validation compiles and measures the floor; the 25 times as many images of a whole one do not."""

    class Metrics(SampleMetrics):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            now[0] += 100.0 + 8.0

        def measure(self, trainer: Any, pl_module: Any, distance: Any) -> dict[str, float]:
            now[0] += 8.0
            return {}

    now, callback = [0.0], Metrics(num_images=1000, batch_size=40)
    callback._distance = cast(Any, object())
    trainer: Any = SimpleNamespace(
        callbacks=[callback], world_size=1, sanity_checking=False, state=SimpleNamespace(fn="validate")
    )
    trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"), save_checkpoint=None, load_checkpoint=None)
    scale, watch = rehearse._one_full_batch(trainer), rehearse.Stopwatch()
    assert (scale, callback.num_images) == ({"Metrics": 25.0}, 40)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rehearse, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        watch.attach(trainer, SimpleNamespace(training_step=None, validation_step=None))
        callback.on_validation_epoch_end(trainer, None)
    part = watch.parts["Metrics"]
    assert (part.first, part.each) == (108.0, 8.0)
    watch.parts |= {name: rehearse.Part(2, 0.0, 0.0) for name in ("step, of a batch", "batch of validation")}
    cli: Any = SimpleNamespace(trainer=trainer, datamodule=SimpleNamespace(
        epoch_samples=None, train_samples=100, val_samples=10, batch_size=10))  # fmt: skip
    told = rehearse._whole_run(watch, {"max_epochs": 18}, cli, 1, scale)
    assert told == "0.00 h of 180 steps, 1.03 h of validations", "18 times 200 s, and 108 s"


@pytest.mark.slow
def test_two_processes_rehearse_together(rehearsed: Recipe, workplace: Path) -> None:
    arguments = ("--rehearse", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu")
    env = {"CUDA_VISIBLE_DEVICES": "", "PL_GLOBAL_SEED": None}
    ranks = start_ranks(2, "train", "recipes/var.yaml", *arguments, cwd=workplace, seconds=200, env=env)
    first, second = (rank.finish() for rank in ranks)
    assert (first.status, second.status) == (0, 0), first.err[-2000:] + second.err[-2000:]
    assert "a whole run" in first.out and "a whole run" not in second.out
    assert "steps" in first.out and not (workplace / "runs" / "var.rehearsal").exists()
