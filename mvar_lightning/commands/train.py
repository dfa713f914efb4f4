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

from mvar_lightning.errors import UserError

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
    if fresh:
        run.forget()
    if run.metrics_file.exists():
        run.claim()
        print(f"{run.folder}: already trained (train anew with --fresh)")
        return run
    trained_here = _train_tokenizer(run)
    extra = [f"--model.tokenizer={trained_here}"] if trained_here is not None else []
    _fit(run, extra)
    return run


def _train_tokenizer(run: Run) -> Path | None:
    """Folder of a tokenizer trained for this run, or None where the recipe names none or it is given."""
    recipe = _read_yaml(run.recipe)
    tokenizer_recipe = recipe.get("tokenizer_recipe")
    if tokenizer_recipe is None or any(o.startswith("--model.tokenizer=") for o in run.overrides):
        return None
    from mvar_lightning.commands.lightning_cli import RecipeCheck

    RecipeCheck(["--config", str(run.recipe), *run.overrides], run.folder)  # now, not once the tokenizer is trained
    data = [override for override in run.overrides if override.startswith("--data.path=")]
    return train(tokenizer_recipe, data).model_folder


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path}: must be a mapping with trainer, model and data")
    return content


def _fit(run: Run, extra: list[str]) -> None:
    from mvar_lightning.checkpoints.folder import open_checkpoint
    from mvar_lightning.commands.lightning_cli import SuiteCLI
    from mvar_lightning.commands.report import write_report

    cli = SuiteCLI(["--config", str(run.recipe), *run.overrides, *extra], run.folder)
    checkpoint = str(run.last_checkpoint) if run.last_checkpoint.is_file() else None
    if checkpoint is not None:
        open_checkpoint(checkpoint)  # a damaged one is told in one line
        print(f"{run.folder}: continuing from {checkpoint}")
    started = time.monotonic()
    with run.started(cli.trainer):
        run.claim()
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    seconds = time.monotonic() - started
    if cli.trainer.is_global_zero:
        _save_weights(run, cli)
        write_report(run, cli, seconds)


def _save_weights(run: Run, cli: SuiteCLI) -> None:
    from mvar_lightning.checkpoints import save

    save(run.model_folder, getattr(cli.model, "model", None), cli.model.tokenizer)
