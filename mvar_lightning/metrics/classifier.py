"""A small classifier of the data set at hand: features for FID, and the judge of class consistency.

B batch, N classes, F features, HW pixels.
"""

from __future__ import annotations

import random
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F

from mvar_lightning.errors import UserError, check_types
from mvar_lightning.pyramid import Size, as_size, as_written, height_width
from mvar_lightning.tools.drawing import as_rgb, normalize
from mvar_lightning.tools.files import kind_of, read_json, write_json
from mvar_lightning.tools.tensors import read_safetensors, write_tensors

FORMAT = "mvar-lightning classifier 1"
MAX_SIDE = 64
"""Larger images are averaged down to this side first: class is visible there, and the cost stays that of a toy."""

STEP_IMAGES = 64
"""Images of a training step at most, whatever the loader's batches: cost and result do not hang on the recipe's."""

Batches = Iterable[Mapping[str, Any]]
"""Batches as the data modules give them: ``image`` (B, 3, H, W), uint8 or in [-1, 1], and ``label`` (B,)."""


class NothingToLearnFrom(UserError):
    """No batch of two images: batch statistics need as many."""


@dataclass(frozen=True)
class ClassifierScore:
    """What a classifier is worth as a judge: its share of right answers on validation images."""

    accuracy: float
    images: int


