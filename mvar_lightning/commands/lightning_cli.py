"""LightningCLI as this suite uses it: recipes in, trainer, module and data out; it runs nothing by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import mvar_lightning.callbacks
import mvar_lightning.data.modules
import mvar_lightning.modules  # noqa: F401 (recipes name these classes, so they must be known by name)
from mvar_lightning.callbacks import GradientNorm, NonFiniteLossGuard, Throughput, WritableRunFolder
from mvar_lightning.errors import UserError


class SaveRecipe(SaveConfigCallback):
    """Writes the resolved recipe to ``config.yaml`` in the run's folder."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = Path(trainer.default_root_dir) / "config.yaml"
        self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)


class SuiteCLI(LightningCLI):
    """Parses recipes and overrides, and builds ``trainer``, ``model`` and ``datamodule``.

    Args:
        args: the command line after the subcommand: ``--config FILE`` and overrides.
        run_folder: where this run writes everything.
    """

    def __init__(self, args: Sequence[str], run_folder: Path) -> None:
        self.run_folder = run_folder
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            args=list(args),
            seed_everything_default=0,
            save_config_callback=SaveRecipe,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=trainer_defaults(run_folder),
            parser_kwargs={"parser_mode": "omegaconf", "prog": "mvar fit", "exit_on_error": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--tokenizer_recipe",
            type=str | None,
            default=None,
            help="recipe that trains the tokenizer if it is missing",
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except Exception as error:  # jsonargparse raises many kinds, all of them about the recipe or the overrides
            raise UserError(_one_line(error)) from error


def trainer_defaults(run_folder: Path) -> dict[str, Any]:
    """What every run has, unless its recipe says otherwise: device and precision, logger, checkpoints, guards."""
    checkpoint = ModelCheckpoint(
        dirpath=run_folder / "checkpoints", filename="step={step}", auto_insert_metric_name=False, save_last=True
    )
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(run_folder), "name": "tensorboard", "version": ""},
    }
    callbacks = [
        WritableRunFolder(),
        checkpoint,
        LearningRateMonitor("step"),
        Throughput(),
        GradientNorm(),
        NonFiniteLossGuard(),
    ]
    return {
        "default_root_dir": str(run_folder),
        "precision": "bf16-mixed" if torch.cuda.is_available() else "32-true",
        "logger": logger,
        "callbacks": callbacks,
    }


def _one_line(error: BaseException) -> str:
    """The gist of a parser's report, which can run over many lines with the help of every class it tried."""
    lines = [line.strip(" -\t") for line in str(error).splitlines() if line.strip(" -\t")]
    return " ".join(lines) if len(lines) < 6 else " ".join(lines[:6])
