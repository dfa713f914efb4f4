"""The pictures have the right pixels, and the callbacks put them where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from mvar_lightning.callbacks import (
    AttentionMaskPicture,
    CoarseToFine,
    ReconstructionGrid,
    ReconstructionStrips,
    SampleGrid,
)
from mvar_lightning.errors import UserError
from mvar_lightning.tools import drawing as pictures_file
from mvar_lightning.tools.drawing import enlarge, from_image, make_grid, make_strips, mask_picture, to_image, to_png


def test_grid_places_every_image() -> None:
    image = torch.arange(5).view(5, 1, 1, 1).expand(-1, 3, 2, 3) / 10
    grid = make_grid(image, columns=3, padding=1)
    assert grid.shape == (3, 2 * 3 + 1, 3 * 4 + 1)
    for index in range(5):
        y, x = 1 + index // 3 * 3, 1 + index % 3 * 4
        assert torch.equal(grid[:, y : y + 2, x : x + 3], image[index])
    assert (grid[:, 4:6, 9:12] == 1).all() and (grid[:, 0] == 1).all() and (grid[:, :, 0] == 1).all()


def test_grid_is_square_by_default() -> None:
    assert make_grid(torch.zeros(9, 3, 4, 4), padding=0).shape == (3, 12, 12)


@pytest.mark.parametrize(("side", "expected"), [(16, 64), (24, 72), (64, 64), (100, 100)])
def test_enlarged_by_whole_factors(side: int, expected: int) -> None:
    image = torch.rand(1, 3, side, side)
    large = enlarge(image)
    assert large.shape[-2:] == (expected, expected)
    factor = expected // side
    assert torch.equal(large[..., ::factor, ::factor], image)
    assert torch.equal(large[..., factor - 1 :: factor, factor - 1 :: factor], image)


def test_strips_are_rows() -> None:
    strips = make_strips(torch.rand(2, 5, 3, 64, 64), padding=0)
    assert strips.shape == (3, 128, 320)


def test_png_round_trip_leaves_no_other_file(tmp_path: Path) -> None:
    picture = torch.rand(3, 5, 7)
    to_png(picture, tmp_path / "new" / "a.png")
    again = from_image(Image.open(tmp_path / "new" / "a.png"))
    assert torch.equal(again, picture.mul(255).round() / 255)
    assert torch.equal(from_image(to_image(picture)), again)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]


def test_png_into_a_file_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        to_png(torch.zeros(3, 2, 2), tmp_path / "file" / "a.png")


def test_mask_pixels() -> None:
    sides = (1, 2)
    visible = torch.zeros(5, 5, dtype=torch.bool)
    visible[0, 0] = True
    visible[1:, 1:] = True
    picture = np.asarray(mask_picture(visible, sides, size=500))
    cells = picture[46 : 46 + 500, 46 : 46 + 500]
    for query in range(5):
        for key in range(5):
            color = pictures_file.VISIBLE if visible[query, key] else pictures_file.HIDDEN
            assert tuple(cells[query * 100 + 50, key * 100 + 50]) == color
    assert tuple(cells[300, 100]) == pictures_file.BORDER and tuple(cells[100, 300]) == pictures_file.BORDER


@pytest.mark.parametrize("sides", [(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)])
def test_large_masks_stay_of_moderate_size(sides: tuple[int, ...]) -> None:
    length = sum(side * side for side in sides)
    picture = mask_picture(torch.ones(length, length, dtype=torch.bool), sides)
    assert 600 < picture.width < 1500


ALL = [SampleGrid, CoarseToFine, ReconstructionGrid, ReconstructionStrips, AttentionMaskPicture]
FILES = ["attention_mask.png", "coarse_to_fine.png", "reconstructions.png", "samples.png"]


def test_files_and_tensorboard(make_trainer: Any, module: Any, data: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path / "board", name="", version="")
    callbacks = [SampleGrid(), CoarseToFine(), ReconstructionGrid(), AttentionMaskPicture()]
    make_trainer(*callbacks, logger=logger).fit(module, datamodule=data)
    assert sorted(file.name for file in (tmp_path / "run").glob("*.png")) == FILES
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    names = ["attention_mask", "coarse_to_fine", "reconstructions", "samples"]
    assert sorted(events.Tags()["images"]) == [f"pictures/{name}" for name in names]
    assert len(events.Images("pictures/samples")) == 2


def test_sample_grid_shows_classes_by_column(make_trainer: Any, module: Any, data: Any) -> None:
    grid = SampleGrid(labels=[2, 0], rows=3)
    picture = grid.draw(make_trainer(), module)
    assert module.asked == [([2, 0, 2, 0, 2, 0], [0, 1, 2, 3, 4, 5])]
    assert picture.shape == (3, 3 * 66 + 2, 2 * 66 + 2)
    assert picture[2, 10, 10] > 0.5 > picture[0, 10, 10] and picture[0, 10, 80] > 0.5 > picture[2, 10, 80]


def test_reconstructions_lie_below_their_originals(module: Any) -> None:
    image = torch.rand(10, 3, 8, 8)
    picture = ReconstructionGrid().draw_images(module, image)
    again = (module.tokenizer.decode(module.tokenizer.encode(image * 2 - 1)) + 1) / 2
    cell = 66
    for index in (0, 7, 9):
        y, x = 2 + index // 8 * 2 * (cell + 2), 2 + index % 8 * cell
        assert torch.equal(picture[:, y : y + 64, x : x + 64], enlarge(image)[index])
        y += cell + 2
        assert torch.allclose(picture[:, y : y + 64, x : x + 64], enlarge(again)[index], atol=1e-6)


def test_strips_of_images_end_with_the_original(module: Any) -> None:
    image = torch.rand(2, 3, 8, 8)
    picture = ReconstructionStrips().draw_images(module, image)
    assert picture.shape == (3, 2 * 66 + 2, 3 * 66 + 2)
    assert torch.equal(picture[:, 2:66, 134:198], enlarge(image)[0])
    # the first scale of the stand-in is one token: a flat picture
    assert picture[:, 2:66, 2:66].std(dim=(1, 2)).max() < 1e-6


@pytest.mark.parametrize("kind", ALL)
def test_without_logger_in_fast_dev_run_and_in_validate(
    make_trainer: Any, module: Any, data: Any, tmp_path: Path, kind: Any
) -> None:
    make_trainer(kind(), fast_dev_run=True).fit(module, datamodule=data)
    assert not list(tmp_path.rglob("*.png"))
    make_trainer(kind()).validate(module, datamodule=data, verbose=False)
    assert bool(list(tmp_path.rglob("*.png"))) == (kind is not AttentionMaskPicture)


def test_last_weights_are_drawn_without_validation(make_trainer: Any, module: Any, data: Any, tmp_path: Path) -> None:
    make_trainer(SampleGrid(), ReconstructionGrid(), limit_val_batches=0).fit(module, datamodule=data)
    assert [file.name for file in (tmp_path / "run").glob("*.png")] == ["samples.png"]


def test_unknown_class_is_a_users_error(make_trainer: Any, module: Any, data: Any) -> None:
    with pytest.raises(UserError, match=r"labels \[0, 3\]: the model knows the classes 0 to 2"):
        make_trainer(SampleGrid(labels=[0, 3])).validate(module, datamodule=data, verbose=False)
