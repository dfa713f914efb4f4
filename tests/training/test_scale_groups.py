"""Training steps scale group after scale group: their gradient is the whole step's, and what cannot be is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from small_run import MODEL_SIZES, copy_of, data_module, trainer
from torch import Tensor

from mvar_lightning import (
    AdjacentAttention,
    FullAttention,
    GlobalHistory,
    LlamaBlocks,
    MarkovVARModule,
    MixedHistory,
    MVARModule,
    NextScaleTransformer,
    NoHistory,
    SlidingWindowAttention,
    SlidingWindowHistory,
    SpatialAttention,
    UserError,
    VARBlocks,
    VARModule,
)
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid
from mvar_lightning.training.scale_groups import (
    AUTO_SHARE,
    KeptForBackward,
    ScaleGroups,
    groups_of_share,
    kept_of_token,
    loss_of_groups,
)
from mvar_lightning.transformer.acceleration import compile_blocks

SCALES = [1, 2, 3, 4]
GROUPS = [range(2), range(2, 3), range(3, 4)]
WHOLE = [range(4)]


def model_of(**changes: Any) -> NextScaleTransformer:
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, code_dim=4, num_classes=5, depth=2, width=128, heads=2, label_drop=0.5, drop_path=0.5)
    model = NextScaleTransformer(SCALES, **{**sizes, **changes}).train()
    for parameter in model.parameters():  # gates are open: at the published start blocks contribute almost nothing
        parameter.data = torch.randn(parameter.shape) * 0.2
    return model


def gradients(model: NextScaleTransformer, groups: list[range]) -> tuple[float, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x_BLZ, idx_BL = torch.randn(3, 29, 4, generator=generator), torch.randint(16, (3, 30), generator=generator)
    model.zero_grad()
    torch.manual_seed(2)  # labels and branches are dropped
    loss, figures = loss_of_groups(model, x_BLZ, torch.tensor([1, 2, 3]), idx_BL, groups)
    loss.backward()
    assert float(figures.loss) == pytest.approx(float(loss), rel=1e-6)
    return float(loss), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", [AdjacentAttention(), SpatialAttention(3, scales=2)], ids=repr)
@pytest.mark.parametrize("history", [NoHistory(), SlidingWindowHistory(3), GlobalHistory(), MixedHistory(2)], ids=repr)
@pytest.mark.parametrize("blocks", [VARBlocks(), VARBlocks(shared_adaln=True), LlamaBlocks()], ids=repr)
def test_gradient_is_that_of_the_whole_step(attention: Any, history: Any, blocks: Any) -> None:
    model = model_of(attention=attention, history=history, blocks=blocks)
    loss, whole = gradients(model, WHOLE)
    grouped_loss, grouped = gradients(model, GROUPS)
    assert grouped_loss == pytest.approx(loss, rel=1e-6)
    # what little is left where larger numbers cancel (a query's bias) has their rounding, in any order of the sums
    rounding = 1e-9 * torch.stack([gradient.norm() for gradient in whole.values()]).norm()
    for name, gradient in whole.items():
        assert (grouped[name] - gradient).norm() <= 1e-6 * gradient.norm() + rounding, name


def test_recomputed_activations_and_frozen_parts_go_with_groups() -> None:
    model = model_of(attention=AdjacentAttention(), checkpoint_activations=True)
    model.class_embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    _, whole = gradients(model, WHOLE)
    _, grouped = gradients(model, GROUPS)
    assert whole["class_embedding.weight"] is None and grouped["class_embedding.weight"] is None
    torch.testing.assert_close(grouped["word_embedding.weight"], whole["word_embedding.weight"])


def test_frozen_inputs_go_with_groups() -> None:
    model = model_of(attention=AdjacentAttention()).requires_grad_(False)
    model.blocks[1].attention.requires_grad_(True)
    _, whole = gradients(model, WHOLE)
    _, grouped = gradients(model, GROUPS)
    trained = [name for name, gradient in whole.items() if gradient is not None]
    assert trained and all(name.startswith("blocks.1.attention") for name in trained)
    for name in trained:
        torch.testing.assert_close(grouped[name], whole[name])


def kept_bytes(model: NextScaleTransformer, groups: list[range]) -> int:
    x_BLZ, idx_BL = torch.randn(3, 29, 4), torch.randint(16, (3, 30))
    with KeptForBackward(model) as kept:
        loss_of_groups(model, x_BLZ, torch.tensor([1, 2, 3]), idx_BL, groups)[0].backward()
    assert kept.now == 0
    return kept.peak


def test_groups_hold_less_at_a_time() -> None:
    model = model_of(attention=AdjacentAttention(), width=64, vocab_size=64)
    assert kept_bytes(model, GROUPS) < 0.75 * kept_bytes(model, WHOLE)  # 16 of 30 tokens, and the inputs of all


def plan_of(attention: Any, sides: tuple[int, ...] = PUBLISHED_SIDES[256]) -> Any:
    return attention.plan(ScalePyramid(sides))


def test_auto_groups_at_the_published_sizes() -> None:
    for size, sides in PUBLISHED_SIDES.items():
        pyramid = ScalePyramid(sides)
        groups = groups_of_share(pyramid, AUTO_SHARE)
        assert [scale for group in groups for scale in group] == list(range(len(sides)))
        shares = [sum(pyramid.tokens_of(scale) for scale in group) / pyramid.num_tokens for group in groups]
        assert max(shares) < 0.46, "one scale of 512 pixels has 45.7% of the tokens"
        if size == 256:
            assert groups == (range(7), range(7, 8), range(8, 9), range(9, 10))
    assert groups_of_share(ScalePyramid([1, 2, 3, 4]), 0.1) == tuple(range(n, n + 1) for n in range(4)), (
        "no less than one scale"
    )
    assert groups_of_share(ScalePyramid([1, 2, 3, 4]), 1.0) == (range(4),)


@pytest.mark.parametrize("said", [[["0..7"], [8], [9]], [[0, 1, 2, 3, 4, 5, 6, 7], ["8"], ["9..9"]], 0.4])
def test_ways_to_say_the_same_groups(said: Any) -> None:
    read = ScaleGroups.read(said, None, plan_of(SpatialAttention(7)))
    assert read.groups == (range(8), range(8, 9), range(9, 10)) and str(read) == "0..7, then 8, then 9"
    assert read.splits_steps and read.at(3) == read.groups


def test_mvars_cycle() -> None:
    """`MVARTrainer.train_one_ep_ratio_k`: of ten iterations 8 on scales 1 to 8, one on scale 9, one on scale 10."""
    read = ScaleGroups.read([["0..7"], [8], [9]], [8, 1, 1], plan_of(SpatialAttention(7)))
    steps = [read.at(step) for step in range(20)]
    assert steps[:8] == [(range(8),)] * 8 and steps[8:10] == [(range(8, 9),), (range(9, 10),)]
    assert steps[10:] == steps[:10] and not read.splits_steps
    assert str(read) == "0..7 for 8 steps, 8 for 1 steps, 9 for 1 steps"


@pytest.mark.parametrize(
    ("said", "cycle", "names"),
    [
        ([["0..7"], [9]], None, "each of the scales 0 to 9 once"),
        ([["0..7"], [9], [8]], None, "each of the scales"),
        ([["7..0"], [8], [9]], None, "a group is empty"),
        ([[0, "x"]], None, "'x' is no scale"),
        ([[-1], ["0..9"]], None, "'-1'|-1 is no scale"),
        ("some", None, "write auto"),
        (1.5, None, "write auto"),
        (0.0, None, "write auto"),
        ("4 gigabytes", None, "a size that they may have such as 4GB"),
        ("0GB", None, "write auto"),
        ("4GB", [8, 1, 1], "a cycle needs groups that are listed"),
        ("auto", [8, 1], "each of the 4 scale groups"),
        ("auto", [8, 0, 1, 1], "at least 1"),
        (None, [1], "each of the 1 scale groups"),
    ],
)
def test_what_is_no_grouping_is_refused(said: Any, cycle: Any, names: str) -> None:
    with pytest.raises(UserError, match=names):
        ScaleGroups.read(said, cycle, plan_of(AdjacentAttention()))


@pytest.mark.parametrize("blocks", [VARBlocks(), LlamaBlocks()], ids=repr)
def test_what_a_token_keeps_tells_what_a_step_keeps(blocks: Any) -> None:
    model = model_of(attention=AdjacentAttention(), blocks=blocks, vocab_size=64)
    state, kept = torch.random.get_rng_state(), kept_of_token(model)
    assert torch.equal(torch.random.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert kept * 3 * 30 == pytest.approx(kept_bytes(model, WHOLE), rel=0.2)


@pytest.mark.parametrize(("depth", "layers"), [(4, 2), (24, 1)])
def test_what_a_token_keeps_is_the_slope_of_two_batches_under_autocast(depth: int, layers: int) -> None:
    """At d24's width the weights that autocast rounds are eight times what a token keeps."""
    sizes = dict(vocab_size=16, depth=layers, width=64 * depth, heads=depth, label_drop=0.0, drop_path=0.0)
    model = model_of(attention=AdjacentAttention(), **sizes)
    kept = []
    with torch.autocast("cpu", torch.bfloat16):
        found = kept_of_token(model)
        for images in (2, 4):
            inputs = model.inputs(torch.zeros(images, 29, 4), torch.zeros(images, dtype=torch.int64))
            with KeptForBackward(model) as held:
                model.features(inputs, range(4))
            kept.append(held.peak)
    assert found == pytest.approx((kept[1] - kept[0]) / (2 * 30), rel=0.1)


