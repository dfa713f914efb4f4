"""The tokenizer equals the published reference: golden numbers computed by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden_formula import CASES, load_case, normal, sliced, weights
from torch import Tensor

from mvar_lightning.checkpoints.official_names import TOKENIZER_KEYS, to_ours
from mvar_lightning.tokenizer import MultiScaleTokenizer

pytestmark = pytest.mark.parametrize("name", CASES)


def build(case: dict[str, Any]) -> MultiScaleTokenizer:
    sizes = case["tokenizer"]
    tokenizer = MultiScaleTokenizer(
        case["patch_nums"],
        vocab_size=sizes["vocab_size"],
        code_dim=sizes["code_dim"],
        channels=sizes["channels"],
        phi_layers=sizes["phi_shared"],
    )
    state = to_ours(weights(case["tokenizer_state"], case["seed"], case["left_at_init"]), TOKENIZER_KEYS)
    missing, unexpected = tokenizer.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["quantizer.ema_hits_KV"], [])
    return tokenizer.eval()


def image_of(name: str, case: dict[str, Any]) -> Tensor:
    side = 16 * case["patch_nums"][-1]
    return normal(f"{name}/image", (case["batch"], 3, side, side), case["seed"]).clamp(-1, 1)


def assert_close(actual: Tensor, expected: np.ndarray, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), atol=atol, rtol=0)


def test_image_to_tokens_and_back(name: str) -> None:
    case, golden = load_case(name)
    tokenizer, image = build(case), image_of(name, case)
    idx_BL = tokenizer.encode(image)
    with torch.no_grad():
        assert_close(tokenizer.latent(image), golden["tokenizer.latent"])
    assert np.array_equal(idx_BL.numpy(), golden["tokenizer.indices"])
    assert_close(tokenizer.quantizer.f_hat(idx_BL), golden["tokenizer.f_hat"])
    assert_close(tokenizer.teacher_input(idx_BL), golden["tokenizer.teacher_input"])
    reconstruction = sliced(tokenizer.decode(idx_BL), "tokenizer.reconstruction", case)
    assert_close(reconstruction, golden["tokenizer.reconstruction"])


def test_teacher_input_of_given_tokens(name: str) -> None:
    case, golden = load_case(name)
    idx_BL = torch.from_numpy(golden["model.indices"]).long()
    assert_close(build(case).teacher_input(idx_BL), golden["model.teacher_input"])


def test_quantizer_loss_and_gradients(name: str) -> None:
    case, golden = load_case(name)
    quantizer = build(case).quantizer
    latent = torch.from_numpy(golden["tokenizer.latent"]).requires_grad_()
    output = quantizer(latent)
    assert np.isclose(output.loss.item(), golden["tokenizer.vq_loss"], rtol=1e-5, atol=0)
    assert np.array_equal(output.idx_BL.numpy(), golden["tokenizer.indices"])
    (output.loss + output.f_hat_straight_through_BZhw.square().mean()).backward()
    assert latent.grad is not None and quantizer.codebook.weight.grad is not None
    assert_close(latent.grad, golden["tokenizer.grad_latent"], atol=1e-6)
    assert_close(quantizer.codebook.weight.grad, golden["tokenizer.grad_codebook"], atol=1e-6)
