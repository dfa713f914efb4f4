"""`mvar train RECIPE`: data, tokenizer, fit and report in one command, reusing what exists.

A next-scale recipe names the recipe of its tokenizer (`tokenizer_recipe`); if that has not been trained on the
same data, it is trained first.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError
from mvar_lightning.runs.train import train


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
    _add_stages(subparsers)


def run_train(arguments: argparse.Namespace) -> int:
    from mvar_lightning.runs.report import print_report
    from mvar_lightning.tools.processes import is_main

    overrides = list(arguments.overrides)
    if arguments.data is not None:
        overrides.append(f"--data.path={arguments.data}")
    run = train(arguments.recipe, overrides, folder=arguments.run_folder, fresh=arguments.fresh)
    if is_main():
        print_report(run)
    return 0


# `mvar fit`, `mvar validate`, `mvar test`: one stage of one recipe, as Lightning runs it.


STAGES = {
    "fit": "train a recipe (--config FILE, overrides such as --model.depth=8)",
    "validate": "validate a checkpoint under a recipe, with its metrics and pictures",
    "test": "the same on the test stage",
}


def _add_stages(subparsers: Any) -> None:
    for stage, help_text in STAGES.items():
        parser = subparsers.add_parser(stage, help=help_text, description=help_text)
        parser.add_argument("--config", metavar="FILE", help="recipe (YAML)")
        parser.add_argument("--ckpt-path", metavar="FILE", help="Lightning checkpoint to resume from or to evaluate")
        parser.add_argument("--run-folder", metavar="DIR", help="where to write (default: runs/ and the recipe's name)")
        parser.add_argument("--options", action="store_true", help="list everything a recipe can set")
        parser.set_defaults(run=partial(run_stage, stage), takes_overrides=True)


def run_stage(stage: str, arguments: argparse.Namespace) -> int:
    from mvar_lightning.checkpoints.folder import open_checkpoint
    from mvar_lightning.runs.recipe import SuiteCLI
    from mvar_lightning.runs.run import run_of
    from mvar_lightning.tools.processes import check_number

    if arguments.options:
        SuiteCLI([*_config(arguments), "--help"], Path("runs"))
        return 0
    if arguments.config is None:
        raise UserError(f"mvar {stage}: --config is missing; name a recipe, for example recipes/var/digits.yaml")
    checkpoint = arguments.ckpt_path
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise UserError(f"checkpoint {checkpoint}: no such file")
    run = run_of(arguments.config, arguments.overrides, arguments.run_folder)
    cli = SuiteCLI(["--config", arguments.config, *arguments.overrides], run.folder)
    if stage != "fit" and checkpoint is None and getattr(cli.model, "init_from", None) is None:
        raise UserError(f"mvar {stage}: no weights; name a checkpoint with --ckpt-path or set model.init_from")
    check_number(cli.trainer.world_size)
    stage_of: dict[str, Any] = {"fit": cli.trainer.fit, "validate": cli.trainer.validate, "test": cli.trainer.test}
    if checkpoint is not None:
        open_checkpoint(checkpoint)  # a foreign or damaged one is told in one line
    with run.started(cli.trainer, alone=stage == "fit"):
        stage_of[stage](cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    return 0


def _config(arguments: argparse.Namespace) -> list[str]:
    return ["--config", arguments.config] if arguments.config else []
