"""A run's recipe as plain YAML, and where the run lives: a folder under runs/ named after recipe and overrides.

The folder is this run's alone while it is at work, and another version of the recipe is refused. Light: recipes are
read without torch or Lightning, so that mistakes are told at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mvar_lightning.compat import said_by_lightning
from mvar_lightning.errors import UserError
from mvar_lightning.runs.naming import in_words, other_recipes, short_hash
from mvar_lightning.runs.recipe_files import recipe_file
from mvar_lightning.tools.files import Lock, check_claim, read_json, write_json
from mvar_lightning.tools.processes import is_lost_process, is_main, started_by_lightning

if TYPE_CHECKING:
    from lightning import Trainer

RUNS = Path("runs")

DAMAGED = "cannot be read ({error}); remove it and run again"
"""What is said of a file of a run that is no JSON."""


REPORTED = ("steps", "seconds", "parameters", "peak_memory_bytes")
"""Numbers of every report."""


class Stopped(KeyboardInterrupt):
    """A run was interrupted or told to stop; the message says which, and how to go on."""


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


def read_recipe(path: Path) -> dict[str, Any]:
    """What a recipe says. Raises `UserError` where it is not there, not YAML or not a mapping."""
    import yaml

    path = recipe_file(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        raise UserError(f"recipe {path}: not valid YAML ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path}: must be a mapping with trainer, model and data")
    try:
        json.dumps(content, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # keys that are no text, aliases that hold themselves
        raise UserError(
            f"recipe {path}: not a recipe's YAML ({error}); keys are words, and no alias holds itself"
        ) from error
    return content


@dataclass(frozen=True)
class Run:
    """One run of a recipe: its YAML file, arguments that replace values of it, the folder that all of it goes to."""

    recipe: Path
    overrides: tuple[str, ...]
    folder: Path

    @property
    def stamp(self) -> Path:
        """The note of whose folder it is (`identity`)."""
        return self.folder / "run.json"

    @property
    def lock(self) -> Lock:
        """Held by rank zero for as long as the run lasts."""
        return Lock(
            self.folder / ".lock",
            f"run folder {self.folder}: another run is at work in it ({{owner}}); wait for it or stop it, or name "
            "another folder with ``run_folder``",
        )

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

    @property
    def arguments(self) -> list[str]:
        """The command line of `runs.recipe.SuiteCLI`."""
        return ["--config", str(self.recipe), *self.overrides]

    def identity(self) -> dict[str, Any]:
        """What must be the same for this folder to be continued or reused: what the recipe says, not its comments; of
        what it takes from elsewhere (``${oc.env:LR}``), the value."""
        content = read_recipe(self.recipe)
        identity = {"recipe_sha256": _digest(content), "overrides": list(self.overrides)}
        if others := other_recipes(self.overrides):
            identity["others_sha256"] = _digest([read_recipe(other) for other in others])
        texts = [content, *(override.partition("=")[2] for override in self.overrides)]
        if "${" in json.dumps(texts, default=str):
            identity["resolved_sha256"] = _digest([_resolved(text) for text in texts])
        return identity

    def is_known(self) -> bool:
        """Whether the folder is this run's; False where it is nobody's. Raises `UserError` for another's."""
        identity = self.identity()
        if "resolved_sha256" in identity and self.stamp.exists():
            known = read_json(self.stamp, DAMAGED)
            if isinstance(known, dict) and "recipe_sha256" in known and "resolved_sha256" not in known:
                del identity["resolved_sha256"]  # of a version that did not look
        return check_claim(self.stamp, identity, self._refusal)

    def report(self) -> dict[str, Any]:
        """What the finished run reported. Raises `UserError` where ``metrics.json`` is no report."""
        found = read_json(self.metrics_file, DAMAGED)
        numbers = found.get("metrics") if isinstance(found, dict) else None
        if isinstance(numbers, dict) and "steps" in found:
            values = [*numbers.values(), *(found.get(name, 0) for name in REPORTED)]
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
                return {**dict.fromkeys(REPORTED, 0), **found}
        raise UserError(f"{self.metrics_file}: is no report of a run; remove it and run again")

    def check(self, fresh: bool = False) -> None:
        """Refuse a folder that cannot be written, is another run's or in use, leaving nothing behind.

        Of several processes all look whose it is, so that none waits for one that was refused (with ``fresh`` it is
        nobody's, or soon). For the rest rank zero looks, before any has begun to work; so do `claim` and `forget`.
        """
        if not is_main():
            _ = fresh or self.is_known()
            return
        new = self._missing()
        with self._writing():
            pass
        self._remove(new)
        self.lock.check()
        self.is_known()

    def claim(self) -> None:
        """Make the folder this run's, or check that it is. Raises `UserError` as `check`."""
        if not is_main():
            return
        with self._writing():
            if not self.is_known():
                write_json(self.stamp, self.identity())
            self.sweep()
        self.check()

    def _refusal(self, setting: str, *values: Any) -> str:
        if setting == "resolved_sha256":
            return (
                f"run folder {self.folder} belongs to a run with other values for what {self.recipe} takes from the "
                "environment; set them as they were, or name another folder with ``run_folder``"
            )
        return (
            f"run folder {self.folder} belongs to another version of {self.recipe} or other overrides; "
            "remove it, or train anew with ``fresh`` (make train FRESH=1), or name another with ``run_folder``"
        )

    def sweep(self) -> None:
        """Remove what killed processes left in the folder: files and weights that were being written."""
        names = (".partial-*", "checkpoints/.partial-*", ".aside-*", ".writable.*")
        for left in [path for name in names for path in self.folder.glob(name)]:
            if (left / "old").exists() and not self.model_folder.exists():
                continue  # weights that were being replaced, the only ones now
            shutil.rmtree(left, ignore_errors=True)
            with suppress(OSError):
                left.unlink()

    def forget(self) -> None:
        """Remove the folder of an earlier run. Raises `UserError` where it is no run's folder."""
        if not is_main() or not self.folder.exists():
            return
        self.lock.check()
        if [*self.folder.rglob(self.stamp.name)] != [self.stamp]:
            raise UserError(
                f"run folder {self.folder}: is not the folder of one run alone, so it is not removed; "
                "name another with ``run_folder``, or remove it yourself"
            )
        shutil.rmtree(self.folder)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise UserError(
                f"run folder {self.folder}: cannot be written ({error.strerror}); choose another with ``run_folder``"
            ) from error

    @contextmanager
    def started(self, trainer: Trainer, alone: bool = True) -> Iterator[None]:
        """Around the trainer's work: a run that fails before its first step leaves no new folder behind.

        Args:
            trainer: the one at work.
            alone: no other run may be at work in the folder.

        Raises:
            UserError: the folder cannot be written or is in use, the disk is full, or another process of the run died.
            KeyboardInterrupt: the run was told to stop.
        """
        new, lock = self._missing() if is_main() else [], self.lock
        if is_main():
            with self._writing():
                if alone:
                    lock.take()
        try:
            yield
        except SystemExit as stop:  # ours and Lightning's answer to Ctrl-C; its status could be 0
            if started_by_lightning():
                raise SystemExit(0) from stop  # with another status the first process would be killed from behind
            why = str(stop) if isinstance(stop.code, str) else "interrupted"
            raise Stopped(f"{self.folder}: {why}; {self.way_on()}") from stop
        except Exception as error:
            if trainer.global_step == 0:
                self._remove(new)
            if message := self._of_machines(error):
                raise UserError(message) from error
            raise
        finally:
            lock.release()

    def _of_machines(self, error: Exception) -> str:
        """What happened to the machines, or what Lightning refuses, in one line; nothing for bugs of ours."""
        if is_lost_process(error):
            reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip().splitlines()[0])[:160]  # not where in whose source
            return (
                f"{self.folder}: another process of this run has ended, so this one ends too ({reason}); "
                f"its own message tells why (none: it was killed, often for memory); {self.way_on()}"
            )
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return f"{self.folder}: {error.strerror} ({error.filename or 'while writing'}); {self.way_on()}"
        return said_by_lightning(error)

    def way_on(self) -> str:
        """How to go on with a run that has ended early."""
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


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _resolved(content: Any) -> Any:
    """A recipe, or the text of an override, with its interpolations resolved as the parser does; where they cannot be,
    as it is: the parser says so."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = yaml.safe_load(content) if isinstance(content, str) else content
        whole = isinstance(value, dict | list)
        return OmegaConf.to_container(OmegaConf.create(value), resolve=True) if whole else value
    except (yaml.YAMLError, OmegaConfBaseException, ValueError):
        return content


def run_of(recipe: str | Path, overrides: Sequence[str], folder: str | Path | None = None) -> Run:
    """The run of a recipe with these overrides, in its usual place unless a folder is given."""
    is_main()  # a rank in the environment that is no number is told before Lightning trips over it
    if folder == "":
        raise UserError("run folder '': the name is empty; give a folder, or leave the option out")
    recipe = recipe_file(recipe)
    if folder is None:
        # recipes/var/digits.yaml and mine/var/digits.yaml both are var/digits; their contents tell them apart
        family = "" if recipe.parent.name == "recipes" else recipe.parent.name
        before = RUNS / family / f"{recipe.stem}+{short_hash(overrides)}"  # of a version that wrote no words
        folder = before if overrides and before.exists() else RUNS / family / f"{recipe.stem}{in_words(overrides)}"
    if "${" in str(folder):  # the parser would look it up: pictures here, curves there
        raise UserError(f"run folder {folder}: ${{ begins a reference in a recipe; choose a name without it")
    return Run(recipe, tuple(overrides), Path(folder))


# Where a checkpoint's run has its data, and how it cuts its images.


class Cutting(NamedTuple):
    """How images are cut: the shorter side before the crop, over the image size, and the crop; as published."""

    resize_ratio: float = 1.125
    crop: str = "center"


def data_settings(checkpoint: str | Path) -> dict[str, Any]:
    """Settings of the data of the run that a checkpoint lies in; empty where there is no run, or its recipe says none.

    Args:
        checkpoint: a run's folder, the ``model/`` in it, or a file of its ``checkpoints/``.

    Raises:
        UserError: the run's recipe is not readable.
    """
    path = Path(checkpoint)
    folder = path.parent if path.name == "model" else path.parent.parent if path.parent.name == "checkpoints" else path
    if not (folder / "config.yaml").is_file():
        return {}
    data = read_recipe(folder / "config.yaml").get("data")
    settings = data.get("init_args") if isinstance(data, dict) else None
    return settings if isinstance(settings, dict) else {}


def settle_cutting(
    checkpoints: Sequence[str | Path | None],
    resize_ratio: float | None = None,
    crop: str | None = None,
    *,
    matters: bool = True,
) -> Cutting:
    """How images are cut: as given, else as the runs of the checkpoints validate, else as published.

    A run of tokens does not say how its images were cut. What a single checkpoint's run says is printed.

    Args:
        checkpoints: whose runs are asked; None is passed over.
        resize_ratio, crop: None where they are not given.
        matters: whether images are cut at all, so that it is worth a line.

    Raises:
        UserError: a ratio that no image can be cut with, or runs that differ where nothing is given.
    """
    from mvar_lightning.data.transforms import check_ratio

    given = {"resize_ratio": resize_ratio, "crop": crop}
    given = {name: value for name, value in given.items() if value is not None}
    of_runs = {str(path): _cutting_of_run(path) for path in checkpoints if path is not None} or {"": {}}
    (first, cut), *others = [(path, Cutting(**(own | given))) for path, own in of_runs.items()]
    check_ratio(cut.resize_ratio)
    for path, other in others:
        if other != cut:
            raise UserError(
                f"``checkpoint`` {path}: cuts images with ``resize_ratio`` {other.resize_ratio} ``crop`` {other.crop}, "
                f"{first} with ``resize_ratio`` {cut.resize_ratio} ``crop`` {cut.crop}; give both options"
            )
    taken = [f"--{name.replace('_', '-')} {own}" for name, own in of_runs[first].items() if name not in given]
    if taken and matters:
        print(f"{first}: images are cut as its run validates: {' '.join(taken)}", flush=True)
    return cut


def _cutting_of_run(checkpoint: str | Path) -> dict[str, Any]:
    """What the run of a checkpoint says about it; values that no image can be cut by are left out."""
    settings = data_settings(checkpoint)
    ratio, crop = settings.get("resize_ratio"), settings.get("val_crop")
    said = {"resize_ratio": float(ratio)} if isinstance(ratio, int | float) and math.isfinite(ratio) else {}
    return said | ({"crop": crop} if crop in ("center", "adm") else {})
