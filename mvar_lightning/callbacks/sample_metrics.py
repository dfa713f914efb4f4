"""Metrics over generated images at validation: FID, KID, class consistency, and whether they are copies.

B batch, N images, F features, HW pixels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mvar_lightning.callbacks.base import generate, is_rehearsal, reconstruct, training_images
from mvar_lightning.callbacks.metrics import ImageMetrics, total
from mvar_lightning.errors import UserError
from mvar_lightning.metrics.classifier import class_consistency
from mvar_lightning.metrics.copying import LEAST, copying_test, nearest
from mvar_lightning.metrics.features import FeatureExtractor
from mvar_lightning.metrics.frechet import FrechetDistance, as_saved, read_reference
from mvar_lightning.metrics.kernel import KernelDistance, rows_of_all
from mvar_lightning.training.memory import CACHE_BYTES

LOG_SECONDS = 10.0
"""Sampling that takes longer than this says how far it is."""

TRAINING_IMAGES = 10_000
"""Training images that samples and validation images are held against."""


class SampleMetrics(ImageMetrics):
    """For next-scale runs: the Frechet distance of generated images, and whether they show the class asked for.

    Image i has seed i and class i modulo the number of classes, whatever the number of ranks. Logs ``fid_<features>``,
    ``kid_<features>`` (to the run's own images, unbiased where there are few), ``fid_images``, ``class_consistency``,
    and ``copying`` with ``copying_p``: the data-copying test's C_T by features against up to 10,000 training images
    (far below 0: samples lie closer to those than the images that this run validates on), and its chance. Beside them,
    measured once, ``rfid_<features>`` of the frozen tokenizer (no model on its tokens can be expected below it) and
    ``fid_<features>_floor``.

    Args:
        reference: path of an npz of moments ``mu`` and ``sigma``, such as ADM's, that FIDs are to, read when this is
            made; the images that this run validates on if not given.
        cache_bytes: keys and values held while sampling; a batch that needs more is drawn in pieces.
    """

    def __init__(
        self,
        extractor: FeatureExtractor | None = None,
        consistency: bool = True,
        num_images: int = 500,
        batch_size: int = 50,
        every_n_epochs: int = 1,
        cache_bytes: float = CACHE_BYTES,
        reference: str | None = None,
    ) -> None:
        super().__init__(extractor, consistency, num_images, batch_size, every_n_epochs)
        self._reference = None if reference is None else read_reference(reference, extractor)
        self._to_reference: FrechetDistance | None = None
        if not cache_bytes > 0:
            raise UserError(f"cache_bytes {cache_bytes}: must be above 0, such as {CACHE_BYTES:.0e}")
        self.cache_bytes = cache_bytes

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._rfid: dict[str, float] = {}
        self._kernel, self._to_reference = KernelDistance(), None
        self._training_NF: Tensor | None = None

    @property
    def judge(self) -> FrechetDistance:
        return self._to_reference or self.distance

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._reference is not None and self._distance is not None and self._to_reference is None:
            self._to_reference = FrechetDistance(self._distance.extractor).to(trainer.strategy.root_device)
            if trainer.is_global_zero:  # sums are added up over ranks
                self._to_reference.refer_to(self._reference)

    on_validation_start = on_test_start = on_fit_start

    def see(self, pl_module: pl.LightningModule, image_B3HW: Tensor, label_B: Tensor) -> None:
        super().see(pl_module, image_B3HW, label_B)
        if self._collecting:
            self.distance.update(reconstruct(pl_module, image_B3HW), real=False)

    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, distance: FrechetDistance
    ) -> dict[str, float]:
        if self._collecting:  # until now the generated side held the reconstructions that passed by
            self._rfid = {f"rfid_{distance.extractor.name}": distance.compute()}
            distance.reset_generated()
        right, judge, kernel = 0, self.judge, self._kernel
        assert kernel is not None
        kernel.reset_generated()
        for image_B3HW, label_B in self._samples(trainer, pl_module):
            kernel.update(judge.update(image_B3HW, real=False), real=False)
            if self._classifier is not None and self.consistency:
                right += int(class_consistency(self._classifier, as_saved(image_B3HW), label_B).sum())
        name, features = judge.extractor.name, judge.extractor.num_features
        numbers = {f"fid_{name}": judge.compute(), "fid_images": float(self.count(trainer))}
        numbers[f"kid_{name}"] = kernel.compute(features, trainer.strategy.root_device)
        if self._classifier is not None and self.consistency:
            numbers["class_consistency"] = total(trainer, right) / self.count(trainer)
        judge.reset_generated()
        return numbers | self._copying(trainer, kernel) | self._rfid

    def _copying(self, trainer: pl.Trainer, kernel: KernelDistance) -> dict[str, float]:
        """Of the rows that the kernel distance has kept; nothing where there are too few images."""
        device, extractor = trainer.strategy.root_device, self.judge.extractor
        held_out_NF, generated_NF = (kernel.rows(real, extractor.num_features, device) for real in (True, False))
        if min(len(held_out_NF), len(generated_NF)) < LEAST:
            return {}
        if self._training_NF is None:
            count = self.count(trainer) if is_rehearsal(trainer) else TRAINING_IMAGES
            parts = [
                self.judge.features(image_B3HW.to(device)).float().cpu()
                for image_B3HW in training_images(trainer, type(self).__name__, count)
            ]
            self._training_NF = rows_of_all(parts, extractor.num_features, device)
        distances = [nearest(rows_NF, [self._training_NF]).distance_N for rows_NF in (generated_NF, held_out_NF)]
        test = copying_test(*distances)
        return {"copying": test.statistic, "copying_p": test.p_value}

    def _samples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the images, batch by batch.

        Ranks whose share is smaller draw one image more and leave it out: of a sharded model all must run as often.
        """
        module, count = cast(Any, pl_module), self.count(trainer)
        share = -(-count // trainer.world_size)
        seeds = [trainer.global_rank + index * trainer.world_size for index in range(share)]
        start = last = time.perf_counter()
        rows = min(self.batch_size, share)
        for first in range(0, len(seeds), self.batch_size):
            batch = seeds[first : first + self.batch_size]
            label_B = torch.tensor(batch, device=pl_module.device) % module.model.num_classes
            with isolate_rng():  # sampling must not change what training draws next
                image_B3HW, _ = generate(trainer, pl_module, label_B, batch, self.cache_bytes, rows)
            counted = sum(seed < count for seed in batch)
            if counted:
                yield image_B3HW[:counted], label_B[:counted]
            now = time.perf_counter()
            if now - last > LOG_SECONDS:
                done = first + len(batch)
                rank_zero_info(f"Sampled {done} of {len(seeds)} images in {now - start:.0f} s")
                last = now
