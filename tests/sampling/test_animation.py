"""The moving picture of a sampling job: a frame a scale, the last one of the very images in the folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvar_lightning.cli import main


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_frames_go_from_coarse_to_the_images_of_the_folder(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [
        "sample",
        "--checkpoint",
        "digits",
        "--classes",
        "3,7",
        "--count",
        "4",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert main([*words, "--strips", form]) == 0
    assert f"strips: {out}/coarse_to_fine.{form}" in capsys.readouterr().out
    with Image.open(out / f"coarse_to_fine.{form}") as moving, Image.open(out / "grid.png") as grid:
        assert moving.n_frames == 4 and moving.size == grid.size
        frames = []
        for index in range(4):
            moving.seek(index)
            frames.append(np.asarray(moving.convert("RGB"), dtype=int))
        last = np.asarray(grid.convert("RGB"), dtype=int)
    apart = [np.abs(frame - last).mean() for frame in frames]
    assert apart == sorted(apart, reverse=True) and apart[0] > 10
    assert apart[-1] == 0 if form == "webp" else apart[-1] < 3, "a GIF has 256 colors"
