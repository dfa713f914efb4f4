"""Recipes by name: in a clone, in a wheel, and beside the recipe that names another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mvar_lightning.errors import UserError
from mvar_lightning.runs import recipe_files
from mvar_lightning.runs.recipe_check import check_quickly
from mvar_lightning.runs.recipe_files import recipe_file

CLONE = recipe_files.PACKAGE.parent / "recipes"


@pytest.fixture(params=["clone", "wheel"])
def recipes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where recipes lie, seen from an empty folder."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if request.param == "clone":
        return CLONE
    monkeypatch.setattr(recipe_files, "PACKAGE", tmp_path / "site-packages" / "mvar_lightning")
    shutil.copytree(CLONE, tmp_path / "site-packages" / "mvar_lightning" / "recipes")
    return tmp_path / "site-packages" / "mvar_lightning" / "recipes"


@pytest.mark.parametrize("name", ["var/digits", "var/digits.yaml", "recipes/var/digits", "recipes/var/digits.yaml"])
def test_a_recipe_by_name(name: str, recipes: Path) -> None:
    assert recipe_file(name) == recipes / "var" / "digits.yaml"


def test_a_short_name_must_be_one_recipes(recipes: Path) -> None:
    assert recipe_file("d30") == recipes / "var" / "d30.yaml"
    with pytest.raises(UserError, match=r"recipe digits: several .* name one of markov_var/digits, mvar/digits"):
        recipe_file("digits")


def test_what_lies_here_comes_first(recipes: Path) -> None:
    Path("recipes/var").mkdir(parents=True)
    shutil.copy(CLONE / "var" / "digits.yaml", "recipes/var/digits.yaml")
    shutil.copy(CLONE / "var" / "digits.yaml", "digits")
    assert recipe_file("var/digits") == Path("recipes/var/digits.yaml")
    assert recipe_file("digits") == Path("digits")


def test_a_recipe_beside_another(recipes: Path) -> None:
    Path("mine").mkdir()
    for name in ("model", "tok"):
        Path("mine", f"{name}.yaml").touch()
    assert recipe_file("tok.yaml", beside="mine/model.yaml") == Path("mine/tok.yaml")
    assert recipe_file("recipes/tokenizer/digits.yaml", "mine/model.yaml") == recipes / "tokenizer" / "digits.yaml"


@pytest.mark.parametrize(
    "name", ["none", "var/none", "../recipes/var/digits", "/var/digits", "", "a b", "x" * 5000, "\0"]
)
def test_no_such_recipe(name: str, recipes: Path) -> None:
    with pytest.raises(UserError, match=r"no such file|cannot be read"):
        recipe_file(name)


def test_a_package_without_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe_files, "PACKAGE", tmp_path / "mvar_lightning")
    with pytest.raises(UserError, match="lost its recipes; install it again"):
        recipe_file("var/digits")


def test_a_sweep_is_no_recipe() -> None:
    with pytest.raises(UserError, match=r"is a sweep, of the recipe recipes/.*; give that, or use mvar sweep"):
        check_quickly("ablations/history")
