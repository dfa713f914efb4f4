from __future__ import annotations

import pytest
import torch
from torch import nn

from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.training.token_loss import chunked_token_loss, token_loss

PYRAMID = ScalePyramid([1, 2, 3])


@pytest.mark.parametrize("tokens_at_once", [5, 28, 1000])
def test_in_chunks_the_loss_and_its_gradients_are_the_same(tokens_at_once: int) -> None:
    torch.manual_seed(0)
    classifier = nn.Linear(8, 20)
    h_BLC = torch.randn(2, 14, 8, requires_grad=True)
    idx_BL = torch.randint(20, (2, 14))
    inputs = (h_BLC, classifier.weight, classifier.bias)
    whole = token_loss(classifier(h_BLC), idx_BL, PYRAMID)
    chunked = chunked_token_loss(h_BLC, classifier, idx_BL, PYRAMID, tokens_at_once=tokens_at_once)
    torch.testing.assert_close(chunked.named(), whole.named())
    # scaled, as gradient accumulation does
    expected, found = (torch.autograd.grad(result.loss / 3, inputs) for result in (whole, chunked))
    torch.testing.assert_close(found, expected)


def test_without_gradient_nothing_is_kept_for_one() -> None:
    classifier = nn.Linear(8, 20)
    with torch.no_grad():
        result = chunked_token_loss(torch.randn(1, 14, 8), classifier, torch.randint(20, (1, 14)), PYRAMID)
    assert result.loss.grad_fn is None


def test_products_run_in_the_precision_of_autocast() -> None:
    torch.manual_seed(0)
    classifier, idx_BL = nn.Linear(64, 20), torch.randint(20, (1, 14))
    h_BLC = torch.randn(1, 14, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = token_loss(classifier(h_BLC).float(), idx_BL, PYRAMID)
        chunked = chunked_token_loss(h_BLC, classifier, idx_BL, PYRAMID, tokens_at_once=5)
    torch.testing.assert_close(chunked.loss_K, whole.loss_K)
    chunked.loss.backward()
    assert classifier.weight.grad is not None and classifier.weight.grad.dtype == torch.float32
