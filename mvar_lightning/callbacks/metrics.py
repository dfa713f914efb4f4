"""Metrics over generated and reconstructed images at validation: FID with its floor, class consistency.

Every number is of the images of all ranks, each counted once. Features are those of a classifier of the run's own data
(`classifier_of`), unless the recipe names an extractor.

B batch, HW pixels.
"""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mvar_lightning.callbacks.base import (
    ValidationCallback,
    images_of,
    is_rehearsal,
    real_images,
    reconstruct,
    training_images,
)
from mvar_lightning.data.image_data import run_data
from mvar_lightning.errors import UserError
from mvar_lightning.evaluation.features import classifier_file, fit_classifier
from mvar_lightning.metrics.classifier import DatasetClassifier, NothingToLearnFrom, class_consistency, load_classifier
from mvar_lightning.metrics.features import ClassifierFeatures, FeatureExtractor
from mvar_lightning.metrics.frechet import FrechetDistance, TooFewImages, as_saved
from mvar_lightning.metrics.kernel import KernelDistance
from mvar_lightning.tools.processes import done_by_first, wait_until_visible

log = logging.getLogger(__name__)

REHEARSAL_IMAGES = 4
"""Images of a ``fast_dev_run``."""


class ImageMetrics(ValidationCallback):
    """What both kinds of runs share: the real statistics, their floor, and the numbers' way to the logger.

    The real statistics are those of the images this run validates on, gathered once per ``fit`` or ``validate``.
    ``latest`` holds the numbers of the last measurement, by their logged names. Of a single image nothing can be
    measured: that is told once, and the run goes on without these numbers.

    Args:
        extractor: features of the Frechet distance; a classifier trained on the run's own data if not given.
        consistency: also measure the share of images that the data set's classifier puts into their class.
        num_images: images of the generated side and of the floor.
        batch_size: images generated at a time, on each rank.
        every_n_epochs: validations in between are left alone; the last epoch's is always measured.
    """

    def __init__(
        self,
        extractor: FeatureExtractor | None = None,
        consistency: bool = True,
        num_images: int = 500,
        batch_size: int = 50,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(every_n_epochs)
        if num_images < 2 or batch_size < 1:
            raise UserError(
                f"num_images {num_images}, batch_size {batch_size}: need at least 2 images and batches of 1"
            )
        self.extractor = extractor
        self.consistency = consistency
        self.num_images = num_images
        self.batch_size = batch_size
        self.latest: dict[str, float] = {}
        self._classifier: DatasetClassifier | None = None
        self._distance: FrechetDistance | None = None
        self._kernel: KernelDistance | None = None
        self._once: dict[str, float] = {}
        self._collecting = False
        self._left_out = False
        self._prefix = "val"

    @abstractmethod
    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, distance: FrechetDistance
    ) -> dict[str, float]:
        """Numbers of one validation, by name without prefix; called on every rank."""

    # -- the classifier and the extractor, before anything else happens on the device

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # another call of fit or validate may come with other data
        self._distance, self._classifier, self._once = None, None, {}
        self._left_out = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._distance is not None or self._left_out:
            return
        device = trainer.strategy.root_device
        run_data(trainer).image_data(type(self).__name__)  # told now if there are none, not after the first epoch
        if self.extractor is None or self.consistency:
            self._classifier = classifier_of(trainer, type(self).__name__)
        if self._classifier is None and self.extractor is None:
            self._leave_out("a data set of one image trains no classifier; add images or give an extractor")
            return
        extractor = self.extractor or ClassifierFeatures(cast(DatasetClassifier, self._classifier))
        self._distance = FrechetDistance(extractor).to(device)

    on_validation_start = on_test_start = on_fit_start  # of `trainer.validate` and `trainer.test` alone

    def due(self, trainer: pl.Trainer) -> bool:
        return not self._left_out and super().due(trainer)

    def _leave_out(self, why: str) -> None:
        self._left_out = True
        rank_zero_only(log.warning)(f"{type(self).__name__}: its numbers are left out: {why}")

    # -- the real images, as they pass by

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, "test")

    def _begin(self, trainer: pl.Trainer, prefix: str) -> None:
        self._prefix = prefix
        self._collecting = self.due(trainer) and not self._once

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self.due(trainer) or dataloader_idx != 0:
            return
        if run_data(trainer).holds_images:
            self.see(pl_module, *images_of(batch, type(self).__name__))

    on_test_batch_end = on_validation_batch_end

    def looks(self) -> bool:
        """Whether `see` does something with the images of this validation."""
        return self._collecting

    def see(self, pl_module: pl.LightningModule, image_B3HW: Tensor, label_B: Tensor) -> None:
        """A batch of real images in [0, 1] passes by."""
        if self._collecting:
            features_BF = self.distance.update(image_B3HW, real=True)
            if self._kernel is not None:
                self._kernel.update(features_BF, real=True)

    @property
    def distance(self) -> FrechetDistance:
        assert self._distance is not None, "used before on_fit_start or on_validation_start"
        return self._distance

    @property
    def judge(self) -> FrechetDistance:
        """The distance that generated images and the floor have: to the run's own images, if not to a reference."""
        return self.distance

    # -- the numbers

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.due(trainer):
            return
        # a token cache has no images to pass by: they are read now, before anything is measured
        if not run_data(trainer).holds_images and self.looks():
            for image_B3HW, label_B in real_images(trainer, type(self).__name__):
                self.see(pl_module, image_B3HW, label_B)
        try:
            numbers = self.measure(trainer, pl_module, self.distance)
            self._once = self._once or self._references(trainer, numbers.get("fid_images", 0.0))
        except TooFewImages as error:  # on all processes, as the sums are
            self._leave_out(str(error))
            return
        numbers |= self._once
        self._collecting = False
        self.latest = {f"{self._prefix}/{name}": value for name, value in numbers.items()}
        pl_module.log_dict(self.latest, sync_dist=trainer.world_size > 1)
        rank_zero_info("  ".join(f"{name} {value:.4g}" for name, value in self.latest.items()))

    on_test_epoch_end = on_validation_epoch_end

    def count(self, trainer: pl.Trainer) -> int:
        """Images to generate, and of the floor; a handful in a ``fast_dev_run``."""
        return min(self.num_images, REHEARSAL_IMAGES) if is_rehearsal(trainer) else self.num_images

    def _references(self, trainer: pl.Trainer, generated: float) -> dict[str, float]:
        """The real-vs-real floor and the counts, once."""
        distance, features = self.judge, self.judge.extractor.num_features
        references = total(trainer, distance.count(real=True))
        numbers = {"fid_reference_images": references} if references else {}  # ADM's moments do not tell
        few = {"reference": references, "generated": generated}  # moments come of enough
        found = " and ".join(f"{count:.0f} {name}" for name, count in few.items() if 0 < count < features)
        if found and not is_rehearsal(trainer):
            rank_zero_only(log.warning)(
                f"{type(self).__name__}: {found} images for {features} features: "
                "their covariance has no full rank, and the distance is biased upwards; take more images"
            )
        distance.reset_generated()
        for image_B3HW in training_images(trainer, type(self).__name__, self.count(trainer)):
            distance.update(image_B3HW.to(trainer.strategy.root_device), real=False)
        numbers["fid_floor_images"] = total(trainer, distance.count(real=False))
        numbers[f"fid_{distance.extractor.name}_floor"] = distance.compute()
        distance.reset_generated()
        return numbers


