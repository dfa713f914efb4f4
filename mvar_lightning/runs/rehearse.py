"""`mvar train RECIPE --rehearse`: two optimizer steps of everything on the real configuration, in a folder that goes.

Data, steps with their accumulation, a checkpoint written and read back, validation with metrics at full batch,
pictures: what would end a run after ten epochs ends it here. Says seconds and peak memory of each part, and what a
whole run takes. A classifier of the data set, where the metrics ask for one, stays beside the shards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mvar_lightning.errors import UserError
from mvar_lightning.runs.recipe_check import check_quickly
from mvar_lightning.runs.run import Run, run_of
from mvar_lightning.runs.train import stoppable, tokenizer_run
from mvar_lightning.tools.processes import check_number, is_main

if TYPE_CHECKING:
    from mvar_lightning.runs.recipe import SuiteCLI

STEPS, VALIDATED = 2, 2
"""Optimizer steps, and batches of the validation."""


class Part(NamedTuple):
    """What one part took: calls, seconds of the first one and of the others, peak memory up to its end."""

    calls: int = 0
    first: float = 0.0
    others: float = 0.0
    peak_bytes: int = 0

    @property
    def each(self) -> float:
        """Seconds of a call that compiles and tunes nothing, if there was one."""
        return self.others / (self.calls - 1) if self.calls > 1 else self.first


class Stopwatch:
    """Wraps functions so that what they take is noted by name."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.parts: dict[str, Part] = {}

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            import torch

            start = time.perf_counter()
            result = function(*arguments, **named)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.note(name, time.perf_counter() - start)
            return result

        return timed

    def note(self, name: str, seconds: float) -> None:
        import torch

        from mvar_lightning.tools.compute import peak_memory_bytes

        part, peak = self.parts.get(name, Part()), peak_memory_bytes(self.device)
        first = seconds if part.calls == 0 else part.first
        others = part.others + (seconds if part.calls else 0.0)
        self.parts[name] = Part(part.calls + 1, first, others, max(part.peak_bytes, peak))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def attach(self, trainer: Any, module: Any) -> None:
        """Note the steps, the validation's batches, the checkpoints, and every callback that acts at validation."""
        for name, function in (("batch of training", "training_step"), ("batch of validation", "validation_step")):
            setattr(module, function, self.watched(name, getattr(module, function)))
        trainer.strategy.save_checkpoint = self.watched("checkpoint written", trainer.strategy.save_checkpoint)
        for callback in trainer.callbacks:
            if hasattr(callback, "due"):
                for hook in ("on_validation_epoch_end", "on_fit_end"):
                    setattr(callback, hook, self.watched(type(callback).__name__, getattr(callback, hook)))


def rehearse(
    recipe: str | Path, overrides: Sequence[str] = (), run_folder: str | Path | None = None
) -> list[tuple[str, str]]:
    """Rehearse a recipe, and tell what it takes, as rows of a table; nothing stays.

    Raises:
        UserError: whatever would end the run itself; a tokenizer that is to be trained first.
    """
    check_quickly(recipe, overrides)
    real = run_of(recipe, overrides, run_folder)
    folder = real.folder.with_name(f"{real.folder.name}.rehearsal")
    with stoppable(real):
        try:
            return _rehearse(real, Run(real.recipe, real.overrides, folder))
        finally:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)


