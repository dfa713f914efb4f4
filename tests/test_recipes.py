"""Every recipe under recipes/: it parses, builds its model (on the meta device) and says what it is."""

from __future__ import annotations

import re
import sys
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import yaml

from mvar_lightning import MultiScaleTokenizer, ShardsDataModule, TokenShardsDataModule
from mvar_lightning.callbacks import ReconstructionMetrics, SampleMetrics
from mvar_lightning.data.making.embedded import DIGITS_SIDE
from mvar_lightning.metrics import FeatureExtractor, InceptionFeatures
from mvar_lightning.pyramid import PUBLISHED_SIDES, Size, as_size
from mvar_lightning.runs.plan import plan
from mvar_lightning.runs.recipe import SuiteCLI
from mvar_lightning.training import next_scale, scorer

ROOT = Path(__file__).parents[1]
SWEEPS = sorted([*(ROOT / "recipes/ablations").glob("*.yaml"), *(ROOT / "recipes/evidence").glob("*.yaml")])
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path not in SWEEPS]
DIGITS, IMAGENET = 10, 1000


class Published(NamedTuple):
    """One row of the papers' and releases' tables."""

    parameters: int
    global_batch: int
    epochs: int
    base_lr: float
    gamma_init: float
    final_lr_ratio: float
    weight_decay_end: float


PUBLISHED = {
    "var/d16": Published(310_283_520, 768, 200, 1e-4, 1e-3, 0.1, 0.05),
    "var/d20": Published(600_917_136, 768, 250, 1e-4, 1e-3, 0.1, 0.05),
    "var/d24": Published(1_033_399_360, 768, 350, 8e-5, 1e-4, 0.01, 0.05),
    "var/d30": Published(2_010_020_356, 1024, 350, 8e-5, 1e-5, 0.01, 0.08),
    "var/d36": Published(2_353_893_904, 768, 350, 8e-5, 5e-6, 0.01, 0.08),
    "mvar/d16": Published(310_283_520, 448, 300, 1e-4, 1e-3, 0.1, 0.05),
    "mvar/d16_finetune": Published(310_283_520, 448, 80, 1e-4, 1e-3, 0.1, 0.05),
    # peak learning rate 8e-5 at any batch (paper); d20 is 623M in the paper, d24 1.02B, the code's d24 a little more
    "markov_var/d16": Published(320_269_568, 768, 200, 8e-5 / 3, 1e-3, 0.1, 0.05),
    "markov_var/d20": Published(623_209_616, 768, 300, 8e-5 / 3, 1e-3, 0.1, 0.05),
    "markov_var/d24": Published(1_046_756_416, 768, 400, 8e-5 / 3, 1e-4, 0.1, 0.05),
}
TOKENIZER_PARAMETERS = {"tokenizer/imagenet256": 108_948_355}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "recipes").with_suffix("").as_posix()


each_recipe = pytest.mark.parametrize("path", RECIPES, ids=name_of)
each_published = pytest.mark.parametrize("name", sorted(PUBLISHED))


class Built(NamedTuple):
    """What a recipe makes; ``raw`` is the YAML."""

    raw: dict[str, Any]
    module: Any
    data: ShardsDataModule | TokenShardsDataModule
    trainer: L.Trainer
    num_classes: int
    cli: SuiteCLI

    @property
    def core(self) -> torch.nn.Module:
        return next(
            getattr(self.module, name) for name in ("model", "scorer", "tokenizer") if hasattr(self.module, name)
        )

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.core.parameters())

    @property
    def global_batch(self) -> int:
        accumulated = getattr(self.module, "accumulate_grad_batches", self.trainer.accumulate_grad_batches)
        return self.data.batch_size * self.trainer.world_size * accumulated


def image_size_of(path: Path, raw: dict[str, Any]) -> Size:
    """A token cache tells the size itself; those of the recipes are of digits, or of what the header names."""
    named = re.search(r"at (\d+) x \1", header_of(path))
    size = as_size(raw["data"]["init_args"].get("image_size", int(named[1]) if named else DIGITS_SIDE))
    assert size is not None
    return size


def without_file(self: InceptionFeatures, path: str) -> None:
    """In place of Inception's constructor, which reads the weights that a user downloads."""
    FeatureExtractor.__init__(self, "inception", 2048)


