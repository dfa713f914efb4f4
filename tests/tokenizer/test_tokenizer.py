"""The tokenizer as a whole: its API, its errors, its size, its fingerprint."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from mvar_lightning.checkpoints.official_names import TOKENIZER_KEYS, to_ours, to_reference, tokenizer_keys
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import PUBLISHED_SIDES
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.tokenizer.autoencoder import Upsample


@pytest.fixture
def tokenizer() -> MultiScaleTokenizer:
    torch.manual_seed(0)
    return tiny()


def tiny(**changes: object) -> MultiScaleTokenizer:
    sizes = {
        "scales": [1, 2, 4],
        "vocab_size": 16,
        "code_dim": 6,
        "channels": 8,
        "channel_multipliers": [1, 2, 2],
        "num_res_blocks": 1,
        "phi_layers": 2,
        "norm_groups": 4,
    }
    return MultiScaleTokenizer(**{**sizes, **changes})


def images(tokenizer: MultiScaleTokenizer, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, tokenizer.image_size, tokenizer.image_size) * 2 - 1


def test_shapes_and_ranges(tokenizer: MultiScaleTokenizer) -> None:
    image = images(tokenizer)
    assert (tokenizer.downsampling, tokenizer.image_size) == (4, 16)
    idx_BL = tokenizer.encode(image)
    assert idx_BL.shape == (2, 21) and idx_BL.dtype == torch.int64
    decoded = tokenizer.decode(idx_BL)
    assert decoded.shape == image.shape and decoded.abs().max() <= 1
    strip = tokenizer.progressive(idx_BL)
    assert len(strip) == 3 and torch.equal(strip[-1], decoded)
    assert tokenizer.teacher_input(idx_BL).shape == (2, 20, 6)


def test_training_forward_agrees_with_encode_and_decode(tokenizer: MultiScaleTokenizer) -> None:
    image = images(tokenizer)
    output = tokenizer(image)
    idx_BL = tokenizer.encode(image)
    assert torch.equal(output.idx_BL, idx_BL)
    torch.testing.assert_close(output.reconstruction_B3HW.clamp(-1, 1), tokenizer.decode(idx_BL), atol=1e-4, rtol=0)
    (output.quantizer_loss + output.reconstruction_B3HW.square().mean()).backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None] == []


def test_images_do_not_depend_on_their_batch(tokenizer: MultiScaleTokenizer) -> None:
    image = images(tokenizer, batch=3)
    assert torch.equal(tokenizer.encode(image)[1:2], tokenizer.encode(image[1:2]))


def test_config_is_json_and_builds_the_same_module(tokenizer: MultiScaleTokenizer) -> None:
    twin = MultiScaleTokenizer(**json.loads(json.dumps(tokenizer.config)))
    twin.load_state_dict(tokenizer.state_dict())
    image = images(tokenizer)
    assert torch.equal(twin.encode(image), tokenizer.encode(image))
    assert fingerprint(twin) == fingerprint(tokenizer)


def test_fingerprint_depends_on_weights_and_scales_alone(tokenizer: MultiScaleTokenizer) -> None:
    original = fingerprint(tokenizer)
    assert len(original) == 64
    tokenizer.quantizer.ema_hits_KV += 1
    assert fingerprint(tokenizer) == original
    retrained = tiny(beta=1.0)
    retrained.load_state_dict(tokenizer.state_dict())
    assert fingerprint(retrained.to(memory_format=torch.channels_last)) == original
    other_scales = tiny(scales=[1, 3, 4])
    other_scales.load_state_dict(tokenizer.state_dict())
    assert fingerprint(other_scales) != original
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias[0] += 1e-3
    assert fingerprint(tokenizer) != original


def test_published_size_has_the_released_number_of_parameters() -> None:
    with torch.device("meta"):
        tokenizer = MultiScaleTokenizer(PUBLISHED_SIDES[256])
    assert sum(p.numel() for p in tokenizer.parameters()) == 108_948_355
    assert tokenizer.image_size == 256


@pytest.mark.parametrize("phi_layers", [0, 1, 2, 4])
def test_key_table_is_a_bijection(phi_layers: int) -> None:
    state = tiny(phi_layers=phi_layers).state_dict()
    table = tokenizer_keys(phi_layers)
    reference = to_reference(state, table)
    assert len(reference) == len(state)
    assert list(to_ours(reference, table)) == list(state)


def test_unknown_key_is_named() -> None:
    with pytest.raises(UserError, match="somebody_else"):
        to_ours({"somebody_else.weight": 0}, TOKENIZER_KEYS)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 20, 16), r"\(1, 3, 20, 16\)"),
        (torch.zeros(1, 1, 16, 16), r"\(1, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"\(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 16, 16), torch.nan), "NaN"),
    ],
)
def test_bad_images_are_named(tokenizer: MultiScaleTokenizer, image: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenizer.encode(image)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 20, dtype=torch.int64), "need"),
        (torch.full((1, 21), 16), "0 to 15"),
        (torch.full((1, 21), -1), "0 to 15"),
        (torch.zeros(1, 21), "float32"),
    ],
)
def test_bad_tokens_are_named(tokenizer: MultiScaleTokenizer, tokens: Tensor, message: str) -> None:
    for method in (tokenizer.decode, tokenizer.teacher_input, tokenizer.progressive):
        with pytest.raises(UserError, match=message):
            method(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": [2, 2]}, "strictly increasing"),
        ({"channels": 6}, "norm_groups 4"),
        ({"channel_multipliers": []}, "channel_multipliers"),
        ({"num_res_blocks": 0}, "num_res_blocks 0"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**change)


def test_upsampling_from_the_small_map_gives_the_plain_convolution() -> None:
    torch.manual_seed(0)
    upsample, x_BCHW = Upsample(8), torch.randn(2, 8, 5, 7)
    plain = upsample(x_BCHW)
    with torch.no_grad():
        torch.testing.assert_close(upsample(x_BCHW), plain.detach())
