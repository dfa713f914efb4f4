"""The notebook runs from the first cell to the last, away from the clone, and its stored outputs are small."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "first_steps.ipynb"
STORED_BYTES = 250_000

pytestmark = pytest.mark.ship


def test_first_steps(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    stored = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert NOTEBOOK.stat().st_size < STORED_BYTES and all(cell.outputs or "class" in cell.source for cell in cells)
    shown = [kinds(cell) for cell in cells]
    for cell in cells:
        cell.outputs = []
    nbclient.NotebookClient(
        stored, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert [kinds(cell) for cell in cells] == shown, "what is stored is what it gives"
    assert not list(tmp_path.iterdir())


def kinds(cell: object) -> list[str]:
    """Which kinds of output a cell has: text, and the type of what it shows."""
    outputs = cell.outputs  # type: ignore[attr-defined]
    return sorted({kind for each in outputs for kind in each.get("data", {each.output_type: ""})})
