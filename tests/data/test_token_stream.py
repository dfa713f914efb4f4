"""Batches of a token cache: each sample once a pass, another view each pass, the same after a resume."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from token_files import token_settings, write_token_cache

import mvar_lightning
from benchmarks.tokens import token_throughput
from mvar_lightning.data import token_data as token_stream
from mvar_lightning.data.reading.loader import TrainLoader
from mvar_lightning.data.reading.order import StreamConfig
from mvar_lightning.data.token_data import (
    TokenReader,
    TokenShardsDataModule,
    TokenTrainStream,
    TokenValidationStream,
)
from mvar_lightning.data.tokens.cache import TokenCache
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid


def samples_of(batches: Any) -> list[tuple[int, int]]:
    """(number, view) of all samples."""
    return [tuple(row) for batch in batches for row in batch["tokens"][:, :2].tolist()]


def train_samples(cache: TokenCache, ranks: int, workers: int, batch: int, epochs: int, **options: Any) -> list[Any]:
    """Of each epoch, what all ranks saw; one loader a rank, used on and on."""
    epoch_batches = cache.samples("train") // (batch * ranks)
    loaders = []
    for rank in range(ranks):
        stream = TokenTrainStream(cache, StreamConfig(batch, 0, rank, ranks), epoch_batches, **options)
        loaders.append(TrainLoader(stream, workers))
    seen = []
    for _ in range(epochs):
        parts = [samples_of(loader) for loader in loaders]
        assert {len(part) for part in parts} == {epoch_batches * batch}
        seen.append([sample for part in parts for sample in part])
    for loader in loaders:
        loader.close()
    return seen


@pytest.mark.parametrize(("ranks", "workers", "batch"), [(1, 0, 20), (1, 2, 4), (2, 0, 5), (2, 2, 2), (4, 1, 5)])
def test_an_epoch_of_one_pass_holds_each_sample_once_and_each_pass_another_view(
    tmp_path: Path, ranks: int, workers: int, batch: int
) -> None:
    cache = write_token_cache(tmp_path / "c", views=3)
    epochs = train_samples(cache, ranks, workers, batch, epochs=3)
    for seen in epochs:
        assert sorted(number for number, _ in seen) == list(range(20))
        assert len({view for _, view in seen}) > 1
    # three passes show each view of each sample once
    assert Counter(sample for seen in epochs for sample in seen) == Counter(
        (number, view) for number in range(20) for view in range(3)
    )


def test_samples_that_fill_no_batch_open_the_next_epoch(tmp_path: Path) -> None:
    cache = write_token_cache(tmp_path / "c")
    seen = [number for epoch in train_samples(cache, 1, 0, 3, epochs=10, shuffle_window=8) for number, _ in epoch]
    assert len(seen) == 180
    for first in range(0, 180, 20):
        assert sorted(seen[first : first + 20]) == list(range(20))


def test_workers_and_ranks_share_one_row(tmp_path: Path) -> None:
    """The number of workers changes nothing; two ranks together have what one has in a batch of twice the size."""
    cache = write_token_cache(tmp_path / "c")

    def batches(rank: int, ranks: int, workers: int, size: int) -> list[list[int]]:
        stream = TokenTrainStream(cache, StreamConfig(size, 3, rank, ranks), 5)
        loader = TrainLoader(stream, workers)
        found = [batch["tokens"][:, 0].tolist() for batch in loader]
        loader.close()
        return found

    one = batches(0, 1, 0, 4)
    assert batches(0, 1, 2, 4) == one
    first, second = batches(0, 2, 0, 2), batches(1, 2, 0, 2)
    assert [a + b for a, b in zip(first, second, strict=True)] == one


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_is_told_its_place_goes_on_there(tmp_path: Path, workers: int) -> None:
    cache = write_token_cache(tmp_path / "c", views=2)

    def loader() -> TrainLoader:
        stream = TokenTrainStream(cache, StreamConfig(3), 6, shuffle_window=8)
        return TrainLoader(stream, workers)

    whole = loader()
    expected = [samples_of([batch]) for _ in range(2) for batch in whole]
    broken = loader()
    for number, _ in enumerate(broken):
        if number == 3:
            break
    resumed = loader()
    resumed.load_state_dict(broken.state_dict())
    assert [samples_of([batch]) for _ in range(2) for batch in resumed] == expected[4:]
    for each in (whole, broken, resumed):
        each.close()


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 3), (2, 2), (3, 4)])
def test_validation_sees_each_sample_once(tmp_path: Path, ranks: int, workers: int) -> None:
    cache = write_token_cache(tmp_path / "c", views=3)
    seen = []
    for rank in range(ranks):
        stream = TokenValidationStream(cache, StreamConfig(3, 0, rank, ranks))
        for worker in range(max(1, workers)):
            for tokens, _, ends in stream.batches(worker, max(1, workers)):
                seen += [tuple(row) for row in tokens[:, :2].tolist()]
                assert ends[-1] == len(tokens) and len(ends) <= stream.num_batches(max(1, workers))
    assert sorted(seen) == [(number, 0) for number in range(1000, 1008)]


def test_batches_are_int64_and_labels_belong_to_tokens(tmp_path: Path) -> None:
    cache = write_token_cache(tmp_path / "c", vocab_size=70_000)
    batch = next(iter(TrainLoader(TokenTrainStream(cache, StreamConfig(20), 1), 0)))
    assert (batch["tokens"].dtype, batch["label"].dtype) == (torch.int64, torch.int64)
    assert batch["tokens"].shape == (20, 5)
    assert torch.equal(batch["label"], batch["tokens"][:, 0] % 3)


def test_a_reader_maps_only_what_it_needs_and_forgets(tmp_path: Path) -> None:
    reader = TokenReader(write_token_cache(tmp_path / "c"), "train")
    tokens, labels = reader.read(np.array([8, 0, 10]), 0)
    assert tokens[:, 0].tolist() == [8, 0, 10] and labels.tolist() == [2, 0, 1]
    assert set(reader._mapped) == {0, 1}
    assert pickle.loads(pickle.dumps(reader))._mapped == {}
    reader.forget()
    assert reader._mapped == {}


def test_the_window_that_is_left_is_unmapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "ROWS_AT_ONCE", 4)
    cache = write_token_cache(tmp_path / "c", train=(4,) * 10)
    stream = TokenTrainStream(cache, StreamConfig(4), 20, shuffle_window=8)
    mapped = [len(stream.reader._mapped) for _ in stream.batches(0, 1)]
    assert len(mapped) == 20 and max(mapped) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Batches in their order whatever a worker reads together, also from the middle of an epoch."""
    cache = write_token_cache(tmp_path / "c", views=2)
    found = []
    for rows in (1, 7, 2048):
        monkeypatch.setattr(token_stream, "ROWS_AT_ONCE", rows)
        loader = TrainLoader(TokenTrainStream(cache, StreamConfig(2), 9, shuffle_window=8), workers)
        loader.load_state_dict({"epoch": 1, "batch": 4})
        found.append([samples_of([batch]) for _ in range(2) for batch in loader])
        loader.close()
    assert len(found[0]) == 5 + 9 and found[0] == found[1] == found[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_that_goes_bad_stops_the_run_in_one_line(tmp_path: Path, workers: int) -> None:
    cache = write_token_cache(tmp_path / "c")
    data = TokenShardsDataModule(str(cache.folder), batch_size=20, num_workers=workers)
    data.setup("fit")
    np.save(cache.folder / "train" / "000001.npy", np.full((1, 4, 5), 5000, np.uint16))
    loader = data.train_dataloader()
    with pytest.raises(UserError, match=r"tokens up to 5000 of 4096 codes.*it is damaged"):
        list(loader)
    loader.close()


# -- the data module


def tokenizer_of(scales: Any, vocab_size: int) -> Any:
    """As much of a tokenizer as data looks at."""
    return SimpleNamespace(pyramid=ScalePyramid(scales), vocab_size=vocab_size)


def module_of(cache: TokenCache, **options: Any) -> TokenShardsDataModule:
    return TokenShardsDataModule(str(cache.folder), **({"batch_size": 4, "num_workers": 0} | options))


def test_the_data_module_tells_what_the_cache_holds(tmp_path: Path) -> None:
    data = module_of(write_token_cache(tmp_path / "c"))
    assert (data.num_classes, data.class_names, data.image_size) == (3, ("a", "b", "c"), 8)
    assert (data.train_samples, data.val_samples, data.batch_size) == (20, 8, 4)
    assert data.tokenizer_hash == token_settings().tokenizer_hash
    assert mvar_lightning.TokenShards is mvar_lightning.TokenShardsDataModule is TokenShardsDataModule


def test_setup_names_a_missing_or_shortened_part(tmp_path: Path) -> None:
    cache = write_token_cache(tmp_path / "c")
    part = cache.folder / "val" / "000001.npy"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"val/000001: \d+ bytes instead of"):
        module_of(cache).setup("fit")
    part.unlink()
    with pytest.raises(UserError, match=r"val/000001\.npy: missing"):
        module_of(cache).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"num_workers": -2}, "num_workers -2"),
        ({"batch_size": 21}, "epoch of 20 samples is less than one batch of 21"),
        ({"seed": -1}, "seed -1"),
        ({"shuffle_window": 0}, "shuffle_window 0"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, int], message: str) -> None:
    cache = write_token_cache(tmp_path / "c")
    with pytest.raises(UserError, match=message):
        module_of(cache, **options).train_dataloader()


