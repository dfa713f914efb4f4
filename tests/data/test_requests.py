"""The jobs behind `mvar shards make` and `mvar tokens make`, called from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvar_lightning import MultiScaleTokenizer, ShardsDataModule, TokenShardsDataModule, normalize
from mvar_lightning.data.check import check
from mvar_lightning.data.index import read_index
from mvar_lightning.data.making.shards import ShardLimits, ShardsRequest, ensure, make_shards
from mvar_lightning.data.tokens.cache import open_part
from mvar_lightning.data.tokens.encoding import EncodeRequest, encode_data
from mvar_lightning.errors import UserError
from tests.faults.harness import start_ranks


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleTokenizer:
    torch.manual_seed(0)
    sizes = {"channels": 8, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "phi_layers": 2, "norm_groups": 4}
    return MultiScaleTokenizer((1, 2), vocab_size=32, code_dim=4, **sizes).train()


def request_of(tokenizer: MultiScaleTokenizer, data: Path, out: Path, **options: Any) -> EncodeRequest:
    defaults = {"resize_ratio": 1.0, "crop": "center", "accelerator": "cpu", "devices": 1, "num_workers": 0}
    return EncodeRequest(tokenizer, data, out, **(defaults | options))


def test_a_cache_from_python_is_what_the_data_module_reads(
    numbered_shards: Any, tokenizer: MultiScaleTokenizer, tmp_path: Path
) -> None:
    folder = numbered_shards(train=20, val=9)
    cache = encode_data(request_of(tokenizer, folder, tmp_path / "cache", batch_size=7))
    assert cache is not None and (cache.samples("train"), cache.samples("val")) == (20, 9)
    assert tokenizer.training and all(parameter.requires_grad for parameter in tokenizer.parameters())
    (batch,) = ShardsDataModule(str(folder), 8, 9, num_workers=0, resize_ratio=1.0).val_dataloader()
    tokenizer.eval()
    expected = tokenizer.encode(normalize(batch["image"])).numpy()
    tokenizer.train()
    assert np.array_equal(np.concatenate([open_part(cache, part)[0][0] for part in cache.split("val")]), expected)
    data = TokenShardsDataModule(str(tmp_path / "cache"), batch_size=9, num_workers=0)
    data.check_model(tokenizer, cache.settings.tokenizer_hash)
    (tokens,) = data.val_dataloader()
    assert np.array_equal(tokens["tokens"].numpy(), expected)
    assert torch.equal(tokens["label"], batch["label"])
    again = encode_data(request_of(tokenizer, folder, tmp_path / "cache", batch_size=7, num_workers=2))
    assert again == cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "views 0: must be 1 or more"),
        ({"batch_size": 0}, "batch_size 0: must be 1 or more"),
        ({"devices": 0}, "devices 0: must be 1 or more"),
        ({"precision": "16-true"}, "precision '16-true': choose one of 32-true, bf16-mixed"),
        ({"num_workers": -1}, "num_workers -1: must be 0"),
    ],
)
def test_wrong_values_are_named(tokenizer: MultiScaleTokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        request_of(tokenizer, Path("x"), Path("y"), **options)


def test_encoding_makes_no_images(tokenizer: MultiScaleTokenizer, tmp_path: Path) -> None:
    """Only data modules and commands make a missing `data/digits`."""
    with pytest.raises(UserError, match="digits: does not exist; make it with `mvar shards make"):
        encode_data(request_of(tokenizer, tmp_path / "digits", tmp_path / "cache"))
    with pytest.raises(UserError, match="does not exist"):
        read_index(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_shards_from_python_by_the_name_of_their_source(tmp_path: Path) -> None:
    made = make_shards(ShardsRequest("digits", tmp_path / "one", ShardLimits(100)))
    assert check(tmp_path / "one") == [] and made.split("val").samples == 360
    assert ensure(tmp_path / "deep" / "digits") == make_shards(ShardsRequest("digits", tmp_path / "two"))
    for options, message in (({"resize": 0}, "resize 0"), ({"workers": -1}, "workers -1")):
        with pytest.raises(UserError, match=message):
            ShardsRequest("digits", tmp_path / "three", **options)


MADE_ONCE = """
import pathlib, time
from mvar_lightning.data.making import shards
make = shards.make_shards
def making(request):
    pathlib.Path(f"made-{os.getpid()}").touch()
    time.sleep(0.3)
    return make(request)
shards.make_shards = making
print(shards.ensure("data/digits").split("train").samples)
"""


@pytest.mark.parametrize("late", [0, 1])
def test_of_several_processes_one_makes_missing_data(late: int, tmp_path: Path) -> None:
    """The second waits, whoever came first."""
    code = f"import os, time; time.sleep(0.5 * (os.environ['LOCAL_RANK'] == '{late}'))" + MADE_ONCE
    answers = [each.finish() for each in start_ranks(2, code=code, cwd=tmp_path)]
    assert [answer.status for answer in answers] == [0, 0], answers
    assert answers[0].out == answers[1].out != ""
    assert len(list(tmp_path.glob("made-*"))) == 1
