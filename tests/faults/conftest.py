"""The tiny assets that rows and writers work on, made once by the product's own commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.assets import make
from tests.faults.harness import shared


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("faults") / "assets", shared())
