"""What a recipe says, as plain YAML: read without torch or Lightning, so that mistakes are told at once.

A checkpoint's run is asked here, too: where its data is, and how its images are cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvar_lightning.errors import UserError


def check_there(recipe: Path) -> None:
    """Raise `UserError` where there is no such file."""
    if not recipe.is_file():
        raise UserError(f"recipe {recipe}: no such file; see the folder recipes/ for those that ship")


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
    checkpoints: Sequence[str | Path],
    resize_ratio: float | None = None,
    crop: str | None = None,
    *,
    matters: bool = True,
) -> Cutting:
    """How images are cut: as given, else as the runs of the checkpoints validate, else as published.

    A run of tokens does not say how its images were cut. What a single checkpoint's run says is printed.

    Args:
        checkpoints: whose runs are asked.
        resize_ratio, crop: None where they are not given.
        matters: whether images are cut at all, so that it is worth a line.

    Raises:
        UserError: a ratio that no image can be cut with, or runs that differ where nothing is given.
    """
    from mvar_lightning.data.transforms import check_ratio

    found = {str(path): _cutting_of(path, resize_ratio, crop) for path in checkpoints}
    (first, (cut, taken)), *others = found.items() or [("", (_given(resize_ratio, crop), ""))]
    check_ratio(cut.resize_ratio)
    for path, (other, _) in others:
        if other != cut:
            raise UserError(
                f"``checkpoint`` {path}: cuts images with ``resize_ratio`` {other.resize_ratio} ``crop`` {other.crop}, "
                f"{first} with ``resize_ratio`` {cut.resize_ratio} ``crop`` {cut.crop}; give both options"
            )
    if taken and matters:
        print(f"{first}: images are cut as its run validates: {taken}", flush=True)
    return cut


def _given(resize_ratio: float | None, crop: str | None) -> Cutting:
    published = Cutting()
    return Cutting(
        published.resize_ratio if resize_ratio is None else resize_ratio, published.crop if crop is None else crop
    )


def _cutting_of(checkpoint: str | Path, resize_ratio: float | None, crop: str | None) -> tuple[Cutting, str]:
    """How images are cut for one checkpoint, and what of it its run says, as options."""
    settings = data_settings(checkpoint)
    ratio, run_crop = settings.get("resize_ratio"), settings.get("val_crop")
    taken = []
    if resize_ratio is None and isinstance(ratio, int | float) and math.isfinite(ratio):
        resize_ratio = float(ratio)
        taken.append(f"--resize-ratio {resize_ratio}")
    if crop is None and run_crop in ("center", "adm"):
        crop = run_crop
        taken.append(f"--crop {crop}")
    return _given(resize_ratio, crop), " ".join(taken)
