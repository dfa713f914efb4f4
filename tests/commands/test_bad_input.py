"""Every kind of bad input: one line that names the thing, its value and the way out; nothing half-written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_run import MODEL_SIZES, TOKENIZER_SIZES, data_module, trainer

from mvar_lightning import TokenizerModule, VARModule
from mvar_lightning.runs.recipe_check import explain

Recipe = dict[str, Any]
Fails = Callable[..., str]
Change = Callable[[Recipe], object]


def set_in(*path: str, value: Any) -> Change:
    """A change of one value of a recipe."""

    def change(recipe: Recipe) -> None:
        section = recipe
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = value

    return change


def model(name: str, value: Any) -> Change:
    return set_in("model", "init_args", name, value=value)


def strategy(name: str, **arguments: Any) -> Change:
    return model("attention", {"class_path": f"mvar_lightning.{name}", "init_args": arguments})


def callback(name: str, **arguments: Any) -> Change:
    member = {"class_path": f"mvar_lightning.callbacks.{name}", "init_args": arguments}
    return set_in("trainer", "callbacks", value=[member])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (model("depht", 2), "recipe recipes/var.yaml: model.depht is not a setting of VARModule (did you mean depth?)"),
        (model("depth", "two"), "recipe recipes/var.yaml: model.depth two: must be a whole number"),
        (model("betas", [0.9]), "model.betas [0.9]: must be a tuple with 2 elements"),
        (set_in("trainer", "max_epoch", value=1), "trainer.max_epoch is not a setting of Trainer (did you mean max_ep"),
        (set_in("trainer", "precision", value="fp99"), "trainer.precision fp99: must be "),
        (set_in("trainr", value={"devices": 1}), "trainr is not a section of a recipe (did you mean trainer?)"),
        (set_in("data", "init_args", "imagesize", value=1), "data.imagesize is not a setting of ShardsDataModule"),
        (
            set_in("data", "init_args", "batch_size", value=0),
            "data.batch_size 0: must be a whole number from 1 to 1048576",
        ),
        (set_in("data", "init_args", "crop", value="middle"), "crop 'middle'"),
        (set_in("data", "init_args", "resize_ratio", value=math.nan), "resize_ratio nan: not a finite number"),
        (set_in("data", "init_args", "image_size", value=8), "data.image_size 8: the tokenizer makes images of 16"),
        (set_in("data", "init_args", "path", value="nowhere"), "data folder nowhere: does not exist; make it with"),
        (set_in("model", "class_path", value="mvar_lightning.WARModule"), "WARModule is no LightningModule (did you"),
        (lambda recipe: recipe.pop("model"), "recipe recipes/var.yaml: model is missing"),
        (lambda recipe: recipe["model"]["init_args"].pop("tokenizer"), "model.tokenizer is missing (VARModule needs"),
        (strategy("FulAttention"), "model.attention: FulAttention is no AttentionStrategy (did you mean FullAttention"),
        (strategy("VARBlocks"), "model.attention: VARBlocks is no AttentionStrategy (known: AdjacentAttention, FullA"),
        (strategy("SpatialAttention", kernel_sise=3), "model.attention.kernel_sise is not a setting of SpatialAtten"),
        (strategy("SpatialAttention", kernel_size=2), "SpatialAttention: kernel_size=2 must be odd"),
        (strategy("SpatialAttention", kernel_size=7), "kernel_size=7 is larger than every map it is for (largest sid"),
        (strategy("SlidingWindowAttention", scales=0), "SlidingWindowAttention: scales=0"),
        (strategy("SpatialAttention", kernel_size=3, scales=[5]), "names scale 5, but the pyramid 1 2 4 has scales"),
        (model("heads", 3), "width 32, heads 3: width must be heads times a multiple of 4"),
        (model("backend", "fast"), "backend"),
        (model("tokenizer", "nowhere"), "nowhere: no such checkpoint"),
        (model("init_from", "nowhere"), "nowhere: no such checkpoint"),
        (callback("EMMA"), "trainer.callbacks: EMMA is no Callback (did you mean EMA?)"),
        (callback("EMA", decy=0.5), "trainer.callbacks.decy is not a setting of EMA (did you mean decay?)"),
        (callback("EMA", decay=1.5), "EMA decay 1.5: must be in [0, 1)"),
        (set_in("trainer", "accelerator", value="gpux"), "trainer: "),
        (set_in("trainer", "max_epochs", value=-1), "trainer.max_steps: -1 never ends"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_wrong_recipe(
    change: Change, said: str, recipe: Recipe, rewrite: Callable[[Recipe], None], fails: Fails
) -> None:
    change(recipe)
    rewrite(recipe)
    assert said in fails("train", "recipes/var.yaml")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--model.depht=3"], "override --model.depht=3: model.depht is not a setting of VARModule (did you mean dep"),
        (["--modl.depth=3"], "override --modl.depth=3: modl.depth is no setting"),
        (["--model.attention=Fast"], "model.attention: Fast is no AttentionStrategy (known: AdjacentAttention, FullA"),
        (["--model.attention=SpatialAttention", "--model.attention.kernel_size=x"], "model.attention.kernel_size x:"),
        (["--trainer.max_epochs=many"], "override --trainer.max_epochs=many: trainer.max_epochs many: must be a who"),
        (["stray"], "stray is no setting"),
    ],
)
def test_a_wrong_override_names_itself(overrides: list[str], said: str, recipe: Recipe, fails: Fails) -> None:
    assert said in fails("train", "recipes/var.yaml", *overrides)


def test_a_wrong_override_is_found_before_the_tokenizer_is_trained(
    tokenizer_recipe: Recipe, recipe: Recipe, rewrite: Callable[[Recipe], None], fails: Fails
) -> None:
    rewrite({**recipe, "tokenizer_recipe": "recipes/tok.yaml"})
    assert "model.depht is not a setting" in fails("train", "recipes/var.yaml", "--model.depht=3")


def test_scales_that_do_not_fit_the_image(tokenizer_recipe: Recipe, fails: Fails) -> None:
    said = fails("train", "recipes/tok.yaml", "--model.scales=[1,2,5]")
    assert "scales 1 2 5: with downsampling 4 they make images of 20 pixels, but data.image_size is 16" in said
    said = fails("fit", "--config", "recipes/tok.yaml", "--model.scales=[4,2]")
    assert "scales [4, 2]: side lengths must be positive and strictly increasing" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: [1", "recipe recipes/bad.yaml: not valid YAML"),
        ("- 1\n", "recipe recipes/bad.yaml: must be a mapping"),
        ("", "recipe recipes/bad.yaml: must be a mapping"),
    ],
)
def test_a_broken_recipe(content: str, said: str, workplace: Path, fails: Fails) -> None:
    (workplace / "recipes").mkdir()
    (workplace / "recipes" / "bad.yaml").write_text(content)
    assert said in fails("train", "recipes/bad.yaml")


@pytest.mark.parametrize("command", [("train",), ("fit", "--config")])
def test_a_missing_recipe(command: tuple[str, ...], fails: Fails) -> None:
    assert "recipe recipes/none.yaml: no such file" in fails(*command, "recipes/none.yaml")


def test_stages_without_what_they_need(recipe: Recipe, workplace: Path, fails: Fails) -> None:
    assert "--config is missing" in fails("fit")
    assert "no weights" in fails("validate", "--config", "recipes/var.yaml")
    assert "no such file" in fails("validate", "--config", "recipes/var.yaml", "--ckpt-path", "none.ckpt")
    assert "not readable as a PyTorch file" in fails(
        "test", "--config", "recipes/var.yaml", "--ckpt-path", "recipes/var.yaml"
    )


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "images"])
def test_data_folders_that_hold_no_shards(kind: str, recipe: Recipe, workplace: Path, fails: Fails) -> None:
    folder = workplace / "folder"
    if kind == "file":
        folder.touch()
    elif kind != "missing":
        folder.mkdir()
    if kind == "images":
        (folder / "cat").mkdir()
    words = {"missing": "does not exist", "empty": "is empty", "file": "is a file", "images": "has no index.json"}
    said = fails("train", "recipes/var.yaml", "--data", "folder")
    assert f"data folder folder: {words[kind]}" in said and "mvar shards make" in said


@pytest.mark.parametrize("command", [("train",), ("fit", "--config")])
def test_a_run_folder_that_cannot_be_written(
    command: tuple[str, ...], recipe: Recipe, workplace: Path, fails: Fails
) -> None:
    (workplace / "file").touch()
    said = fails(*command, "recipes/var.yaml", "--run-folder", "file/run")
    assert "run folder file/run: cannot be written (Not a directory); choose another with --run-folder" in said


def test_a_run_folder_is_tried_before_the_tokenizer_is_trained(
    tokenizer_recipe: Recipe, recipe: Recipe, rewrite: Callable[[Recipe], None], workplace: Path, fails: Fails
) -> None:
    rewrite({**recipe, "tokenizer_recipe": "recipes/tok.yaml"})
    (workplace / "file").touch()
    assert "cannot be written" in fails("train", "recipes/var.yaml", "--run-folder", "file/run")


def test_a_wrong_override_does_not_cost_the_earlier_run(recipe: Recipe, workplace: Path, fails: Fails) -> None:
    folder = workplace / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    fails("train", "recipes/var.yaml", "--run-folder", "runs/mine", "--fresh", "--model.depht=3")
    assert (folder / "run.json").exists()


def test_an_output_folder_that_cannot_be_written(checkpoint: Path, workplace: Path, fails: Fails) -> None:
    (workplace / "file").touch()
    said = fails("sample", "--checkpoint", checkpoint, "--classes", "1", "--out", "file/samples")
    assert "--out file/samples: cannot be written (Not a directory); choose another folder" in said


def test_a_class_out_of_range(checkpoint: Path, fails: Fails) -> None:
    said = fails("sample", "--checkpoint", checkpoint, "--classes", "3,10", "--out", "samples")
    assert said == "class 10: the model knows classes 0 to 9"


def lightning_checkpoint(module: L.LightningModule, shards: Path, folder: Path) -> Path:
    run = trainer(folder, max_steps=1, limit_val_batches=0)
    run.fit(module, datamodule=data_module(shards))
    run.save_checkpoint(folder / "one.ckpt")
    return folder / "one.ckpt"


@pytest.mark.slow
def test_checkpoints_of_something_else(
    recipe: Recipe, tokenizer: Path, other_tokenizer: Path, shards: Path, tmp_path_factory: Any, fails: Fails
) -> None:
    """Another architecture, another tokenizer, a tokenizer alone."""
    folder = tmp_path_factory.mktemp("checkpoints")
    ours = lightning_checkpoint(VARModule(str(tokenizer), **MODEL_SIZES), shards, folder)
    said = fails("fit", "--config", "recipes/var.yaml", "--ckpt-path", ours, "--model.depth=3")
    assert "depth 2, but the run has 3" in said and "init_from" in said
    said = fails("fit", "--config", "recipes/var.yaml", "--ckpt-path", ours, f"--model.tokenizer={other_tokenizer}")
    assert "belongs to tokenizer" in said and "point model.tokenizer to the one it was trained with" in said
    alone = lightning_checkpoint(TokenizerModule(**TOKENIZER_SIZES), shards, folder)
    said = fails("validate", "--config", "recipes/var.yaml", "--ckpt-path", alone)
    assert "holds no next-scale model" in said
    assert "tokenizer alone" in fails("sample", "--checkpoint", tokenizer, "--out", "samples")


def test_a_damaged_last_checkpoint_does_not_start_anew(recipe: Recipe, workplace: Path, fails: Fails) -> None:
    folder = workplace / "runs" / "var" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"PK\x03\x04 cut off")
    said = fails("train", "recipes/var.yaml")
    assert "runs/var/checkpoints/last.ckpt: not readable as a PyTorch file" in said


def test_a_pickle_with_code_is_not_executed(recipe: Recipe, workplace: Path, fails: Fails) -> None:
    torch.save({"state_dict": {}, "hook": Bomb(workplace / "fired")}, workplace / "bomb.ckpt")
    said = fails("validate", "--config", "recipes/var.yaml", "--ckpt-path", "bomb.ckpt")
    assert "nothing was executed" in said and not (workplace / "fired").exists()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_report_of_an_unknown_form_is_still_one_line() -> None:
    told = explain("Something\n  else\n\nwent wrong\nand more", ["--config", "r.yaml"])
    assert told.startswith("recipe r.yaml: Something else went wrong") and "\n" not in told
