"""Private doors of libraries: what no public name gives. All of them stand here, each with a test that names it.

Where a newer version closes one, `tests/test_compat.py` says which, and this is the one file to mend. Nothing heavy is
imported before a door is used, and each takes and gives the libraries' objects as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = tuple[Tensor, ...] | list[Tensor]

F = TypeVar("F", bound=Callable[..., object])

# Python (3.11 to 3.13)


def is_broken(pool: Any) -> bool:
    """Whether a `ProcessPoolExecutor` has seen a process of its own die: ``_broken`` (3.3 and later). It tells so only
    by refusing more work."""
    return bool(pool._broken)


# torch (2.11 to 2.13)


def allow_recompiles(limit: int) -> None:
    """Let the compiler make at least so many variants of a function, after which it gives up on it.

    ``torch._dynamo.config.recompile_limit`` (2.6 and later). There is a public name in ``torch.compiler.config`` for
    other settings, not for this one; its default of 8 is less than the scales of a published model.
    """
    import torch

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)


def compile_whole_under_ddp() -> None:
    """Let the compiler take a function as one graph inside a `DistributedDataParallel`: ``optimize_ddp`` off (2.0 and
    later).

    It splits graphs where DDP's buckets end, for a model that is compiled as a whole. A block is smaller than a bucket,
    and its parameters' hooks fire between blocks anyway; split, each would be three graphs.
    """
    import torch

    config: Any = torch._dynamo.config
    config.optimize_ddp = False


def constant_when_compiled(function: F) -> F:
    """Mark a function whose result the compiler takes as it is when it traces.

    ``torch.compiler.assume_constant_result`` does it in one line, and to get there imports the whole of
    ``torch._dynamo``: half of what importing a transformer takes.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def lerp_each(starts: Tensors, ends: Tensors, weight: float) -> None:
    """``start += weight * (end - start)`` for each pair, in place: ``torch._foreach_lerp_`` (2.0 and later).

    One kernel for hundreds of parameters, as torch's own weight averaging (`swa_utils`) calls it.
    """
    import torch

    torch._foreach_lerp_(starts, ends, weight)


def copy_each(targets: Tensors, sources: Tensors) -> None:
    """Copy each source into its target: ``torch._foreach_copy_`` (2.1 and later), one kernel for all of them."""
    import torch

    torch._foreach_copy_(targets, sources)


@cache
def has_onednn_linear() -> bool:
    """Whether this torch has oneDNN and its product as an operator: ``torch.ops.mkldnn._linear_pointwise``, which the
    compiler writes into its code (2.0 and later). It takes an activation along, and reads factors as they lie."""
    import torch

    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, algorithm: str) -> Tensor:
    """``activation(x W^T + b)``; "none" is no activation, and ``algorithm`` the kind of GELU."""
    import torch

    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return result


def onednn_linear_times(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
    """``(x W^T + b) * factor`` in one pass; without gradient."""
    import torch

    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factor, weight, bias, "mul")
    return result


def int8_packed(weight_OI: Tensor, scale_O: Tensor) -> Any:
    """Weights in 8 bits as torch's CPU kernels read them: ``torch.ops.quantized.linear_prepack``, which torch's own
    quantized layers call (1.3 and later). Each weight must be a whole number times its row's scale."""
    import torch

    zero_O = torch.zeros(len(scale_O), dtype=torch.int64)
    return torch.ops.quantized.linear_prepack(
        torch.quantize_per_channel(weight_OI, scale_O.double(), zero_O, 0, torch.qint8), None
    )


def int8_product(x: Tensor, packed: Any) -> Tensor:
    """``x W^T`` in float32; each row of x is rounded to 8 bits by a scale of its own. Of reduced range: without VNNI
    two products of 8 bits overflow the 16 that they are added in.

    The kernel takes one scale for all rows, from their smallest and largest number: rows are brought to [-1, 1] before
    it, with one more that holds both ends, so that a row's product does not depend on what is computed beside it.
    Of a row that holds NaN or infinity come numbers that are not finite.
    """
    import torch

    rows = x.flatten(0, -2)
    scale_R1 = rows.abs().amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    whole = torch.zeros(len(rows) + 1, rows.shape[1])
    torch.div(rows, scale_R1, out=whole[:-1]).nan_to_num_()
    whole[-1, :2] = torch.tensor([1.0, -1.0])[: rows.shape[1]]
    result: Tensor = torch.ops.quantized.linear_dynamic(whole, packed, True)[:-1].mul_(scale_R1)
    return result.unflatten(0, x.shape[:-1])


# Lightning (2.6)