@pytest.mark.slow
def test_blocks_that_are_compiled_are_measured_compiled() -> None:
    model = model_of(attention=AdjacentAttention(), vocab_size=16, depth=1, label_drop=0.0, drop_path=0.0)
    eager = kept_of_token(model)
    compile_blocks(model, backend="aot_eager_decomp_partition")  # inductor's choice of what is kept, without its code
    assert 0.3 * eager < kept_of_token(model) < 0.95 * eager


def test_groups_of_a_given_size() -> None:
    read = ScaleGroups.read("2.6MB", None, plan_of(SpatialAttention(7)))
    assert read.target == 2.6e6 and read.splits_steps
    pyramid = ScalePyramid(PUBLISHED_SIDES[256])
    assert read.within(1000.0, 10, pyramid).groups == (range(8), range(8, 9), range(9, 10))  # 255 tokens x 10 x 1 kB
    assert read.within(1000.0, 1, pyramid).groups == (range(10),)
    assert len(read.within(1e9, 10, pyramid).groups) == 10, "no less than a scale"
    with pytest.raises(UserError, match="reads keys of scale"):
        ScaleGroups.read("4 GiB", None, plan_of(FullAttention()))


def test_a_fit_makes_its_groups_for_the_size(
    shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("mvar_lightning.training.next_scale.rank_zero_info", told.append)
    whole = fitted(tokenizer, shards, tmp_path / "whole")
    grouped = fitted(tokenizer, shards, tmp_path / "grouped", scale_groups="1.5MB")
    [line] = [line for line in told if "scale groups" in line]
    assert "0..1, then 2; the largest keeps" in line
    for name, value in whole.items():
        assert (grouped[name] - value).abs().mean() < 1e-6, name


@pytest.mark.parametrize("attention", [FullAttention(), SlidingWindowAttention(2)], ids=repr)
def test_keys_of_another_group_are_refused(attention: Any) -> None:
    with pytest.raises(UserError, match=r"scale 9 reads keys of scale [08].*AdjacentAttention"):
        ScaleGroups.read([["0..8"], [9]], None, plan_of(attention))
    assert ScaleGroups.read(None, None, plan_of(attention)).groups == (range(10),)


class Groups(L.Callback):
    """Which scales' losses each batch has logged anew."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self._before: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        now = {name: value for name, value in trainer.logged_metrics.items() if name.startswith("train/loss_scale_")}
        new = [name for name, value in now.items() if value != self._before.get(name)]
        self.seen.append(sorted(int(name.rpartition("_")[2]) for name in new))
        self._before = now


def fitted(
    tokenizer: Path, shards: Path, folder: Path, *callbacks: L.Callback, precision: str = "32-true", **changes: Any
) -> dict[str, Tensor]:
    L.seed_everything(0, verbose=False)
    made = MarkovVARModule(str(tokenizer), **{**MODEL_SIZES, "base_lr": 0.05, "drop_path": 0.2, **changes})
    settings = dict(precision=precision, accumulate_grad_batches=2, gradient_clip_val=0.3, log_every_n_steps=1)
    run = trainer(folder, *callbacks, max_steps=3, **settings)
    run.fit(made, datamodule=data_module(shards))
    assert run.global_step == 3
    return copy_of(made.model)


def test_a_fit_in_groups_is_a_fit_of_the_whole(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    """With accumulated and clipped gradients, dropped labels and branches."""
    whole = fitted(tokenizer, shards, tmp_path / "whole")
    grouped = fitted(tokenizer, shards, tmp_path / "grouped", scale_groups=[["0..1"], [2]])
    for name, value in whole.items():
        assert (grouped[name] - value).abs().mean() < 1e-6, name


def test_a_fit_in_a_cycle_trains_one_group_a_step(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    groups = Groups()
    fitted(tokenizer, shards, tmp_path, groups, scale_groups=[["0..1"], [2]], scale_cycle=[2, 1])
    assert groups.seen == [[0, 1]] * 4 + [[2]] * 2  # two batches a step


def test_refused_where_the_module_is_made(tokenizer: Path) -> None:
    with pytest.raises(UserError, match="reads keys of scale"):
        VARModule(str(tokenizer), **MODEL_SIZES, scale_groups="auto")
    assert len(MVARModule(str(tokenizer), **MODEL_SIZES, attention=AdjacentAttention(), scale_groups="auto")
               .scale_groups.groups) > 1  # fmt: skip
    assert all(a.stop == b.start for a, b in pairwise(groups_of_share(ScalePyramid(SCALES), 0.3)))


def test_loss_scaling_is_refused(tokenizer: Path) -> None:
    made = MarkovVARModule(str(tokenizer), **MODEL_SIZES, scale_groups=[["0..1"], [2]])
    strategy = SimpleNamespace(root_device=torch.device("cpu"))  # CPUs have no such precision
    made.trainer = run = SimpleNamespace(precision="16-mixed", datamodule=None, strategy=strategy)
    with pytest.raises(UserError, match="bf16-mixed, not 16-mixed"):
        made.setup("fit")
    run.precision = "bf16-mixed"
    made.setup("fit")


def test_groups_in_bfloat16_are_close(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    whole = fitted(tokenizer, shards, tmp_path / "whole", precision="bf16-mixed")
    grouped = fitted(tokenizer, shards, tmp_path / "grouped", precision="bf16-mixed", scale_groups=[["0..1"], [2]])
    apart = torch.cat([(grouped[name] - value).abs().flatten() for name, value in whole.items()])
    assert apart.mean() < 2e-4 and all(value.dtype == torch.float32 for value in grouped.values())
