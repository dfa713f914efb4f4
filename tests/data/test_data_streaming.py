"""Streams: every sample once, epochs of known length, the same order again, and damage survived or named."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvar_lightning.data.index import ShardInfo, read_index
from mvar_lightning.data.reading import samples as faults_module
from mvar_lightning.data.reading.loader import StreamLoader, TrainLoader
from mvar_lightning.data.reading.order import StreamConfig, TrainStream, ValidationStream
from mvar_lightning.data.reading.place import ShardPlace
from mvar_lightning.data.reading.samples import Faults, ImageReader, read_shard
from mvar_lightning.data.transforms import build_transform
from mvar_lightning.errors import UserError


def parts_of(folder: Path, split: str = "train", **changes: object) -> tuple[ImageReader, Any, StreamConfig]:
    """What a stream is made of."""
    shards = changes.pop("shards", read_index(folder).split(split).shards)
    transform = changes.pop("transform", build_transform("center", 8, 1.0))
    reader = ImageReader(ShardPlace(str(folder)), sum(shard.bytes for shard in shards), transform, num_classes=3)
    return reader, shards, StreamConfig(**({"batch_size": 4} | changes))


def numbers(batches: list) -> list[int]:
    """The numbers painted into the pictures, see conftest."""
    found = []
    for batch in batches:
        bytes_B3 = batch["image"][:, :, 0, 0].long()
        found += (bytes_B3[:, 0] + 256 * bytes_B3[:, 1]).tolist()
        assert [number % 3 for number in found[-len(batch["label"]) :]] == batch["label"].tolist()
    return found


def all_validation(folder: Path, ranks: int, workers: int, batch_size: int = 4) -> list[int]:
    found = []
    for rank in range(ranks):
        stream = ValidationStream(*parts_of(folder, "val", rank=rank, world_size=ranks, batch_size=batch_size))
        batches = [batch for worker in range(workers) for batch in stream.batches(worker, workers)]
        assert len(batches) <= stream.num_batches(workers)
        found += numbers(batches)
    return found


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 3), (2, 2), (3, 1), (4, 2), (5, 7)])
def test_validation_reads_every_sample_once(numbered_shards, ranks, workers):
    folder = numbered_shards(train=8, val=13, samples_per_shard=5)
    assert sorted(all_validation(folder, ranks, workers)) == list(range(1000, 1013))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9))
def test_validation_blocks_cover_all_samples_once(counts, ranks, workers, batch_size):
    shards = tuple(ShardInfo(f"{n}.tar", samples, 1, "") for n, samples in enumerate(counts))
    reader = ImageReader(ShardPlace(), 0, build_transform("center", 8), 1)
    streams = [ValidationStream(reader, shards, StreamConfig(batch_size, 0, rank, ranks)) for rank in range(ranks)]
    blocks = [stream.blocks(worker, workers) for stream in streams for worker in range(workers)]
    assert [position for consumer in blocks for block in consumer for position in block] == list(range(sum(counts)))
    assert all(0 < len(block) <= batch_size for consumer in blocks for block in consumer)
    if batch_size > 1 and sum(counts) >= ranks * workers:  # ranks step together, as sharded models need
        assert len({stream.num_batches(workers) for stream in streams}) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_through_worker_processes_and_again(numbered_shards, workers):
    loader = StreamLoader(ValidationStream(*parts_of(numbered_shards(train=8, val=13), "val")), workers)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sorted(numbers(batches)) == list(range(1000, 1013))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_epochs_have_their_length_and_repeat_with_the_seed(numbered_shards, workers):
    folder = numbered_shards()

    def epochs(seed: int) -> list[list[int]]:
        loader = TrainLoader(TrainStream(*parts_of(folder, seed=seed), epoch_batches=7, shuffle_buffer=9), workers)
        assert len(loader) == 7
        return [numbers(list(loader)) for _ in range(3)]

    first = epochs(0)
    assert [len(epoch) for epoch in first] == [28] * 3
    assert first == epochs(0) != epochs(1)
    assert first[0] != first[1] != first[2]


def test_one_consumer_draws_without_repeats(numbered_shards):
    loader = TrainLoader(TrainStream(*parts_of(numbered_shards()), epoch_batches=20, shuffle_buffer=16), 0)
    # two passes over 40 samples; the buffer may blur the border between the passes
    counts = Counter(numbers(list(loader)))
    assert len(counts) == 40
    assert max(counts.values()) <= 3
    ordered = TrainLoader(TrainStream(*parts_of(numbered_shards(40, 12, 9)), epoch_batches=10, shuffle_buffer=1), 0)
    assert sorted(numbers(list(ordered))) == list(range(40))


def test_worker_roles_turn_with_the_first_batch(numbered_shards):
    """Three workers resumed at any batch give, taken in turn, what they would have given uninterrupted."""
    stream = TrainStream(*parts_of(numbered_shards()), epoch_batches=8, shuffle_buffer=9)

    def in_turn(first: int) -> list[list[int]]:
        stream.position[1] = first
        rows = [list(stream.batches(worker, 3)) for worker in range(3)]
        return [numbers([rows[n % 3][n // 3]]) for n in range(8 - first)]

    whole = in_turn(0)
    assert all(in_turn(first) == whole[first:] for first in range(1, 8))


def test_consumers_share_the_shards_evenly(numbered_shards):
    """3 ranks x 2 workers on 4 shards: all together read each shard equally often."""
    folder = numbered_shards()
    opened: Counter[str] = Counter()
    for rank in range(3):
        stream = TrainStream(*parts_of(folder, rank=rank, world_size=3), 1)
        for worker in range(2):
            row = stream._shard_row(0, rank * 2 + worker, 6)
            opened.update(next(row).name for _ in range(4))
    assert set(opened.values()) == {6}


def test_ranks_see_different_orders(numbered_shards):
    folder = numbered_shards()
    streams = [TrainStream(*parts_of(folder, rank=rank, world_size=2), 5) for rank in range(2)]
    assert numbers(list(streams[0].batches(0, 1))) != numbers(list(streams[1].batches(0, 1)))


@pytest.mark.parametrize(("workers", "taken"), [(0, 0), (0, 1), (0, 7), (0, 9), (2, 1), (2, 5), (2, 9)])
def test_a_resumed_loader_goes_on_with_the_next_batch(numbered_shards, workers, taken):
    folder = numbered_shards()
    parts = parts_of(folder, transform=build_transform("random", 6))

    def loader() -> TrainLoader:
        return TrainLoader(TrainStream(*parts, epoch_batches=7, shuffle_buffer=9), workers)

    uninterrupted = loader()
    expected = [batch["image"] for _ in range(2) for batch in uninterrupted]
    stopped = loader()
    passes = iter([batch["image"] for _ in range(taken // 7) for batch in stopped])
    seen = list(passes)
    iterator = iter(stopped)
    seen += [next(iterator)["image"] for _ in range(taken % 7)]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    while len(seen) < 14:
        seen += [batch["image"] for batch in resumed]
    assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))


def test_a_pass_left_early_is_followed_by_the_next_epoch(numbered_shards):
    loader = TrainLoader(TrainStream(*parts_of(numbered_shards()), epoch_batches=7), 0)
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 0, "batch": 1}
    iter(loader)
    assert loader.state_dict() == {"epoch": 1, "batch": 0}
    iter(loader)  # nothing drawn: still the same epoch
    assert loader.state_dict() == {"epoch": 1, "batch": 0}


def damage(*keys: str):
    def change(name: str, data: bytes) -> tuple[str, bytes]:
        return name, data[:40] if name.removesuffix(".png") in keys else data

    return change


def test_a_damaged_sample_is_skipped_counted_and_named(numbered_shards, rewrite_shard, caplog):
    folder = numbered_shards()
    rewrite_shard(folder, "val/000000.tar", damage("00000001"))
    rewrite_shard(folder, "train/000001.tar", damage("00000012"))
    with caplog.at_level(logging.WARNING):
        found = all_validation(folder, 2, 1)
    assert len(found) == len(set(found)) == 11
    assert "skipped sample 00000001 of shard val/000000.tar" in caplog.text
    caplog.clear()
    loader = TrainLoader(TrainStream(*parts_of(folder), epoch_batches=10, shuffle_buffer=1), 0)
    batches = list(loader)
    assert [len(batch["label"]) for batch in batches] == [4] * 10  # shapes do not change
    assert len(set(numbers(batches))) == 39
    assert "skipped sample 00000012 of shard train/000001.tar" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_samples_stop_the_run(numbered_shards, rewrite_shard, monkeypatch, workers):
    monkeypatch.setattr(faults_module, "MIN_SAMPLES", 2)
    folder = numbered_shards()
    rewrite_shard(folder, "train/000001.tar", damage(*(f"{n:08d}" for n in (10, 12, 14))))
    loader = TrainLoader(TrainStream(*parts_of(folder), epoch_batches=10, shuffle_buffer=1), workers)
    with pytest.raises(UserError, match=r"3 of \d+ samples are damaged, last 00000014 of shard train/000001") as error:
        list(loader)
    assert "\n" not in str(error.value)


def test_a_batch_without_a_readable_sample_stops_the_run(numbered_shards, rewrite_shard):
    folder = numbered_shards(4, 4, 4)
    for number in range(4):
        rewrite_shard(folder, f"train/00000{number}.tar", damage(f"{number:08d}"))
    with pytest.raises(UserError, match="not one sample"):
        list(TrainLoader(TrainStream(*parts_of(folder), epoch_batches=1), 0))


def test_share_of_damaged_samples_and_shards():
    faults = Faults(num_shards=300)
    faults.seen = 5000
    for number in range(50):
        faults.sample("a.tar", str(number), "broken")
    with pytest.raises(UserError, match="51 of 5000 samples"):
        faults.sample("a.tar", "50", "broken")
    for number in range(3):
        faults.shard(f"{number}.tar", "cut off")
        faults.shard(f"{number}.tar", "cut off")  # the same one again counts once
    with pytest.raises(UserError, match="4 of 300 shards"):
        faults.shard("3.tar", "cut off")


def test_a_truncated_shard_gives_what_it_has_and_is_named(numbered_shards, caplog):
    folder = numbered_shards()
    shard = read_index(folder).split("train").shards[2]
    path = folder / shard.name
    path.write_bytes(path.read_bytes()[: shard.bytes // 2])
    with caplog.at_level(logging.WARNING):
        samples = list(read_shard(ShardPlace(str(folder)), shard, Faults(num_shards=1000)))
    assert 0 < len(samples) < 10
    assert "shard train/000002.tar is damaged" in caplog.text
    with pytest.raises(UserError, match=r"train/000002\.tar is damaged"):
        list(TrainLoader(TrainStream(*parts_of(folder), epoch_batches=10), 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_shard_is_named(numbered_shards, workers):
    folder = numbered_shards()
    parts = parts_of(folder)
    (folder / "train" / "000003.tar").unlink()
    with pytest.raises(UserError, match=r"train/000003\.tar: cannot be opened") as error:
        list(TrainLoader(TrainStream(*parts, epoch_batches=10), workers))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [b"3", b"-1"])
def test_a_label_outside_the_classes_is_named(numbered_shards, rewrite_shard, label):
    folder = numbered_shards()
    rewrite_shard(folder, "train/000000.tar", lambda name, data: (name, label if name == "00000007.cls" else data))
    with pytest.raises(UserError, match=rf"000000\.tar, sample 00000007: label {label.decode()} is outside 0\.\.2"):
        list(TrainLoader(TrainStream(*parts_of(folder), epoch_batches=10, shuffle_buffer=1), 0))


def test_a_label_that_is_no_number_counts_as_damage(numbered_shards, rewrite_shard, caplog):
    folder = numbered_shards()
    rewrite_shard(folder, "val/000000.tar", lambda name, data: (name, b"x" if name == "00000000.cls" else data))
    assert len(all_validation(folder, 1, 1)) == 11
    assert "label b'x' is not a number" in caplog.text


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle member was loaded",))


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pth"])
def test_pickles_are_never_read(numbered_shards, rewrite_shard, suffix):
    folder = numbered_shards(8, 4, 4)
    bomb = pickle.dumps(Bomb())
    for number in range(4):
        # the image of the first sample of each shard is replaced by a pickle
        def change(name: str, data: bytes, key: str = f"{number:08d}") -> tuple[str, bytes]:
            return (f"{key}.{suffix}", bomb) if name == f"{key}.png" else (name, data)

        rewrite_shard(folder, f"val/00000{number}.tar", change)
    shard = read_index(folder).split("val").shards[0]
    (sample,) = read_shard(ShardPlace(str(folder)), shard, Faults(1000))
    assert sample.image == b"" and "has no picture" in sample.fault
    with pytest.raises(UserError, match=r"not one sample of this split is usable, last .* has no picture"):
        all_validation(folder, 1, 1)


def test_pipe_commands_are_never_run(tmp_path):
    shard = ShardInfo(f"pipe:touch {tmp_path}/owned", 1, 1, "")
    with pytest.raises(UserError, match="cannot be opened"):
        list(read_shard(ShardPlace(str(tmp_path)), shard, Faults(1)))
    assert not (tmp_path / "owned").exists()


def test_small_sets_are_kept_and_large_ones_streamed(numbered_shards, monkeypatch):
    folder = numbered_shards()
    shard = read_index(folder).split("train").shards[0]
    place, transform = ShardPlace(str(folder)), build_transform("center", 8)
    small, large = (ImageReader(place, shard.bytes, transform, 3, limit=limit) for limit in (10**6, 10))
    kept = list(small.read(shard, Faults(1)))
    assert list(large.read(shard, Faults(1))) == kept
    assert small.picture(kept[0]) is small.picture(kept[0])
    assert large.picture(kept[0]) is not large.picture(kept[0])
    (folder / shard.name).unlink()
    assert list(small.read(shard, Faults(1))) == kept
    with pytest.raises(UserError):
        list(large.read(shard, Faults(1)))


def test_streams_without_shards_or_batches_are_refused(numbered_shards):
    folder = numbered_shards()
    with pytest.raises(UserError, match="no shards"):
        ValidationStream(*parts_of(folder, shards=()))
    with pytest.raises(UserError, match="batch_size 0"):
        ValidationStream(*parts_of(folder, batch_size=0))
    with pytest.raises(UserError, match="epoch of 0 batches"):
        TrainStream(*parts_of(folder), 0)
    with pytest.raises(UserError, match="num_workers -1"):
        StreamLoader(ValidationStream(*parts_of(folder)), -1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_emptied_of_samples_end_with_an_error(numbered_shards, rewrite_shard, split):
    folder = numbered_shards()
    for number in range(4):
        rewrite_shard(folder, f"{split}/00000{number}.tar", lambda name, data: (f"{name}.txt", data))
    with pytest.raises(UserError):
        list(TrainLoader(TrainStream(*parts_of(folder, split), epoch_batches=2), 0))


def test_a_loader_ends_its_workers_by_lightnings_private_door(numbered_shards):
    """`compat.end_workers`: at once, and the next pass has new ones."""
    loader = StreamLoader(ValidationStream(*parts_of(numbered_shards())), 2)
    next(iter(loader))
    workers = loader._iterator._workers
    loader.close()
    assert loader._iterator is None and not any(worker.is_alive() for worker in workers)
    assert len(list(loader)) == len(loader)
    loader.close()