@cache
def build(path: Path) -> Built:
    """Parse a recipe as `mvar fit` does and build everything, with meta tensors and without data or tokenizer files."""
    raw = yaml.safe_load(path.read_text())
    image_size = image_size_of(path, raw)
    num_classes = IMAGENET if image_size in PUBLISHED_SIDES else DIGITS
    if image_size in PUBLISHED_SIDES:
        sizes: dict[str, Any] = {"scales": PUBLISHED_SIDES[image_size]}
    else:
        tokenizer_recipe = ROOT / raw.get("tokenizer_recipe", "recipes/tokenizer/digits.yaml")
        sizes = yaml.safe_load(tokenizer_recipe.read_text())["model"]["init_args"]
        sizes = {key: value for key, value in sizes.items() if key in signature(MultiScaleTokenizer).parameters}
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        for module in (next_scale, scorer):
            patch.setattr(module, "load_tokenizer", lambda path: MultiScaleTokenizer(**sizes))
            patch.setattr(module, "fingerprint", lambda tokenizer: "0" * 64)
        patch.setattr(next_scale, "load_initial_weights", lambda *_: "")
        patch.setattr(next_scale, "other_codes", lambda *_: "")
        patch.setattr(InceptionFeatures, "__init__", without_file)
        patch.setattr("mvar_lightning.callbacks.sample_metrics.read_reference", lambda path, extractor: None)
        for kind in (ShardsDataModule, TokenShardsDataModule):
            patch.setattr(kind, "num_classes", property(lambda data: num_classes))
        patch.setattr(ShardsDataModule, "channels", property(lambda data: 3))
        patch.setenv("PL_GLOBAL_SEED", "0")  # the recipes seed everything; leave no trace of it
        patch.setattr(sys, "argv", sys.argv[:1])
        cli = SuiteCLI(["--config", str(path)], Path("runs") / "never-written")
    return Built(raw, cli.model, cli.datamodule, cli.trainer, num_classes, cli)


