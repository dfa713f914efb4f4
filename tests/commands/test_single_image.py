"""A data set of one image: a run with everything on says what it cannot measure and goes on to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mvar_lightning.cli import main
from mvar_lightning.data.making.embedded import digits
from mvar_lightning.data.making.shards import ShardLimits, ShardsRequest, make_shards
from mvar_lightning.data.making.sources import Source


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_tokenizer_run_on_one_image(
    batch_size: int,
    tokenizer_recipe: dict[str, Any],
    workplace: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = digits()
    make_shards(
        ShardsRequest(
            Source(whole.class_names, whole.train[:1], whole.val[:1]), workplace / "one", ShardLimits(samples=4)
        )
    )
    tokenizer_recipe["data"]["init_args"] |= {"path": "one", "batch_size": batch_size}
    names = ("ReconstructionMetrics", "ReconstructionGrid", "ReconstructionStrips", "EMA")
    tokenizer_recipe["trainer"] |= {
        "max_epochs": 2,
        "callbacks": [{"class_path": f"mvar_lightning.callbacks.{name}"} for name in names],
    }
    (workplace / "recipes" / "tok.yaml").write_text(yaml.safe_dump(tokenizer_recipe, sort_keys=False))
    status = main(["train", "recipes/tok.yaml"])
    said = capfd.readouterr().err
    if batch_size > 1:
        assert status == 2 and "an epoch of 1 samples is less than one batch of 32" in said
        assert "give a smaller batch_size" in said
        return
    assert status == 0, said
    assert caplog.text.count("its numbers are left out: a data set of one image trains no classifier") == 1
    found = json.loads((workplace / "runs" / "tok" / "metrics.json").read_text())
    assert "psnr" in json.dumps(found) and "rfid" not in json.dumps(found)
