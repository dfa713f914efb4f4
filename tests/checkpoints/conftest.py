from __future__ import annotations

from pathlib import Path

import pytest
from golden_formula import CASES
from reference_files import import_case, write_case

from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import NextScaleTransformer

Pair = tuple[NextScaleTransformer, MultiScaleTokenizer]


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Files of the four golden cases as the references write them; not to be changed."""
    folder = tmp_path_factory.mktemp("released")
    return {name: write_case(name, folder) for name in CASES}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """The four golden cases imported; not to be changed."""
    return {name: import_case(name, tmp_path_factory.mktemp(name)) for name in CASES}
