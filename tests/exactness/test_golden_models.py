"""The imported models equal the published references: golden numbers computed by them."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_formula import CASES, integers, load_case, sliced
from reference_files import import_case
from torch import Tensor

from mvar_lightning.checkpoints.official import reference_state
from mvar_lightning.sampling import generate
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import NextScaleTransformer

pytestmark = pytest.mark.parametrize("name", CASES)

Pair = tuple[NextScaleTransformer, MultiScaleTokenizer]


@cache
def golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return load_case(name)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {case: import_case(case, tmp_path_factory.mktemp(case)) for case in CASES}


@pytest.fixture
def pair(name: str, imported: dict[str, Pair]) -> Pair:
    """A golden case through the importer; not to be changed."""
    return imported[name]


def assert_close(actual: Tensor, expected: np.ndarray, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), atol=atol, rtol=0)


def inputs(name: str) -> tuple[Tensor, Tensor]:
    """Labels and token pyramid, by the formula."""
    case, _ = golden(name)
    batch, seed = case["batch"], case["seed"]
    scales = [
        integers(f"{name}/idx{scale}", case["tokenizer"]["vocab_size"], (batch, side * side), seed)
        for scale, side in enumerate(case["patch_nums"])
    ]
    return integers(f"{name}/label", case["num_classes"], (batch,), seed), torch.cat(scales, dim=1)


def loss_of(pair: Pair, name: str) -> tuple[Tensor, Tensor]:
    model, tokenizer = pair
    label_B, idx_BL = inputs(name)
    logits_BLV = model(tokenizer.teacher_input(idx_BL), label_B)
    return logits_BLV, F.cross_entropy(logits_BLV.flatten(0, 1), idx_BL.flatten())


def test_inputs_follow_the_formula(name: str, pair: Pair) -> None:
    label_B, idx_BL = inputs(name)
    arrays = golden(name)[1]
    assert np.array_equal(label_B.numpy(), arrays["model.label"])
    assert np.array_equal(idx_BL.numpy(), arrays["model.indices"])
    assert_close(pair[1].teacher_input(idx_BL), arrays["model.teacher_input"])


def test_logits_and_loss(name: str, pair: Pair) -> None:
    logits_BLV, loss = loss_of(pair, name)
    arrays = golden(name)[1]
    assert_close(logits_BLV, arrays["model.logits"])
    assert np.isclose(loss.item(), arrays["model.loss"], rtol=1e-5, atol=0)


def test_gradient_norms(name: str, pair: Pair) -> None:
    expected = golden(name)[0]["gradient_norms"]
    if not expected:
        assert name == "mvar_tiny", "only MVAR's reference cannot train on a CPU"
        return
    pair = copy.deepcopy(pair)
    model = pair[0]
    loss_of(pair, name)[1].backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            assert gradients[key] is not None, key
            parameter.copy_(gradients[key])
    norms = {key: tensor.norm().item() for key, tensor in reference_state(model).items() if key in expected}
    assert norms.keys() == expected.keys()
    for key, norm in expected.items():
        assert np.isclose(norms[key], norm, rtol=1e-4, atol=1e-9), (key, norms[key], norm)


def test_greedy_sampling(name: str, pair: Pair) -> None:
    case, arrays = golden(name)
    label_B = torch.from_numpy(arrays["model.label"])
    images_B3HW, idx_BL = generate(*pair, label_B, cfg=case["cfg"], top_k=1, top_p=None, return_tokens=True)
    assert np.array_equal(idx_BL.numpy(), arrays["sample.indices"])
    assert_close(sliced(images_B3HW, "sample.image", case), arrays["sample.image"])


@torch.no_grad()
def test_guided_logits(name: str, pair: Pair) -> None:
    """The sampler's loop written out: guidance over both halves of the batch, then the most likely token."""
    model, tokenizer = pair
    case, arrays = golden(name)
    label_B = torch.from_numpy(arrays["model.label"])
    batch, last = len(label_B), model.pyramid.num_scales - 1
    state = model.begin(torch.cat([label_B, torch.full_like(label_B, model.num_classes)]), images=batch)
    quantizer = tokenizer.quantizer
    f_hat, x_BlZ, guided = quantizer.empty_f_hat(batch), None, []
    for scale in range(last + 1):
        logits_RlV = model.step(state, scale, x_BlZ)
        strength = case["cfg"] * scale / last
        guided.append((1 + strength) * logits_RlV[:batch] - strength * logits_RlV[batch:])
        f_hat = quantizer.accumulate(f_hat, quantizer.lookup(guided[-1].argmax(dim=-1)), scale)
        x_BlZ = quantizer.next_input(f_hat, min(scale + 1, last))
    assert_close(torch.cat(guided, dim=1), arrays["sample.guided_logits"], atol=1e-4)


def test_every_array_is_compared(name: str) -> None:
    """A new golden array needs a test here or beside the tokenizer's."""
    compared = {"model.label", "model.indices", "model.teacher_input", "model.logits", "model.loss"}
    compared |= {"sample.indices", "sample.guided_logits", "sample.image"}
    assert {key for key in golden(name)[1] if not key.startswith("tokenizer.")} == compared
