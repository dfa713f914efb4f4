"""What the code computes is what a16be38, the last commit before its files were moved, computed.

`python -m benchmarks.unchanged` says the same bit for bit, with both revisions on one machine.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import mvar_lightning

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECORD: dict[str, Any] = json.loads((BENCHMARKS / "results" / "unchanged.json").read_text())
BEFORE: dict[str, Any] = RECORD["items"]

pytestmark = pytest.mark.slow

OTHER_TOKENS = 0.01
"""Another CPU sums floats in another order, so a latent halfway between two codes, or a draw at the border of two
probabilities, may come out as the neighbor. That is a rare token; a mistake changes most of them."""

LOOSE = {"losses, tokenizer": 1e-3}
"""With the widest and the narrowest instructions of one CPU, ten losses of a transformer differ by 2e-7 of themselves.
Those of the tokenizer, whose codes are chosen anew at each step, differ by 4e-5, from the second step on."""


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The probe's items of the package under test."""
    spec = importlib.util.spec_from_file_location("unchanged", BENCHMARKS / "unchanged.py")
    assert spec is not None and spec.loader is not None
    unchanged = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unchanged)
    checkout = Path(mvar_lightning.__file__).parents[1]
    return unchanged.run_probe(checkout, tmp_path_factory.mktemp("unchanged") / "probe")["items"]


def with_part(part: str) -> list[str]:
    return [name for name, item in BEFORE.items() if part in item]


def test_every_item_of_the_record_is_computed(now: dict[str, Any]) -> None:
    assert {name: sorted(item) for name, item in now.items()} == {name: sorted(item) for name, item in BEFORE.items()}


@pytest.mark.parametrize("name", with_part("exact"))
def test_files_orders_and_hashes_are_the_same(name: str, now: dict[str, Any]) -> None:
    """Shards and their index, the order of samples, the structure of a token cache, fingerprints of saved folders."""
    before, after = BEFORE[name]["exact"], now[name]["exact"]
    assert sorted(after) == sorted(before)
    for part in before:
        found = after[part]
        if isinstance(found, dict) and "tokenizer_hash" in found:
            found = {key: value for key, value in found.items() if key != "crc32"}  # checksums came later
        assert found == before[part], part


@pytest.mark.parametrize("name", with_part("tokens"))
def test_tokens_are_the_same_but_for_float_sums(name: str, now: dict[str, Any]) -> None:
    before, after = BEFORE[name]["tokens"], now[name]["tokens"]
    assert [len(row) for row in after] == [len(row) for row in before]
    pairs = [pair for rows in zip(before, after, strict=True) for pair in zip(*rows, strict=True)]
    others = sum(old != new for old, new in pairs)
    assert others <= OTHER_TOKENS * len(pairs), f"{others} of {len(pairs)} tokens are others"


@pytest.mark.parametrize("name", with_part("losses"))
def test_ten_steps_have_the_same_losses(name: str, now: dict[str, Any]) -> None:
    """Also learning rates, gradient norms, and the losses of each scale and of the validations."""
    before, after = BEFORE[name]["losses"], now[name]["losses"]
    assert sorted(after) == sorted(before)
    room = LOOSE.get(name, 1e-5)
    for column in before:
        if column.startswith("codebook/"):  # whole codes, of which one counts
            continue
        old, new = ([float.fromhex(value) for value in values[column]] for values in (before, after))
        assert len(new) == len(old), column
        assert new == pytest.approx(old, rel=room, abs=1e-9), column
        if column == "train/loss":
            assert new[0] == pytest.approx(old[0], rel=1e-5), "the first step follows from no other"
