"""Faster sampling of a loaded model, in place: CUDA graphs, compiled blocks, weights in bf16.

CUDA graphs for each scale: the blocks' kernels are recorded once and then launched as one.

The coarse scales have few tokens, and there a GPU waits for the host to launch hundreds of small kernels. A graph reads
and writes where it did when it was recorded, so inputs are copied there first. Keys and values of a cache would have to
stay at their place too; strategies that keep some are refused.

R rows, l tokens of one scale, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mvar_lightning.compat import allow_recompiles, compile_whole_under_ddp, copy_each
from mvar_lightning.errors import UserError
from mvar_lightning.transformer.quantized import quantize
from mvar_lightning.transformer.transformer import NextScaleTransformer, SamplingState

RECORDED_TOKENS = 2**14
"""Steps of more tokens run as they are: their kernels keep the GPU busy, and a graph's own memory would be large."""

Replay = Callable[[SamplingState, Tensor], Tensor]
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records what a function does; gives what does it again, and the tensor that then holds the result."""


class RecordOnGPU:
    """`Record` by CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        # a stream of its own for warm-up and recording: cuBLAS keeps a workspace for each stream, and that of torch's
        # common capture stream is freed when another recording ends that used it (pytorch 193402)
        self._pool, self._aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        current, aside = torch.cuda.current_stream(), self._aside
        # a recording must not meet what is done once: warm up, on a stream aside as torch's recording asks for
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiles, tunes, and makes the tables that are made on first use
                run()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # other threads (loaders that pin memory, loggers) may go on meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


class ScaleGraphs:
    """Runs the blocks of a sampling step from a recording for each scale and number of rows.

    The weights are read where they lie: change them in place or not at all.

    Raises:
        UserError: the model's strategy keeps keys and values between scales.
    """

    def __init__(self, model: NextScaleTransformer, record: Record) -> None:
        if model.backend.plan.cache_tokens:
            raise UserError(
                f"CUDA graphs: {model.strategy!r} keeps keys and values between scales, which have no fixed place; "
                "sample without graphs, or with AdjacentAttention or SpatialAttention"
            )
        self._run = model.run_rows
        self._record = record
        self._recordings: dict[tuple[int, int, torch.dtype], Replay] = {}

    def __call__(self, rows: SamplingState, scale: int, x_RlC: Tensor) -> Tensor:
        if x_RlC.shape[0] * x_RlC.shape[1] > RECORDED_TOKENS:
            return self._run(rows, scale, x_RlC)
        # a recording is of one shape; the dtype says whether autocast was on
        key = scale, len(x_RlC), x_RlC.dtype
        if key not in self._recordings:
            self._recordings[key] = self._recording(rows, scale, x_RlC)
        return self._recordings[key](rows, x_RlC)

    def _recording(self, rows: SamplingState, scale: int, x_RlC: Tensor) -> Replay:
        """One scale with one number of rows, on inputs that stay where they are."""
        # a graph reads the addresses it was recorded with: these copies are never let go
        modulations, head_modulation = [each.clone() for each in rows.modulations], rows.head_modulation.clone()
        fixed = replace(rows, modulations=modulations, head_modulation=head_modulation)
        fixed_x_RlC, device = x_RlC.clone(), x_RlC.device.type

        def steps() -> Tensor:
            # what autocast has converted before is freed when it ends, but the graph would still read it
            dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
                return self._run(fixed, scale, fixed_x_RlC)

        again, result = self._record(steps)

        def replay(rows: SamplingState, x_RlC: Tensor) -> Tensor:
            copy_each([fixed_x_RlC, head_modulation, *modulations], [x_RlC, rows.head_modulation, *rows.modulations])
            again()
            return result.clone()  # the next replay writes over it

        return replay


def record_scales(model: NextScaleTransformer, record: Record | None = None) -> NextScaleTransformer:
    """Sample from recorded scales (CUDA graphs), in place: after `compile_blocks`, if at all, and on the final device.

    Raises:
        UserError: no GPU, or a strategy that keeps a cache.
    """
    if record is None:
        if next(model.parameters()).device.type != "cuda":
            raise UserError("CUDA graphs: the model is on no GPU; leave them out, or move it there first")
        record = RecordOnGPU()
    model.replay_rows = ScaleGraphs(model, record)
    model.equal_rows = True
    return model


SHAPES_OF_A_SCALE = 4
"""Allowed variants of a block at one scale: with and without guidance, a last chunk of rows, and one to spare."""


def compile_blocks(model: NextScaleTransformer, **options: Any) -> NextScaleTransformer:
    """`torch.compile` every block, in place; the first run of each scale and batch size compiles.

    Every scale has its own shapes, and each is compiled once for all blocks. torch gives up on a function after 8
    variants, fewer than there are scales, so that limit is raised.

    Args:
        options: of `torch.compile`; shapes are static by default (``dynamic=False``).
    """
    needed = SHAPES_OF_A_SCALE * model.pyramid.num_scales
    allow_recompiles(needed)
    compile_whole_under_ddp()
    model.equal_rows = True
    for block in model.blocks:
        block.compile(**{"dynamic": False, **options})
    return model


def weights_in_bf16(model: NextScaleTransformer) -> NextScaleTransformer:
    """Keep the weights of the products in bf16, in place: half the memory, and under autocast the same numbers.

    Without gradients autocast converts every weight anew at every call. What it leaves in float32 stays so: query
    scales and norms, whose rounding would shift every score, and the inputs' embeddings, positions and history, which
    a step makes with autocast off. To be run under autocast; the weights that were in float32 are gone.
    """
    for part in (model.condition, model.blocks, model.head):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    return model


def prepare(
    model: NextScaleTransformer,
    precision: str,
    *,
    compiled: bool = False,
    graphs: bool = False,
    quantized: str | None = None,
) -> None:
    """Make a loaded model ready for `computing` in ``precision``, in place; give it weights of few bits, compile its
    blocks and record its scales if asked for. Raises `UserError` as `quantize` and `record_scales`, and for compiled
    blocks in int8, whose products the compiler does not know."""
    if quantized is not None:
        quantize(model, quantized)
    if compiled and model.quantized == "int8":
        raise UserError("``quantize`` int8: is not compiled; leave out one of the two, or take int8-weights")
    if precision == "bf16":
        weights_in_bf16(model)
    if compiled:
        compile_blocks(model)
    if graphs:
        record_scales(model)
