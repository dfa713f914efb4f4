"""Finished runs of a sweep as small files of JSON, so that a table goes on, and is drawn again, without ``runs/``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError
from mvar_lightning.runs.run import DAMAGED, Run
from mvar_lightning.runs.sweep_results import Curve, Sweep, SweepRun
from mvar_lightning.tools.files import read_json, write


class KeptRuns:
    """A folder with a file for each finished run: what it is of, its report, and the curves that the sweep draws.

    Args:
        folder: made when the first run is written.
        sweep: whose columns and curves say which logged numbers are kept.
    """

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self.folder, self.sweep = folder, sweep

    def file(self, variant: str, seed: int) -> Path:
        return self.folder / f"{variant}-seed{seed}.json"

    def read(self, variant: str, seed: int, run: Run) -> SweepRun | None:
        """A run that was kept; None where there is none.

        Raises:
            UserError: a damaged file, or one of another version of the recipe or other overrides.
        """
        file = self.file(variant, seed)
        if not file.exists():
            return None
        found = read_json(file, DAMAGED)
        if not isinstance(found, Mapping) or not {"identity", "report", "curves"} <= set(found):
            raise UserError(f"{file}: is no run that a sweep kept; remove it and sweep again")
        if found["identity"] != run.identity():
            raise UserError(
                f"{file}: is of another version of {run.recipe} or other overrides; remove it to train anew, or keep "
                "the new results in another folder with ``keep``"
            )
        try:
            curves = {name: Curve(tuple(steps), tuple(values)) for name, (steps, values) in found["curves"].items()}
            float(found["report"]["steps"])
            return SweepRun(variant, seed, {**found["report"], "metrics": dict(found["report"]["metrics"])}, curves)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{file}: is no run that a sweep kept; remove it and sweep again") from None

    def write(self, run: Run, finished: SweepRun) -> None:
        """Keep a finished run. Raises UserError where the folder cannot be written."""
        shown = {*self.sweep.curves, *(column.metric for column in self.sweep.columns if column.measure != "last")}
        content: dict[str, Any] = {
            "identity": run.identity(),
            "report": finished.report,
            "curves": {name: list(curve) for name, curve in finished.curves.items() if name in shown},
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.file(finished.variant, finished.seed), json.dumps(content) + "\n")
        except OSError as error:
            raise UserError(f"``keep`` {self.folder}: cannot be written ({error.strerror})") from error
