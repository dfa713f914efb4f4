"""Where a run lives: a folder under runs/ named after its recipe, and after its overrides where it has any."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning import Trainer

RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """One run of a recipe.

    Attributes:
        recipe: its YAML file.
        overrides: arguments that replace values of the recipe.
        folder: where everything of the run is written.
    """

    recipe: Path
    overrides: tuple[str, ...]
    folder: Path

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def model_folder(self) -> Path:
        """The trained weights in the suite's own format."""
        return self.folder / "model"

    @property
    def last_checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def identity(self) -> dict[str, Any]:
        """What must be the same for this folder to be continued or reused: what the recipe says, not its comments."""
        content = json.dumps(read_recipe(self.recipe), sort_keys=True)
        return {"recipe_sha256": hashlib.sha256(content.encode()).hexdigest(), "overrides": list(self.overrides)}

    def check(self) -> None:
        """Refuse a folder that cannot be written or is another run's, leaving nothing behind."""
        new = self._missing()
        with self._writing():
            pass
        self._remove(new)
        stamp = self.folder / "run.json"
        if stamp.exists() and read_json(stamp) != self.identity():
            raise UserError(
                f"run folder {self.folder} belongs to another version of {self.recipe} or other overrides; "
                "remove it, or train anew with --fresh (make train FRESH=1), or name another with --run-folder"
            )

    def claim(self) -> None:
        """Make the folder this run's, or check that it is.

        Raises `UserError` if the folder cannot be written or belongs to another version of the recipe.
        """
        stamp = self.folder / "run.json"
        with self._writing():
            if not stamp.exists():
                write_json(stamp, self.identity())
        self.check()

    def forget(self) -> None:
        """Remove the folder of an earlier run. Raises `UserError` where it is no run's folder."""
        if not self.folder.exists():
            return
        if [*self.folder.rglob("run.json")] != [self.folder / "run.json"]:
            raise UserError(
                f"run folder {self.folder}: is not the folder of one run alone, so it is not removed; "
                "name another with --run-folder, or remove it yourself"
            )
        shutil.rmtree(self.folder)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise UserError(
                f"run folder {self.folder}: cannot be written ({error.strerror}); choose another with --run-folder"
            ) from error

    @contextmanager
    def started(self, trainer: Trainer) -> Iterator[None]:
        """Around the trainer's work: a run that fails before its first step leaves no new folder behind.

        Raises `UserError` if the folder cannot be written, `KeyboardInterrupt` if the run was told to stop.
        """
        new = self._missing()
        with self._writing():
            pass
        try:
            yield
        except SystemExit as stop:  # Lightning's answer to Ctrl-C and to SIGTERM; of the latter the status would be 0
            raise KeyboardInterrupt(f"{self.folder}: interrupted; {self._way_on()}") from stop
        except Exception:
            if trainer.global_step == 0:
                self._remove(new)
            raise

    def _way_on(self) -> str:
        if self.last_checkpoint.is_file():
            return f"the same command continues from {self.last_checkpoint}"
        return "there is no checkpoint yet, the same command starts anew"

    def _missing(self) -> list[Path]:
        """The folder and its parents, those that do not exist."""
        return [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]

    def _remove(self, new: list[Path]) -> None:
        """Remove the folder and its parents, those that were made here."""
        if not new:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            for parent in new[1:]:
                parent.rmdir()


def run_of(recipe: str | Path, overrides: Sequence[str], folder: str | Path | None = None) -> Run:
    """The run of a recipe with these overrides, in its usual place unless a folder is given."""
    recipe = Path(recipe)
    if folder == "":
        raise UserError("run folder '': the name is empty; give a folder, or leave the option out")
    if not recipe.is_file():
        raise UserError(f"recipe {recipe}: no such file; see the folder recipes/ for those that ship")
    if folder is None:
        suffix = f"+{hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:6]}" if overrides else ""
        # recipes/var/digits.yaml and mine/var/digits.yaml both are var/digits; their contents tell them apart
        family = "" if recipe.parent.name == "recipes" else recipe.parent.name
        folder = RUNS / family / f"{recipe.stem}{suffix}"
    return Run(recipe, tuple(overrides), Path(folder))


def read_recipe(path: Path) -> dict[str, Any]:
    """What a recipe says. Raises `UserError` where it is not YAML or not a mapping."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path}: must be a mapping with trainer, model and data")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    aside.replace(path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and run again") from error
