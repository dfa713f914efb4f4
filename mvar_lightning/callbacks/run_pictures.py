"""Pictures of a run: sample grids, reconstructions, coarse-to-fine strips, the attention mask.

B batch, R rows, K scales, L all tokens, HW pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mvar_lightning.callbacks.base import ValidationCallback, generate, images_of, publish, real_images, reconstruct
from mvar_lightning.data.image_data import run_data
from mvar_lightning.errors import UserError
from mvar_lightning.tools.compute import evaluating
from mvar_lightning.tools.drawing import enlarge, from_image, make_grid, make_pairs, make_strips, mask_picture, to_unit


class Picture(ValidationCallback):
    """A picture drawn at validation and, where the last validation is older than the weights, when training ends.

    Every rank draws (sharded models need all of them); rank zero writes.

    Args:
        every_n_epochs: validations in between are left alone.
        file: name of the PNG in the run's folder; TensorBoard only if none.
    """

    tag: str

    def __init__(self, every_n_epochs: int = 1, file: str | None = None) -> None:
        super().__init__(every_n_epochs)
        self.file = file
        self._drawn_at = -1

    @abstractmethod
    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
        """The picture (3, H, W) in [0, 1], or none if there is nothing to show yet."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.due(trainer):
            self._publish(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not on_train_end: by now weight averaging has left its weights in the module
        if self._drawn_at != trainer.global_step:
            self._publish(trainer, pl_module)

    def _publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with isolate_rng(), torch.no_grad():
            picture_3HW = self.draw(trainer, pl_module)
        if picture_3HW is not None:
            publish(trainer, picture_3HW, self.tag, self.file)
            # a picture of `validate` is not one of this training, which draws its own at the end
            self._drawn_at = trainer.global_step if trainer.state.fn == TrainerFn.FITTING else -1


class SampleGrid(Picture):
    """Generated images: one column a class, one row a seed; the same seeds and classes each time.

    Args:
        labels: the classes shown, one column each; the first ten if not given.
        rows: images of each class.
    """

    tag = "pictures/samples"

    def __init__(
        self,
        labels: list[int] | None = None,
        rows: int = 4,
        every_n_epochs: int = 1,
        file: str | None = "samples.png",
    ) -> None:
        super().__init__(every_n_epochs, file)
        self.labels = labels
        self.rows = rows

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor:
        labels = classes_shown(pl_module, self.labels)
        image_B3HW, _ = samples(trainer, pl_module, labels * self.rows)
        return make_grid(enlarge(image_B3HW), columns=len(labels))


class CoarseToFine(Picture):
    """For next-scale runs: a generated image after each scale, one row an image, coarse on the left.

    Args:
        labels: the classes shown, one row each; the first six if not given.
    """

    tag = "pictures/coarse_to_fine"

    def __init__(
        self, labels: list[int] | None = None, every_n_epochs: int = 1, file: str | None = "coarse_to_fine.png"
    ) -> None:
        super().__init__(every_n_epochs, file)
        self.labels = labels

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor:
        _, idx_BL = samples(trainer, pl_module, classes_shown(pl_module, self.labels, limit=6))
        return make_strips(after_each_scale(pl_module, idx_BL))


class ImagePicture(Picture):
    """A picture of the first validation images.

    Args:
        num_images: how many of them; at most one batch.
    """

    def __init__(self, num_images: int, every_n_epochs: int, file: str | None) -> None:
        super().__init__(every_n_epochs, file)
        self.num_images = num_images
        self._image_B3HW: Tensor | None = None

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0:
            who = type(self).__name__
            if run_data(trainer).holds_images:
                self._image_B3HW = images_of(batch, who)[0][: self.num_images].clone()
            elif self._image_B3HW is None:
                self._image_B3HW = next(real_images(trainer, who))[0][: self.num_images]

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor | None:
        return None if self._image_B3HW is None else self.draw_images(pl_module, self._image_B3HW)

    @abstractmethod
    def draw_images(self, pl_module: pl.LightningModule, image_B3HW: Tensor) -> Tensor:
        """The picture of these images in [0, 1]."""


class ReconstructionGrid(ImagePicture):
    """Validation images, each above its reconstruction."""

    tag = "pictures/reconstructions"
    columns = 8

    def __init__(self, num_images: int = 32, every_n_epochs: int = 1, file: str | None = "reconstructions.png") -> None:
        super().__init__(num_images, every_n_epochs, file)

    def draw_images(self, pl_module: pl.LightningModule, image_B3HW: Tensor) -> Tensor:
        return make_pairs(image_B3HW, reconstruct(pl_module, image_B3HW), self.columns)


class ReconstructionStrips(ImagePicture):
    """For tokenizer runs: a validation image after each scale, coarse on the left, the original at the right end."""

    tag = "pictures/coarse_to_fine"

    def __init__(self, num_images: int = 6, every_n_epochs: int = 1, file: str | None = "coarse_to_fine.png") -> None:
        super().__init__(num_images, every_n_epochs, file)

    def draw_images(self, pl_module: pl.LightningModule, image_B3HW: Tensor) -> Tensor:
        tokenizer = cast(Any, pl_module.tokenizer)
        with evaluating(tokenizer):
            idx_BL = tokenizer.encode(image_B3HW * 2 - 1)
        strips_RK3HW = after_each_scale(pl_module, idx_BL)
        return make_strips(torch.cat([strips_RK3HW, image_B3HW[:, None]], dim=1))


class AttentionMaskPicture(pl.Callback):
    """The run's visibility as a picture, once, when training starts: queries down, keys across, lines between scales.

    Args:
        file: name of the PNG in the run's folder; TensorBoard only if none.
    """

    tag = "pictures/attention_mask"

    def __init__(self, file: str | None = "attention_mask.png") -> None:
        self.file = file

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            model = cast(Any, pl_module.model)
            picture = mask_picture(model.mask(), model.pyramid.sides)
            publish(trainer, from_image(picture), self.tag, self.file)


def classes_shown(pl_module: pl.LightningModule, labels: Sequence[int] | None, limit: int = 10) -> list[int]:
    """The labels asked for, checked against the model's classes; the first few if none were."""
    num_classes = cast(Any, pl_module.model).num_classes
    if labels is None:
        return list(range(min(num_classes, limit)))
    if not labels or any(not 0 <= label < num_classes for label in labels):
        raise UserError(f"labels {list(labels)}: the model knows the classes 0 to {num_classes - 1}; name some of them")
    return list(labels)


def samples(trainer: pl.Trainer, pl_module: pl.LightningModule, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and tokens for these labels, seed i for the i-th, with the recipe's sampling settings."""
    return generate(trainer, pl_module, torch.tensor(labels, device=pl_module.device), range(len(labels)))


def after_each_scale(pl_module: pl.LightningModule, idx_BL: Tensor) -> Tensor:
    """Images in [0, 1] after each scale: (B, K, 3, H, W)."""
    tokenizer = cast(Any, pl_module.tokenizer)
    with evaluating(tokenizer):
        return torch.stack([to_unit(image_B3HW) for image_B3HW in tokenizer.progressive(idx_BL)], dim=1)
