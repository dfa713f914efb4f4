"""Drawn token caches: each sample is what its seed draws, and a job that was killed goes on to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvar_lightning import MultiScaleTokenizer, NextScaleTransformer, generate
from mvar_lightning.cli import main
from mvar_lightning.data.tokens.cache import check_cache, open_part, read_cache
from mvar_lightning.data.tokens.making import TokenJob
from mvar_lightning.sampling.jobs import list_jobs

Draw = Callable[..., int]


@pytest.fixture
def draw(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    monkeypatch.setattr("mvar_lightning.sampling.token_jobs.PART_SAMPLES", 8)

    def run(out: Path, *arguments: str) -> int:
        common = ["--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu"]
        return main(["tokens", "draw", *common, "--count", "4", "--val-count", "1", "--batch-size", "3", *arguments])

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_samples_are_those_of_their_seeds(
    draw: Draw, tmp_path: Path, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer
) -> None:
    assert draw(tmp_path / "cache", "--cfg", "2", "--seed", "3") == 0
    cache = read_cache(tmp_path / "cache")
    assert (
        cache.settings.drawn
        and check_cache(tmp_path / "cache") == []
        and [part.samples for part in cache.parts] == [8, 8, 4, 5]
    )
    arrays = [open_part(cache, part) for part in cache.parts]
    for split, first, count in ((arrays[:3], 0, 4), (arrays[3:], 4, 1)):
        tokens = np.concatenate([tokens_1nL[0] for tokens_1nL, _ in split])
        labels = np.concatenate([labels_n for _, labels_n in split])
        assert labels.tolist() == list(range(5)) * count, "the classes take turns"
        for label in (0, 4):
            seeds = [job.seed for job in list_jobs([label], 5, 3)][first : first + count]
            assert (
                tokens[labels == label] == generate(model, tokenizer, label, cfg=2.0, seeds=seeds).tokens.numpy()
            ).all()


def test_a_killed_job_goes_on_to_the_same_bytes_and_other_tokens_are_refused(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(tmp_path / "whole") == 0
    written: list[str] = []
    write = TokenJob.write

    def killed(self: TokenJob, task: Any, *arrays: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(task.part)
        return write(self, task, *arrays)

    monkeypatch.setattr(TokenJob, "write", killed)
    assert draw(tmp_path / "cache") == 130 and "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "cache" / "tokens.json").exists()
    again: list[str] = []
    monkeypatch.setattr(
        TokenJob, "write", lambda self, task, *rest: (again.append(task.part), write(self, task, *rest))[1]
    )
    assert draw(tmp_path / "cache", "--seed", "1") == 2
    assert "was begun with" in capsys.readouterr().err
    assert draw(tmp_path / "cache") == 0
    assert written == ["train/000000", "train/000001"] and again == ["train/000002", "val/000000"]
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert draw(tmp_path / "cache", "--selector", "MostLikely") == 2, "other tokens, though of the same model"
