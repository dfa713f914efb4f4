"""Training on several processes: what is divided over them (FSDP2), means over their images, and their random draws."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import cast

import lightning as L
import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from mvar_lightning.checkpoints.assign import fill, on_meta
from mvar_lightning.compat import share_one_copy
from mvar_lightning.errors import UserError
from mvar_lightning.transformer import NextScaleTransformer
from mvar_lightning.transformer.blocks import AdaLNBlock


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all processes, for transformers whose training does not fit on one device.

    Lightning's strategy for `fully_shard`, with nothing left to set wrongly: all processes share one copy (no tensor
    parallelism), and a checkpoint is one file with the whole weights, which `mvar sample`, `mvar info` and another
    number of processes can read. Writing it gathers weights and optimizer states in the memory of rank zero.

    Args:
        timeout_minutes: a collective that takes longer ends the run; see docs/clusters.md.
        gather_in_bf16: gather the weights of blocks and classifier in bf16, half the traffic and no copies for
            autocast; gradients are still summed in float32, and what makes the inputs stays in float32.
    """

    def __init__(self, timeout_minutes: float = 30.0, gather_in_bf16: bool = False) -> None:
        self.gather_in_bf16 = gather_in_bf16
        super().__init__(save_distributed_checkpoint=False, timeout=timedelta(minutes=timeout_minutes))

    def setup_environment(self) -> None:
        # by default Lightning takes nodes for data and each node's processes for tensor parallelism
        share_one_copy(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        if not any(isinstance(module, FSDPModule) for module in trainer.lightning_module.modules()):
            raise UserError(
                f"trainer.strategy {type(self).__name__}: {type(trainer.lightning_module).__name__} has nothing to "
                "shard; use ddp (tokenizers fit on one device)"
            )
        super().setup(trainer)


def shard_where_asked(model: NextScaleTransformer, strategy: Strategy) -> None:
    """Shard a transformer once, in place, where the trainer's strategy is `FullySharded`; else do nothing.

    Each block, its modulation, the classifier and the rest are groups. A group's parameters are gathered when the
    module that owns it is called; what reads a weight otherwise finds shards. Between forward passes only the shards
    are in memory, those of the root included: averaging and loading weights then find the same tensors at any time.
    Weights are gathered in their own precision, so the numbers are those of one process, unless the strategy asks for
    less (`FullySharded`).

    Raises:
        UserError: Lightning's own `ModelParallelStrategy`, whose checkpoints and meshes take other forms.
    """
    if isinstance(model, FSDPModule) or not isinstance(strategy, ModelParallelStrategy):
        return
    if not isinstance(strategy, FullySharded):
        raise UserError("trainer.strategy ModelParallelStrategy: use mvar_lightning.training.FullySharded, made of it")
    mesh = strategy.device_mesh["data_parallel"]
    # inputs come in the precision of the residual stream, which is the model's own business
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if strategy.gather_in_bf16 else MixedPrecisionPolicy()
    for block in cast(list[AdaLNBlock], list(model.blocks)):
        # the modulation is computed before the block runs, and so is a group of its own
        fully_shard(block.modulation, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    # sampling calls the classifier for some rows at a time
    fully_shard(model.head.linear, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for method in ("inputs", "features", "begin", "step", "step_features"):  # training and sampling enter here, too
        register_fsdp_forward_method(model, method)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without gradient: its shard, or all of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def whole(shard: Tensor, like: Tensor) -> Tensor:
    """The whole tensor on the CPU, of which ``shard`` is this process's part, divided as ``like`` is.

    All processes must call it together where ``like`` is divided.
    """
    if not isinstance(like, DTensor):
        return shard
    parts = DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return parts.full_tensor().cpu()


def load_whole(into: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, each process its part."""
    if isinstance(into, DTensor):
        value = distribute_tensor(value.to(into.device_mesh.device_type), into.device_mesh, into.placements)
    with torch.no_grad():
        into.copy_(value)


def gathered(model: NextScaleTransformer) -> NextScaleTransformer:
    """The model itself or, of a sharded one, an unsharded copy on the CPU; all processes must call it together."""
    if not isinstance(model, FSDPModule):
        return model
    state = {name: whole(local(tensor), like=tensor) for name, tensor in model.state_dict().items()}
    return fill(on_meta(lambda: NextScaleTransformer.from_config(model.config)), state, "the sharded model")


SHORT = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""What Lightning takes for its own names of precisions."""


def check_precision(precision: object, taken: Sequence[str], why: str) -> None:
    """Raise `UserError` for a precision, as the trainer or a recipe says it, that is not among those ``taken``."""
    if SHORT.get(str(precision), str(precision)) not in taken:
        raise UserError(f"trainer.precision {precision}: {why}; take {', '.join(taken)}")


def has_trainer(module: L.LightningModule) -> bool:
    """Whether a module is at work in a trainer, and not made of a checkpoint for its own sake."""
    try:
        return module.trainer is not None
    except RuntimeError:  # Lightning's word for it
        return False


def log_means(module: L.LightningModule, named: Mapping[str, Tensor], images: int) -> None:
    """Log means over an epoch's images, whatever share of them each process has.

    Lightning averages the processes' counts of images as whole numbers: 15 and 16 images become 15 each, and the mean
    3% too large. Counts that are multiples of the number of processes have a whole average. ``named`` are means over a
    batch, ``images`` its size on this process.
    """
    module.log_dict(dict(named), batch_size=images * module.trainer.world_size, sync_dist=True)


def seed_batch(module: L.LightningModule, batch_idx: int) -> None:
    """Seed torch for one training batch from the run's seed, the epoch, the batch and the rank.

    Draws then do not depend on what came before: label dropout and stochastic depth of an interrupted run are those of
    an uninterrupted one, without any generator state to restore.
    """
    torch.manual_seed(seed_of_batch(module, batch_idx, module.global_rank))


def seed_of_batch(module: L.LightningModule, batch_idx: int, rank: int) -> int:
    run_seed = os.environ.get("PL_GLOBAL_SEED", "0")
    batch = f"{run_seed}/{module.current_epoch}/{batch_idx}/{rank}"
    return int.from_bytes(hashlib.sha256(batch.encode()).digest()[:7], "big")