def said_by_lightning(error: Exception) -> str:
    """In one line, a mistake in a recipe that Lightning finds only when it works: an error that its own code (the
    module of the innermost frame) raises. Of any other error nothing."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = "" if last is None else str(last.tb_frame.f_globals.get("__name__"))
    raised = isinstance(error, (ValueError, TypeError, RuntimeError)) and module.startswith("lightning.")
    named = isinstance(error, MisconfigurationException) or "loading state_dict" in str(error)
    return f"Lightning: {' '.join(str(error).split())[:500]}" if raised or named else ""


def lets_clip(optimizer: Any) -> None:
    """Tell Lightning that a fused optimizer needs no loss scale, so that gradients may be clipped under bf16-mixed.

    ``_step_supports_amp_scaling`` is torch's mark on fused optimizers. Lightning takes it for a sign that gradients are
    unscaled inside the step, where it is too late to clip; bf16 has no scale.
    """
    optimizer._step_supports_amp_scaling = False


def expect_unused_parameters(strategy: Any) -> None:
    """Let DDP find parameters without a gradient, unless the recipe says whether it should.

    ``DDPStrategy._ddp_kwargs``: the strategy's own arguments are no longer to be had once it is made from a short name.
    """
    strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


def share_gradients_with_buckets(strategy: Any) -> None:
    """Let DDP's buckets be the gradients' own memory, unless the recipe says otherwise: 4 bytes a parameter less, and
    no copies. ``DDPStrategy._ddp_kwargs``, as above."""
    strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)


def logs_now(trainer: Any) -> bool:
    """Whether the logger takes values of this step, as Lightning's own monitors ask: ``_logger_connector``."""
    return bool(trainer._logger_connector.should_update_logs)


def show_in_bar(trainer: Any, name: str, value: float) -> None:
    """Show a number in the progress bar, whichever it is, until it is replaced: ``_progress_bar_metrics``.

    A value that is logged with ``prog_bar=True`` is read from its device at each batch's end, with a bar or without.
    """
    trainer._logger_connector._progress_bar_metrics[name] = value


def epoch_ends_here(trainer: Any) -> bool:
    """Whether a validation or the end of the epoch follows this training batch.

    The epoch loop's own questions to itself, asked before it acts on them: a checkpoint in a batch's last hook must
    know whether another comes right after.
    """
    fit = trainer.fit_loop
    loop = fit.epoch_loop
    return bool(loop._num_ready_batches_reached() or loop._should_check_val_fx(fit._data_fetcher))


def share_one_copy(strategy: Any, processes: int) -> None:
    """Let all processes of a `ModelParallelStrategy` share one copy of a model: ``_data_parallel_size`` and
    ``_tensor_parallel_size``. Its arguments want the number of processes before there is a trainer that knows it."""
    strategy._data_parallel_size, strategy._tensor_parallel_size = processes, 1


def workers_of(loader: Any) -> Sequence[Any]:
    """The worker processes of a loader whose ``_iterator`` is a DataLoader's: torch's ``_workers`` (1.0 and later)."""
    return getattr(loader._iterator, "_workers", ())


def end_workers(loader: Any) -> None:
    """End the worker processes of a loader whose ``_iterator`` is a DataLoader's, and forget the iterator.

    Lightning's own way at the end of a run; a DataLoader has only its destructor, which comes when memory is tidied.
    """
    from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator

    _shutdown_workers_and_reset_iterator(loader)


def abandon_workers(loader: Any) -> None:
    """The same where a worker was killed: whatever it held, a lock of torch's own among them, it holds for ever.

    torch ends workers by setting an event that they look at under its lock, and relies on its signal handler to break
    the wait for a dead holder. Here none of that is touched: the others are killed, and the iterator is told that it
    has been shut down (``_shutdown``, ``_worker_pids_set``: 1.0 and later).
    """
    from torch.utils.data._utils import signal_handling

    iterator, loader._iterator = loader._iterator, None
    for worker in iterator._workers:
        worker.kill()
        worker.join()
    iterator._shutdown = True
    if hasattr(iterator, "_pin_memory_thread"):
        iterator._pin_memory_thread_done_event.set()  # a thread's; it looks every few seconds
    for queue in iterator._index_queues:
        queue.cancel_join_thread()
        queue.close()
    if iterator._worker_pids_set:
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


# aiohttp (3.14)


def unread(content: Any) -> bytes:
    """What an ``aiohttp.StreamReader`` held when its transfer broke; asked for it, it raises the error alone."""
    content._exception = None
    return bytes(content.read_nowait(-1))
