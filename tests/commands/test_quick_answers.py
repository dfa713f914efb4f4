"""Commands answer at once: what a mistake loads is counted, which unlike seconds is the same on every machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mvar_lightning import UserError
from mvar_lightning.cli import COMMANDS
from mvar_lightning.runs.bounds import import_class
from mvar_lightning.runs.recipe import RecipeCheck
from mvar_lightning.runs.recipe_check import _arguments, _settings, _trainer_settings, check_quickly

ROOT = Path(__file__).parents[2]
LIGHT = 300
"""Modules: Python with argparse and YAML has some 150, torch alone 1,500."""

PROBE = """
import sys
from mvar_lightning.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(status, len(sys.modules), *[name for name in {names} if name in sys.modules])
"""


def loaded(arguments: list[str], names: tuple[str, ...] = ()) -> tuple[int, int, list[str], str]:
    """Status, number of modules, which of ``names`` are among them, and the last line of standard error."""
    command = [sys.executable, "-c", PROBE.format(names=names), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    status, count, *found = done.stdout.splitlines()[-1].split()
    return int(status), int(count), found, (done.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["evaluate", "images", "--help"],
        ["analyze", "perturb", "--help"],
        ["sweep", "--help"],
        ["reconstruct", "--help"],
        ["tokens", "make", "--help"],
        ["shards", "make", "--help"],
    ],
    ids=" ".join,
)
def test_help_is_light(arguments: list[str]) -> None:
    status, modules, found, _ = loaded(arguments, ("torch", "numpy", "yaml", "rich"))
    assert status == 0 and modules < LIGHT and not found
    assert len(COMMANDS) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample"], "model: give either --checkpoint PATH or --official"),
        (["sample", "--official", "var"], "--official var: give both files, --model FILE and --tokenizer FILE"),
        (["edit", "--image", "a.png", "--box", "0,0,1,1"], "model: give either"),
        (["evaluate", "images", "--reference", "x"], "nothing to evaluate; give one of --checkpoint"),
        (["analyze", "rfa"], "model: give either"),
        (["fit"], "mvar fit: --config is missing"),
        (["train", "none.yaml"], "recipe none.yaml: no such file"),
        (["train", "recipes/var.yaml", "--model.depht=3"], "override --model.depht=3: model.depht is not a setting of"),
        (["fit", "--config", "recipes/var.yaml", "--trainer.max_epoch=3"], "(did you mean max_epochs?)"),
        (["train", "recipes/var.yaml", "--modl.depth=3"], "modl.depth is no setting"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_needs_no_torch(arguments: list[str], message: str, recipe: dict[str, Any], workplace: Path) -> None:
    status, modules, found, line = loaded(arguments, ("torch", "lightning"))
    assert status == 2 and message in line and modules < LIGHT and not found


def test_a_strategy_is_made_without_lightning(recipe: dict[str, Any], workplace: Path) -> None:
    override = ["--model.attention=SpatialAttention", "--model.attention.kernel_size=2"]
    status, _, found, line = loaded(["train", "recipes/var.yaml", *override], ("lightning.pytorch", "torchmetrics"))
    assert status == 2 and "SpatialAttention: kernel_size=2 must be odd" in line and not found


def test_info_and_generate_load_what_they_need(checkpoint: Path) -> None:
    heavy = ("lightning", "torchmetrics", "scipy", "matplotlib", "torch._dynamo")
    assert loaded(["info", str(checkpoint)], heavy)[2] == []
    code = f"import sys, mvar_lightning; mvar_lightning.generate; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "change",
    [
        {"trainr": {"devices": 1}},
        {"model": {"init_args": {"depht": 2}}},
        {"data": {"init_args": {"imagesize": 2}}},
        {"trainer": {"max_epoch": 2}},
        {"trainer": {"callbacks": [{"class_path": "mvar_lightning.callbacks.EMA", "init_args": {"decy": 0.5}}]}},
        {"model": {"init_args": {"attention": {
            "class_path": "mvar_lightning.SpatialAttention", "init_args": {"kernel_sise": 3}}}}},
    ],
    ids=str,
)  # fmt: skip
def test_quick_words_are_the_parsers(
    change: dict[str, Any], recipe: dict[str, Any], rewrite: Callable[..., None], workplace: Path
) -> None:
    rewrite(_with(recipe, change))
    messages = []
    for check in (
        lambda: check_quickly("recipes/var.yaml"),
        lambda: RecipeCheck(["--config", "recipes/var.yaml"], Path("runs/x")),
    ):
        with pytest.raises(UserError) as error:
            check()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def _with(recipe: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The change merged into the recipe, mapping by mapping."""
    merged = dict(recipe)
    for name, value in change.items():
        merged[name] = _with(merged[name], value) if isinstance(merged.get(name), dict) else value
    return merged


@pytest.mark.parametrize(
    "name", ["VARModule", "MarkovVARModule", "TokenizerModule", "ShardsDataModule", "FullAttention"]
)
def test_settings_are_those_of_the_signature(name: str) -> None:
    from inspect import signature

    assert _settings(f"mvar_lightning.{name}") == list(signature(import_class(f"mvar_lightning.{name}")).parameters)
    assert _trainer_settings() == list(signature(import_class("lightning.Trainer")).parameters)
    assert _settings("mine.Model") is None and _arguments("mvar_lightning.errors", "nothing") is None


def test_recipes_that_ship_are_found_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in sorted(Path("recipes").glob("*/*.yaml")):
        if path.parent.name not in ("ablations", "evidence"):  # sweeps
            assert check_quickly(path)


@pytest.mark.parametrize(
    "overrides",
    [
        ["--model.base_lr", "0.001"],
        ["--model", "mvar_lightning.VARModule"],
        ["--trainer.max_time", "00:00:01.5"],
        ["--config", "small.yaml"],
        ["--config=small.yaml"],
        ["--print_config=skip_null"],
        ["--model.help=VARModule"],
        ["--model.attention.class_path=mvar_lightning.FullAttention"],
        ["--data.class_path=mvar_lightning.TokenShardsDataModule"],
        ["--model.attention.scales", "2"],
        ["--trainer.callbacks+=EMA"],
    ],
)
def test_what_only_the_parser_understands_is_left_to_it(overrides: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    attention = "{class_path: mvar_lightning.SlidingWindowAttention, init_args: {scales: 0}}"
    recipe.write_text(f"model: {{class_path: mvar_lightning.VARModule, init_args: {{attention: {attention}}}}}\n")
    assert check_quickly(recipe, overrides)["model"]["class_path"] == "mvar_lightning.VARModule"
    with pytest.raises(UserError, match="scales=0"):  # which is told where nothing is in the way
        check_quickly(recipe, ["--model.depth=2"])


@pytest.mark.parametrize("content", ["model: &a {x: *a}\n", "2020-01-01: 3\n"])
def test_yaml_that_is_no_recipe_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match="not a recipe's YAML"):
        check_quickly(tmp_path / "recipe.yaml")


def test_the_token_caches_module_is_known_by_its_short_name(recipe: dict[str, Any], workplace: Path) -> None:
    words = recipe | {"data": {"class_path": "TokenShardsDataModule", "init_args": {"path": "data/tokens"}}}
    (workplace / "tokens.yaml").write_text(yaml.safe_dump(words))
    checked = RecipeCheck(["--config", "tokens.yaml"], workplace / "run")
    assert checked.config["data"]["class_path"] == "mvar_lightning.TokenShardsDataModule"
