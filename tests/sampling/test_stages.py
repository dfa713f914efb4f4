"""Several models in one image (CoDe): a model that takes over goes on as if it had drawn what is there."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.small_models import SIZES, small_tokenizer
from PIL import Image

from mvar_lightning import UserError, edit, generate, load
from mvar_lightning.attention import (
    AdjacentAttention,
    AttentionStrategy,
    FullAttention,
    SlidingWindowAttention,
    SpatialAttention,
)
from mvar_lightning.checkpoints import save
from mvar_lightning.cli import main
from mvar_lightning.sampling import ConstantGuidance, CutoffGuidance
from mvar_lightning.sampling.jobs import list_jobs
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.drawing import from_image
from mvar_lightning.transformer import LlamaBlocks, NextScaleTransformer, SlidingWindowHistory

SCALES = [1, 2, 3, 4]
CONVOLUTIONS: dict[str, Any] = {"channels": 8, "norm_groups": 4, "num_res_blocks": 1, "channel_multipliers": [1, 1]}
LABELS = [0, 2, 1]


def tokenizer(scales: list[int] = SCALES) -> MultiScaleTokenizer:
    torch.manual_seed(0)
    return MultiScaleTokenizer(scales, **SIZES, **CONVOLUTIONS).eval()


def model(attention: AttentionStrategy, seed: int = 1, depth: int = 2, **axes: Any) -> NextScaleTransformer:
    torch.manual_seed(seed)
    sizes = {"num_classes": 3, "width": 16, "heads": 2, "gamma_init": 0.3}
    return NextScaleTransformer(SCALES, **SIZES, **sizes, depth=depth, attention=attention, **axes).eval()


FAMILIES = {
    "full": lambda **k: model(FullAttention(), **k),
    "window": lambda **k: model(SlidingWindowAttention(2), **k),
    "spatial": lambda **k: model(SpatialAttention(kernel_size=3, scales=1), **k),
    "markov": lambda **k: model(AdjacentAttention(), history=SlidingWindowHistory(2), blocks=LlamaBlocks(), **k),
}
GUIDANCE = {
    "none": 0,
    "linear": 2.0,
    "constant": ConstantGuidance(1.0),
    "ends early": CutoffGuidance(1.5, first_scale=0, last_scale=1),
    "begins late": CutoffGuidance(1.5, first_scale=3, last_scale=3),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cfg", GUIDANCE.values(), ids=GUIDANCE)
def test_a_model_that_takes_over_from_its_copy_changes_nothing(family: str, cfg: Any) -> None:
    whole = FAMILIES[family]()
    alone = generate(whole, tokenizer(), LABELS, cfg=cfg, seeds=[1, 2, 3])
    for cuts in ([1], [2], [3], [1, 3]):
        borders = [0, *cuts, len(SCALES)]
        stages = [(range(a, b), deepcopy(whole)) for a, b in pairwise(borders)]
        made = generate(stages, tokenizer(), LABELS, cfg=cfg, seeds=[1, 2, 3])
        assert torch.equal(made.tokens, alone.tokens), cuts
        torch.testing.assert_close(made.images, alone.images, atol=1e-4, rtol=0)


def test_rows_that_go_in_several_passes_fill_the_same_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FAMILIES["window"]()
    alone = generate(whole, tokenizer(), LABELS, seeds=[1, 2, 3])
    monkeypatch.setattr("mvar_lightning.transformer.transformer.TOKENS_AT_ONCE", 20)
    made = generate([(range(2), whole), (range(2, 4), deepcopy(whole))], tokenizer(), LABELS, seeds=[1, 2, 3])
    assert torch.equal(made.tokens, alone.tokens)


@pytest.mark.parametrize("drafter", FAMILIES)
@pytest.mark.parametrize("refiner", FAMILIES)
def test_any_family_finishes_what_any_other_drafts(drafter: str, refiner: str) -> None:
    first, second = FAMILIES[drafter](seed=1, depth=3), FAMILIES[refiner](seed=2, depth=1)
    alone = generate(first, tokenizer(), LABELS, seeds=[1, 2, 3]).tokens
    made = generate([(range(3), first), (range(3, 4), second)], tokenizer(), LABELS, seeds=[1, 2, 3]).tokens
    drafted = first.pyramid.span(range(3)).stop
    assert torch.equal(made[:, :drafted], alone[:, :drafted])
    # the last scale is the refiner's: teacher forcing on the same tokens gives its distribution, greedily its choice
    made = generate([(range(3), first), (range(3, 4), second)], tokenizer(), LABELS, cfg=0, top_k=1).tokens
    with torch.no_grad():
        logits = second(tokenizer().teacher_input(made), torch.tensor(LABELS))
    assert torch.equal(made[:, drafted:], logits[:, drafted:].argmax(dim=-1))


def test_edits_take_stages() -> None:
    whole, mask = FAMILIES["full"](), torch.zeros(8, 8, dtype=torch.bool)
    mask[:, 4:] = True
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    alone = edit(whole, tokenizer(), image, mask, 1, seeds=[5])
    made = edit([(range(2), whole), (range(2, 4), deepcopy(whole))], tokenizer(), image, mask, 1, seeds=[5])
    assert torch.equal(made.tokens, alone.tokens)


def test_the_drafters_cache_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the refiner's is made: their peak is the larger of the two, not the sum."""
    import weakref

    from mvar_lightning.attention import KVCache

    caches: list[weakref.ref[KVCache]] = []
    alive: list[int] = []
    init = KVCache.__init__

    def counted(self: KVCache, *args: Any, **kwargs: Any) -> None:
        alive.append(sum(cache() is not None for cache in caches))
        caches.append(weakref.ref(self))
        init(self, *args, **kwargs)
        tokens.append(self.layers[0]._buffers[0].shape[2])

    tokens: list[int] = []
    monkeypatch.setattr(KVCache, "__init__", counted)
    generate([(range(2), FAMILIES["full"]()), (range(2, 4), FAMILIES["full"](seed=3))], tokenizer(), LABELS, cfg=0)
    assert alive == [0, 0] and tokens == [1 + 4, 1 + 4 + 9 + 16]  # the drafter's has room for its own scales alone


