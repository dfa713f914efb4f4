"""Two processes do together what one does alone: gradients, weights, and every number of a validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import write_digits

from tests.faults.harness import script, start_ranks

SCRIPT = Path(__file__).with_name("two_process_run.py")


def run(*arguments: object) -> dict[str, Any]:
    ranks = 1 if arguments[3] == "one" else 2
    for process in start_ranks(ranks, code=script(SCRIPT, *arguments), seconds=300, env={"CUDA_VISIBLE_DEVICES": ""}):
        done = process.finish()
        assert done.status == 0, done.err[-3000:]
    return torch.load(Path(str(arguments[2])), weights_only=True)


@pytest.mark.slow
def test_two_processes_and_shards_of_the_model_equal_one(tokenizer: Path, tmp_path: Path) -> None:
    """With accumulated and clipped gradients, averaged weights, recomputed activations, also in scale groups.

    Validated on 31 images.
    """
    shards = write_digits(tmp_path / "shards", val=31)
    one, ddp, sharded, ddp_groups, sharded_groups = (
        run(tokenizer, shards, tmp_path / f"{kind.replace(' ', '-')}.pt", *kind.split())
        for kind in ("one", "ddp", "sharded", "ddp groups", "sharded groups")
    )
    assert one["losses"][0] != one["losses"][-1] and max(one["norms"]) > 0.3
    assert {"val/fid_pixels", "val/rfid_pixels", "val/loss", "predictions/usage_scale_2"} <= one["sampled"].keys()
    assert {"val/rfid_pixels", "val/psnr", "val/ssim", "codebook/usage_scale_2"} <= one["reconstructed"].keys()
    for two in (ddp, sharded, ddp_groups, sharded_groups):
        assert one["steps"] == two["steps"] == 4
        assert one["lr"] == two["lr"] == pytest.approx(0.01 * 16 / 256)
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert two["state"].keys() == one["state"].keys()
        for name, value in one["state"].items():
            assert (two["state"][name] - value).abs().mean() < 1e-6, name
        for part in ("sampled", "reconstructed"):
            assert two[part].keys() == one[part].keys()
            different = {n: (v, two[part][n]) for n, v in one[part].items() if two[part][n] != pytest.approx(v, 1e-4)}
            assert not different
        assert two["sampled"]["val/fid_images"] == 7 and two["reconstructed"]["val/rfid_images"] == 31
