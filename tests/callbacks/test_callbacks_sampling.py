"""Callbacks sample in the run's precision and in pieces that memory allows; what is drawn does not depend on them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch._dynamo.testing import CompileCounter

from mvar_lightning import MultiScaleTokenizer, NextScaleTransformer, VARBlocks
from mvar_lightning.attention import KVCache
from mvar_lightning.callbacks import SampleMetrics
from mvar_lightning.callbacks.base import generate
from mvar_lightning.checkpoints.assign import on_meta
from mvar_lightning.pyramid import PUBLISHED_SIDES
from mvar_lightning.sampling import generate as sample
from mvar_lightning.training.memory import CACHE_BYTES, cache_of_image
from mvar_lightning.transformer.acceleration import compile_blocks


class Module:
    """What the callbacks ask of a module; it remembers the batches and whether autocast was on."""

    device, cfg = torch.device("cpu"), 1.5

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = dict(vocab_size=16, code_dim=4)
        self.tokenizer = MultiScaleTokenizer(
            [1, 2, 3], channels=8, channel_multipliers=[1, 1], num_res_blocks=1, norm_groups=4, **sizes
        )
        self.model = NextScaleTransformer([1, 2, 3], num_classes=5, depth=2, width=32, heads=2, **sizes)
        self.asked: list[tuple[int, bool]] = []

    def generate(self, label_B: torch.Tensor, seeds: list[int]) -> Any:
        self.asked.append((len(seeds), torch.is_autocast_enabled("cpu")))
        return sample(self.model, self.tokenizer, label_B, cfg=self.cfg, seeds=seeds)


def trainer_of(context: Any) -> Any:
    return SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=context))


def test_pieces_give_the_same_tokens() -> None:
    module, label_B = Module(), torch.arange(5)
    trainer: Any = trainer_of(nullcontext)
    whole = generate(trainer, module, label_B, range(5))  # type: ignore[arg-type]
    one = cache_of_image(module.model, 1.5, 4)
    assert one == 2 * 2 * module.model.backend.plan.cache_tokens * 32 * 2 * 4
    for allowed, sizes in ((2.5 * one, [2, 2, 1]), (1.0, [1] * 5)):
        module.asked.clear()
        image_B3HW, idx_BL = generate(trainer, module, label_B, range(5), allowed)  # type: ignore[arg-type]
        assert [size for size, _ in module.asked] == sizes
        assert torch.equal(idx_BL, whole[1]) and (image_B3HW - whole[0]).abs().max() < 1e-5


def test_a_smaller_batch_or_piece_compiles_nothing_anew() -> None:
    torch._dynamo.reset()
    module, compiled = Module(), CompileCounter()
    trainer: Any = trainer_of(nullcontext)
    trainer.global_rank, trainer.world_size, trainer.fast_dev_run = 0, 1, False
    plain = list(generate(trainer, module, torch.arange(7) % 5, range(7)))  # type: ignore[arg-type]
    module.asked.clear()
    compile_blocks(module.model, backend=compiled)
    metrics = SampleMetrics(num_images=7, batch_size=3)
    batches = [image for image, _ in metrics._samples(trainer, module)]  # type: ignore[arg-type]
    assert [size for size, _ in module.asked] == [3, 3, 3] and [len(image) for image in batches] == [3, 3, 1]
    assert (torch.cat(batches) - plain[0]).abs().max() < 1e-5
    assert compiled.frame_count == 3, "one for each scale"
    metrics.cache_bytes = 2.5 * cache_of_image(module.model, 1.5, 4)
    assert len(torch.cat([image for image, _ in metrics._samples(trainer, module)])) == 7  # type: ignore[arg-type]
    assert {size for size, _ in module.asked[3:]} == {2} and compiled.frame_count == 6


def test_samples_are_drawn_in_the_runs_precision() -> None:
    module = Module()
    plugin = MixedPrecision("bf16-mixed", "cpu")
    generate(trainer_of(plugin.forward_context), module, torch.arange(2), range(2))  # type: ignore[arg-type]
    assert module.asked == [(2, True)] and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("element", "images"), [(2, 5), (4, 2)])
def test_fifty_images_of_d36_hold_less_than_12_gib(element: int, images: int) -> None:
    sizes = dict(vocab_size=4096, code_dim=32, num_classes=1000, depth=36, blocks=VARBlocks(shared_adaln=True))
    model = on_meta(lambda: NextScaleTransformer(PUBLISHED_SIDES[512], **sizes))  # type: ignore[arg-type]
    one = cache_of_image(model, 1.5, element)
    assert 50 * one > 60 * 2**30, "as it was, all at once"
    at_once = int(CACHE_BYTES / one)
    assert at_once == images
    shape = dict(layers=36, batch=2 * at_once, heads=36, head_dim=64)
    dtype = torch.bfloat16 if element == 2 else torch.float32
    cache = KVCache(model.backend.plan, **shape, device=torch.device("meta"), dtype=dtype)
    held = sum(buffer.nbytes for layer in cache.layers for buffer in layer._buffers)
    assert held == at_once * one and held < 12 * 2**30