def test_a_split_without_samples_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no samples for val"):
        module_of(write_token_cache(tmp_path / "c", val=())).val_dataloader()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("f" * 64, (1, 2), 4096), "hash 0123456789ab, model.tokenizer has ffffffffffff"),
        (("0123456789abcdef" * 4, (1, 3), 4096), r"scales \[1, 2\], model.tokenizer has \[1, 3\]"),
        (("0123456789abcdef" * 4, (1, 2), 512), "vocab_size 4096, model.tokenizer has 512"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path: Path, given: Any, message: str) -> None:
    data = module_of(write_token_cache(tmp_path / "c"))
    data.check_model(tokenizer_of([1, 2], 4096), token_settings().tokenizer_hash)
    tokenizer_hash, scales, vocab_size = given
    with pytest.raises(UserError, match=message):
        data.check_model(tokenizer_of(scales, vocab_size), tokenizer_hash)


def test_a_tokenizer_is_not_trained_on_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a tokenizer is trained on images; give ShardsDataModule"):
        module_of(write_token_cache(tmp_path / "c")).check_model(tokenizer_of([1, 2], 4096))


def test_real_images_are_asked_for_by_name(tmp_path: Path) -> None:
    data = module_of(write_token_cache(tmp_path / "c"))
    with pytest.raises(UserError, match=r"SampleMetrics: needs real images.*set data\.images"):
        data.image_data("SampleMetrics")


