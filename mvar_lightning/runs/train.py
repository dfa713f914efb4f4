"""`train`: one recipe from data to report, its tokenizer first where that is missing.

A next-scale recipe names the recipe of its tokenizer (`tokenizer_recipe`); if that has not been trained on the same
data, it is trained first. `run_stage` is one stage alone, as Lightning runs it. Everything heavy is imported only once
the recipe has been looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.errors import UserError
from mvar_lightning.runs.recipe_check import check_quickly, setting_of
from mvar_lightning.runs.recipe_files import recipe_file
from mvar_lightning.runs.run import Run, Stopped, run_of
from mvar_lightning.tools.console import print_table
from mvar_lightning.tools.files import write_json
from mvar_lightning.tools.processes import check_number, is_main, launched, wait_until_visible

if TYPE_CHECKING:
    from mvar_lightning.runs.recipe import SuiteCLI

SHOWN = ("val/", "codebook/usage")
"""Metrics of the table at the end, by the beginning of their names."""

MACHINES = ("--trainer.accelerator=", "--trainer.devices=", "--trainer.num_nodes=", "--trainer.strategy=ddp")
"""Overrides that a tokenizer's recipe needs as well when a launcher has started the processes."""

DATA = tuple(f"--data.{name}=" for name in ("path", "train_shards", "val_shards", "num_classes", "allow_pipe"))
"""Those that it always needs: they say which images."""

GIVEN = {"model.tokenizer", "model.init_args.tokenizer"}
"""Overrides with which no tokenizer is trained."""


def train(
    recipe: str | Path, overrides: Sequence[str] = (), run_folder: str | Path | None = None, fresh: bool = False
) -> Run:
    """Run a recipe to its end and write its report; a finished run is returned as it is.

    Of several processes all come here with the same arguments. They decide alike: what they ask of the folder does
    not change before all of them have begun to train, except by `fresh`, which none of them asks it about.

    Args:
        recipe: a YAML file.
        overrides: settings that replace the recipe's, such as ``--model.depth=8``.
        run_folder: where to write; ``runs/`` and the recipe's name if not given.
        fresh: forget an earlier run in the same folder.

    Raises:
        UserError: a wrong recipe or override, missing data, or a folder of another run.
        KeyboardInterrupt: the run was interrupted or told to stop.
    """
    check_quickly(recipe, overrides)
    run = run_of(recipe, overrides, run_folder)
    with stoppable(run):
        _train(run, fresh)
    return run


def _train(run: Run, fresh: bool) -> None:
    if run.metrics_file.exists() and not fresh:
        run.check()
        if is_main():
            run.report()
            print(f"{run.folder}: already trained (train anew with --fresh)")
        return
    from mvar_lightning.runs.plan import check_machine
    from mvar_lightning.runs.recipe import RecipeCheck

    check = RecipeCheck(run.arguments, run.folder)
    check_machine(check)
    tokenizer = tokenizer_run(run, check.tokenizer_recipe)
    if tokenizer is not None and not tokenizer.metrics_file.exists():
        check.build(RecipeCheck(tokenizer.arguments, tokenizer.folder))
    if fresh:
        run.forget()
    run.check(fresh)
    trained_here = None if tokenizer is None else _train_tokenizer(tokenizer)
    extra = [f"--model.tokenizer={trained_here}"] if trained_here is not None else []
    _fit(run, extra, None if fresh or not run.last_checkpoint.is_file() else run.last_checkpoint)


@contextmanager
def stoppable(run: Run) -> Iterator[None]:
    """An interrupt (Ctrl-C and, on the command line, SIGTERM) ends a run with words in every phase; where a trainer
    trains, `LastCheckpoint` takes SIGTERM over and keeps the run's place first.

    Raises:
        Stopped: with the run's folder and how to go on.
    """
    try:
        yield
    except Stopped:
        raise
    except KeyboardInterrupt as error:
        raise Stopped(f"{run.folder}: interrupted; {run.way_on()}") from error


