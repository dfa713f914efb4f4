"""The jobs from Python: every example of docs/python.md runs, and mistakes name arguments, not flags."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mvar_lightning import UserError
from mvar_lightning.checkpoints.source import Source, open_tokenizer
from mvar_lightning.evaluation import features as data_classifier
from mvar_lightning.evaluation.image_job import EvaluateImagesRequest, evaluate_images
from mvar_lightning.evaluation.papers.analyses import AnalyzeRequest, analyze_attention
from mvar_lightning.evaluation.strips import ReconstructRequest
from mvar_lightning.evaluation.tokenizer import EvaluateTokenizerRequest
from mvar_lightning.runs.sweep import SweepRequest, run_sweep
from mvar_lightning.sampling.editing import EditRequest
from mvar_lightning.sampling.jobs import SampleRequest, sample_images

ROOT = Path(__file__).parents[2]
SECTIONS = re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.M | re.S)
TRAINING = ("A recipe, from data to report", "A sweep over variants")


@pytest.fixture
def digits(
    recipe: dict[str, Any], checkpoint: Path, shards: Path, workplace: Path, rewrite: Callable[..., None]
) -> None:
    """What the examples name, in small: data, a run, recipes, a photo."""
    shutil.copytree(shards, "data/digits")
    shutil.copytree(checkpoint, "runs/var/digits/model")
    Image.effect_noise((40, 30), 90).convert("RGB").save("photo.png")
    recipe["trainer"]["limit_train_batches"] = 2
    rewrite(recipe)
    Path("recipes/var").mkdir()
    Path("recipes/var.yaml").rename("recipes/var/digits.yaml")
    Path("recipes/ablations").mkdir()
    sweep = {"recipe": "recipes/var/digits.yaml", "variants": {"full": None}, "columns": [{"metric": "val/loss"}]}
    Path("recipes/ablations/strategies.yaml").write_text(yaml.safe_dump(sweep))


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, id=title, marks=[pytest.mark.slow] if title in TRAINING else []) for title, code in SECTIONS],
)
def test_the_examples_run(code: str, digits: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(data_classifier, "STEPS", (2, 2))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if "train(" in code:
        shutil.rmtree("runs")  # the example trains the run itself
    exec(compile(code, "docs/python.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out


def test_every_job_has_an_example() -> None:
    code = "".join(code for _, code in SECTIONS)
    jobs = (
        "make_shards",
        "encode_data",
        "sample_images",
        "edit_picture",
        "evaluate_images",
        "run_tokenizer_evaluation",
    )
    assert all(f"{job}(" in code for job in (*jobs, "reconstruct_images", "analyze_attention", "train", "run_sweep"))


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (lambda source, shards: SampleRequest(source, count=0), "count 0: must be at least 1"),
        (lambda source, shards: sample_images(SampleRequest(source, classes=[10])), "class 10: the model knows"),
        (
            lambda source, shards: sample_images(SampleRequest(source, data="x", out="o")),
            "data folder x: does not exist",
        ),
        (lambda source, shards: sample_images(SampleRequest(source, classes="cat")), "to use names give data FOLDER"),
        (lambda source, shards: EditRequest(source, "a.png", count=-1), "count -1: must be at least 1"),
        (lambda source, shards: EvaluateImagesRequest("x"), "give one of source and images"),
        (lambda source, shards: EvaluateImagesRequest("x", source, batch_size=0), "batch_size 0: must be at least 1"),
        (lambda source, shards: EvaluateImagesRequest("x", source, features="none"), "features none: every number"),
        (
            lambda source, shards: evaluate_images(EvaluateImagesRequest(shards, source, feature_size=8)),
            "feature_size: is for TorchScript files alone, not for features data",
        ),
        (lambda source, shards: EvaluateTokenizerRequest("x", "y", images=0), "images 0: must be at least 1"),
        (lambda source, shards: ReconstructRequest({}), "reconstruct: give either files of images or data SHARDS"),
        (lambda source, shards: analyze_attention(AnalyzeRequest(source)), "data: the analysis looks at real images"),
        (lambda source, shards: run_sweep(SweepRequest("none.yaml")), "sweep none.yaml: cannot be read"),
        (lambda source, shards: Source(), "model: give either checkpoint PATH or official"),
        (lambda source, shards: open_tokenizer(source.path, image_size=32), "image_size 32: this tokenizer takes"),
    ],
)
def test_a_mistake_names_the_argument(
    job: Callable[[Source, str], Any], message: str, checkpoint: Path, shards: Path, workplace: Path
) -> None:
    with pytest.raises(UserError) as error:
        job(Source(str(checkpoint)), str(shards))
    assert message in str(error.value) and "--" not in str(error.value) and "``" not in error.value.with_flags()
    assert not list(workplace.iterdir())
