from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# shared machines are too uneven for deadlines
settings.register_profile("suite", deadline=None, max_examples=25)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device (make test-gpu)"))
