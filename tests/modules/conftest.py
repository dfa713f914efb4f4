"""Shards and tokenizers of a small run, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import write_digits, write_tokenizer


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("modules") / "shards")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("modules") / "tokenizer")


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("modules") / "other", seed=1)
