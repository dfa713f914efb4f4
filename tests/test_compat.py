"""The private doors of torch and Lightning are still there, and do what this suite takes them to do."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from faulty_server import serving
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from small_run import data_module, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mvar_lightning import compat


class Line(L.LightningModule):
    """One number that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)


def test_a_pool_whose_process_died_is_broken() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        assert not compat.is_broken(pool)
        with pytest.raises(BrokenProcessPool):
            pool.submit(os._exit, 1).result(timeout=60)
        assert compat.is_broken(pool)


def test_the_limit_of_recompiles_rises_and_never_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch._dynamo.config.recompile_limit
    try:
        compat.allow_recompiles(before + 5)
        compat.allow_recompiles(1)
        assert torch._dynamo.config.recompile_limit == before + 5
    finally:
        torch._dynamo.config.recompile_limit = before


def test_blocks_are_compiled_whole_under_ddp() -> None:
    with torch._dynamo.config.patch(optimize_ddp=True):
        compat.compile_whole_under_ddp()
        assert torch._dynamo.config.optimize_ddp is False


def test_a_function_is_marked_as_torch_marks_it() -> None:
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert vars(compat.constant_when_compiled(ours)) == vars(torch.compiler.assume_constant_result(theirs))


def test_pairs_of_tensors_are_mixed_and_copied_in_place() -> None:
    starts, ends = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.zeros(3)]
    compat.lerp_each(starts, ends, 0.25)
    assert starts[0].tolist() == [0.25] * 2 and starts[1].tolist() == [0.75] * 3
    compat.copy_each(starts, ends)
    assert all(torch.equal(start, end) for start, end in zip(starts, ends, strict=True))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednns_product_is_an_operator() -> None:
    assert compat.has_onednn_linear(), "mkldnn._linear_pointwise is gone: products go to F.linear, more slowly"
    x, weight, bias, factor = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6), torch.randn(4, 6)
    plain = F.linear(x, weight, bias)
    torch.testing.assert_close(compat.onednn_linear(x, weight, bias, "none", ""), plain)
    torch.testing.assert_close(compat.onednn_linear(x, weight, None, "relu", ""), F.relu(x @ weight.T))
    tanh = F.gelu(plain, approximate="tanh")
    torch.testing.assert_close(compat.onednn_linear(x, weight, bias, "gelu", "tanh"), tanh)
    torch.testing.assert_close(compat.onednn_linear_times(x, weight, bias, factor), plain * factor)


def test_a_fused_optimizer_may_be_clipped_under_bf16(shards: Path, tmp_path: Path) -> None:
    class Clipped(Line):
        let = True

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = super().configure_optimizers()
            if self.let:
                compat.lets_clip(optimizer)
            return optimizer

    settings: dict[str, Any] = {"precision": "bf16-mixed", "gradient_clip_val": 1.0, "max_steps": 1}
    trainer(tmp_path, **settings).fit(Clipped(), datamodule=data_module(shards))
    Clipped.let = False
    with pytest.raises(RuntimeError, match="clip"):  # the door is needed still
        trainer(tmp_path, **settings).fit(Clipped(), datamodule=data_module(shards))


def test_all_processes_of_a_model_parallel_strategy_share_one_copy() -> None:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (1, 2), "where its arguments go"
    compat.share_one_copy(strategy, 4)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (4, 1)


def test_ddp_is_told_to_expect_unused_parameters() -> None:
    plain, decided = DDPStrategy(), DDPStrategy(find_unused_parameters=False)
    for strategy in (plain, decided):
        compat.expect_unused_parameters(strategy)
    assert plain._ddp_kwargs == {"find_unused_parameters": True}
    assert decided._ddp_kwargs == {"find_unused_parameters": False}
    decided._ddp_kwargs["gradient_as_bucket_view"] = False
    for strategy, expected in ((plain, True), (decided, False)):
        compat.share_gradients_with_buckets(strategy)
        assert strategy._ddp_kwargs["gradient_as_bucket_view"] is expected


def test_a_callback_sees_when_values_are_logged_and_when_an_epoch_ends(shards: Path, tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    class Watch(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen.append((compat.logs_now(trainer), compat.epoch_ends_here(trainer)))

    settings: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 2, "val_check_interval": 3}
    trainer(tmp_path, Watch(), **settings).fit(Line(), datamodule=data_module(shards))
    assert [logs for logs, _ in seen] == [False, True] * 3
    assert [ends for _, ends in seen] == [False, False, True] * 2, "at a validation, and at the epoch's end"


@pytest.mark.slow
def test_the_processes_of_a_loader_end() -> None:
    loader = DataLoader([0, 1, 2, 3], num_workers=1, persistent_workers=True)
    assert [int(batch) for batch in loader] == [0, 1, 2, 3]
    (worker,) = compat.workers_of(loader)
    assert worker.is_alive()
    compat.end_workers(loader)
    assert loader._iterator is None and not worker.is_alive()


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_a_bar_shows_what_it_is_told(bar: type[L.Callback], tmp_path: Path) -> None:
    run: Any = trainer(tmp_path, bar(), enable_progress_bar=True)
    compat.show_in_bar(run, "loss", 0.5)
    assert run.progress_bar_callback.get_metrics(run, Line())["loss"] in (0.5, "0.500")


def test_what_came_before_a_transfer_broke_is_not_lost(tmp_path: Path) -> None:
    """aiohttp's reader raises the error in place of the bytes that it holds."""
    import fsspec

    (tmp_path / "x").write_bytes(bytes(range(200)))
    with serving(tmp_path) as server:
        server.breaks = {"/x": 1}
        file: Any = fsspec.filesystem("http").open(f"{server.url}/x", "rb", block_size=0, size=1)
        while file.r.content.exception() is None:
            time.sleep(0.01)
        with pytest.raises(Exception, match="not completed"):
            file.read(10)
        assert compat.unread(file.r.content) == bytes(range(100))