def tokenizer_run(run: Run, recipe: str | None) -> Run | None:
    """The run of this one's tokenizer, or None where the recipe names none or it is given."""
    if recipe is None or GIVEN.intersection(map(setting_of, run.overrides)):
        return None
    overrides = [override for override in run.overrides if override.startswith(DATA)]
    file = recipe_file(recipe, beside=run.recipe)
    found = run_of(file, overrides)
    if launched() and not found.metrics_file.exists():
        # all processes that a launcher started train it, so its trainer must hear of them too
        overrides += [override for override in run.overrides if override.startswith(MACHINES)]
        found = run_of(file, overrides)
    return found


def _train_tokenizer(run: Run) -> Path:
    """Folder of the tokenizer. A mistake says that it is its recipe's, which few of the overrides reach."""
    try:
        return train(run.recipe, run.overrides).model_folder
    except UserError as error:
        raise UserError(
            f"tokenizer_recipe {run.recipe} (overrides other than those of its data's place do not reach it; train it "
            f"by itself with others, and give --model.tokenizer={run.folder}): {error.marked}"
        ) from error


def _fit(run: Run, extra: list[str], checkpoint: Path | None) -> None:
    from lightning.pytorch.callbacks import LambdaCallback

    from mvar_lightning.checkpoints.folder import open_checkpoint, save
    from mvar_lightning.runs.recipe import SuiteCLI
    from mvar_lightning.training.distributed import gathered

    cli = SuiteCLI([*run.arguments, *extra], run.folder)
    trainer: Any = cli.trainer
    check_number(trainer.world_size)
    if checkpoint is not None:
        opened = open_checkpoint(checkpoint)  # a damaged one is told in one line
        opened.check_resumable()
        if is_main():
            at = opened.training
            print(f"{run.folder}: continuing from {checkpoint} (epoch {at['epoch']}, step {at['global_step']})")
    validated: list[int] = []
    trainer.callbacks.append(LambdaCallback(on_validation_end=lambda trainer, _: validated.append(trainer.global_step)))
    with run.started(trainer):
        run.claim()
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        kept = _last_checkpoint(trainer)
        kept.keep_metrics(trainer)
        if validated[-1:] != [trainer.global_step]:  # the report is about the final weights
            trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
            kept.keep_metrics(trainer)
        model = getattr(cli.model, "model", None)
        model = None if model is None else gathered(model)  # sharded weights need all ranks for that
        if trainer.is_global_zero:
            if hasattr(cli.model, "save"):  # neither a tokenizer nor a model over one
                cli.model.save(run.model_folder)
            else:
                save(run.model_folder, model, cli.model.tokenizer, class_names=getattr(cli.model, "class_names", ()))
            write_report(run, cli)
        trainer.strategy.barrier()
    wait_until_visible(run.metrics_file)


