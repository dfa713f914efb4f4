"""`mvar train RECIPE --rehearse`: two optimizer steps of everything on the real configuration, in a folder that goes.

Data, steps with their accumulation, validation with metrics at full batch, pictures, a checkpoint written, and a second
trainer that goes on from it: what would end a run after ten epochs ends it here. Says seconds and peak memory of each
part, and what a whole run takes. A classifier of the data set, where the metrics ask for one, stays beside the shards.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mvar_lightning.errors import UserError
from mvar_lightning.runs.recipe_check import check_quickly
from mvar_lightning.runs.run import Run, Stopped, run_of
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

    device: Any

    def __init__(self) -> None:
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
        self.device = trainer.strategy.root_device
        for name, function in (("batch of training", "training_step"), ("batch of validation", "validation_step")):
            setattr(module, function, self.watched(name, getattr(module, function)))
        for name, function in (("checkpoint written", "save_checkpoint"), ("checkpoint read", "load_checkpoint")):
            setattr(trainer.strategy, function, self.watched(name, getattr(trainer.strategy, function)))
        for callback in trainer.callbacks:
            if hasattr(callback, "due"):
                hook = self.watched(type(callback).__name__, callback.on_validation_epoch_end)
                callback.on_validation_epoch_end = self._then_again(callback, hook)

    def _then_again(self, callback: Any, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Of metrics of samples a second time, as each later validation has it: the first compiles, and has its floor
        to measure."""
        from mvar_lightning.callbacks import SampleMetrics

        def twice(trainer: Any, module: Any) -> None:
            hook(trainer, module)
            if callback.due(trainer):
                self.watched(type(callback).__name__, callback.measure)(trainer, module, callback.distance)

        return twice if isinstance(callback, SampleMetrics) else hook


def rehearse(
    recipe: str | Path, overrides: Sequence[str] = (), run_folder: str | Path | None = None
) -> list[tuple[str, str]]:
    """Rehearse a recipe, and tell what it takes, as rows of a table; nothing stays.

    Raises:
        UserError: whatever would end the run itself; a tokenizer that is to be trained first; a folder in its place.
    """
    check_quickly(recipe, overrides)
    real = run_of(recipe, overrides, run_folder)
    folder = real.folder.with_name(f"{real.folder.name}.rehearsal")
    if is_main() and folder.exists():
        raise UserError(
            f"rehearsal folder {folder}: is there already; another rehearsal is at work in it, or one was killed: "
            "remove it, or name another run folder with ``run_folder``"
        )
    with stoppable(real):
        try:
            return _rehearse(real, Run(real.recipe, real.overrides, folder))
        except Stopped as error:
            raise Stopped(f"{real.folder}: the rehearsal was stopped; nothing of it stays") from error
        finally:
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)


def _rehearse(real: Run, run: Run) -> list[tuple[str, str]]:
    from mvar_lightning.runs.plan import check_machine
    from mvar_lightning.runs.recipe import RecipeCheck

    check = RecipeCheck(real.arguments, real.folder)
    check_machine(check)
    tokenizer = tokenizer_run(real, check.tokenizer_recipe)
    if tokenizer is not None and not tokenizer.metrics_file.exists():
        raise UserError(f"rehearsal: the tokenizer is not trained yet; first mvar train {tokenizer.recipe} --rehearse")
    extra = [] if tokenizer is None else [f"--model.tokenizer={tokenizer.model_folder}"]
    settings: dict[str, Any] = check.config.as_dict()
    model = settings["model"].get("init_args", {})
    accumulated = model.get("accumulate_grad_batches") or settings["trainer"].get("accumulate_grad_batches") or 1
    watch = Stopwatch()
    cli = _cli(run, extra, STEPS * accumulated)
    whole = _run_parts(run, cli, watch, settings["trainer"], accumulated)
    _go_on(run, cli, watch)
    rows = [
        (name, f"{part.each:,.2f} s (the first {part.first:,.2f} s), peak {part.peak_bytes / 1e9:,.2f} GB")
        for name, part in watch.parts.items()
    ]
    peak = max(part.peak_bytes for part in watch.parts.values())
    return [*rows, ("peak memory", f"{peak / 1e9:,.2f} GB"), ("a whole run, about", whole)]


