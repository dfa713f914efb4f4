"""How good are the images: feature extractors, the classifier of a data set, Frechet distance, class consistency."""

from __future__ import annotations

from mvar_lightning.metrics.classifier import (
    ClassifierScore,
    DatasetClassifier,
    class_consistency,
    load_classifier,
    save_classifier,
    train_classifier,
)
from mvar_lightning.metrics.features import (
    ClassifierFeatures,
    FeatureExtractor,
    InceptionFeatures,
    TorchScriptFeatures,
)
from mvar_lightning.metrics.frechet import FrechetDistance, as_saved

__all__ = [
    "ClassifierFeatures",
    "ClassifierScore",
    "DatasetClassifier",
    "FeatureExtractor",
    "FrechetDistance",
    "InceptionFeatures",
    "TorchScriptFeatures",
    "as_saved",
    "class_consistency",
    "load_classifier",
    "save_classifier",
    "train_classifier",
]
