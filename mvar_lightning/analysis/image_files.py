"""An evaluation of generated images in a folder: JSON, Markdown, and a picture of the first ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mvar_lightning.analysis.image_report import ImageReport
from mvar_lightning.callbacks.pictures import enlarge, make_grid, to_image
from mvar_lightning.checkpoints.files import written_aside
from mvar_lightning.errors import UserError

FILES = ("images.json", "images.md", "images.png")
SHOWN = 64


def write_report(
    report: ImageReport, about: Mapping[str, Any], image_N3HW: Tensor, columns: int, folder: Path
) -> list[Path]:
    """Write `FILES` into ``folder``, all or none.

    Args:
        report: what was measured.
        about: what was measured on, for the JSON and the foot of the Markdown; what is None is left out of the latter.
        image_N3HW: some images in [0, 1] for the picture.
        columns: of them in a row; 0 makes a square.
        folder: made if it is missing.

    Raises:
        UserError: the folder cannot be written.
    """
    targets = [folder / name for name in FILES]
    told = "".join(f"- {name.replace('_', ' ')}: {value}\n" for name, value in about.items() if value is not None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(*targets) as (numbers, table, picture):
            numbers.write_text(json.dumps({**about, **report.content()}, indent=2) + "\n", encoding="utf-8")
            table.write_text(f"{report.markdown('Generated images')}\n{told}", encoding="utf-8")
            to_image(make_grid(enlarge(image_N3HW), columns)).save(picture)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
    return targets
