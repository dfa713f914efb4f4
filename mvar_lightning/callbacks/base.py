"""What the callbacks ask of a run: its batches, its folder, its loggers, whether now is the time.

B batch, HW pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mvar_lightning.callbacks.loggers import log_picture
from mvar_lightning.data.image_data import run_data
from mvar_lightning.data.reading.loader import TrainLoader, loading
from mvar_lightning.errors import UserError
from mvar_lightning.tools.compute import evaluating
from mvar_lightning.tools.drawing import as_rgb, to_png, to_unit
from mvar_lightning.training.memory import CACHE_BYTES, cache_of_image


class ValidationCallback(pl.Callback):
    """A callback that acts every n-th epoch's validation, and at each one outside of training.

    Everything that needs the weights happens in ``on_validation_epoch_end``: from ``on_validation_epoch_start``
    to there, Lightning's weight averaging has put the averaged weights in place (see ``ema.py``).
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise UserError(
                f"every_n_epochs {every_n_epochs}: must be at least 1; remove the callback to switch it off"
            )
        self.every_n_epochs = every_n_epochs

    def due(self, trainer: pl.Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != TrainerFn.FITTING or is_rehearsal(trainer):
            return True
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
        return last or epoch % self.every_n_epochs == 0


def is_rehearsal(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``: everything is tried, little is computed, nothing is kept."""
    return bool(cast(Any, trainer).fast_dev_run)


def real_images(trainer: pl.Trainer, who: str) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the validation images in [0, 1], and their labels, on the run's device, batch by batch.

    For runs whose own batches hold tokens. Raises UserError where no images belong to them.
    """
    device = trainer.strategy.root_device
    limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
    with isolate_rng(), loading(run_data(trainer).image_data(who).val_dataloader()) as loader:
        for batch in islice(loader, limit if isinstance(limit, int) else None):
            image_B3HW, label_B = images_of(batch, who)
            yield image_B3HW.to(device), label_B.to(device)


def training_images(trainer: pl.Trainer, who: str, count: int) -> Iterator[Tensor]:
    """This rank's share of ``count`` training images (fewer if there are fewer), in [0, 1], batch by batch.

    From a fresh loader and with the random state put back: measuring must not change what training sees. Always the
    first epoch's, so that a run that was continued measures its floor on the images of one that was not.
    """
    wanted = len(range(trainer.global_rank, count, trainer.world_size))
    if wanted == 0:
        return
    with isolate_rng(), loading(run_data(trainer).image_data(who).train_dataloader()) as loader:
        if isinstance(loader, TrainLoader):
            loader.load_state_dict({"epoch": 0, "batch": 0})
        for batch in loader:
            image_B3HW = images_of(batch, who)[0][:wanted]
            wanted -= len(image_B3HW)
            yield image_B3HW
            if wanted == 0:
                return


def images_of(batch: Any, who: str) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1] and labels (B,) of a batch."""
    if not isinstance(batch, dict) or "image" not in batch or "label" not in batch:
        raise UserError(
            f"{who}: the validation batches hold no 'image' and 'label'; remove this callback from the recipe"
        )
    return to_unit(batch["image"]), batch["label"]


def reconstruct(pl_module: pl.LightningModule, image_B3HW: Tensor) -> Tensor:
    """Images in [0, 1] through the module's tokenizer and back."""
    tokenizer = cast(Any, pl_module.tokenizer)
    with evaluating(tokenizer):
        return to_unit(tokenizer.decode(tokenizer.encode(image_B3HW * 2 - 1)))


def generate(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    label_B: Tensor,
    seeds: Sequence[int],
    cache_bytes: float = CACHE_BYTES,
    rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1] and tokens (B, L) of these labels and seeds, with the recipe's settings, in
    the run's precision: so many images at a time as ``cache_bytes`` of keys and values allow, one at least.

    Where the model's blocks are compiled or recorded each time has equally many: a smaller one is filled up, also to
    ``rows`` if that is what other calls have.
    """
    module = cast(Any, pl_module)
    with trainer.precision_plugin.forward_context():
        device = pl_module.device.type
        half = torch.is_autocast_enabled(device)
        size = torch.get_autocast_dtype(device).itemsize if half else next(module.model.parameters()).element_size()
        at_once = max(1, int(cache_bytes / max(1, cache_of_image(module.model, module.cfg, size))))
        full = min(at_once, max(rows, len(seeds)))
        parts = []
        for first in range(0, len(seeds), full):
            own_B, own = label_B[first : first + full], list(seeds[first : first + full])
            count, missing = len(own), full - len(own) if module.model.equal_rows else 0
            drawn = module.generate(torch.cat([own_B, own_B[:1].expand(missing)]), own + own[:1] * missing)
            parts.append([each[:count] for each in drawn])
    image_B3HW, idx_BL = (torch.cat(each) for each in zip(*parts, strict=True))
    return image_B3HW, idx_BL


def run_folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir)


def publish(trainer: pl.Trainer, picture_3HW: Tensor, tag: str, file: str | None) -> None:
    """A picture in [0, 1] to every logger that takes pictures and, if ``file`` is named, into the run's folder; of gray
    and RGBA images in RGB, which every logger takes.

    Rank zero only. A ``fast_dev_run`` writes no file: it must not replace the picture of a real run.
    """
    if not trainer.is_global_zero:
        return
    picture_3HW = as_rgb(picture_3HW[None])[0]
    log_picture(trainer, picture_3HW, tag)
    if file is not None and not is_rehearsal(trainer):
        to_png(picture_3HW, run_folder(trainer) / file)
