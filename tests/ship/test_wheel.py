"""The built package, in an environment that has nothing else, away from the clone: it trains and samples by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
MEGABYTES = 6
SOURCES = ("mvar_lightning", "recipes", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")

pytestmark = pytest.mark.ship


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, copy = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source") / "clone"
    copy.mkdir()
    for name in SOURCES:  # of a copy: nothing that an earlier build left behind may get in
        whole = ROOT / name
        if whole.is_dir():
            shutil.copytree(whole, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(whole, copy)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", out, copy], check=True, capture_output=True)
    (found,) = out.glob("*.whl")
    return found


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mvar_lightning/")}
    clone = {file.relative_to(ROOT).as_posix() for file in (ROOT / "mvar_lightning").rglob("*.py")}
    assert clone, "the package has files"
    recipes = {f"mvar_lightning/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "recipes").rglob("*.yaml")}
    model = {
        f"mvar_lightning/models/digits/{name}" for name in ("model.safetensors", "tokenizer.safetensors", "config.json")
    }
    others = {"mvar_lightning/py.typed", "mvar_lightning/checkpoints/imagenet_classes.txt"}
    others |= {file.relative_to(ROOT).as_posix() for file in (ROOT / "mvar_lightning" / "demo" / "page").iterdir()}
    assert names == clone | recipes | model | others
    assert wheel.stat().st_size < MEGABYTES * 1e6


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment ``bin/`` that holds the wheel, and nothing of the clone."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True, env=clean())
    return folder


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def mvar(place: Path, *arguments: str, status: int = 0) -> str:
    command = [place / "env" / "bin" / "mvar", *arguments]
    found = subprocess.run(command, cwd=place, env=clean(), text=True, capture_output=True)
    assert found.returncode == status, found.stderr
    return found.stdout + found.stderr


def test_it_samples_from_the_model_that_ships(place: Path) -> None:
    mvar(place, "sample", "--checkpoint", "digits", "--classes", "3", "--count", "2", "--out", "samples")
    pictures = sorted((place / "samples").rglob("*.png"))
    assert pictures and all(Image.open(picture).size[0] >= 16 for picture in pictures)
    assert "architecture" in mvar(place, "info", "digits")


def test_it_trains_a_recipe_by_name(place: Path) -> None:
    quick = ("--trainer.max_steps=2", "--trainer.limit_val_batches=1")
    mvar(place, "train", "tokenizer/digits", "--run-folder", "runs/tokenizer/digits", *quick)
    said = mvar(place, "train", "var/digits", "--model.tokenizer=runs/tokenizer/digits/model", *quick)
    assert (place / "data" / "digits" / "index.json").is_file() and "var/digits" in said
    assert "several are called so" in mvar(place, "train", "digits", status=2)


def test_its_own_code_is_imported_and_typed(place: Path) -> None:
    found = subprocess.run(
        [place / "env" / "bin" / "python", "-c", "import mvar_lightning as m, pathlib; print(m.__file__)"],
        cwd=place,
        env=clean(),
        text=True,
        capture_output=True,
        check=True,
    )
    assert place in Path(found.stdout.strip()).parents
    assert (Path(found.stdout.strip()).parent / "py.typed").is_file()
