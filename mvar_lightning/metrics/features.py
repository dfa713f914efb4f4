"""The feature axis: what turns images into the vectors whose statistics a Frechet distance compares.

B batch, F features, N classes, S spatial features, HW pixels. Every extractor takes float images in [0, 1] and gives
float32 features.
"""

from __future__ import annotations

import importlib
import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvar_lightning.errors import UserError
from mvar_lightning.metrics.classifier import DatasetClassifier, load_classifier
from mvar_lightning.tools.copies import fetched
from mvar_lightning.tools.drawing import as_rgb
from mvar_lightning.tools.files import in_a_line, kind_of, sha256_of

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_ADDRESS = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"

SPATIAL_CHANNELS = 7
"""Channels of a map that sFID compares, position by position, as in ADM's evaluator: so many that 17 x 17 positions
give about as many numbers (2023) as the pooled features have."""


class ImageFeatures(NamedTuple):
    """Everything that an extractor says about images, in float32: features (B, F), class logits (B, N), and for sFID
    some channels of a map (B, S), flattened with channels last. What it does not offer is None."""

    features_BF: Tensor
    logits_BN: Tensor | None = None
    spatial_BS: Tensor | None = None


class FeatureExtractor(nn.Module):
    """Images to feature vectors. Frozen, always in evaluation mode, never under autocast.

    ``name`` goes into the names of the metrics (``fid_<name>``), so that numbers of different features
    cannot be confused; ``num_features`` is F. An extractor that also classifies, or that has a map, says how many
    numbers these give (``num_logits``, ``num_spatial``; 0 is none) and gives them in ``extract_all``.
    """

    name: str
    num_features: int
    num_logits: int = 0
    num_spatial: int = 0

    def __init__(self, name: str, num_features: int) -> None:
        super().__init__()
        self.name, self.num_features = name, num_features

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) floats in [0, 1] -> (B, F) float32; gray and RGBA images are looked at as RGB (`as_rgb`)."""
        with torch.autocast(image_B3HW.device.type, enabled=False):
            return self.extract(as_rgb(image_B3HW.float())).float().flatten(1)

    @torch.no_grad()
    def measure(self, image_B3HW: Tensor) -> ImageFeatures:
        """As `forward` -> features, and logits and spatial features where there are any."""
        with torch.autocast(image_B3HW.device.type, enabled=False):
            found = self.extract_all(as_rgb(image_B3HW.float()))
        return ImageFeatures(*(None if part is None else part.float().flatten(1) for part in found))  # type: ignore[arg-type]

    @abstractmethod
    def extract(self, image_B3HW: Tensor) -> Tensor:
        """The features themselves; called without gradient and outside autocast."""

    def extract_all(self, image_B3HW: Tensor) -> ImageFeatures:
        """Features, logits and spatial features in one pass; called as ``extract`` is."""
        return ImageFeatures(self.extract(image_B3HW))


def _spatial(map_BCHW: Tensor) -> Tensor:
    """The first channels of a map, channels last: the order of TensorFlow's maps, hence of stored moments."""
    return map_BCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)


class ClassifierFeatures(FeatureExtractor):
    """Penultimate features of a classifier trained on the data set at hand; see ``classifier.py``.

    Numbers are comparable only between runs that share the classifier's file. They say nothing beside published FIDs.
    """

    def __init__(self, classifier: DatasetClassifier | str) -> None:
        model = classifier if isinstance(classifier, DatasetClassifier) else load_classifier(Path(classifier))
        super().__init__("classifier", model.num_features)
        self.classifier = model.requires_grad_(False).eval()
        self.num_logits, self.num_spatial = model.num_classes, SPATIAL_CHANNELS * math.prod(model.map_shape)

    def extract(self, image_B3HW: Tensor) -> Tensor:
        return self.classifier.features(image_B3HW)

    def extract_all(self, image_B3HW: Tensor) -> ImageFeatures:
        map_BCHW = self.classifier.maps(image_B3HW)
        features_BF = self.classifier.bottleneck(map_BCHW.flatten(1))
        return ImageFeatures(features_BF, self.classifier.head(F.relu(features_BF)), _spatial(map_BCHW))


