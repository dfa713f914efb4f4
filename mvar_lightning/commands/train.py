"""`mvar train RECIPE`: data, tokenizer, fit and report in one command, reusing what exists.

A next-scale recipe names the recipe of its tokenizer (`tokenizer_recipe`); if that has not been trained on the
same data, it is trained first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvar_lightning.commands.lightning_cli import SuiteCLI
    from mvar_lightning.commands.runs import Run


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="run a recipe from data to report (what `make train` calls)",
        description="Prepare data and tokenizer, train, validate, report. Other arguments override the recipe.",
    )
    parser.add_argument("recipe", help="a YAML file under recipes/")
    parser.add_argument("--data", metavar="DIR", help="shard folder to train on instead of the recipe's")
    parser.add_argument("--run-folder", metavar="DIR", help="where to write (default: runs/ and the recipe's name)")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in the same folder")
    parser.set_defaults(run=run_train, takes_overrides=True)


def run_train(arguments: argparse.Namespace) -> int:
    from mvar_lightning.commands.report import print_report

    overrides = list(arguments.overrides)
    if arguments.data is not None:
        overrides.append(f"--data.path={arguments.data}")
    print_report(train(arguments.recipe, overrides, folder=arguments.run_folder, fresh=arguments.fresh))
    return 0


def train(recipe: str | Path, overrides: Sequence[str], folder: str | Path | None = None, fresh: bool = False) -> Run:
    """Run a recipe to its end and write its report; a finished run is returned as it is.

    Raises:
        UserError: a wrong recipe or override, missing data, or a folder of another run.
    """
    from mvar_lightning.commands.runs import run_of

    run = run_of(recipe, overrides, folder)
    if run.metrics_file.exists() and not fresh:
        run.check()
        print(f"{run.folder}: already trained (train anew with --fresh)")
        return run
    tokenizer_recipe = _checked(run).get("tokenizer_recipe")
    if fresh:
        run.forget()
    run.check()
    trained_here = _train_tokenizer(run, tokenizer_recipe)
    extra = [f"--model.tokenizer={trained_here}"] if trained_here is not None else []
    _fit(run, extra)
    return run


def _checked(run: Run) -> dict[str, Any]:
    """The recipe, its mistakes and those of the overrides found: before anything is removed or trained."""
    from mvar_lightning.commands.runs import read_recipe

    recipe = read_recipe(run.recipe)  # told before the slow imports below
    from mvar_lightning.commands.lightning_cli import RecipeCheck

    RecipeCheck(["--config", str(run.recipe), *run.overrides], run.folder)
    return recipe


def _train_tokenizer(run: Run, tokenizer_recipe: str | None) -> Path | None:
    """Folder of a tokenizer trained for this run, or None where the recipe names none or it is given."""
    if tokenizer_recipe is None or any(o.startswith("--model.tokenizer=") for o in run.overrides):
        return None
    data = [override for override in run.overrides if override.startswith("--data.path=")]
    return train(tokenizer_recipe, data).model_folder


def _fit(run: Run, extra: list[str]) -> None:
    from lightning.pytorch.callbacks import LambdaCallback

    from mvar_lightning.checkpoints.folder import open_checkpoint
    from mvar_lightning.commands.lightning_cli import SuiteCLI
    from mvar_lightning.commands.report import write_report

    cli = SuiteCLI(["--config", str(run.recipe), *run.overrides, *extra], run.folder)
    checkpoint = str(run.last_checkpoint) if run.last_checkpoint.is_file() else None
    if checkpoint is not None:
        open_checkpoint(checkpoint)  # a damaged one is told in one line
        print(f"{run.folder}: continuing from {checkpoint}")
    validated: list[int] = []
    trainer: Any = cli.trainer
    trainer.callbacks.append(LambdaCallback(on_validation_end=lambda trainer, _: validated.append(trainer.global_step)))
    started = time.monotonic()
    with run.started(trainer):
        run.claim()
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        if validated[-1:] != [trainer.global_step]:  # the report is about the final weights
            trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    seconds = time.monotonic() - started
    if trainer.is_global_zero:
        _save_weights(run, cli)
        write_report(run, cli, seconds)


def _save_weights(run: Run, cli: SuiteCLI) -> None:
    from mvar_lightning.checkpoints import save

    save(run.model_folder, getattr(cli.model, "model", None), cli.model.tokenizer)
