"""Pictures where notebooks look for them, and the tour of `help(mvar_lightning)`."""

from __future__ import annotations

import io
import re

import pytest
import torch
from PIL import Image

import mvar_lightning
from mvar_lightning import UserError, show, to_pil
from mvar_lightning.sampling import Generated


def test_images_become_pil_images_and_one_picture() -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    each = to_pil(images)
    assert len(each) == 3 and each[0].size == (16, 16)
    assert each[1].getpixel((2, 5)) == tuple(round(float(level) * 255) for level in images[1, :, 5, 2])
    assert [*to_pil((images * 255).round().byte())[0].tobytes()] == [*each[0].tobytes()]
    assert to_pil([*images])[2].tobytes() == to_pil(images[2])[0].tobytes() == each[2].tobytes()
    assert show(images, columns=2).size == (2 * 66 + 2, 2 * 66 + 2), "16 pixels, enlarged to 64"
    made = Generated(images, torch.zeros(3, 1, dtype=torch.int64))
    assert Image.open(io.BytesIO(made._repr_png_())).size == show(images).size
    assert [image.tobytes() for image in made.to_pil()] == [image.tobytes() for image in each]


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 2, 4, 4), "of shape"),
        (torch.full((1, 3, 4, 4), -1.0), "image / 2 + 0.5"),
        (torch.full((1, 3, 4, 4), torch.nan), "not in"),
        (torch.zeros(0, 3, 4, 4), "none to show"),
    ],
)
def test_what_is_no_image_is_told(images: torch.Tensor, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        show(images)


def test_the_tour_names_what_is_there() -> None:
    tour = str(mvar_lightning.__doc__)
    named = set(re.findall(r"`(\w+)`", tour)) - {"mvar"}
    assert len(named) > 15 and named <= set(mvar_lightning.__all__)
    assert set(re.search(r"import (.*)", tour)[1].split(", ")) <= set(mvar_lightning.__all__)  # type: ignore[index]
