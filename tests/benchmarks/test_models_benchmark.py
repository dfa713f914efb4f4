from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, models, phases, sides
from benchmarks.flops import attention_block_gflops, cache_mib
from benchmarks.published import PREFIX_GFLOPS, PUBLISHED, published_for
from benchmarks.references import Reference
from benchmarks.sides import Case, Ours
from benchmarks.table import markdown
from mvar_lightning.attention import FullAttention, SlidingWindowAttention
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid

PYRAMID = ScalePyramid(PUBLISHED_SIDES[256])
TINY = Case("var", depth=1, image_size=256, batch=1, device="cpu", repeats=1)


@pytest.mark.parametrize("row", [row for row in PUBLISHED if row.attention_gflops], ids=lambda row: str(row))
def test_counted_cost_is_the_published_one(row: Any) -> None:
    case = Case(row.architecture, row.depth, row.image_size, batch=32, device="cpu")
    counted = measure.counted(case)
    assert counted["attention_gflops"] == pytest.approx(row.attention_gflops, abs=0.011)
    assert counted["cache_mib"] == row.cache_mib


def test_counted_cost_of_the_prefix_ablation() -> None:
    for scales, published in PREFIX_GFLOPS.items():
        strategy = FullAttention() if scales is None else SlidingWindowAttention(scales)
        counted = attention_block_gflops(strategy.plan(PYRAMID), width=1024, depth=16)
        assert counted == pytest.approx(published, abs=0.011)


def test_cache_size_follows_precision_and_plan() -> None:
    plan = FullAttention().plan(PYRAMID)
    assert cache_mib(plan, 1024, 16, rows=64, bytes_each=2) == 2720


def test_peak_memory_sees_what_was_freed() -> None:
    before = measure.reset_peak_resident()
    torch.ones(2**24)  # 64 MiB, touched and let go
    assert 60 < (measure.peak_resident() - before) / 2**20 < 120


def test_sides_run_in_turn_and_the_ratio_is_theirs_over_ours() -> None:
    order: list[str] = []

    def side(name: str, work: int) -> Any:
        def run() -> None:
            order.append(name)
            sum(range(work))

        return run

    result = measure.alternate({"reference": side("r", 400_000), "ours": side("o", 20_000)}, repeats=3)
    assert order == ["r", "o"] * 4, "a warm-up and three repeats"
    assert result["ratio"] > 3 and result["processor_ratio"] > 3
    assert len(result["ours"]["all_seconds"]) == 3


def raises() -> dict[str, Any]:
    raise RuntimeError("out of\nmemory")


@pytest.mark.slow
def test_a_failed_process_is_a_row_not_an_end() -> None:
    assert measure.in_own_process(raises) == {"failed": "out of memory"}


