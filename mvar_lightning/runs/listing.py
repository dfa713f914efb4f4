"""`mvar runs`: which run is which, how far it is, and what it came to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError
from mvar_lightning.runs.run import RUNS, Run
from mvar_lightning.tools.files import read_json

FIGURES = ("val/loss", "val/fid_", "val/psnr", "val/rfid_")
"""Key figures, by the beginning of their names."""
NO_FIGURES = ("images", "floor")
DEEPEST = 4
"""Folders below the one that is looked through: runs/sweeps/NAME/VARIANT/SEED."""


@dataclass(frozen=True)
class ListedRun:
    """One run's folder.

    Attributes:
        folder, recipe, overrides: which it is.
        state: ``running``, ``finished``, ``stopped`` (the same command goes on) or ``begun`` (no checkpoint yet).
        step: optimizer steps so far, as far as its last checkpoint or report tells.
        figures: of its report.
        seconds_ago: since something in it was written.
        problem: why it could not be read whole.
    """

    folder: str
    recipe: str
    overrides: list[str]
    state: str
    step: int | None
    figures: dict[str, float]
    seconds_ago: float
    problem: str = ""

    @property
    def age(self) -> str:
        """In words, of the largest unit that fits."""
        for name, unit in (("d", 86400), ("h", 3600), ("min", 60)):
            if self.seconds_ago >= unit:
                return f"{self.seconds_ago / unit:.0f} {name}"
        return f"{max(0.0, self.seconds_ago):.0f} s"

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def row(self) -> list[str]:
        """Of the table: run, overrides, step, state, figures, age."""
        figures = ", ".join(f"{name.removeprefix('val/')} {value:.4g}" for name, value in self.figures.items())
        said = " ".join(override.removeprefix("--") for override in self.overrides)
        step = "" if self.step is None else f"{self.step:,}"
        return [self.folder, said, step, self.state, self.problem or figures, self.age]


def list_runs(folder: str | Path = RUNS) -> list[ListedRun]:
    """All runs below a folder, the latest first. What of a run cannot be read is told in its row.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `mvar train RECIPE` makes runs/ where it is called")
    return sorted(map(_listed, _folders(folder, DEEPEST)), key=lambda run: run.seconds_ago)


def _folders(folder: Path, deepest: int) -> Iterator[Path]:
    if (folder / "run.json").is_file():
        yield folder
        return
    if deepest:
        for inside in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
            yield from _folders(inside, deepest - 1)


def _listed(folder: Path) -> ListedRun:
    run, overrides, report, step, problem = Run(Path(), (), folder), [], {}, None, ""
    try:
        stamp = read_json(run.stamp)
        overrides = [str(each) for each in stamp.get("overrides", [])] if isinstance(stamp, dict) else []
        state = _state(run)
        if run.metrics_file.is_file():
            report = run.report()
            step = int(report["steps"])
        elif run.last_checkpoint.is_file():
            step = _step_of(run.last_checkpoint)
    except UserError as error:
        state, problem = "unreadable", str(error)
    written = [path.stat().st_mtime for path in (run.stamp, run.metrics_file, run.last_checkpoint) if path.exists()]
    recipe = str(report.get("recipe", "")) or folder.name.partition("+")[0]
    metrics = report.get("metrics", {})
    figures = {name: value for name, value in metrics.items() if _is_key(name)}
    ago = time.time() - max(written, default=folder.stat().st_mtime)
    return ListedRun(str(folder), recipe, overrides, state, step, figures, ago, problem)


def _is_key(name: str) -> bool:
    return name.startswith(FIGURES) and not any(part in name for part in ("_scale_", "_last", *NO_FIGURES))


def _state(run: Run) -> str:
    try:
        run.lock.check()
    except UserError as error:
        if "another run is at work" in str(error):
            return "running"
        raise
    if run.metrics_file.is_file():
        return "finished"
    return "stopped" if run.last_checkpoint.is_file() else "begun"


def _step_of(checkpoint: Path) -> int | None:
    """From the checkpoint's own record; its weights are not read."""
    from mvar_lightning.checkpoints.folder import open_checkpoint

    step = open_checkpoint(checkpoint, whole=False).training.get("global_step")
    return step if isinstance(step, int) else None
