"""LightningCLI as this suite uses it: recipes in, trainer, module and data out; it runs nothing by itself."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mvar_lightning import callbacks
from mvar_lightning.compat import expect_unused_parameters, share_gradients_with_buckets
from mvar_lightning.errors import UserError
from mvar_lightning.runs.bounds import import_class, made_of, object_of
from mvar_lightning.runs.recipe_check import check_quickly, check_values, explain
from mvar_lightning.runs.recipe_files import tokenizer_recipe
from mvar_lightning.runs.run import run_of
from mvar_lightning.tools.compute import keep_freed_memory
from mvar_lightning.training import TokenizerModule

NOISE = (
    "LightningCLI's args parameter",  # we do give both, on purpose
    r"Found \d+ module\(s\) in eval mode",  # the frozen tokenizer
    r"`isinstance\(treespec, LeafSpec\)`",  # torch to Lightning
    r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # said of numbers that are reduced already
    r"Using ModelCheckpoint with manual optimization",  # it saves what a step left, as everywhere else
    r"FSDP2-wrapped module .* returned a view tensor",  # nothing here writes into it
)
"""Warnings of the libraries that a user can do nothing about."""

LOGGERS = ("wandb", "mlflow")
"""Extras of the package."""

PARSER = {"parser_mode": "omegaconf", "prog": "mvar fit", "exit_on_error": False, "allow_abbrev": False}

import_module("mvar_lightning.data.token_data")  # recipes name its class, and image_data's: both must be there by name


class SaveRecipe(SaveConfigCallback):
    """Writes the resolved recipe to ``config.yaml`` in the run's folder."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = Path(trainer.default_root_dir) / "config.yaml"
        self.parser.save(self.config, str(path), skip_unset=False, overwrite=True, multifile=False)


class SuiteCLI(LightningCLI):
    """Parses recipes and overrides, and builds ``trainer``, ``model`` and ``datamodule``.

    Args:
        args: the command line after the subcommand: ``--config FILE`` and overrides.
        run_folder: where this run writes everything.
    """

    def __init__(self, args: Sequence[str], run_folder: Path) -> None:
        self.run_folder, self.arguments = run_folder, list(args)
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        log.addFilter(lambda record: "litlogger" not in record.getMessage())  # an advertisement
        if not torch.cuda.is_available():
            keep_freed_memory()
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
            parser_kwargs=PARSER,
        )

    @property
    def recipe(self) -> Path:
        return Path(self.arguments[1])

    @property
    def tokenizer_recipe(self) -> str | None:
        """Overrides included; the file, where it is found from here or beside the recipe."""
        name = self.config.get("tokenizer_recipe")
        found = tokenizer_recipe({"tokenizer_recipe": name}, self.recipe)
        return name if found is None else str(found)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        words = "recipe that trains the tokenizer if it is missing"
        parser.add_argument("--tokenizer_recipe", type=str | None, default=None, help=words)
        parser.add_lightning_class_args(callbacks.LastCheckpoint, "checkpoint")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data", "model.init_args.class_names", class_names_of, apply_on="instantiate")
        parser.link_arguments("data", "model.init_args.image_channels", channels_of, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except Exception as error:  # jsonargparse raises many kinds, all of them about the recipe or the overrides
            raise UserError(explain(str(error), args)) from error

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            # the user's mistake is at the bottom of what the parser wrapped around it
            mistake: BaseException | None = error
            while mistake is not None and not isinstance(mistake, UserError):
                mistake = mistake.__cause__ or mistake.__context__
            if mistake is None and (told := _of_a_class(error)):
                raise UserError(told) from error
            if mistake is None and "Does not validate against" in str(error):  # the parser's own, found late
                raise UserError(explain(str(error), self.arguments)) from error
            if mistake is None:
                raise
            raise UserError(mistake.marked) from error
        strategy: Any = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            share_gradients_with_buckets(strategy)
        if isinstance(strategy, DDPStrategy) and isinstance(self.model, TokenizerModule):
            # a discriminator and a generator in turn, and of n shared phi maybe not all: each backward has its own
            expect_unused_parameters(strategy)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        if trainer.loggers and not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            # the curves of a sweep are read from it, whatever else the recipe names
            trainer.loggers = [*trainer.loggers, made_of(tensorboard_of(self.run_folder))]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the recipe names no other
            trainer.strategy.checkpoint_io = callbacks.last_checkpoint.DurableCheckpointIO()
        return trainer


def _of_a_class(error: Exception) -> str:
    """Why a class of the recipe could not be made, such as a logger whose package is not there; nothing where the
    error is another's. The parser has what the class said among what it tried besides."""
    tried = re.findall(
        r"^\s*- (?!Expected a |Not a valid subclass|Problem|Import path)(\S.*)$", str(error), re.MULTILINE
    )
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ModuleNotFoundError):
        cause = cause.__cause__ or cause.__context__
    if cause is None and not tried:
        return ""
    said = " ".join(str(cause if cause is not None else tried[0]).split())
    package = next((name for name in LOGGERS if f"`{name}`" in said or f"'{name}" in said), None)
    way_out = f"; pip install mvar-lightning[{package}]" if package else ""
    return f"trainer: one of the recipe's classes cannot be made: {said[:400]}{way_out}"