class ReconstructionMetrics(ImageMetrics):
    """For tokenizer runs: the Frechet distance of reconstructions to the images themselves, at every validation.

    Logs ``rfid_<features>``, ``rfid_images`` and ``reconstruction_consistency`` (share of reconstructions that the data
    set's classifier still puts into their class), beside ``fid_<features>_floor``. ``num_images`` counts the floor's.
    """

    def __init__(
        self,
        extractor: FeatureExtractor | None = None,
        consistency: bool = True,
        num_images: int = 500,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(extractor, consistency, num_images, every_n_epochs=every_n_epochs)
        self._kept = 0

    def _begin(self, trainer: pl.Trainer, prefix: str) -> None:
        super()._begin(trainer, prefix)
        if self._distance is not None:
            self._distance.reset_generated()
        self._kept = 0

    def looks(self) -> bool:
        return True

    def see(self, pl_module: pl.LightningModule, image_B3HW: Tensor, label_B: Tensor) -> None:
        super().see(pl_module, image_B3HW, label_B)
        again_B3HW = as_saved(reconstruct(pl_module, image_B3HW))
        self.distance.update(again_B3HW, real=False)
        if self._classifier is not None and self.consistency:
            self._kept += int(class_consistency(self._classifier, again_B3HW, label_B).sum())

    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, distance: FrechetDistance
    ) -> dict[str, float]:
        images = total(trainer, distance.count(real=False))
        numbers = {f"rfid_{distance.extractor.name}": distance.compute(), "rfid_images": images}
        if self._classifier is not None and self.consistency:
            numbers["reconstruction_consistency"] = total(trainer, self._kept) / images
        distance.reset_generated()
        return numbers


def total(trainer: pl.Trainer, count: int) -> float:
    """The sum over ranks."""
    total = torch.tensor(count, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(total, reduce_op="sum"))


def classifier_of(trainer: pl.Trainer, who: str) -> DatasetClassifier | None:
    """The classifier of the run's data set: loaded if it exists, else trained on rank zero while the others wait.

    None where none can be trained: a data set of one image.

    It lies in ``classifier/`` beside the shards, or in the run's folder where the data may not be written, under a
    name made of the index, the image size and how images are cut to it: other data or another cut makes another
    classifier. What else the run sets (batches, workers, processes) makes no difference to it.
    """
    data, device = run_data(trainer).image_data(who), trainer.strategy.root_device
    # building a network draws random weights, even if they are replaced: training must not notice
    with isolate_rng(), contextlib.suppress(NothingToLearnFrom):
        if is_rehearsal(trainer):
            return fit_classifier(data, device, steps=2)  # kept nowhere

        def made() -> Path | None:
            with contextlib.suppress(NothingToLearnFrom):  # the others wait for an answer, whichever it is
                return classifier_file(data, Path(trainer.default_root_dir), device)
            return None

        file = done_by_first(made)
        if file is not None:
            wait_until_visible(file)
            return load_classifier(file).to(device)
    return None
