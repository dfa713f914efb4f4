"""Editing keeps the image's tokens outside the mask and takes the model's inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning import MultiScaleTokenizer, NextScaleTransformer, edit, generate
from mvar_lightning.errors import UserError
from mvar_lightning.sampling import inpaint_mask, outpaint_mask
from mvar_lightning.sampling.editing import keep_at, kept


@pytest.fixture
def image_B3HW(tokenizer: MultiScaleTokenizer) -> Tensor:
    size = tokenizer.image_size
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_nothing_or_everything_masked(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor
) -> None:
    size, idx_BL = tokenizer.image_size, tokenizer.encode(image_B3HW)
    images, none_BL = edit(model, tokenizer, image_B3HW, torch.zeros(size, size), [0, 1], seeds=[0, 1])
    assert torch.equal(none_BL, idx_BL)
    torch.testing.assert_close(images, tokenizer.decode(idx_BL).add(1).div(2))
    _, all_BL = edit(model, tokenizer, image_B3HW, torch.ones(size, size), [0, 1], seeds=[0, 1])
    assert torch.equal(all_BL[:, :1], idx_BL[:, :1]), "scales with at most three tokens keep the image's"
    assert (all_BL[:, 1:] != idx_BL[:, 1:]).float().mean() > 0.8


@pytest.mark.parametrize("more_smooth", [False, True])
def test_tokens_by_the_mask(
    more_smooth: bool, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor
) -> None:
    mask = inpaint_mask((0.0, 0.0, 0.5, 1.0), tokenizer.pyramid.last_side)
    idx_BL = tokenizer.encode(image_B3HW)
    _, edited_BL = edit(model, tokenizer, image_B3HW, mask, [0, 1], seeds=[0, 1], more_smooth=more_smooth)
    keep_Bhw, pyramid = ~mask[None], tokenizer.pyramid
    keep_L = torch.cat([keep_at(scale, keep_Bhw, pyramid)[0] for scale in range(len(pyramid))])
    assert torch.equal(edited_BL[:, keep_L], idx_BL[:, keep_L])
    assert (edited_BL[:, ~keep_L] != idx_BL[:, ~keep_L]).float().mean() > 0.5


def test_tokens_inside_are_conditioned_on_the_image(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor
) -> None:
    """Greedy: inside the mask stands the argmax of teacher forcing on the edited tokens."""
    mask = inpaint_mask((0.2, 0.2, 0.8, 0.8), tokenizer.pyramid.last_side)
    _, idx_BL = edit(model, tokenizer, image_B3HW, mask, [0, 1], cfg=0, top_k=1)
    with torch.no_grad():
        expected_BL = model(tokenizer.teacher_input(idx_BL), torch.tensor([0, 1])).argmax(-1)
    keep_L = torch.cat([keep_at(scale, ~mask[None], tokenizer.pyramid)[0] for scale in range(4)])
    assert (~keep_L).any() and torch.equal(idx_BL[:, ~keep_L], expected_BL[:, ~keep_L])
    free_BL = generate(model, tokenizer, [0, 1], cfg=0, top_k=1)[1]
    assert not torch.equal(free_BL[:, ~keep_L], idx_BL[:, ~keep_L])


def test_mask_at_each_scale_is_the_published_one(tokenizer: MultiScaleTokenizer) -> None:
    side, pyramid = tokenizer.pyramid.last_side, tokenizer.pyramid
    keep = 1 - inpaint_mask((0.1, 0.3, 0.8, 0.9), side).float()
    for scale, pn in enumerate(pyramid.sides):
        expected = F.interpolate(keep[None, None], size=(pn, pn), mode="bilinear", align_corners=False) > 0.5
        expected = expected.flatten(1) | (pn * pn <= 3)
        assert torch.equal(keep_at(scale, keep[None].bool(), pyramid), expected)


def test_pixels_become_tokens_by_area(tokenizer: MultiScaleTokenizer) -> None:
    mask = torch.zeros(tokenizer.image_size, tokenizer.image_size)
    mask[0:2, 0:1] = 1  # half of the first token (two pixels wide)
    mask[2, 2] = 1  # a quarter of another
    painted = ~kept(mask, tokenizer)[0]
    assert painted.nonzero().tolist() == [[0, 0]]


def test_boxes_in_and_out() -> None:
    inside, outside = inpaint_mask((0.25, 0.5, 1.0, 0.75), 8), outpaint_mask((0.25, 0.5, 1.0, 0.75), 8)
    assert torch.equal(inside, ~outside)
    assert inside.nonzero().tolist() == [[y, x] for y in (4, 5) for x in range(2, 8)]


def test_one_image_many_seeds_is_reproducible(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor
) -> None:
    mask = outpaint_mask((0.4, 0.4, 0.9, 0.9), tokenizer.image_size)
    images, idx_BL = edit(model, tokenizer, image_B3HW[:1], mask, seeds=[3, 4, 5])
    assert images.shape[0] == 3 and not torch.equal(idx_BL[0], idx_BL[1])
    assert torch.equal(edit(model, tokenizer, image_B3HW[:1], mask, seeds=[5])[1], idx_BL[2:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask_BHW": torch.zeros(7, 7)}, r"mask of shape \(7, 7\)"),
        ({"mask_BHW": torch.zeros(5, 10, 10)}, "one for each"),
        ({"mask_BHW": torch.full((10, 10), 255.0)}, "from 0"),
        ({"image_B3HW": torch.zeros(2, 3, 12, 12)}, r"image of shape \(2, 3, 12, 12\)"),
        ({"label_B": [0, 1, 2]}, "2 images, 3 labels"),
        ({"label_B": 6}, "label 6"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_bad_input(
    change: dict[str, Any],
    said: str,
    model: NextScaleTransformer,
    tokenizer: MultiScaleTokenizer,
    image_B3HW: Tensor,
) -> None:
    arguments: dict[str, Any] = {"image_B3HW": image_B3HW, "mask_BHW": torch.zeros(10, 10), "label_B": [0, 1]}
    with pytest.raises(UserError, match=said):
        edit(model, tokenizer, **{**arguments, **change})


@pytest.mark.parametrize("box", [(0, 0, 1.2, 1), (0.5, 0.5, 0.5, 1), (0, 0.9, 1, 0.1), (0, 0, 1)])
def test_boxes_that_hold_nothing(box: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="box"):
        inpaint_mask(box, 16)