def header_of(path: Path) -> str:
    """The comment block at the top, as one line without its marks."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def test_the_required_recipes_are_there() -> None:
    names = {name_of(path) for path in RECIPES}
    digits = {f"{family}/digits" for family in ("tokenizer", "var", "mvar", "markov_var")}
    assert names >= {*PUBLISHED, *TOKENIZER_PARAMETERS, *digits}


@each_recipe
def test_builds_its_model_on_the_meta_device(path: Path) -> None:
    built = build(path)
    assert {parameter.device.type for parameter in built.core.parameters()} == {"meta"}
    assert built.module.tokenizer.image_size == image_size_of(path, built.raw)
    if hasattr(built.module, "model"):
        assert built.module.model.num_classes == built.num_classes
        assert built.module.model.pyramid == built.module.tokenizer.pyramid


@each_recipe
def test_header_is_a_document(path: Path) -> None:
    header = header_of(path)
    for word in ("Source:", "Command:", "Hardware:"):
        assert word in header, f"{path}: its header says nothing after {word!r}"
    assert "Expected:" in header or "Measured:" in header, f"{path}: its header tells no result to expect"
    command = header[header.index("Command:") : header.index("Hardware:")]
    assert f"recipes/{name_of(path)}.yaml" in command, f"{path}: its command runs another recipe"


@each_recipe
def test_header_tells_the_true_size_and_batch(path: Path) -> None:
    built, header = build(path), header_of(path)
    for number, unit in re.findall(r"([\d.]+)([MB]) (?:\(paper\) )?parameters", header):
        told = float(number) * {"M": 1e6, "B": 1e9}[unit]
        assert built.parameters == pytest.approx(told, rel=0.03), f"{path}: {number}{unit} parameters"
    for number in re.findall(r"global batch (\d+)", header):
        assert built.global_batch == int(number), f"{path}: global batch {number}"


@each_published
def test_parameters_and_training_settings_are_the_published_ones(name: str) -> None:
    built, expected = build(ROOT / "recipes" / f"{name}.yaml"), PUBLISHED[name]
    assert built.parameters == expected.parameters
    assert built.global_batch == expected.global_batch
    assert built.trainer.max_epochs == expected.epochs
    module = built.module
    assert module.base_lr == pytest.approx(expected.base_lr, rel=1e-4)
    assert (module.final_lr_ratio, module.weight_decay_end) == (expected.final_lr_ratio, expected.weight_decay_end)
    assert module.model.gamma_init == expected.gamma_init
    assert module.weight_decay == 0.05 and module.betas == (0.9, 0.95)
    assert built.trainer.gradient_clip_val == 2.0
    assert module.model.label_drop == 0.1
    assert module.model.drop_path == pytest.approx(0.1 * module.model.depth / 24)


@pytest.mark.parametrize("name", sorted(TOKENIZER_PARAMETERS))
def test_tokenizer_is_the_released_architecture(name: str) -> None:
    built = build(ROOT / "recipes" / f"{name}.yaml")
    assert built.parameters == TOKENIZER_PARAMETERS[name]
    assert built.global_batch == 256
    assert built.module.tokenizer.config == MultiScaleTokenizer(PUBLISHED_SIDES[256]).config


def test_fine_tuning_differs_from_scratch_by_its_start_and_its_length() -> None:
    scratch, tuned = (build(ROOT / "recipes" / "mvar" / f"{name}.yaml").raw for name in ("d16", "d16_finetune"))
    ours, theirs = scratch["model"]["init_args"], tuned["model"]["init_args"]
    assert {key for key in theirs if theirs[key] != ours.get(key)} == {"init_from", "cfg"}
    assert {key for key in tuned["trainer"] if tuned["trainer"][key] != scratch["trainer"][key]} == {"max_epochs"}


@each_recipe
def test_next_scale_recipes_watch_samples_and_tokenizers_watch_reconstructions(path: Path) -> None:
    built = build(path)
    kinds = {type(callback).__name__ for callback in built.trainer.callbacks}
    wanted = {"SampleMetrics", "SampleGrid"} if hasattr(built.module, "model") else {"ReconstructionMetrics"}
    if getattr(built.module, "target", None) is not None and built.module.target.scales is not None:
        wanted = set()  # it draws some scales alone, after another model
    if hasattr(built.module, "scorer"):
        wanted = set()  # it makes no images
    assert kinds >= {*wanted, "LastCheckpoint", "WritableRunFolder", "NonFiniteLossGuard"}


@pytest.mark.parametrize("name", ["tokenizer/imagenet256", "tokenizer/adapt"])
def test_tokenizers_at_256_pixels_train_no_classifier_for_their_metrics(name: str) -> None:
    trainer = build(ROOT / "recipes" / f"{name}.yaml").trainer
    (metrics,) = (callback for callback in trainer.callbacks if isinstance(callback, ReconstructionMetrics))
    assert isinstance(metrics.extractor, InceptionFeatures) and not metrics.consistency
    assert metrics.num_images >= 10_000


@pytest.mark.parametrize("name", sorted({*PUBLISHED, *TOKENIZER_PARAMETERS, "markov_var/d16_released"}))
def test_recipes_for_imagenet_fit_their_card(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = plan(build(ROOT / f"recipes/{name}.yaml").cli)
    assert found.fits, found.rows()
    assert found.shape.parameters == build(ROOT / f"recipes/{name}.yaml").parameters and found.card in (24e9, 80e9)
    assert found.images == 1_281_167 and found.steps is not None and found.steps > 100_000


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_recipes_for_imagenet_compile_read_tokens_and_take_inception(name: str) -> None:
    built = build(ROOT / "recipes" / f"{name}.yaml")
    assert isinstance(built.data, TokenShardsDataModule) and built.module.model.blocks[0]._compiled_call_impl
    (metrics,) = (each for each in built.trainer.callbacks if isinstance(each, SampleMetrics))
    assert isinstance(metrics.extractor, InceptionFeatures) and not metrics.consistency
    arguments = built.raw["trainer"]["callbacks"][0]["init_args"]
    assert arguments["reference"].endswith("512.npz" if name == "var/d36" else "256_labeled.npz")


@each_recipe
def test_tokenizer_recipe_trains_what_the_recipe_reads(path: Path) -> None:
    raw = build(path).raw
    if "tokenizer_recipe" in raw:
        tokenizer = Path(raw["tokenizer_recipe"])
        assert (ROOT / tokenizer).is_file()
        assert (
            Path(raw["model"]["init_args"]["tokenizer"])
            == "runs" / tokenizer.with_suffix("").relative_to("recipes") / "model"
        )
        data = raw["data"]["init_args"]
        trained_on = yaml.safe_load((ROOT / tokenizer).read_text())["data"]["init_args"]["path"]
        assert trained_on == data.get("images", data["path"])  # a token cache names the images that it was made of
