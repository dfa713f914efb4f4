"""`mvar plan`, and what it says of a card that is too small or not there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from mvar_lightning import UserError
from mvar_lightning.cli import main
from mvar_lightning.runs import plan as planning
from mvar_lightning.runs.plan import check_machine, plan
from mvar_lightning.runs.recipe import RecipeCheck

ROOT = Path(__file__).parents[2]
D16, MARKOV, DIGITS = (ROOT / f"recipes/{name}.yaml" for name in ("var/d16", "markov_var/d16", "var/digits"))


QUIET = "--trainer.callbacks=null"
"""Without metrics, whose weights are not here."""


class Card(NamedTuple):
    total_memory: float


@cache
def parsed(recipe: Path, *overrides: str) -> RecipeCheck:
    return RecipeCheck.of(recipe, overrides)


def test_the_table_and_a_card_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(D16)]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("310,283,520", "96 x 8 x 1 = 768", "optimizer state", "peak of a device"))
    assert main(["plan", str(D16), "--card", "24GB"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "over 90% of 24 GB" in error and "batch_size 24, accumulate_grad_batches 4" in error
    assert "checkpoint_activations: true" in error and "compile_blocks" not in error, "which it has"


def test_what_it_names_fits() -> None:
    changed = parsed(D16, "--data.batch_size=24", "--trainer.accumulate_grad_batches=4")
    assert not plan(parsed(D16), card="24GB").fits and plan(changed, card="24GB").fits
    eager = plan(parsed(MARKOV, "--model.compile_blocks=false"), card="40GB")
    assert any(way.startswith("compile_blocks: true, scale_groups: auto") for way in eager.ways()), [*eager.ways()]
    eager = plan(parsed(D16, "--model.compile_blocks=false"), card="16GB")
    assert not any("scale_groups" in way for way in eager.ways()), "scales that read one another are one group"
    with pytest.raises(UserError, match="such as 80GB"):
        plan(parsed(D16), card="large")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets torch find a GPU of so many bytes and this generation, itself built for some."""

    def set_up(size: float, here: tuple[int, int] = (9, 0), built: tuple[str, ...] = ("sm_80", "sm_90")) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card(size))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: here)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))

    return set_up


def test_a_recipe_for_gpus_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"written for GPUs of 80 GB; torch is built without CUDA; .*accelerator=cpu"):
        check_machine(parsed(D16, QUIET))
    check_machine(parsed(D16, QUIET, "--trainer.accelerator=cpu"))
    check_machine(parsed(DIGITS))
    with pytest.raises(UserError, match="written for a GPU; torch is built without CUDA"):
        check_machine(parsed(DIGITS, "--trainer.accelerator=gpu"))


def test_a_driver_that_does_not_run_this_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for driver, words in ((False, "there is no GPU here"), (True, "the driver here does not run: install a newer")):
        monkeypatch.setattr(planning, "DRIVER", Path("/" if driver else "/nowhere"))
        with pytest.raises(UserError, match=f"torch is built for CUDA 13.0, .*{words}"):
            check_machine(parsed(D16, QUIET))


def test_a_card_that_is_too_small_is_told_what_would_fit(gpu: Callable[..., None]) -> None:
    gpu(80e9)
    check_machine(parsed(D16, QUIET))
    gpu(24e9)
    with pytest.raises(UserError, match="over 90% of 24 GB; would fit: batch_size 24"):
        check_machine(parsed(D16, QUIET))


SPATIAL = {"class_path": "mvar_lightning.SpatialAttention", "init_args": {"kernel_size": 3, "scales": 1}}


@pytest.mark.parametrize(
    ("version", "words"), [(None, "the package natten is not installed"), ("0.21.6", "was built without CUDA kernels")]
)
def test_natten_is_asked_for_before_the_data(
    version: str | None,
    words: str,
    recipe: dict[str, Any],
    rewrite: Callable[..., None],
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module: Any = ModuleType("natten")
    module.__spec__, module.__version__ = ModuleSpec("natten", None), version
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "natten", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *package: (
        (module.__spec__ if version else None) if name == "natten" else find(name, *package)))  # fmt: skip
    recipe["model"]["init_args"] |= {"backend": "natten", "attention": SPATIAL}
    recipe["data"]["init_args"]["path"] = "data/none"
    rewrite(recipe)
    assert words in fails("train", "recipes/var.yaml")


def test_weights_and_references_are_looked_for_before_the_data(
    recipe: dict[str, Any], rewrite: Callable[..., None], fails: Callable[..., str]
) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Flatten()), "pixels.pt")
    pixels = {"class_path": "mvar_lightning.metrics.TorchScriptFeatures", "init_args": {"path": "pixels.pt"}}
    inception = {"class_path": "mvar_lightning.metrics.InceptionFeatures", "init_args": {"path": "weights/none.pth"}}
    recipe["data"]["init_args"]["path"] = "data/none"
    for arguments, words in (
        ({"extractor": inception}, "Inception weights weights/none.pth: no such file; download weights-inception"),
        ({"extractor": pixels, "reference": "none.npz"}, "reference none.npz: no such file; ADM's are https://"),
    ):
        metrics = {"class_path": "mvar_lightning.callbacks.SampleMetrics", "init_args": arguments}
        recipe["trainer"]["callbacks"] = [metrics]
        rewrite(recipe)
        for command in (("train", "recipes/var.yaml"), ("fit", "--config", "recipes/var.yaml")):
            assert words in fails(*command)


@pytest.mark.parametrize(
    ("here", "built", "runs"),
    [
        ((8, 6), ("sm_80",), True),
        ((9, 0), ("sm_80", "sm_90a"), True),
        ((12, 0), ("sm_80", "sm_90"), False),
        ((12, 0), ("sm_90", "compute_90"), True),
        ((7, 5), ("sm_80", "compute_80"), False),
        ((9, 4), ("gfx942",), True),
    ],
)
def test_a_gpu_without_kernels_is_told(
    here: tuple[int, int], built: tuple[str, ...], runs: bool, gpu: Callable[..., None]
) -> None:
    gpu(80e9, here, built)
    if runs:
        check_machine(parsed(D16, QUIET))
        return
    with pytest.raises(UserError, match=f"has kernels for {', '.join(built)}, the GPU here is sm_{here[0]}{here[1]}"):
        check_machine(parsed(D16, QUIET))
