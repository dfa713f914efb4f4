"""Every row of faults: right today, and wrong on the old commit for a reason that is the row's own."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import PROJECT, shared
from tests.faults.rows import answer_of
from tests.faults.rows_kit import ROWS, Row

OLD = Path(__file__).with_name("rows_a16be38.jsonl")
RIGHT_THEN: dict[str, str] = {}
"""Rows that the old commit answers rightly here, and why."""
MISSING_NAME = re.compile(r"ImportError|ModuleNotFoundError|cannot import name|module '.*' has no attribute")


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_row_is_right(row: Row, assets: Path) -> None:
    # not under pytest's own folder, which is root's alone: some rows run as another user
    with tempfile.TemporaryDirectory(prefix="row-") as place:
        Path(place).chmod(0o755)
        told = answer_of(row, PROJECT, shared(), assets, Path(place) / "case")
    if told["right"] is None:
        pytest.skip(told["reason"])
    assert told["right"], told["reason"]


def old() -> dict[str, dict[str, Any]]:
    return {line["id"]: line for line in map(json.loads, OLD.read_text().splitlines())}


def test_the_old_commit_was_wrong_in_every_row() -> None:
    lines = old()
    assert list(lines) == [row.id for row in ROWS]
    assert {name for name, line in lines.items() if line["right"]} == RIGHT_THEN.keys()
    for name, line in lines.items():
        assert line["right"] or line["reason"], name
        assert not MISSING_NAME.search(line["reason"] or ""), line