def test_images_of_other_classes_are_refused(tmp_path: Path, numbered_shards: Any) -> None:
    cache = write_token_cache(tmp_path / "c")
    with pytest.raises(UserError, match=r"data\.images .*: has other classes than token cache"):
        module_of(cache, images=str(numbered_shards())).setup("fit")


class Recorder(lightning.LightningModule):
    """Notes what it sees; a single weight is trained so that Lightning has something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(samples_of([batch]))
        return (self.weight - batch["label"].float().mean()) ** 2

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += samples_of([batch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(lightning.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(cache: TokenCache, workers: int, ckpt_path: Path | None = None, **options: Any) -> Recorder:
    model = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_epochs=3,
        **options,
    )
    data = module_of(cache, batch_size=3, num_workers=workers, shuffle_window=8)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return model


@pytest.mark.parametrize(("step", "workers", "limit"), [(8, 0, 0), (8, 2, 0), (6, 0, 0), (5, 0, 4)])
def test_a_resumed_fit_sees_the_same_batches(tmp_path: Path, step: int, workers: int, limit: int) -> None:
    cache, saved = write_token_cache(tmp_path / "c", views=2), tmp_path / "saved.ckpt"
    options = {"limit_train_batches": limit} if limit else {}
    whole = fit(cache, workers, callbacks=[SaveAt(step, saved)], **options)
    assert len(whole.seen) == 3 * (limit or 6)
    assert sorted(whole.validated) == sorted([(number, 0) for number in range(1000, 1008)] * 3)
    resumed = fit(cache, workers, ckpt_path=saved, **options)
    assert resumed.seen == whole.seen[step:]
    assert resumed.weight.item() == whole.weight.item()


def test_the_benchmark_measures_far_more_than_single_samples_would_give() -> None:
    """Targets are 50,000 and 20,000 samples/s on a machine at rest; here only that nothing is done for each sample."""
    figures = token_throughput(tokens=680, samples=3000, passes=4, batch_size=64, workers=0)
    assert figures.best > 10_000
    assert len(figures.anonymous_mb) == 4 and figures.anonymous_mb[-1] - figures.anonymous_mb[0] < 5