def class_names_of(data: LightningDataModule) -> tuple[str, ...] | None:
    """Names of the classes of a data module that knows them; that its data is not there is told by the module."""
    try:
        return getattr(data, "class_names", None)
    except UserError:
        return None


def channels_of(data: LightningDataModule) -> int:
    """Of a data module's images; RGB's of one that does not say. That data is not there is told by the module."""
    try:
        return int(getattr(data, "channels", 3))
    except UserError:
        return 3


class RecipeCheck(SuiteCLI):
    """Parses recipe and overrides and judges their values: finds mistakes before anything is made or trained.

    Raises:
        UserError: what the parser refuses, or a number out of its bounds.
    """

    @classmethod
    def of(cls, recipe: str | Path, overrides: Sequence[str] = ()) -> RecipeCheck:
        """A recipe with its overrides, looked at quickly first."""
        check_quickly(recipe, overrides)
        run = run_of(recipe, overrides)
        return cls(run.arguments, run.folder)

    def instantiate_classes(self) -> None:
        """Not here."""
        recipe = self.config.as_dict()
        check_values(recipe, self.arguments)
        if judge := getattr(import_class(object_of(recipe["model"])[0]), "check_precision", None):
            try:
                judge(recipe["trainer"].get("precision"))
            except UserError as error:
                check_values({}, self.arguments, [("trainer.precision", error.marked)])

    def build(self, tokenizer: RecipeCheck) -> None:
        """Make trainer, callbacks, data and, without memory for weights, the model over a tokenizer that is still to be
        trained by its own recipe. Raises `UserError` for what any of them refuses."""
        (path, settings), (_, sizes) = (object_of(check.config.model.as_dict()) for check in (self, tokenizer))
        recipe = self.config.as_dict()
        made_of(recipe["data"])
        self.config_init = {
            # without the logger: some begin to write, or to send, once they are made
            "trainer": {name: made_of(value) for name, value in {**recipe["trainer"], "logger": False}.items()},
            "checkpoint": callbacks.LastCheckpoint(**recipe["checkpoint"]),
        }
        self.instantiate_trainer()
        module = import_class(path)
        if hasattr(module, "check_settings"):
            module.check_settings(sizes, {name: made_of(value) for name, value in settings.items()})


def trainer_defaults(run_folder: Path) -> dict[str, Any]:
    """What every run has, unless its recipe says otherwise: device and precision, logger, checkpoints, guards."""
    return {
        "default_root_dir": str(run_folder),
        "precision": "bf16-mixed" if torch.cuda.is_available() else "32-true",
        "logger": tensorboard_of(run_folder),
        "callbacks": [
            callbacks.WritableRunFolder(),
            LearningRateMonitor("step"),
            callbacks.Throughput(),
            callbacks.GradientNorm(),
            callbacks.NonFiniteLossGuard(),
            callbacks.ProgressLines(),
            callbacks.ScaleCharts(),
        ],
    }


def tensorboard_of(run_folder: Path) -> dict[str, Any]:
    """The logger of every run."""
    return {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(run_folder), "name": "tensorboard", "version": ""},
    }
