"""What the recipe of a checkpoint's run says about its data: where it is, and how its images are cut."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

RATIO, CROP = 1.125, "center"
"""How images are cut where neither an option nor a run says it: as published."""


def data_settings(checkpoint: str | Path) -> dict[str, Any]:
    """Settings of the data of the run that a checkpoint lies in; empty where there is no run, or its recipe says none.

    Args:
        checkpoint: a run's folder, the ``model/`` in it, or a file of its ``checkpoints/``.

    Raises:
        UserError: the run's recipe is not readable.
    """
    from mvar_lightning.commands.runs import read_recipe

    path = Path(checkpoint)
    folder = path.parent if path.name == "model" else path.parent.parent if path.parent.name == "checkpoints" else path
    if not (folder / "config.yaml").is_file():
        return {}
    data = read_recipe(folder / "config.yaml").get("data")
    settings = data.get("init_args") if isinstance(data, dict) else None
    return settings if isinstance(settings, dict) else {}


def settle_cutting(args: argparse.Namespace, checkpoint: str | Path | None, *, matters: bool = True) -> None:
    """Fill in ``--resize-ratio`` and ``--crop`` where they are not given: as the checkpoint's run validates, else as
    published. A run of tokens does not say how its images were cut.

    Args:
        args: with both, None where they were not given.
        checkpoint: whose run is asked; none asks none.
        matters: whether images are cut at all, so that it is worth a line.

    Raises:
        UserError: a ratio that no image can be cut with.
    """
    from mvar_lightning.data.transforms import check_ratio

    settings = {} if checkpoint is None else data_settings(checkpoint)
    ratio, crop = settings.get("resize_ratio"), settings.get("val_crop")
    taken = []
    if args.resize_ratio is None:
        args.resize_ratio = RATIO
        if isinstance(ratio, int | float) and math.isfinite(ratio):
            args.resize_ratio = float(ratio)
            taken.append(f"--resize-ratio {args.resize_ratio}")
    if args.crop is None:
        args.crop = CROP
        if crop in ("center", "adm"):
            args.crop = crop
            taken.append(f"--crop {crop}")
    check_ratio(args.resize_ratio)
    if taken and matters:
        print(f"{checkpoint}: images are cut as its run validates: {' '.join(taken)}", flush=True)