def run_stage(
    stage: str,
    recipe: str | Path,
    overrides: Sequence[str] = (),
    checkpoint: str | Path | None = None,
    run_folder: str | Path | None = None,
) -> None:
    """One stage (``fit``, ``validate`` or ``test``) of a recipe, as Lightning runs it.

    Args:
        recipe, overrides, run_folder: as of `train`.
        checkpoint: Lightning's, to resume from or to evaluate.

    Raises:
        UserError: as `train`; no such checkpoint, or nothing to evaluate.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise UserError(f"checkpoint {checkpoint}: no such file")
    check_quickly(recipe, overrides)
    run = run_of(recipe, overrides, run_folder)
    with stoppable(run):
        _run_stage(stage, run, checkpoint)


def _run_stage(stage: str, run: Run, checkpoint: str | Path | None) -> None:
    from mvar_lightning.checkpoints.folder import open_checkpoint
    from mvar_lightning.runs.plan import check_machine
    from mvar_lightning.runs.recipe import RecipeCheck, SuiteCLI

    if stage == "fit":
        check_machine(RecipeCheck(run.arguments, run.folder))
    cli = SuiteCLI(run.arguments, run.folder)
    if stage != "fit" and checkpoint is None and getattr(cli.model, "init_from", None) is None:
        raise UserError(f"mvar {stage}: no weights; name a checkpoint with ``ckpt_path`` or set model.init_from")
    check_number(cli.trainer.world_size)
    if checkpoint is not None:
        opened = open_checkpoint(checkpoint)  # a foreign or damaged one is told in one line
        if stage == "fit":
            opened.check_resumable()
    work: Any = getattr(cli.trainer, stage)
    with run.started(cli.trainer, alone=stage == "fit"):
        work(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)


def list_options(recipe: str | Path | None = None) -> None:
    """Print everything that a recipe can set, and end the program."""
    from mvar_lightning.runs.recipe import SuiteCLI

    SuiteCLI([*(["--config", str(recipe)] if recipe else []), "--help"], Path("runs"))


# What a finished run has come to.


def write_report(run: Run, cli: SuiteCLI) -> None:
    """Write ``metrics.json``: last validation metrics, sizes, speed and memory of the run.

    The seconds are those of training with its validations, over all the times that the run was taken up again.
    """
    from mvar_lightning.callbacks.loggers import log_report
    from mvar_lightning.tools.compute import peak_memory_bytes

    module: Any = cli.model
    trainer: Any = cli.trainer
    kept = _last_checkpoint(trainer)
    latest = dict(kept.metrics)
    for callback in trainer.callbacks:
        latest |= getattr(callback, "latest", {})
    core = next(getattr(module, name) for name in ("model", "scorer", "tokenizer") if hasattr(module, name))
    report = {
        "recipe": str(run.recipe),
        "overrides": list(run.overrides),
        "steps": trainer.global_step,
        "seconds": round(kept.state_dict()["seconds"], 1),
        "parameters": sum(parameter.numel() for parameter in core.parameters()),
        "seconds_per_step": latest.get("speed/step_seconds"),
        "peak_memory_bytes": peak_memory_bytes(trainer.strategy.root_device),
        "metrics": dict(sorted(kept.metrics.items())),
        **kept.best.report(run.last_checkpoint.parent),
    }
    if hasattr(module, "model"):
        report["attention"] = repr(core.strategy)
        # keys and values that sampling one unguided image holds, in the model's precision
        elements = 2 * core.backend.plan.cache_tokens * core.width * core.depth
        report["kv_cache_bytes_per_image"] = elements * next(core.parameters()).element_size()
    write_json(run.metrics_file, report)
    log_report(trainer, report)


def _last_checkpoint(trainer: Any) -> Any:
    """The callback of every run."""
    from mvar_lightning.callbacks import LastCheckpoint

    return next(callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint))


def print_report(run: Run) -> None:
    """The table at the end of `mvar train`."""
    report = run.report()
    shown = {name: value for name, value in report["metrics"].items() if name.startswith(SHOWN)}
    rows = [
        ("steps", f"{report['steps']:,} in {report['seconds']:.0f} s"),
        ("parameters", f"{report['parameters']:,}"),
        ("peak memory", f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB"),
        *((name, f"{value:.4g}") for name, value in shown.items() if "_scale_" not in name),
    ]
    if isinstance(best := report.get("best"), dict):
        rows.append((f"best {best.get('monitor')}", f"{best.get('value'):.4g} at step {best.get('step'):,}"))
    print_table(rows, title=str(run.recipe))
    written = {
        "best": Path(best["checkpoint"]) if isinstance(best, dict) else run.folder / "none",
        "samples": run.folder / "samples.png",
        "reconstructions": run.folder / "reconstructions.png",
        "metrics": run.metrics_file,
        "checkpoint": run.last_checkpoint,
        "weights": run.model_folder,
        "TensorBoard": run.folder / "tensorboard",
    }
    for label, path in written.items():
        if path.exists():
            print(f"  {label:<12} {path}")
