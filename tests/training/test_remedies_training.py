"""Remedies inside a Lightning run: with averaged weights, and codes that have a start and restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_run import TOKENIZER_SIZES, data_module, trainer

from mvar_lightning import TokenizerModule
from mvar_lightning.callbacks import EMA
from mvar_lightning.tokenizer import CodebookRemedy, DataDependentInit, DeadCodeRestart

CODES = "tokenizer.quantizer.codebook.weight"


def checkpoint_of(folder: Path, shards: Path, steps: int, **settings: Any) -> dict[str, Any]:
    L.seed_everything(0, verbose=False)
    module = TokenizerModule(**TOKENIZER_SIZES, lr=3e-3, **settings)
    with torch.no_grad():
        module.tokenizer.quantizer.codebook.weight[4:] += 9
    run = trainer(folder, EMA(decay=0.99, warmup=False), max_steps=steps)
    run.fit(module, datamodule=data_module(shards))
    run.save_checkpoint(folder / "a.ckpt")
    return torch.load(folder / "a.ckpt", weights_only=True)


@pytest.mark.parametrize("remedy", [DeadCodeRestart(every=2), DataDependentInit()])
def test_replaced_codes_are_not_averaged_with_what_they_replaced(
    remedy: CodebookRemedy, shards: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, shards, steps=2, remedies=[remedy])
    average, current = checkpoint["state_dict"][CODES], checkpoint["current_model_state"][CODES]
    assert current.abs().max() < 8, "the lost codes were to be replaced"
    assert (average - current).abs().max() < 0.1
    assert not torch.equal(average[:4], current[:4])


def test_state_of_remedies_is_in_the_checkpoint_and_fits_the_next_run(shards: Path, tmp_path: Path) -> None:
    state = checkpoint_of(tmp_path, shards, 2, remedies=[DataDependentInit(), DeadCodeRestart(every=5)])["state_dict"]
    assert state["remedies.0.done"] and state["remedies.1.steps"] == 2
    assert state["remedies.1.hits_KV"].sum() == 2 * 16 * 21
    again = TokenizerModule(**TOKENIZER_SIZES, remedies=[DataDependentInit(), DeadCodeRestart(every=5)])
    again.load_state_dict(state)
