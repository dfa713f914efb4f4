from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from small_run import write_digits, write_tokenizer

# shared machines are too uneven for deadlines
settings.register_profile("suite", deadline=None, max_examples=25)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device (make test-gpu)"))


# what the small runs of tests/training and tests/commands train on; rooms with tokenizers of their own override these


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("small") / "shards")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("small") / "tokenizer")


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("small") / "other", seed=1)