class TorchScriptFeatures(FeatureExtractor):
    """Features of a TorchScript file: any network that maps (B, 3, H, W) to (B, F).

    TorchScript is a program: loading the file runs code of whoever wrote it, so use files you trust.

    Args:
        path: the file, as written by ``torch.jit.save``.
        name: goes into the metric names; the file's stem if not given.
        size: images are resized to size x size first (bilinear, antialiased); unchanged if not given.
        as_bytes: feed numbers 0 ... 255 (as floats) instead of [0, 1].
    """

    def __init__(self, path: str, name: str | None = None, size: int | None = None, as_bytes: bool = False) -> None:
        file = Path(path)
        if kind_of(file) != "file":
            raise UserError(f"feature file {path}: no such file; give a TorchScript file written by torch.jit.save")
        try:
            network = torch.jit.load(str(file), map_location="cpu").eval()
        except RuntimeError as error:
            raise UserError(f"feature file {path}: not a TorchScript file; write it with torch.jit.save") from error
        probe = torch.zeros(2, 3, size or 64, size or 64)
        try:
            with torch.no_grad():
                features: Any = network(probe)
        except RuntimeError as error:
            side, reason = probe.shape[-1], str(error).splitlines()[-1][:200]
            raise UserError(
                f"feature file {path}: cannot take images of {side} x {side} ({reason}); give its ``feature_size``"
            ) from error
        if not isinstance(features, Tensor) or features.shape[:1] != (2,):
            found = str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"feature file {path}: maps two images to {found}; it must give (2, features)")
        super().__init__(name or file.stem, features.flatten(1).shape[1])
        self.network, self.size, self.scale = network, size, 255.0 if as_bytes else 1.0

    def extract(self, image_B3HW: Tensor) -> Tensor:
        if self.size is not None:
            shape = (self.size, self.size)
            image_B3HW = F.interpolate(image_B3HW, shape, mode="bilinear", antialias=True).clamp(0, 1)
        return self.network(image_B3HW * self.scale)


class InceptionFeatures(FeatureExtractor):
    """The 2048 pool features of Inception v3 behind published FIDs, through torch-fidelity (the extra ``[fid]``).

    The resize is torch-fidelity's imitation of TensorFlow 1 (bilinear, no antialiasing), as in published numbers.
    Logits are without the last layer's bias, as ADM's Inception score takes them; spatial features are the first 7
    channels of what TensorFlow's graph calls ``mixed_6/conv``, here ``Mixed_6d.branch1x1``: 17 x 17 x 7.

    Args:
        path: the weights' file; nothing is downloaded.
    """

    def __init__(self, path: str) -> None:
        file = fetched(path)
        if kind_of(file) != "file":
            raise UserError(
                f"Inception weights {path}: no such file; download {INCEPTION_FILE} from {INCEPTION_ADDRESS} "
                "(`mvar fetch inception` does)"
            )
        expected = INCEPTION_FILE.removesuffix(".pth").rpartition("-")[2]
        found = sha256_of(file)
        if not found.startswith(expected):
            raise UserError(
                f"Inception weights {path}: SHA-256 starts with {found[:8]}, not {expected}; "
                f"download {INCEPTION_FILE} again from {INCEPTION_ADDRESS}"
            )
        try:
            inception = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except (ImportError, RuntimeError, AttributeError) as error:
            raise UserError(
                'Inception features need torch-fidelity, pip install "mvar-lightning[fid]", and a torchvision of the '
                f"same build as torch (docs/metrics.md); here: {in_a_line(error)}; or use ClassifierFeatures or "
                "TorchScriptFeatures"
            ) from error
        super().__init__("inception", 2048)
        self.num_logits, self.num_spatial = 1008, SPATIAL_CHANNELS * 17**2
        outputs = ["2048", "logits_unbiased"]
        self.network = inception.FeatureExtractorInceptionV3("inception-v3-compat", outputs, str(file))
        self.network.requires_grad_(False).eval()

    def extract(self, image_B3HW: Tensor) -> Tensor:
        return self.network(_bytes(image_B3HW))[0]

    def extract_all(self, image_B3HW: Tensor) -> ImageFeatures:
        maps: list[Tensor] = []
        layer = self.network.Mixed_6d.branch1x1
        handle = layer.register_forward_hook(lambda module, inputs, output: maps.append(_spatial(output)))
        try:
            features_BF, logits_BN = self.network(_bytes(image_B3HW))
        finally:
            handle.remove()
        return ImageFeatures(features_BF, logits_BN, maps[0])


def _bytes(image_B3HW: Tensor) -> Tensor:
    return image_B3HW.mul(255).round().clamp(0, 255).to(torch.uint8)
