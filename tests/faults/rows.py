"""The rows of faults, against any checkout: `python -m tests.faults.rows --product DIR [--only ID] [--out FILE]`.

One line of JSON a row: its id, whether the product is right, and the reason where it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from . import rows_checkpoints, rows_command, rows_images, rows_library, rows_shards, rows_training  # noqa: F401
from .assets import make
from .corpus import clear, name_of
from .harness import PROJECT, Harness
from .rows_kit import ROWS, Case, Row, Skip


def answer_of(row: Row, product: Path, harness: Harness, assets: Path, folder: Path) -> dict[str, Any]:
    """Judge one row in a new folder; `right` is None where this machine does not allow it."""
    folder.mkdir(mode=0o755, parents=True)
    begin = time.monotonic()
    try:
        reason = row.function(Case(product, harness, assets, folder))
        right: bool | None = reason is None
    except Skip as skipped:
        right, reason = None, str(skipped)
    finally:
        seconds = time.monotonic() - begin
        clear(folder)
    for path, name in ((folder, "CASE"), (assets, "ASSETS"), (product, "PRODUCT")):
        reason = reason and reason.replace(str(path), name)
    return {"id": row.id, "row": row.words, "right": right, "reason": reason, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--product", type=Path, default=PROJECT, metavar="DIR", help="a checkout (this one)")
    parser.add_argument("--only", default="", metavar="ID", help="rows whose id contains this")
    parser.add_argument("--out", type=Path, metavar="FILE", help="lines of JSON (stdout)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where the tiny assets are kept")
    arguments = parser.parse_args()
    product = arguments.product.resolve()
    cache = arguments.cache or Path(tempfile.gettempdir()) / f"mvar-faults-{os.getuid()}" / name_of(product)
    harness = Harness(product)
    assets = make(cache, harness)
    lines = []
    with tempfile.TemporaryDirectory(prefix="rows-") as place:
        Path(place).chmod(0o755)
        for number, row in enumerate(row for row in ROWS if arguments.only in row.id):
            line = answer_of(row, product, harness, assets, Path(place) / f"case-{number}")
            lines.append(json.dumps(line))
            print(lines[-1], flush=True)
    harness.close()
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
