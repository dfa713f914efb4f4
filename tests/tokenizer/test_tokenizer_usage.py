"""Codebook usage and perplexity per scale."""

from __future__ import annotations

import math

import torch

from mvar_lightning.metrics.quality import CodebookUsage
from mvar_lightning.pyramid import ScalePyramid


def test_hand_made_case_over_two_batches() -> None:
    usage = CodebookUsage(ScalePyramid([1, 2]), vocab_size=4)
    usage.update(torch.tensor([[0, 1, 1, 2, 2], [0, 1, 1, 2, 2]]))
    usage.update(torch.tensor([[3, 1, 1, 2, 2]]))
    values = usage.compute()
    # Scale 0 saw 3 tokens, so at most 3 codes, and used 0 and 3; scale 1 used 2 of 4, equally often.
    torch.testing.assert_close(values["usage_K"], torch.tensor([2 / 3, 2 / 4]))
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    torch.testing.assert_close(values["perplexity_K"], torch.tensor([math.exp(entropy), 2.0]))


def test_reset_forgets_and_nothing_seen_is_zero() -> None:
    usage = CodebookUsage(ScalePyramid([1, 2]), vocab_size=4)
    usage.update(torch.tensor([[0, 1, 1, 2, 2]]))
    usage.reset()
    values = usage.compute()
    assert values["usage_K"].tolist() == [0, 0] and values["perplexity_K"].tolist() == [0, 0]
    assert not usage.state_dict()