def arguments(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    models.add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args(["--out", str(tmp_path)])), **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 0}, "--batch 0"),
        ({"depths": [16, 0]}, "--depths 0"),
        ({"peak_tflops": 0.0}, "--peak-tflops 0"),
        ({"markov_var_repo": "nowhere"}, "--markov-var-repo nowhere"),
        pytest.param({"device": "cuda"}, "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has")),
    ],
)
def test_options_that_mean_nothing(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        models.run(arguments(tmp_path, **changes))


def test_counted_figures_need_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No part: what is counted and published, written as JSON and as a table."""
    changes = {"parts": [], "no_memory": True, "depths": [16, 24], "sizes": [256, 1024]}
    assert models.run(arguments(tmp_path, **changes)) == 0
    (file,) = tmp_path.glob("models-*.json")
    record = json.loads(file.read_text())
    assert len(record["rows"]) == 12 and record["torch"] == torch.__version__
    table = file.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert "|  | key-value cache, MiB | 0 |" in table
    assert "| markov_var d24, 1024 px | sampling and decoding, s |  |  |  | 5.322 (Markov-VAR" in table
    assert "of peak" not in table


def test_the_table_puts_the_sides_beside_the_papers(tmp_path: Path) -> None:
    side = {"seconds": 2.0}
    both = {"ours": side, "reference": {"seconds": 3.0}, "ratio": 1.5, "processor_ratio": 1.4}
    times = {"sample": both, "generate": both, "step": {"ours": side}}
    memory = {
        "generate": {"ours": {"peak_mib": 73, "above_loaded_mib": 4}, "reference": {"peak_mib": 100.0}},
        "train": {"ours": {"peak_mib": 10, "above_loaded_mib": 4}, "reference": {"failed": "killed"}},
        "step": {"ours": {"peak_mib": 12, "above_loaded_mib": 5}},
    }
    memory["generate"]["reference"]["above_loaded_mib"] = 6
    known = [{"source": row.source, **row.figures()} for row in published_for("var", 16, 256)]
    row = {"architecture": "var", "depth": 16, "image_size": 256, "batch": 1, "counted": measure.counted(TINY)}
    row |= {"published": known, "times": times, "memory": memory}
    row["of_peak"] = models.shares_of_peak(row, peak_tflops=0.5)
    record = {**models.describe("cpu", "32", arguments(tmp_path, peak_tflops=0.5)), "rows": [row]}
    written = markdown(record)
    assert "sampling, tokens only, s | 2.000 | 3.000 | 1.50 (1.40 cpu) |  |  |" in written
    assert "sampling and decoding, s | 2.000 | 3.000 | 1.50 (1.40 cpu) |  | 0.34 (MVAR" in written
    assert "| 73 (4) | 100 (6) | 0.73 of it |  | 10882 (MVAR" in written, "ours / reference, and it says so"
    assert "train step, forward and backward: peak (above loaded), MiB | 10 (4) | failed: killed |  |  |  |" in written
    share = f"{3 * row['counted']['forward_tflop'] / 2.0 / 0.5:.1%}"
    assert f"whole train step, with optimizer, s | 2.000 |  |  | {share} | 0.99 (MVAR" in written
    assert "| 12 (5) |  |  |  | 34319 (MVAR" in written


def test_each_model_is_written_when_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed keeps what it has, as JSON and as a table."""
    measured = models.measure

    def killed_at_the_second(case: Case, **options: Any) -> dict[str, Any]:
        if case.architecture == "mvar":
            raise KeyboardInterrupt
        return measured(case, **options)

    monkeypatch.setattr(models, "measure", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        models.run(arguments(tmp_path, parts=[], no_memory=True))
    (figures,), (table,) = tmp_path.glob("models-*.json"), tmp_path.glob("models-*.md")
    assert [row["architecture"] for row in json.loads(figures.read_text())["rows"]] == ["var"]
    assert "var d16, 256 px" in table.read_text()


def test_mvar_is_counted_as_it_is_trained() -> None:
    """All scales with adjacent attention: more pairs than its neighborhoods."""
    counted = measure.counted(replace(TINY, architecture="mvar"))
    assert counted["trained_tflop"] > counted["forward_tflop"]
    counted = measure.counted(TINY)
    assert counted["trained_tflop"] == counted["forward_tflop"]


def test_only_ours_takes_a_whole_step() -> None:
    case = replace(TINY, repo="somewhere")
    assert case.sides_of("step") == ("ours",) and case.sides_of("train") == ("ours", "reference")


@pytest.mark.slow
def test_a_whole_step_clips_updates_and_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Ours(replace(TINY, architecture="mvar", parts=("step",)))
    weight = ours.model.word_embedding.weight
    before = weight.detach().clone()
    monkeypatch.setattr(sides, "CLIP", 1e-3)
    assert ours.run("step").isfinite()
    norm = torch.stack([p.grad.norm() for p in ours.model.parameters() if p.grad is not None]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-2)
    state = ours.optimizer.state[weight]
    assert state["step"] == 1 and state["exp_avg"].any() and torch.equal(weight, before)
    assert ours.model.strategy == ours.sampler.strategy, "MVAR's own attention"


@pytest.mark.slow
def test_a_process_that_decodes_holds_no_transformer() -> None:
    ours = Ours(replace(TINY, architecture="mvar", parts=("decode",)))
    expected = ours.run("decode")
    ours.keep_for("decode")
    for model in (ours.transformer, ours.trained, ours.sampler):
        assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(ours.run("decode"), expected)


@pytest.mark.slow
def test_sampling_and_decoding_is_both() -> None:
    case = replace(TINY, architecture="markov_var", parts=("generate",))
    assert Ours(replace(case, precision="bf16")).sampler.head.linear.weight.dtype == torch.bfloat16
    image_B3HW = Ours(case).run("generate")  # bf16 convolutions take a minute on a CPU without them
    assert image_B3HW.shape == (1, 3, 256, 256) and image_B3HW.min() >= 0


@pytest.mark.slow
def test_all_parts_run_and_the_phases_sum_up() -> None:
    case = replace(TINY, architecture="markov_var", parts=("sample", "train"))
    result = measure.times(case)
    assert result["sample"]["ours"]["seconds"] > 0 and result["train"]["ours"]["seconds"] > 0
    profiled = phases.profile(case)
    found = [(row["scale"], row["phase"]) for row in profiled["rows"]]
    every = (phases.EMBED, phases.BLOCKS, phases.HEAD, phases.CHOICE)
    once = [(-1, phases.CONDITION), *((-1, phase) for phase in phases.TRAIN.values())]
    assert sorted(found) == sorted([*once, *((scale, phase) for scale in range(10) for phase in every)])
    assert found[-5:] == [(-1, phase) for phase in phases.TRAIN.values()], "in the order of a step"
    assert len(phases.table(profiled["rows"])) == 17


@pytest.mark.slow
def test_mvar_trains_with_dense_adjacent_attention_on_shared_weights() -> None:
    ours = Ours(replace(TINY, architecture="mvar", parts=("train",)))
    ours.run("train")
    weight = ours.transformer.word_embedding.weight
    assert weight is ours.trained.word_embedding.weight and weight.grad is not None


CLONE = """
import dist
from einops import rearrange
import torch
from torch import nn

class Tokenizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(4, 2)

    def fhat_to_img(self, f_hat):
        return f_hat * 2

class Model(nn.Module):
    def __init__(self, tokenizer):
        super().__init__()
        self.vae = (tokenizer,)
        self.register_buffer("attn_bias_for_masking", torch.zeros(1, 1, 5, 5))

    def autoregressive_infer_cfg(self, B, label_B, g_seed, cfg, top_k, top_p):
        return self.vae[0].fhat_to_img(torch.full((B, 2, 2, 2), cfg))

def build_vae_var(device, patch_nums, depth, attn_l2_norm, init_adaln_gamma):
    print("built")
    nn.Linear.reset_parameters = lambda self: None
    tokenizer = Tokenizer()
    return tokenizer, Model(tokenizer)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder shaped as VAR's repository, with a model of a few lines."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text(CLONE)
    (tmp_path / "models" / "var.py").write_text("")
    (tmp_path / "dist.py").write_text("")
    return tmp_path


def test_a_clone_is_imported_without_a_trace(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, path = torch.nn.Linear.reset_parameters, list(sys.path)
    reference = Reference("var", clone, 1, ScalePyramid([1, 2]), torch.device("cpu"), adjacent_mask=True)
    assert torch.nn.Linear.reset_parameters is own and sys.path == path
    assert not {"models", "dist"} & set(sys.modules)
    assert capsys.readouterr().out == ""
    mask = reference.model.attn_bias_for_masking[0, 0]
    assert mask[0, 0] == 0 and mask[1, 0] == -torch.inf and mask[1, 4] == 0


def test_sampling_stops_before_the_decoder(clone: Path) -> None:
    reference = Reference("var", clone, 1, ScalePyramid([1, 2]), torch.device("cpu"))
    f_hat = reference.sample(torch.tensor([3]), cfg=1.5, top_k=1, top_p=0.0)
    assert f_hat.unique().tolist() == [1.5]
    assert reference.decode(f_hat).unique().tolist() == [3.0], "the decoder is back in place"


def test_a_folder_that_is_no_clone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"models/markovvar\.py"):
        Reference("markov_var", tmp_path, 1, PYRAMID, torch.device("cpu"))
