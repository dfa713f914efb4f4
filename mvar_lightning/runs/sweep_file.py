"""What a sweep file says: one recipe, its variants and seeds, and the columns of the table they end in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError

MEASURES = ("last", "fall")
LARGEST_SEED = 2**32 - 1
"""Of Lightning's seed_everything, which refuses others, at the start of each run."""
REDUCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max}


@dataclass(frozen=True)
class Column:
    """One number of each run.

    Args:
        metric: name in the run's ``metrics.json``; with ``*`` or ``[1-9]`` it may stand for several.
        title: heading; the metric's name if not given.
        measure: `last`, the final value; or `fall`, how far it fell at worst below the largest value logged before.
        reduce: `min` or `max` of the metrics that the name stands for.
        format: Python's format of one value.
        divide: the value is divided by this first (1048576 makes MiB of bytes).
    """

    metric: str
    title: str = ""
    measure: str = "last"
    reduce: str = "min"
    format: str = ".3g"
    divide: float = 1.0

    def __post_init__(self) -> None:
        for name in ("metric", "title", "measure", "reduce", "format"):
            if not isinstance(value := getattr(self, name), str) or (name == "metric" and not value):
                raise UserError(f"column {self.metric!r}: {name} {value!r} must be text")
        if not _is_number(self.divide) or not self.divide:
            raise UserError(f"column {self.metric!r}: divide {self.divide!r} must be a number other than 0")
        if self.measure not in MEASURES or self.reduce not in REDUCTIONS:
            raise UserError(
                f"column {self.metric!r}: measure {self.measure!r}, reduce {self.reduce!r}; "
                f"they can be {', '.join(MEASURES)} and {', '.join(REDUCTIONS)}"
            )
        try:
            format(0.5, self.format)
        except ValueError:
            raise UserError(f"column {self.metric!r}: {self.format!r} formats no number; try .3f or .1%") from None

    @property
    def heading(self) -> str:
        return self.title or self.metric

    def write(self, value: float) -> str:
        return format(value, self.format)


@dataclass(frozen=True)
class Sweep:
    """A recipe trained in several variants, each with every seed.

    Args:
        recipe: the YAML file that the variants change.
        variants: name of each -> settings that replace the recipe's (`model.depth: 4`).
        columns: what the table shows.
        overrides: settings of every variant.
        seeds: values of ``seed_everything``.
        plot: metrics of the columns that are drawn as bars; all columns if not given.
        curves: logged metrics drawn over the steps of the run.
    """

    recipe: str
    variants: dict[str, dict[str, Any]]
    columns: tuple[Column, ...]
    overrides: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    plot: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()

    def arguments(self, variant: str, seed: int) -> list[str]:
        """Command-line overrides of one run."""
        settings = {**self.overrides, **self.variants[variant], "seed_everything": seed}
        return [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
        ]

    @property
    def plotted(self) -> tuple[Column, ...]:
        chosen = tuple(column for column in self.columns if column.metric in self.plot)
        return chosen or self.columns


def read_sweep(path: str | Path) -> Sweep:
    """A sweep file. Raises UserError where it is missing, not YAML, or says something else than a sweep."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"sweep {path}: not UTF-8 text (byte {error.start}); see recipes/ablations/") from None
    except OSError as error:
        raise UserError(f"sweep {path}: cannot be read ({error.strerror}); see recipes/ablations/") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
        raise UserError(f"sweep {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, Mapping):
        raise UserError(f"sweep {path}: must be a mapping with recipe, variants and columns")
    known = [field.name for field in fields(Sweep)]
    if unknown := sorted(set(map(str, content)) - set(known)):
        raise UserError(f"sweep {path}: {unknown[0]!r} is not known; it can have {', '.join(known)}")
    return _sweep(path, content)


def _sweep(path: str | Path, content: Mapping[str, Any]) -> Sweep:
    for needed in ("recipe", "variants", "columns"):
        if not content.get(needed):
            raise UserError(f"sweep {path}: {needed} is missing or empty")
    if not isinstance(recipe := content["recipe"], str):
        raise UserError(f"sweep {path}: recipe {recipe!r} must be the name of a YAML file")
    columns = _columns(path, content["columns"])
    plot = _names(path, content, "plot")
    if unknown := [metric for metric in plot if metric not in {column.metric for column in columns}]:
        raise UserError(f"sweep {path}: plot: {unknown[0]!r} is the metric of no column")
    return Sweep(
        recipe=recipe,
        variants=_variants(path, content["variants"]),
        columns=columns,
        overrides=_settings(path, "overrides", content.get("overrides")),
        seeds=_seeds(path, content.get("seeds", [0])),
        plot=plot,
        curves=_names(path, content, "curves"),
    )


def _variants(path: str | Path, variants: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(variants, Mapping) or not all(isinstance(v, Mapping | None) for v in variants.values()):
        raise UserError(f"sweep {path}: variants must map each name to its settings, such as {{model.depth: 4}}")
    for name in map(str, variants):
        if not name or name[0] == "." or "/" in name or "\0" in name:
            raise UserError(f"sweep {path}: variant {name!r} is also a folder's name; use letters, digits and - alone")
    return {str(name): _settings(path, f"variant {name}", settings) for name, settings in variants.items()}


def _settings(path: str | Path, where: str, settings: Any) -> dict[str, Any]:
    if not isinstance(settings, Mapping | None):
        raise UserError(f"sweep {path}: {where} {settings!r} must be settings, such as {{model.depth: 4}}")
    for name, value in (settings or {}).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):  # a date, a set, or a list within itself
            raise UserError(
                f"sweep {path}: {where}: {name} {value!r} is no text, number, list or mapping; quote it"
            ) from None
    return dict(settings or {})


def _columns(path: str | Path, columns: Any) -> tuple[Column, ...]:
    if not isinstance(columns, list) or not all(isinstance(column, Mapping) for column in columns):
        raise UserError(f"sweep {path}: columns must be a list of mappings with a metric")
    try:
        return tuple(Column(**column) for column in columns)
    except TypeError as error:
        raise UserError(f"sweep {path}: columns: {str(error).split(') ')[-1]}") from None
    except UserError as error:
        raise UserError(f"sweep {path}: {error}") from None


def _seeds(path: str | Path, seeds: Any) -> tuple[int, ...]:
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or not all(0 <= seed <= LARGEST_SEED for seed in seeds):
        raise UserError(f"sweep {path}: seeds {seeds!r} must be a list of whole numbers, 0 to {LARGEST_SEED}")
    return tuple(dict.fromkeys(seeds))


def _names(path: str | Path, content: Mapping[str, Any], which: str) -> tuple[str, ...]:
    """A list of metrics. One name alone is refused: its letters would be taken for names."""
    names = content.get(which) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"sweep {path}: {which} {names!r} must be a list of metrics, such as [val/loss]")
    return tuple(names)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
