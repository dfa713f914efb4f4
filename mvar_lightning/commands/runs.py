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
        """What must be the same for this folder to be continued or reused."""
        text = self.recipe.read_bytes()
        return {"recipe_sha256": hashlib.sha256(text).hexdigest(), "overrides": list(self.overrides)}

    def claim(self) -> None:
        """Make the folder this run's, or check that it is.

        Raises `UserError` if the folder cannot be written or belongs to another version of the recipe.
        """
        stamp = self.folder / "run.json"
        with self._writing():
            if not stamp.exists():
                write_json(stamp, self.identity())
        if read_json(stamp) != self.identity():
            raise UserError(
                f"run folder {self.folder} belongs to another version of {self.recipe} or other overrides; "
                "remove it, or train anew with --fresh (make train FRESH=1), or name another with --run-folder"
            )

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

        Raises `UserError` if the folder cannot be written.
        """
        new = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        with self._writing():
            pass
        try:
            yield
        except Exception:
            if new and trainer.global_step == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
                with suppress(OSError):
                    for parent in new[1:]:
                        parent.rmdir()
            raise


def run_of(recipe: str | Path, overrides: Sequence[str], folder: str | Path | None = None) -> Run:
    """The run of a recipe with these overrides, in its usual place unless a folder is given."""
    recipe = Path(recipe)
    if not recipe.is_file():
        raise UserError(f"recipe {recipe}: no such file; see the folder recipes/ for those that ship")
    if folder is None:
        suffix = f"+{hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:6]}" if overrides else ""
        # recipes/var/digits.yaml and mine/var/digits.yaml both are var/digits; their contents tell them apart
        folder = RUNS / recipe.parent.name / f"{recipe.stem}{suffix}"
    return Run(recipe, tuple(overrides), Path(folder))


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
