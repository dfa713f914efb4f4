"""The tiny assets that rows and writers work on, made once by the product's own commands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mvar_lightning import save
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import NextScaleTransformer
from tests.faults.assets import make
from tests.faults.harness import shared
from tests.faults.small_models import small_model, small_tokenizer


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("faults") / "assets", shared())


@pytest.fixture(scope="session")
def pair() -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
    return small_model(), small_tokenizer()


@pytest.fixture(scope="session")
def saved(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(folder, *pair)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    tmp_path.chmod(0o755)
    return Path(shutil.copytree(saved, tmp_path / "model"))
