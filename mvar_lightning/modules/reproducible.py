"""Randomness that does not depend on what came before: an interrupted run draws what an uninterrupted one would."""

from __future__ import annotations

import hashlib
import os

import lightning as L
import torch


def seed_batch(module: L.LightningModule, batch_idx: int) -> None:
    """Seed torch for one training batch from the run's seed, the epoch, the batch and the rank.

    Label dropout and stochastic depth then are the same after a resume, without any generator state to restore.
    """
    torch.manual_seed(_seed(module, batch_idx, module.global_rank))


def joined_generator(module: L.LightningModule, batch_idx: int) -> torch.Generator:
    """Draws on all processes what torch's own generator draws first for this batch on one process alone."""
    return torch.Generator().manual_seed(_seed(module, batch_idx, rank=0))


def _seed(module: L.LightningModule, batch_idx: int, rank: int) -> int:
    run_seed = os.environ.get("PL_GLOBAL_SEED", "0")
    place = f"{run_seed}/{module.current_epoch}/{batch_idx}/{rank}"
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "big")
