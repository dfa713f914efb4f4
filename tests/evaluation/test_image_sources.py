"""Images from folders and archives: what is no image set, and what is damaged, is told in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.image_sources import ArchiveImages, FolderImages, open_images
from mvar_lightning.evaluation.images import FeatureStore

PIXELS = np.random.default_rng(0).integers(0, 9, (6, 8, 8, 3), dtype=np.uint8)


def folder(path: Path) -> Path:
    path.mkdir()
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(path / f"{number}.png")
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_an_archive_damaged_anywhere_is_told(save: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    save(path, PIXELS)
    whole, told = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / f"{place}.npz").write_bytes(damaged)  # each under its own name: what is unpacked is kept
        try:
            list(ArchiveImages(tmp_path / f"{place}.npz").read(0, 4))  # stored pixels can be any
        except UserError as error:
            told += f"{place}.npz" in str(error)
    assert told > (40 if save is np.savez else len(whole) / 3 / 2)


def test_a_damaged_part_of_features_is_told_at_any_place(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.npz"
    np.savez_compressed(path, features=PIXELS.astype(np.float32))
    whole, told = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            list(FeatureStore(tmp_path).rows("features", 1))
        except UserError as error:
            told += "damaged; remove it" in str(error)
    assert told > len(whole) / 3 / 2


def test_our_overview_of_an_evaluation_is_none_of_the_images(tmp_path: Path) -> None:
    images = folder(tmp_path / "images")
    before = FolderImages(images)
    for out in (images, images / "evaluation"):
        out.mkdir(exist_ok=True)
        Image.new("RGB", (50, 90)).save(out / "images.png")
        (out / "images.json").write_text("{}")
    assert FolderImages(images).identity == before.identity, "evaluated into the same folder and started again"
    (images / "images.json").unlink()
    assert "images.png" in FolderImages(images).files, "without a report beside it, it is a picture like others"


def test_a_picture_is_no_folder(tmp_path: Path) -> None:
    picture = folder(tmp_path / "images") / "0.png"
    with pytest.raises(UserError, match=r"0.png: is a file, but no npz; give a folder of images"):
        open_images(picture)
    with pytest.raises(UserError, match="no such folder"):
        open_images(tmp_path / "none")
