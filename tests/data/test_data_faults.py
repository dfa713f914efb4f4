"""Faults while a run goes on: killed loading processes, shards that vanish or break under it, memory that stays."""

from __future__ import annotations

import os
import signal
import time
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.data import LoaderOptions, worker_memory
from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.data.index import read_index
from mvar_lightning.data.reading.loader import worker_death
from mvar_lightning.data.reading.samples import ImageReader
from mvar_lightning.errors import UserError
from tests.faults.harness import completed


@pytest.fixture
def streamed(monkeypatch):
    """Shards are read again in every pass, as of large sets."""
    init = ImageReader.__init__
    monkeypatch.setattr(ImageReader, "__init__", lambda self, *args, **kw: init(self, *args, **(kw | {"limit": 1})))


def loader_of(folder: Path, workers: int, **options):
    defaults = {"image_size": 8, "batch_size": 4, "resize_ratio": 1.0, "shuffle_buffer": 1}
    return ShardsDataModule(str(folder), num_workers=workers, **(defaults | options)).train_dataloader()


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_worker_ends_the_pass_with_advice(numbered_shards, which):
    loader = loader_of(numbered_shards(), 2, epoch_samples=40_000)
    batches = iter(loader)
    next(batches)
    os.kill(loader._iterator._workers[which].pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"process ended \(pid \d+, SIGKILL\); if memory was short, lower data\.num_w"):
        list(batches)
    assert time.monotonic() - started < 20
    assert len(list(islice(loader, 3))) == 3  # and the next pass has new ones
    loader.close()


@pytest.mark.slow
def test_a_worker_killed_with_a_lock_of_torchs_in_its_hand_ends_the_pass_too(numbered_shards):
    """Workers look at an event, under its lock, before each batch: sooner or later one dies right there."""
    loader = loader_of(numbered_shards(), 2, epoch_samples=40_000)
    batches = iter(loader)
    next(batches)
    iterator, worker = loader._iterator, loader._iterator._workers[0]
    iterator._workers_done_event._cond.acquire()  # as the dead one would hold it
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(UserError, match="process ended"):
        next(batches)
    assert loader._iterator is None and not any(other.is_alive() for other in iterator._workers)


KILLED_IN_TRAINING = """
import os, signal, sys
import lightning, torch
from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.errors import UserError

class Kills(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            workers = self.trainer.train_dataloader._iterator._workers
            os.kill(workers[1].pid, signal.SIGKILL)
        return (self.weight - batch["image"].float().mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = ShardsDataModule(sys.argv[1], 8, 4, 2, resize_ratio=1.0, epoch_samples=400_000)
trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
try:
    trainer.fit(Kills(), datamodule=data)
except UserError as error:
    print("told:", error)
"""


@pytest.mark.slow
def test_a_worker_killed_in_training_ends_the_run_within_seconds(numbered_shards):
    folder = numbered_shards()
    done = completed(code=KILLED_IN_TRAINING.replace("sys.argv[1]", repr(str(folder))))
    assert "told: a data loading process ended" in done.stdout, done.stderr[-2000:]
    assert done.returncode == 0


class Ended:
    pid = 7

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode


def test_what_is_said_about_workers_that_ended():
    assert "shared memory was short" in str(worker_death([Ended(None), Ended(-signal.SIGBUS)]))
    assert "(pid 7, status 3)" in str(worker_death([Ended(3)]))
    assert worker_death([Ended(None), Ended(0)]) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_under_the_run_is_named(numbered_shards, streamed, workers):
    folder = numbered_shards()
    loader = loader_of(folder, workers, epoch_samples=4000)
    batches = iter(loader)
    next(batches)
    (folder / "train" / "000003.tar").unlink()
    with pytest.raises(UserError, match=r"train/000003\.tar: cannot be opened .*mvar shards check"):
        list(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_off_under_the_run_is_named(numbered_shards, streamed, workers):
    folder = numbered_shards()
    loader = loader_of(folder, workers, epoch_samples=4000)
    batches = iter(loader)
    next(batches)
    path = folder / "train" / "000002.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(UserError, match=r"train/000002\.tar is damaged: .* \(1 of 4 shards so far\)"):
        list(batches)


@pytest.mark.parametrize("garbage", [b"\0" * 4096, b"not a tar file" * 400, b""])
def test_a_shard_overwritten_under_the_run_is_named(numbered_shards, streamed, garbage):
    folder = numbered_shards()
    batches = iter(loader_of(folder, 0, epoch_samples=4000))
    next(batches)
    (folder / "train" / "000001.tar").write_bytes(garbage)
    with pytest.raises(UserError, match=r"train/000001\.tar is damaged"):
        list(batches)


def test_a_shard_with_flipped_bytes_loses_samples_and_not_the_run(numbered_shards, monkeypatch, caplog):
    """Tar headers and the pictures' own checks find damage: what is left goes on, up to the share that stops a run."""
    folder = numbered_shards(train=400, val=12, samples_per_shard=100)
    path = folder / "train" / "000001.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 8
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))
    assert read_index(folder).split("train").samples == 400
    batches = list(loader_of(folder, 0))
    assert len(batches) == 100
    assert "skipped sample" in caplog.text


@pytest.mark.slow
def test_memory_of_workers_does_not_grow_over_twenty_passes(tmp_path, streamed):
    from benchmarks.data import synthetic_shards

    synthetic_shards(tmp_path / "shards", 64, size=(160, 120))
    options = LoaderOptions(str(tmp_path / "shards"), image_size=64, batch_size=8, passes=20, pass_batches=8)
    memory = worker_memory(options, "exact")
    assert max(memory[10:]) < 1.05 * max(memory[2:10]) + 4
