"""Selectors: the first map is what would be drawn without one, the best goes on, an image depends on its seed alone."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from torch import Tensor

from mvar_lightning import (
    AdjacentAttention,
    FullAttention,
    LlamaBlocks,
    MultiScaleTokenizer,
    NextScaleTransformer,
    SlidingWindowHistory,
    SpatialAttention,
    UserError,
    edit,
    generate,
    quantize,
)
from mvar_lightning.cli import main
from mvar_lightning.sampling import (
    BestOfScales,
    ConstantGuidance,
    Drawn,
    ImageNoise,
    MostLikely,
    SamplingSettings,
    Scorer,
    Selector,
    load_scorer,
    save_scorer,
)
from mvar_lightning.sampling.jobs import list_jobs
from mvar_lightning.tokenizer import fingerprint
from mvar_lightning.tools.drawing import from_image

MakeModel = Callable[..., NextScaleTransformer]
LABELS, SEEDS = [0, 3, 3, -1], [11, 2**32 - 1, 5, 0]
SIZES: dict[str, Any] = {"channels": [8, 12], "embedding": 4, "hidden": [16]}
FAMILIES: dict[str, dict[str, Any]] = {
    "var": {"attention": FullAttention()},
    "mvar": {"attention": SpatialAttention(3, scales=1)},
    "markov": {"attention": AdjacentAttention(), "history": SlidingWindowHistory(2), "blocks": LlamaBlocks()},
}


class Watched(Selector):
    """Takes the map of a given number, and keeps what it saw."""

    which, seen = 0, []

    def scores(self, drawn: Drawn) -> Tensor:
        self.seen.append(drawn)
        return torch.eye(self.candidates)[self.which].expand(len(drawn.idx_BMl), -1)


@pytest.fixture
def watched() -> type[Watched]:
    Watched.which, Watched.seen = 0, []
    return Watched


@pytest.fixture(scope="module")
def scorer(tokenizer: MultiScaleTokenizer, model: NextScaleTransformer) -> Scorer:
    torch.manual_seed(0)
    made = Scorer(fingerprint(tokenizer), tokenizer.pyramid.sides, tokenizer.code_dim, model.num_classes, **SIZES)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cfg", [0.0, ConstantGuidance(1.0)], ids=repr)
def test_the_first_map_is_what_would_be_drawn_without(
    family: str, cfg: Any, make_model: MakeModel, tokenizer: MultiScaleTokenizer, watched: type[Watched]
) -> None:
    model = make_model(**FAMILIES[family])
    plain = generate(model, tokenizer, LABELS, cfg=cfg, top_k=20, seeds=SEEDS)
    first = generate(model, tokenizer, LABELS, cfg=cfg, top_k=20, seeds=SEEDS, selector=watched(3))
    assert torch.equal(first.tokens, plain.tokens) and torch.equal(first.images, plain.images)
    watched.which = 2
    other = generate(model, tokenizer, LABELS, cfg=cfg, top_k=20, seeds=SEEDS, selector=watched(3, [1, 3])).tokens
    assert torch.equal(other[:, 0], plain.tokens[:, 0]) and (other != plain.tokens).float().mean() > 0.5


def test_what_goes_on_is_what_was_judged(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, watched: type[Watched]
) -> None:
    watched.which = 1
    made = generate(model, tokenizer, LABELS, seeds=SEEDS, selector=watched(3)).tokens
    f_hats, tokens = tokenizer.quantizer.f_hats(made), tokenizer.pyramid.split(made)
    assert [drawn.scale for drawn in watched.seen] == list(range(4))
    for drawn, f_hat, idx_Bl in zip(watched.seen, f_hats, tokens, strict=True):
        assert torch.equal(drawn.idx_BMl[:, 1], idx_Bl) and drawn.label_B.tolist() == [0, 3, 3, 5]
        torch.testing.assert_close(drawn.f_hat_BMZhw[:, 1], f_hat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["likely", "best", "by chance"])
def test_an_image_depends_on_its_label_and_seed_alone(
    kind: str, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, scorer: Scorer
) -> None:
    selector = {
        "likely": MostLikely(4),
        "best": BestOfScales(4, [1, 2, 3], scorer),
        "by chance": BestOfScales(5, None, scorer, temperature=0.1, among=3),
    }[kind]
    images, idx_BL = generate(model, tokenizer, LABELS, seeds=SEEDS, selector=selector)
    assert (idx_BL != generate(model, tokenizer, LABELS, seeds=SEEDS).tokens).any()
    for order in ([2], [3, 1, 0], [1, 2]):
        some = {"label_B": [LABELS[i] for i in order], "seeds": [SEEDS[i] for i in order]}
        again = generate(model, tokenizer, **some, selector=selector)
        assert torch.equal(again.tokens, idx_BL[order])
        torch.testing.assert_close(again.images, images[order], atol=1e-4, rtol=0)


def test_more_candidates_keep_the_first_ones_and_no_other_draw_changes(tokenizer: MultiScaleTokenizer) -> None:
    noise, other = (ImageNoise(SEEDS, tokenizer.pyramid, torch.device("cpu")) for _ in range(2))
    few_BlM, pick_B = noise.of_maps(2, 3)
    many_BlM, same_B = noise.of_maps(2, 50)
    assert torch.equal(many_BlM[..., :3], few_BlM) and torch.equal(few_BlM[..., 0], noise.uniform(2))
    assert torch.equal(pick_B, same_B) and torch.equal(noise.gumbel(0, 7), other.gumbel(0, 7))
    assert len(many_BlM.unique()) == many_BlM.numel(), "no number twice, in no image and no map"
    assert not torch.isin(noise.of_maps(3, 2)[0], many_BlM).any() and abs(many_BlM.mean() - 0.5) < 0.03


def test_likelihood_ranks_as_the_filtered_distribution_does(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, watched: type[Watched]
) -> None:
    generate(model, tokenizer, LABELS, top_k=9, top_p=None, temperature=0.7, seeds=SEEDS, selector=watched(6))
    for drawn in watched.seen:
        least = drawn.logits_BlV.topk(9).values[..., -1:]
        log_p = (drawn.logits_BlV / 0.7).masked_fill(drawn.logits_BlV < least, -torch.inf).log_softmax(-1)
        expected_BM = log_p.gather(-1, drawn.idx_BMl.transpose(1, 2)).sum(1)
        found_BM = MostLikely(6).scores(drawn) / 0.7
        torch.testing.assert_close(found_BM - found_BM[:, :1], expected_BM - expected_BM[:, :1], atol=1e-4, rtol=1e-4)
        assert torch.equal(found_BM.argmax(1), expected_BM.argmax(1)) and found_BM.std(1).min() > 0


def test_the_scorer_is_asked_for_each_map_by_itself(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, scorer: Scorer, watched: type[Watched]
) -> None:
    generate(model, tokenizer, LABELS, seeds=SEEDS, selector=watched(3))
    for drawn in watched.seen:
        found_BM = BestOfScales(3, None, scorer).scores(drawn)
        for image, label in enumerate((0, 3, 3, 5)):
            for number in range(3):
                f_hat = drawn.f_hat_BMZhw[image, number][None]
                alone = scorer(f_hat, torch.tensor([label]), torch.tensor([drawn.scale]))
                torch.testing.assert_close(found_BM[image, number], alone[0], atol=1e-4, rtol=1e-4)
    assert len(found_BM.unique()) == 12, "label, map and scale matter"


def test_a_scorer_that_is_in_training_is_asked_as_it_will_be(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, scorer: Scorer
) -> None:
    scorer.train()
    twice = [
        generate(model, tokenizer, [1, 2], seeds=[3, 4], selector=BestOfScales(4, scorer=scorer)).tokens for _ in "ab"
    ]
    assert torch.equal(*twice) and scorer.training


def test_picks_follow_the_scores() -> None:
    score_BM = torch.tensor([0.0, 2.0, 1.0, -5.0, 2.0]).expand(4000, -1)
    uniform_B = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    assert (MostLikely(5).pick(score_BM, uniform_B) == 1).all(), "of equal ones the first"
    picked = MostLikely(5, temperature=2.0, among=4).pick(score_BM, uniform_B)
    share = (torch.tensor([0.0, 2.0, 1.0, -torch.inf, 2.0], dtype=torch.float64) / 2).softmax(0)
    counts = torch.bincount(picked, minlength=5)
    assert counts[3] == 0
    assert chisquare(counts[share > 0], 4000 * share[share > 0]).pvalue > 1e-3


@pytest.mark.parametrize("attention", [FullAttention(), AdjacentAttention()], ids=repr)
def test_a_few_images_at_a_time_give_the_same(
    attention: Any, make_model: MakeModel, tokenizer: MultiScaleTokenizer, scorer: Scorer, monkeypatch: Any
) -> None:
    model, selector = make_model(attention=attention), BestOfScales(3, None, scorer)
    whole = generate(model, tokenizer, [0, 1, 2], seeds=[5, 6, 7], selector=selector)
    monkeypatch.setattr(importlib.import_module("mvar_lightning.sampling.sampler"), "LOGITS_AT_ONCE", 2000)
    in_parts = generate(model, tokenizer, [0, 1, 2], seeds=[5, 6, 7], selector=selector)
    monkeypatch.setattr(importlib.import_module("mvar_lightning.sampling.selectors"), "NUMBERS_AT_ONCE", 1)
    one_by_one = generate(model, tokenizer, [0, 1, 2], seeds=[5, 6, 7], selector=selector)
    assert torch.equal(in_parts.tokens, whole.tokens) and torch.equal(one_by_one.tokens, whole.tokens)


def test_two_models_and_few_bits(make_model: MakeModel, tokenizer: MultiScaleTokenizer) -> None:
    model = make_model()
    alone = generate(model, tokenizer, LABELS, seeds=SEEDS, selector=MostLikely(4)).tokens
    stages = [(range(2), model), (range(2, 4), deepcopy(model))]
    assert torch.equal(generate(stages, tokenizer, LABELS, seeds=SEEDS, selector=MostLikely(4)).tokens, alone)
    quantize(small := deepcopy(model), "int8")
    made = generate(small, tokenizer, LABELS, seeds=SEEDS, selector=MostLikely(4)).tokens
    assert (made != generate(small, tokenizer, LABELS, seeds=SEEDS).tokens).any()


def test_edits_judge_maps_with_the_images_tokens_in_them(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, watched: type[Watched]
) -> None:
    size = tokenizer.image_size
    image, mask = torch.rand(1, 3, size, size) * 2 - 1, torch.zeros(size, size)
    mask[:, size // 2 :] = 1
    plain = edit(model, tokenizer, image, mask, 1, seeds=[5, 6])
    same = edit(model, tokenizer, image, mask, 1, seeds=[5, 6], selector=watched(3))
    assert torch.equal(same.tokens, plain.tokens)
    given, last = tokenizer.pyramid.split(tokenizer.encode(image))[-1], watched.seen[-1]
    kept = (last.idx_BMl == given[:, None]).all(dim=(0, 1))
    assert kept.view(5, 5)[:, :2].all() and not kept.all()
    other = edit(model, tokenizer, image, mask, 1, seeds=[5, 6], selector=MostLikely(4)).tokens
    assert (other != plain.tokens).any() and torch.equal(other[:, -25:][:, kept], given[:, kept].expand(2, -1))


def test_a_scorer_of_maps_that_are_no_squares(tmp_path: Path) -> None:
    made = Scorer("", [1, [1, 2], [2, 4], [4, 8]], 4, 3, channels=[8, 16], embedding=8, hidden=[16]).eval()
    assert made.head[0][0].in_features == 16 * 2 * 2 + 2 * 8  # halved down to 2 on either axis
    score_N = made(torch.randn(5, 4, 4, 8), torch.arange(5) % 4, torch.arange(5) % 4)
    assert score_N.shape == (5,) and torch.isfinite(score_N).all()
    save_scorer(tmp_path / "scorer", made)
    assert load_scorer(tmp_path / "scorer").pyramid == made.pyramid


def test_scorers_are_saved_and_read_without_unpickling(tmp_path: Path, scorer: Scorer) -> None:
    save_scorer(tmp_path / "run" / "model", scorer)
    assert sorted(path.name for path in (tmp_path / "run" / "model").iterdir()) == ["config.json", "scorer.safetensors"]
    found = load_scorer(tmp_path / "run")
    assert found.digest() == scorer.digest() and not found.training and found.tokenizer_hash == scorer.tokenizer_hash
    assert BestOfScales(4, None, str(tmp_path / "run")).identity() == BestOfScales(4, None, scorer).identity()
    content = bytearray((tmp_path / "run/model/scorer.safetensors").read_bytes())
    content[-3] ^= 255
    (tmp_path / "run/model/scorer.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_scorer(tmp_path / "run")
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    for change, said in (({"channels": [8]}, "missing|unexpected"), ({"channels": "8"}, "must be"), ({"x": 1}, "x")):
        (tmp_path / "run/model/config.json").write_text(
            json.dumps({**config, "scorer": {**config["scorer"], **change}})
        )
        with pytest.raises(UserError, match=said):
            load_scorer(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("dear")
    with pytest.raises(UserError, match="something else"):
        save_scorer(tmp_path / "other", scorer)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MostLikely(1), "candidates 1"),
        (lambda: MostLikely(4, [2, 1]), "in order"),
        (lambda: MostLikely(4, []), "give some"),
        (lambda: MostLikely(4, temperature=-1.0), "temperature -1"),
        (lambda: MostLikely(4, among=2), "among 2"),
        (lambda: MostLikely(4, temperature=1.0, among=2.5), "among 2.5"),  # type: ignore[arg-type]
        (lambda: MostLikely(4, 3), "scales 3; give some"),  # type: ignore[arg-type]
        (lambda: MostLikely(4, ["a"]), r"scales \['a'\]; give some"),  # type: ignore[list-item]
        (lambda: MostLikely(4, [1.5]), r"scales \[1.5\]; give some"),  # type: ignore[list-item]
        (lambda: MostLikely(4, temperature="1"), "temperature '1'"),  # type: ignore[arg-type]
        (lambda: BestOfScales(4), "scorer"),
        (lambda: BestOfScales(4, None, "nowhere"), "no scorer is there"),
        (lambda: SamplingSettings(top_k=1, selector=MostLikely(4)), "top_k 1"),
        (lambda: SamplingSettings(more_smooth=True, selector=MostLikely(4)), "more_smooth"),
        (lambda: SamplingSettings(selector="MostLikely"), "a selector such as"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_told_at_construction(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_what_does_not_fit_is_told_before_anything_is_drawn(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, scorer: Scorer
) -> None:
    other = Scorer("0" * 64, tokenizer.pyramid.sides, tokenizer.code_dim, model.num_classes, **SIZES)
    few = Scorer(fingerprint(tokenizer), tokenizer.pyramid.sides, tokenizer.code_dim, 2, **SIZES)
    broken = deepcopy(scorer)
    torch.nn.init.constant_(broken.head[-1].bias, torch.nan)
    for selector, said in (
        (MostLikely(4, [4]), "the model has 0 to 3"),
        (BestOfScales(4, None, other), "maps of tokenizer 000000000000"),
        (BestOfScales(4, None, few), "2 classes, the model 5"),
        (BestOfScales(4, None, broken), "scores are NaN"),
    ):
        with pytest.raises(UserError, match=said):
            generate(model, tokenizer, [0], selector=selector)


class Weighed(MostLikely):
    def __init__(self, weight: float, candidates: int = 4) -> None:
        super().__init__(candidates)
        self.weight = weight


def test_the_command_takes_a_name_or_a_scorer(
    sample: Callable[..., int],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: NextScaleTransformer,
    tokenizer: MultiScaleTokenizer,
    scorer: Scorer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_scorer(tmp_path / "scorer", scorer)
    save_scorer(tmp_path / "other", Scorer("0" * 64, [1, 2, 3, 5], 8, 5, **SIZES))
    out, common = tmp_path / "out", ("--classes", "3", "--count", "2")
    best = ("--selector", str(tmp_path / "scorer"), "--candidates", "3", "--selected-scales", "1-2")
    assert sample(out, *common, *best) == 0 and sample(out, *common, *best) == 0
    settings = json.loads((out / "sampling.json").read_text())
    assert settings["selector"] == BestOfScales(3, [1, 2], scorer).identity() and str(tmp_path) not in str(settings)
    made = generate(
        model, tokenizer, 3, seeds=[job.seed for job in list_jobs([3], 2, 0)], selector=BestOfScales(3, [1, 2], scorer)
    )
    for image_3HW, job in zip(made.images, list_jobs([3], 2, 0), strict=True):
        with Image.open(out / job.file) as picture:
            assert torch.allclose(from_image(picture), image_3HW, atol=1 / 250)
    assert sample(tmp_path / "plain", *common) == 0
    assert "selector" not in json.loads((tmp_path / "plain" / "sampling.json").read_text())
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))  # the worked example of the documents
    command = ["--import", "my_selectors", "sample", "--checkpoint", str(checkpoint), "--device", "cpu", *common]
    assert main([*command, "--out", str(tmp_path / "own"), "--selector", "MostVaried", "--candidates", "9"]) == 0
    varied, plain = (
        generate(model, tokenizer, 3, seeds=range(20), selector=selector).tokens[:, -25:]
        for selector in (Selector.members["MostVaried"](9), None)
    )
    assert sum(len(row.unique()) for row in varied) > sum(len(row.unique()) for row in plain) + 20
    capsys.readouterr()
    for arguments, said in (
        (("--selector", "MostLikely"), "holds images with selector"),
        (("--selector", "MostLikly"), "--selector MostLikly: no scorer is there"),
        (("--selector", str(tmp_path / "other")), "--selector: the scorer was trained on maps of tokenizer"),
        (("--selector", "BestOfScales"), "give the folder of its scorer"),
        (
            ("--selector", "Weighed"),
            "is made of more than candidates and scales (missing a required argument: 'weight'); give it from Python",
        ),
        (("--selector", "MostLikely", "--candidates", "1"), "--candidates 1"),
        (("--candidates", "4"), "--candidates: goes with --selector"),
    ):
        assert sample(out, *common, *arguments) == 2
        err = capsys.readouterr().err
        assert said in err and err.strip().count("\n") == 0
    assert main(["info", str(tmp_path / "scorer")]) == 0 and "scorer" in capsys.readouterr().out
