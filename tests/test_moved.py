"""Old module names and class paths: they lead to the new ones, and each tells so once, in one line."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_recipes import ROOT, build

import mvar_lightning
from mvar_lightning import moved
from mvar_lightning.moved import MOVED, old_module

CLASS_PATHS = (
    *("AdversarialLoss", "DataDependentInit", "DeadCodeRestart", "DiffAugment", "EntropyLoss", "MVARModule"),
    *("MarkovVARModule", "NonSaturatingLoss", "PatchDiscriminator", "PerceptualLoss", "QuantizerLoss"),
    *("ShardsDataModule", "SlidingWindowHistory", "SpatialAttention", "TokenShards", "TokenShardsDataModule"),
    *("TokenizerModule", "VARBlocks", "VARModule", "callbacks.AttentionMaskPicture", "callbacks.CoarseToFine"),
    *("callbacks.EMA", "callbacks.ReconstructionGrid", "callbacks.ReconstructionMetrics"),
    *("callbacks.ReconstructionStrips", "callbacks.SampleGrid", "callbacks.SampleMetrics"),
    *("metrics.InceptionFeatures", "metrics.TorchScriptFeatures", "modules.FullySharded"),
)
"""What recipes and documents of version 0.1 named by path."""

OLD_PATHS = {
    "mvar_lightning.VARModule": "mvar_lightning.modules.VARModule",
    "mvar_lightning.ShardsDataModule": "mvar_lightning.data.modules.ShardsDataModule",
    "mvar_lightning.callbacks.SampleGrid": "mvar_lightning.callbacks.samples.SampleGrid",
    "mvar_lightning.callbacks.EMA": "mvar_lightning.callbacks.ema.EMA",
}


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Every test meets old modules that have told nothing yet."""
    old = [name for name in sys.modules if name.removeprefix("mvar_lightning.") in MOVED]
    for name in old:
        if isinstance(sys.modules[name], moved._Moved):
            del sys.modules[name]
    old_module.cache_clear()
    yield


@pytest.mark.parametrize("path", CLASS_PATHS)
@pytest.mark.filterwarnings("ignore:mvar_lightning")
def test_every_class_path_of_the_old_recipes_and_documents_is_found(path: str) -> None:
    module, _, name = f"mvar_lightning.{path}".rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_old_module_leads_to_modules_that_are_there() -> None:
    for old, new in MOVED.items():
        for target in new.split():
            assert importlib.import_module(f"mvar_lightning.{target}")
        path = ROOT / "mvar_lightning" / old.replace(".", "/")
        there = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
        assert there == (old == moved.READING), f"{old} is there again; take it out of the table"


@pytest.mark.parametrize(
    ("path", "home"),
    [
        ("modules.families.VARModule", "training.next_scale"),
        ("callbacks.samples.SampleGrid", "callbacks.run_pictures"),
        ("callbacks.judge.classifier_of", "callbacks.metrics"),
        ("data.modules.ShardsDataModule", "data.image_data"),
        ("data.reading.read_shard", "data.reading.samples"),
        ("tokenizer.remedies.restart.DeadCodeRestart", "tokenizer.codebook"),
        ("callbacks.samples._anything", None),
    ],
)
def test_a_name_is_looked_up_where_it_is_now_and_told_once(path: str, home: str | None) -> None:
    module, _, name = f"mvar_lightning.{path}".rpartition(".")
    old = importlib.import_module(module)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if home is None:
            with pytest.raises(AttributeError, match=r"it is now mvar_lightning\.callbacks\.run_pictures"):
                getattr(old, name)
            assert not told
            return
        new = importlib.import_module(f"mvar_lightning.{home}")
        assert getattr(old, name) is getattr(new, name) is getattr(old, name)
    assert [str(line.message) for line in told] == [
        f"{module} is now mvar_lightning.{home}; the old name works until {moved.UNTIL}"
    ]


@pytest.mark.parametrize("name", ["generate", "edit"])
def test_importing_an_old_module_takes_no_function_away(name: str) -> None:
    """`sampling.generate` was a file and is a function; importing the file leaves the function in its place."""
    from mvar_lightning import sampling

    own = getattr(sampling, name)
    old = importlib.import_module(f"mvar_lightning.sampling.{name}")
    assert isinstance(old, moved._Moved) and getattr(sampling, name) is own
    with pytest.warns(FutureWarning, match=r"mvar_lightning\.sampling\.(sampler|editing)"):
        assert getattr(old, name) is own
    with pytest.raises(TypeError, match="model"):
        getattr(sampling, name)()
    importlib.import_module("mvar_lightning.sampling.settings")
    assert isinstance(vars(sampling)["settings"], moved._Moved), "where no function is, the old file stands as ever"


def test_folders_that_an_update_leaves_behind_are_not_found_first(tmp_path: Path) -> None:
    for room in ("modules", "benchmarks"):
        (tmp_path / room / "__pycache__").mkdir(parents=True)
    mvar_lightning.__path__.append(str(tmp_path))
    try:
        assert isinstance(importlib.import_module("mvar_lightning.modules"), moved._Moved)
        test_benchmarks_tell_where_they_went()
    finally:
        mvar_lightning.__path__.remove(str(tmp_path))


def test_benchmarks_tell_where_they_went() -> None:
    for name in ("benchmarks", "benchmarks.models"):
        with pytest.raises(ImportError, match="python -m benchmarks"):
            importlib.import_module(f"mvar_lightning.{name}")


def test_what_never_was_is_not_found() -> None:
    for name in ("nonsense", "modules.nonsense", "benchmark"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"mvar_lightning.{name}")


def test_a_recipe_with_old_class_paths_builds(tmp_path: Path) -> None:
    text = (ROOT / "recipes/var/digits.yaml").read_text()
    for new, old in OLD_PATHS.items():
        assert f"class_path: {new}\n" in text
        text = text.replace(f"class_path: {new}\n", f"class_path: {old}\n")
    (tmp_path / "old.yaml").write_text(text)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        old = build(tmp_path / "old.yaml")
    lines = [str(line.message) for line in told if "the old name works" in str(line.message)]
    assert sorted(line.split()[0] for line in lines) == sorted(
        path.rpartition(".")[0] for path in OLD_PATHS.values() if "ema" not in path
    ), "one line for each old module"
    new_kinds = [type(part) for part in build(ROOT / "recipes/var/digits.yaml").trainer.callbacks]
    assert [type(part) for part in old.trainer.callbacks] == new_kinds
    assert type(old.module) is mvar_lightning.VARModule and type(old.data) is mvar_lightning.ShardsDataModule


@pytest.mark.slow
def test_the_line_on_standard_error() -> None:
    code = "from mvar_lightning.modules import VARModule, MVARModule; from mvar_lightning.evaluating import evaluating"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = done.stderr.splitlines()
    assert "mvar_lightning.modules is now mvar_lightning.training; the old name works until" in first
    assert "mvar_lightning.evaluating is now mvar_lightning.tools.compute" in second


def test_codebook_usage_is_still_a_name_of_the_tokenizers_room() -> None:
    from mvar_lightning import metrics, tokenizer

    with pytest.warns(FutureWarning, match=r"tokenizer\.usage is now"):
        assert tokenizer.CodebookUsage is metrics.quality.CodebookUsage