def _rehearse(real: Run, run: Run) -> list[tuple[str, str]]:
    from lightning.pytorch.callbacks import LambdaCallback

    from mvar_lightning.checkpoints.folder import open_checkpoint
    from mvar_lightning.runs.plan import check_card
    from mvar_lightning.runs.recipe import RecipeCheck, SuiteCLI
    from mvar_lightning.tools.tensors import read_torch

    check = RecipeCheck(real.arguments, real.folder)
    tokenizer = tokenizer_run(real, check.tokenizer_recipe)
    if tokenizer is not None and not tokenizer.metrics_file.exists():
        raise UserError(f"rehearsal: the tokenizer is not trained yet; first mvar train {tokenizer.recipe} --rehearse")
    settings: dict[str, Any] = check.config.as_dict()
    model = settings["model"].get("init_args", {})
    accumulated = model.get("accumulate_grad_batches") or settings["trainer"].get("accumulate_grad_batches") or 1
    changed = {
        "default_root_dir": run.folder,
        "max_epochs": 1,
        "max_steps": -1,
        "limit_train_batches": STEPS * accumulated,
        "limit_val_batches": VALIDATED,
        "check_val_every_n_epoch": 1,
        "num_sanity_val_steps": 0,
    }
    extra = [] if tokenizer is None else [f"--model.tokenizer={tokenizer.model_folder}"]
    cli = SuiteCLI(
        [*run.arguments, *(f"--trainer.{name}={value}" for name, value in changed.items()), *extra], run.folder
    )
    trainer: Any = cli.trainer
    check_number(trainer.world_size)
    check_card(real.recipe, real.overrides, str(settings["trainer"].get("accelerator")))
    scale = _one_full_batch(trainer)
    watch = Stopwatch(trainer.strategy.root_device)
    begun: list[float] = []
    first = LambdaCallback(on_train_batch_start=lambda *_: begun.append(time.perf_counter()))
    last = LambdaCallback(on_train_batch_end=lambda *_: watch.note("step, of a batch", time.perf_counter() - begun[-1]))
    trainer.callbacks[:] = [first, *trainer.callbacks, last]
    watch.attach(trainer, cli.model)
    with run.started(trainer):
        trainer.fit(cli.model, datamodule=cli.datamodule)
        trainer.strategy.barrier()
        open_checkpoint(run.last_checkpoint).check_resumable()
        watch.watched("checkpoint read back", read_torch)(run.last_checkpoint)
        trainer.strategy.barrier()
    return _rows(watch, settings["trainer"], cli, accumulated, scale)


def _one_full_batch(trainer: Any) -> dict[str, float]:
    """Let each metric generate one full batch on each process; how many times that a whole one is."""
    scale: dict[str, float] = {}
    for callback in trainer.callbacks:
        if hasattr(callback, "num_images") and hasattr(callback, "batch_size"):
            whole = callback.num_images
            callback.num_images = min(whole, max(2, callback.batch_size * trainer.world_size))
            scale[type(callback).__name__] = whole / callback.num_images
    return scale


def _rows(
    watch: Stopwatch, trainer: dict[str, Any], cli: SuiteCLI, accumulated: int, scale: dict[str, float]
) -> list[tuple[str, str]]:
    data: Any = cli.datamodule
    fitted: Any = cli.trainer
    rows = [
        (name, f"{part.each:,.2f} s (the first {part.first:,.2f} s), peak {part.peak_bytes / 1e9:,.2f} GB")
        for name, part in watch.parts.items()
    ]
    world, parts = fitted.world_size, watch.parts
    batches = (data.epoch_samples or data.train_samples) // (data.batch_size * world)
    limit = trainer.get("limit_train_batches")
    batches = min(batches, limit) if isinstance(limit, int) and limit > 0 else batches
    epochs, most = trainer.get("max_epochs") or -1, trainer.get("max_steps") or -1
    steps = most if most > 0 else batches // accumulated * epochs
    epochs = epochs if epochs > 0 else -(-steps * accumulated // batches)
    training = steps * accumulated * parts["step, of a batch"].each
    validation: float = parts["batch of validation"].each * -(
        -getattr(data, "val_samples", 0) // (data.batch_size * world)
    )
    validation += sum(parts[type(c).__name__].first * scale.get(type(c).__name__, 1.0)
                      for c in fitted.callbacks if hasattr(c, "due") and type(c).__name__ in parts)  # fmt: skip
    validations = -(-epochs // (trainer.get("check_val_every_n_epoch") or 1))
    whole = f"{training / 3600:,.2f} h of {steps:,} steps, {validations * validation / 3600:,.2f} h of validations"
    peak = max(part.peak_bytes for part in parts.values())
    return [*rows, ("peak memory", f"{peak / 1e9:,.2f} GB"), ("a whole run, about", whole)]