def _cli(run: Run, extra: Sequence[str], batches: int) -> SuiteCLI:
    """Trainer, model and data as the recipe has them, but for the run's length and folder."""
    from mvar_lightning.runs.recipe import SuiteCLI

    changed = {
        "default_root_dir": run.folder,
        "max_epochs": 1,
        "max_steps": -1,
        "limit_train_batches": batches,
        "limit_val_batches": VALIDATED,
        "check_val_every_n_epoch": 1,
        "num_sanity_val_steps": 0,
    }
    return SuiteCLI([*run.arguments, *(f"--trainer.{name}={value}" for name, value in changed.items()), *extra],
                    run.folder)  # fmt: skip


def _run_parts(run: Run, cli: SuiteCLI, watch: Stopwatch, settings: dict[str, Any], accumulated: int) -> str:
    """Two steps, and a validation with all that comes with it; gives what a whole run would take."""
    from lightning.pytorch.callbacks import LambdaCallback

    trainer: Any = cli.trainer
    check_number(trainer.world_size)
    scale = _one_full_batch(trainer)
    begun: list[float] = []
    first = LambdaCallback(on_train_batch_start=lambda *_: begun.append(time.perf_counter()))
    last = LambdaCallback(on_train_batch_end=lambda *_: watch.note("step, of a batch", time.perf_counter() - begun[-1]))
    trainer.callbacks[:] = [first, *trainer.callbacks, last]
    watch.attach(trainer, cli.model)
    with run.started(trainer):
        trainer.fit(cli.model, datamodule=cli.datamodule)
        trainer.strategy.barrier()
    return _whole_run(watch, settings, cli, accumulated, scale)


def _go_on(run: Run, cli: SuiteCLI, watch: Stopwatch) -> None:
    """Another trainer and model go on from the checkpoint, for two steps more."""
    from mvar_lightning.checkpoints.folder import open_checkpoint

    open_checkpoint(run.last_checkpoint).check_resumable()
    cli.config.trainer.max_epochs, cli.config.trainer.limit_val_batches = 2, 0
    cli.instantiate_classes()
    trainer: Any = cli.trainer
    trainer.callbacks[:] = [callback for callback in trainer.callbacks if not hasattr(callback, "due")]
    watch.attach(trainer, cli.model)
    with run.started(trainer):
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=run.last_checkpoint, weights_only=True)
        trainer.strategy.barrier()
    if trainer.current_epoch != 2:
        raise UserError(f"rehearsal: the second trainer ended in epoch {trainer.current_epoch}, not 2: no resume")


def _one_full_batch(trainer: Any) -> dict[str, float]:
    """Let each metric take one full batch on each process; how many times that a whole one is."""
    scale: dict[str, float] = {}
    for callback in trainer.callbacks:
        if hasattr(callback, "num_images") and hasattr(callback, "batch_size"):
            whole = callback.num_images
            callback.num_images = min(whole, max(2, callback.batch_size * trainer.world_size))
            scale[type(callback).__name__] = whole / callback.num_images
    return scale


def _whole_run(
    watch: Stopwatch, trainer: dict[str, Any], cli: SuiteCLI, accumulated: int, scale: dict[str, float]
) -> str:
    data: Any = cli.datamodule
    fitted: Any = cli.trainer
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
    once = 0.0
    for name in {type(callback).__name__ for callback in fitted.callbacks if hasattr(callback, "due")} & parts.keys():
        # what was done but once grows with no number of images: pictures, and the floor of reconstructions
        again = parts[name].calls > 1
        validation += parts[name].each * (scale.get(name, 1.0) if again else 1.0)
        once += parts[name].first if again else 0.0
    validations = -(-epochs // (trainer.get("check_val_every_n_epoch") or 1))
    hours = (once + validations * validation) / 3600
    return f"{training / 3600:,.2f} h of {steps:,} steps, {hours:,.2f} h of validations"