OTHER: dict[str, Any] = {"num_classes": 3, "depth": 1, "width": 16, "heads": 2}


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (lambda m: [(range(2), m), (range(2, 4), m)], "the one before it"),
        (lambda m: [(range(2), m), (range(3, 4), deepcopy(m))], "follow each other from 0 to 3"),
        (lambda m: [(range(2), m), (range(2, 5), deepcopy(m))], "follow each other"),
        (lambda m: [(range(1, 4), m)], "follow each other"),
        (lambda m: [], "none"),
        (lambda m: [(range(0, 4, 2), m)], "follow each other"),
        (lambda m: [m, m], r"give \(range\(0, 8\), transformer\)"),
        (lambda m: [(range(4), "m")], "a transformer"),
        (lambda m: "var_d16", "a transformer"),
        (lambda m: [(range(2), m), (range(2, 3), NextScaleTransformer([1, 2, 3], **SIZES, **OTHER))], "scales"),
        (
            lambda m: [
                (range(2), m),
                (range(2, 4), NextScaleTransformer(SCALES, **{**SIZES, "vocab_size": 8}, **OTHER)),
            ],
            "vocab_size: the first model has 16, that of scale 2 8",
        ),
        (
            lambda m: [
                (range(2), m),
                (range(2, 4), NextScaleTransformer(SCALES, **SIZES, **{**OTHER, "num_classes": 4})),
            ],
            "num_classes",
        ),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_drawn(stages: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        generate(stages(FAMILIES["full"]()), tokenizer(), LABELS)


def test_models_that_were_loaded_with_other_tokenizers_are_told(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        torch.manual_seed(seed)
        own = MultiScaleTokenizer(SCALES, **SIZES, **CONVOLUTIONS).eval()
        save(tmp_path / name, FAMILIES["full"](), own)
    (one, own), (other, _) = load(tmp_path / "one"), load(tmp_path / "other")
    assert one is not None and other is not None
    with pytest.raises(UserError, match="that of scale 2 was trained with another tokenizer"):
        generate([(range(2), one), (range(2, 4), other)], own, LABELS)
    generate([(range(2), one), (range(2, 4), FAMILIES["full"]())], own, LABELS)


def test_a_tokenizer_of_other_scales_is_told() -> None:
    with pytest.raises(UserError, match="scales"):
        generate([(range(4), FAMILIES["full"]())], small_tokenizer(), LABELS)


def test_the_command_takes_a_refiner_and_tells_one_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped, own = load("digits")
    assert shipped is not None
    torch.manual_seed(0)
    sizes = {"vocab_size": own.vocab_size, "code_dim": own.code_dim, "num_classes": 10}
    small = NextScaleTransformer(own.pyramid.sides, **sizes, depth=1, width=32, heads=2, attention=AdjacentAttention())
    save(tmp_path / "small", small, own)
    save(tmp_path / "other", small, type(own)(**own.config))
    command = ["sample", "--checkpoint", "digits", "--classes", "3", "--count", "2", "--out", str(tmp_path / "out")]
    assert main([*command, "--refiner", str(tmp_path / "small"), "--from-scale", "2"]) == 0
    made = generate(
        [(range(2), shipped), (range(2, 4), small.eval())], own, 3, seeds=[job.seed for job in list_jobs([3], 2, 0)]
    )
    files = sorted((tmp_path / "out").glob("0003*.png"))
    for image_3HW, file in zip(made.images, sorted(files, key=lambda f: f.name), strict=True):
        with Image.open(file) as picture:
            assert torch.allclose(from_image(picture), image_3HW, atol=1 / 250)
    for arguments, words in (
        (["small", "--from-scale", "3"], "from_scale"),  # into the same folder
        (["small", "--from-scale", "4"], "--from-scale 4"),
        (["small"], "go together"),
        (["other", "--from-scale", "2"], "another tokenizer"),
    ):
        assert main([*command, "--refiner", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("mvar: error:") == 1 and err.strip().count("\n") == 0
