"""FSDP2 that gathers in bf16 trains as autocast alone does, on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from mvar_lightning import NextScaleTransformer
from mvar_lightning.training.distributed import FullySharded, shard_where_asked
from mvar_lightning.transformer.acceleration import compile_blocks
from tests.group_of_one import group_of_one


def gradients(model: NextScaleTransformer) -> tuple[float, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x_BLZ, label_B = torch.randn(2, 13, 4, generator=generator), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x_BLZ, label_B).flatten(0, 1), torch.arange(28) % 12)
    loss.backward()
    whole: Any = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss), {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in whole.items()}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_gathered_in_bf16_have_the_gradients_of_autocast(compiled: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=12, code_dim=4, num_classes=3, depth=2, width=32, heads=2, gamma_init=1.0)
    plain = NextScaleTransformer([1, 2, 3], **sizes, drop_path=0.0, label_drop=0.0).train()
    torch.nn.init.normal_(plain.head.linear.weight, std=0.1)
    sharded = NextScaleTransformer.from_config(plain.config).train()
    sharded.load_state_dict(plain.state_dict())
    with group_of_one(tmp_path):
        strategy = FullySharded(gather_in_bf16=True)
        strategy._device_mesh = {"data_parallel": init_device_mesh("cpu", (1,))}
        if compiled:  # in the order of a run: a module compiles when it is made
            compile_blocks(sharded, backend="aot_eager")
        shard_where_asked(sharded, strategy)
        (loss, ours), (expected, theirs) = gradients(sharded), gradients(plain)
        assert abs(loss - expected) < 0.02 * expected and ours.keys() == theirs.keys()
        assert all(p.dtype == torch.float32 for p in sharded.parameters())
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).norm() <= 0.08 * gradient.norm() + 1e-6, name
