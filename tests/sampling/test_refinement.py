"""Refinement in passes: what is drawn again, what the masked head may know, its training, and its files."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.small_models import CONVOLUTIONS, SIZES
from torch import Tensor

from mvar_lightning import InPasses, RefinementModule, UserError, generate, load, load_refinement, save, save_refinement
from mvar_lightning.attention import AdjacentAttention, FullAttention, SpatialAttention
from mvar_lightning.cli import main
from mvar_lightning.sampling.refinement import known_codes
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import LlamaBlocks, NextScaleTransformer, SlidingWindowHistory
from mvar_lightning.transformer.refinement import Refinement

SCALES = [1, 2, 3, 4]
LABELS, SEEDS = [0, 2, 1], [5, 6, 7]
FAMILIES: dict[str, dict[str, Any]] = {
    "full": {"attention": FullAttention()},
    "spatial": {"attention": SpatialAttention(3, scales=2)},
    "markov": {"attention": AdjacentAttention(), "history": SlidingWindowHistory(2), "blocks": LlamaBlocks()},
}


def tokenizer() -> MultiScaleTokenizer:
    torch.manual_seed(0)
    return MultiScaleTokenizer(SCALES, **SIZES, **CONVOLUTIONS).eval()


def model(depth: int = 3, width: int = 16, **axes: Any) -> NextScaleTransformer:
    torch.manual_seed(1)
    sizes = {"num_classes": 3, "width": width, "heads": 2, "depth": depth, "gamma_init": 0.5}
    made = NextScaleTransformer(SCALES, **SIZES, **sizes, **axes).eval()
    with torch.no_grad():
        made.head.linear.weight.mul_(100)  # at first all codes are nearly equally likely
    return made


def refinement(base: NextScaleTransformer, blocks: int = 2) -> Refinement:
    made = Refinement(base, blocks).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def tokens_of(
    base: NextScaleTransformer, passes: InPasses | None, rows: slice = slice(None), **settings: Any
) -> Tensor:
    return generate(base, tokenizer(), LABELS[rows], seeds=SEEDS[rows], refinement=passes, **settings).tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_depends_on_its_seed_alone_and_one_draw_is_none_more(family: str) -> None:
    base = model(**FAMILIES[family])
    plain, made = tokens_of(base, None), refinement(base)
    refined = tokens_of(base, InPasses(made))
    assert torch.equal(refined[:, :1], plain[:, :1]) and not torch.equal(refined[:, 1:14], plain[:, 1:14])
    assert torch.equal(tokens_of(base, InPasses(made), slice(1, 2)), refined[1:2])
    assert torch.equal(tokens_of(base, InPasses(made, {1: [4], 2: [9]})), plain)
    later = tokens_of(base, InPasses(made, {3: [8, 8]}))
    assert torch.equal(later[:, :14], plain[:, :14]) and not torch.equal(later, plain)


def test_each_pass_draws_the_least_probable_of_the_last_pass_again(monkeypatch: pytest.MonkeyPatch) -> None:
    base = model(attention=FullAttention())
    seen: list[tuple[int, Tensor, Tensor]] = []
    forward = Refinement.forward

    def watched(self: Refinement, *args: Any) -> Tensor:
        logits = forward(self, *args)
        seen.append((args[2], args[5], logits))
        return logits

    monkeypatch.setattr(Refinement, "forward", watched)
    first: list[Tensor] = []
    from mvar_lightning.sampling import sampler

    choose: Callable[..., Any] = sampler.choose
    monkeypatch.setattr(sampler, "choose", lambda *args: first.append((args[0].clone(), out := choose(*args))) or out)  # type: ignore[func-returns-value,arg-type]
    found = tokens_of(base, InPasses(refinement(base)), cfg=0, top_k=1)
    assert [(scale, masked.sum(dim=1).unique().tolist()) for scale, masked, _ in seen] == [
        (1, [3]),
        (2, [8]),
        (2, [7]),
        (2, [5]),
    ]
    logits, (idx, _) = first[2]
    log_p = logits.log_softmax(-1).gather(-1, idx[..., None])[..., 0]
    before = torch.ones_like(idx, dtype=torch.bool)
    for _, masked, logits in seen[1:]:
        assert not (masked & ~before).any(), "of those that were drawn last"
        stay, again = log_p.masked_fill(masked | ~before, torch.inf), log_p.masked_fill(~masked, -torch.inf)
        assert (stay.amin(dim=1) >= again.amax(dim=1)).all()
        idx = torch.where(masked, logits.argmax(dim=-1), idx)  # greedy: what a pass draws
        log_p, before = logits.log_softmax(-1).gather(-1, idx[..., None])[..., 0], masked
    assert torch.equal(found[:, 5:14], idx)


@torch.no_grad()
def test_masked_tokens_and_other_scales_are_not_told() -> None:
    base, quantizer = model(attention=FullAttention()), tokenizer().quantizer
    made, own = refinement(base), slice(5, 14)
    one, other = torch.randint(16, (2, 2, 30), generator=torch.Generator().manual_seed(0))
    masked = torch.zeros(2, 9, dtype=torch.bool)
    masked[:, [1, 4, 8]] = True
    mixed = torch.where(masked, other[:, own], one[:, own])
    label_B = torch.tensor([0, 2])
    x_BlC = base.embed(tokenizer().teacher_input(one), base.class_embedding(label_B))[:, own]

    def logits(of: NextScaleTransformer, idx_Bl: Tensor) -> Tensor:
        codes = known_codes(quantizer.lookup(idx_Bl), masked, quantizer, 2)
        return made(of, made.conditions(of, label_B), 2, x_BlC, codes, masked)  # type: ignore[no-any-return]

    plain = logits(base, one[:, own])
    assert torch.equal(logits(base, mixed), plain)
    assert not torch.allclose(logits(base, other[:, own]), plain, atol=1e-3)
    adjacent = NextScaleTransformer.from_config(base.config, attention=AdjacentAttention()).eval()
    adjacent.load_state_dict(base.state_dict())
    torch.testing.assert_close(logits(adjacent, one[:, own]), plain)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            base.transform(base.inputs(tokenizer().teacher_input(one), label_B), range(4))[:, own], plain
        )


def test_training_changes_the_refinement_alone_and_it_learns(tmp_path: Path) -> None:
    base, own = model(attention=FullAttention()), tokenizer()
    save(tmp_path / "base", base, own)
    sizes: dict[str, Any] = {"num_classes": 3, "depth": 3, "width": 16, "heads": 2}
    settings: dict[str, Any] = {"tokenizer": str(tmp_path / "base"), "init_from": str(tmp_path / "base"), **sizes}
    torch.manual_seed(0)
    module = RefinementModule(refined_blocks=2, **settings).train()
    assert not module.model.training and module.refinement.training
    before = deepcopy(module.model.state_dict())
    idx_BL = torch.randint(16, (8, 30), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    batch = {"tokens": idx_BL, "label": torch.arange(16) % 3}
    optimizer = torch.optim.AdamW(module.trained.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        found = module.masked_loss(batch)
        optimizer.zero_grad()
        found.loss.backward()
        assert all(p.grad is not None for p in module.refinement.parameters()), "no part without a gradient"
        optimizer.step()
        losses.append(float(found.loss.detach()))
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert module.eval().generate(torch.tensor([1, 2]), [3, 4]).images.shape == (2, 3, 8, 8)
    module.save_beside(tmp_path / "run")
    again = load_refinement(tmp_path / "run", base, own)
    assert {file.name for file in (tmp_path / "run" / "refinement").iterdir()} == {
        "refinement.json",
        "refinement.safetensors",
    }
    state = module.refinement.state_dict()
    assert state and all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    for wrong, words in (
        ({"init_from": None}, "belongs to a trained model"),
        ({"train_scales": [3]}, "train_scales: is of a model's own training"),
        ({"refined_blocks": 4}, "refined_blocks 4: the model has 3"),
    ):
        with pytest.raises(UserError, match=words):
            RefinementModule(**{**settings, **wrong})


def test_files_that_do_not_belong_are_told(tmp_path: Path) -> None:
    base, own = model(attention=FullAttention()), tokenizer()
    save_refinement(tmp_path / "r", refinement(base), base, own)
    other = deepcopy(base)
    with torch.no_grad():
        other.head.linear.weight[0, 0] += 1
    for path, beside, words in (
        (tmp_path / "none", base, "has no refinement.json"),
        (tmp_path / "r", other, "beside other weights"),
    ):
        with pytest.raises(UserError, match=words):
            load_refinement(path, beside, own)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="something else"):
        save_refinement(tmp_path / "full", refinement(base), base, own)
    weights = tmp_path / "r" / "refinement.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="damaged"):
        load_refinement(tmp_path / "r", base, own)


def test_a_refinement_of_other_weights_is_told_and_a_known_model_may_be_rounded(tmp_path: Path) -> None:
    base, own, passes = model(attention=FullAttention()), tokenizer(), {1: [1, 3]}
    save_refinement(tmp_path / "r", refinement(base), base, own)
    other, equal = deepcopy(base), deepcopy(base)
    with torch.no_grad():
        other.head.linear.weight[0, 0] += 1
    for made in (refinement(base), load_refinement(tmp_path / "r", base, own)):
        with pytest.raises(UserError, match="beside other weights; load it beside this model"):
            tokens_of(other, InPasses(made, passes))
        plain = tokens_of(equal, InPasses(made, passes))
        assert torch.equal(tokens_of(base, InPasses(made, passes)), plain)
    with torch.no_grad():
        equal.head.linear.weight += 1  # as a rounding: another hash, but it was asked before
    tokens_of(equal, InPasses(made, passes))
    with pytest.raises(UserError, match="beside other weights"):
        tokens_of(deepcopy(equal), InPasses(made, passes))
    assert deepcopy(made).known == [] and torch.equal(tokens_of(base, InPasses(deepcopy(made), passes)), plain)


def test_the_published_passes_go_by_shape_and_a_run_without_such_maps_draws_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = MultiScaleTokenizer([1, (1, 4), 4], **SIZES, **CONVOLUTIONS).eval()
    base = NextScaleTransformer(
        [1, (1, 4), 4], **SIZES, num_classes=3, width=16, heads=2, depth=1, attention=FullAttention()
    ).eval()
    with pytest.raises(UserError, match="the published ones fit none of the scales"):
        generate(base, own, LABELS, refinement=InPasses(Refinement(base, 1)))
    save(tmp_path / "base", base, own)
    sizes: dict[str, Any] = {"num_classes": 3, "depth": 1, "width": 16, "heads": 2}
    settings: dict[str, Any] = {"tokenizer": str(tmp_path / "base"), "init_from": str(tmp_path / "base"), **sizes}
    module = RefinementModule(**settings).eval()
    assert module.passes is None and module.generate(torch.tensor([1]), [3]).images.shape == (1, 3, 8, 8)
    refined = RefinementModule(**settings, refinement_passes={1: [1, 3]}).eval()
    assert refined.generate(torch.tensor([1]), [3]).tokens.shape == (1, 21)
    with pytest.raises(UserError, match="5 tokens, longer"):
        RefinementModule(**settings, refinement_passes={1: [1, 4]})


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ({2: [1, 1, 2, 6]}, "10 tokens, longer than the map of scale 2"),
        ({1: [1, 2]}, "3 tokens, shorter"),
        ({0: [1]}, "the first scale has one draw"),
        ({4: [1]}, "the model has scales 0 to 3"),
        ({1: [0, 4]}, "at least 1"),
        ({1: []}, "at least 1"),
        ([1, 3], "numbers by scale"),
        ({1: 4}, "refinement_passes 1:4: give a list"),
        ({1: "13"}, "give a list"),
        ({"1": [1, 3]}, "refinement_passes '1':"),
        ({1: [True, 3]}, "at least 1"),
    ],
)
def test_schedules_that_mean_nothing_are_told(passes: Any, words: str) -> None:
    base = model(attention=FullAttention())
    with pytest.raises(UserError, match=words):
        tokens_of(base, InPasses(Refinement(base, 1), passes))


def test_what_it_does_not_go_with_is_told() -> None:
    base = model(attention=FullAttention())
    made = Refinement(base, 1)
    with pytest.raises(UserError, match="more_smooth"):
        tokens_of(base, InPasses(made), more_smooth=True)
    with pytest.raises(UserError, match="of a model of width 16"):
        tokens_of(model(width=32), InPasses(made))
    with pytest.raises(UserError, match="has 3 blocks of its model, this one has 2 in all"):
        tokens_of(model(depth=2, attention=FullAttention()), InPasses(Refinement(base, 3)))
    stages = [(range(2), base), (range(2, 4), deepcopy(base))]
    with pytest.raises(UserError, match="drawn by another model"):
        generate(stages, tokenizer(), LABELS, refinement=InPasses(made, {2: [4, 5]}))
    by_itself = generate(stages, tokenizer(), LABELS, seeds=SEEDS, refinement=InPasses(made)).tokens
    assert torch.equal(by_itself, tokens_of(base, InPasses(made, {1: [1, 3]}))), "the published ones of its own scales"
    with pytest.raises(UserError, match="fit none of 0 to 0 of the scales"):
        generate([(range(1), base), (range(1, 4), deepcopy(base))], tokenizer(), LABELS, refinement=InPasses(made))
    alone = generate(stages, tokenizer(), LABELS, seeds=SEEDS, refinement=InPasses(made, {1: [1, 3]})).tokens
    assert torch.equal(alone, tokens_of(base, InPasses(made, {1: [1, 3]})))


def test_the_command_takes_a_refinement_and_a_cache_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped, own = load("digits")
    assert shipped is not None
    save_refinement(tmp_path / "r", refinement(shipped), shipped, own)
    command = ["sample", "--checkpoint", "digits", "--classes", "3", "--count", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--refinement", str(tmp_path / "r"), "--refinement-passes", "1:2,2"]) == 0
    written = (tmp_path / "out" / "sampling.json").read_text()
    assert "1:2,2" in written and "cache_policy" not in written
    for arguments, words in (
        ([], "holds images with refinement"),
        (["--refinement", str(tmp_path / "r")], "holds images with refinement"),
        (["--refinement", str(tmp_path / "r"), "--refinement-passes", "1:2,3"], "--refinement-passes 1:2,3: 5 tokens"),
        (["--refinement-passes", "1:2,2"], "--refinement-passes: needs --refinement"),
        (["--refinement-passes", "1:1,3", "1:2,2"], "--refinement-passes 1: is given twice"),
        (["--refinement", str(tmp_path)], "has no refinement.json"),
        (["--cache-budget", "0.6"], "holds images with"),
        (["--cache-budget", "0.2"], "--cache-budget 0.2: keeps 6 of 30 tokens"),
        (["--cache-drafters", "0"], "needs --cache-budget"),
        (["--cache-budget", "0.6", "--cache-drafters", "4"], "--cache-drafters 4: the model has layers 0 to 3"),
    ):
        assert main([*command, *arguments]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("mvar: error:") == 1 and err.strip().count("\n") == 0