class DatasetClassifier(nn.Module):
    """A plain convolutional classifier of RGB images, of others as RGB (`as_rgb`); every stage halves the map until it
    is 4 pixels wide.

    Args:
        num_classes: N.
        image_size: side of the images it is made for, or (height, width).
        num_features: F, kept low so that a covariance over a few hundred images is not degenerate.
        width: channels of the first stage.
    """

    def __init__(self, num_classes: int, image_size: Size, num_features: int = 64, width: int = 24) -> None:
        super().__init__()
        self.num_classes, self.image_size, self.num_features, self.width = num_classes, image_size, num_features, width
        self.score = ClassifierScore(accuracy=float("nan"), images=0)
        height, side = (min(side, MAX_SIDE) for side in height_width(image_size))
        self.shape = height, side
        stages: list[nn.Module] = [_stage(3, width, stride=1)]
        channels = width
        while max(height, side) > 4:
            stages.append(_stage(channels, min(2 * channels, 4 * width), stride=2))
            channels, height, side = min(2 * channels, 4 * width), (height + 1) // 2, (side + 1) // 2
        self.stages = nn.Sequential(*stages)
        self.map_shape = height, side
        self.bottleneck = nn.Linear(channels * height * side, num_features)
        self.head = nn.Linear(num_features, num_classes)

    @property
    def config(self) -> dict[str, Any]:
        """``DatasetClassifier(**config)`` builds it again."""
        sizes = {name: getattr(self, name) for name in ("num_classes", "image_size", "num_features", "width")}
        return sizes | {"image_size": as_written(self.image_size)}

    def maps(self, image_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the last map (B, channels, *map_shape)."""
        return self.stages(F.adaptive_avg_pool2d(as_rgb(image_B3HW), self.shape) * 2 - 1)

    def features(self, image_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, F), the input of the last layer before its non-linearity."""
        return self.bottleneck(self.maps(image_B3HW).flatten(1))

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> logits (B, N)."""
        return self.head(F.relu(self.features(image_B3HW)))


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU())


def train_classifier(
    train_loader: Batches,
    val_loader: Batches,
    num_classes: int,
    image_size: Size,
    seed: int = 0,
    steps: int = 300,
    device: torch.device | str = "cpu",
) -> DatasetClassifier:
    """A classifier trained for a fixed number of steps (AdamW, one-cycle schedule, small shifts of the image).

    The same loaders and seed give the same weights on one kind of device; the caller's random state is left as it was.
    Its accuracy on ``val_loader`` is measured once, at the end, and recorded in ``classifier.score``.
    """
    with isolate_rng(), torch.enable_grad(), torch.inference_mode(False):
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(seed)
        model = DatasetClassifier(num_classes, image_size).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for image_B3HW, label_B in islice(_endless(train_loader), steps):
            image_B3HW = _shift((normalize(image_B3HW.to(device)).float() + 1) / 2)
            loss = F.cross_entropy(model(image_B3HW), label_B.to(device), label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        model.requires_grad_(False).eval()
        model.score = score(model, val_loader, device)
    return model


def _endless(loader: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        usable = False
        for batch in loader:
            parts = zip(batch["image"].split(STEP_IMAGES), batch["label"].split(STEP_IMAGES), strict=True)
            for image_B3HW, label_B in parts:
                # a single image has no batch statistics
                if len(label_B) > 1:
                    usable = True
                    yield image_B3HW, label_B
        if not usable:
            raise NothingToLearnFrom(
                "classifier: the training data has no batch of two images; add images or raise batch_size"
            )


def _shift(image_B3HW: Tensor) -> Tensor:
    """The batch moved by up to 1/12 of its side in both directions, borders repeated."""
    height, width = image_B3HW.shape[-2:]
    reach = max(height // 12, 1)
    y, x = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    return F.pad(image_B3HW, (reach,) * 4, mode="replicate")[..., y : y + height, x : x + width]


@torch.no_grad()
def score(model: DatasetClassifier, loader: Batches, device: torch.device | str = "cpu") -> ClassifierScore:
    """Share of images in a loader that the classifier puts into their class."""
    right = images = 0
    for batch in loader:
        predicted_B = model((normalize(batch["image"].to(device)).float() + 1) / 2).argmax(dim=1)
        right += int((predicted_B == batch["label"].to(device)).sum())
        images += len(predicted_B)
    if not images:
        raise UserError("classifier: the validation data is empty; fill the data folder first")
    return ClassifierScore(accuracy=right / images, images=images)


@torch.no_grad()
def class_consistency(model: DatasetClassifier, image_B3HW: Tensor, label_B: Tensor) -> Tensor:
    """Which images ([0, 1]) the classifier puts into the class they were asked for: bool (B,)."""
    with torch.autocast(image_B3HW.device.type, enabled=False):
        return model(image_B3HW.float()).argmax(dim=1) == label_B.to(image_B3HW.device)


def save_classifier(model: DatasetClassifier, file: Path) -> None:
    """Write ``file`` (safetensors) and beside it a JSON of its sizes and score, each whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "format": FORMAT,
        "config": model.config,
        "accuracy": model.score.accuracy,
        "validation_images": model.score.images,
    }
    # the weights go last: whoever sees them finds the description already there
    write_json(file.with_suffix(".json"), about)
    write_tensors(file, model.state_dict())


def load_classifier(file: Path) -> DatasetClassifier:
    """A classifier written by ``save_classifier``, in evaluation mode."""
    description = file.with_suffix(".json")
    for needed in (file, description):
        if kind_of(needed) != "file":
            raise UserError(f"classifier {file}: {needed.name} is missing; remove the folder and it is trained again")
    about = read_json(description)
    if isinstance(about, dict) and about.get("format") not in (None, FORMAT):
        found = reprlib.repr(about["format"])
        raise UserError(f"classifier {file}: format {found}, not {FORMAT!r}; remove it and run again")
    try:
        check_types(DatasetClassifier.__init__, about["config"])
        about["config"]["image_size"] = as_size(about["config"]["image_size"])
        with torch.device("meta"):  # takes no memory, whatever the sizes
            model = DatasetClassifier(**about["config"])
        model.load_state_dict(read_safetensors(file), assign=True)
        model.score = ClassifierScore(accuracy=float(about["accuracy"]), images=int(about["validation_images"]))
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"classifier {file}: damaged; remove it and its .json, and it is trained again") from error
    return model.requires_grad_(False).eval()
