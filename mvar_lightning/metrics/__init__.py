"""How good are the images: feature extractors, the classifier of a data set, Frechet distance, class
consistency, Inception score, precision and recall."""

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
    ImageFeatures,
    InceptionFeatures,
    TorchScriptFeatures,
)
from mvar_lightning.metrics.frechet import FrechetDistance, as_saved, frechet_distance
from mvar_lightning.metrics.kernel import KernelDistance, kernel_distance
from mvar_lightning.metrics.moments import FeatureMoments, Moments, StoredReference
from mvar_lightning.metrics.precision_recall import inception_score, precision_recall

__all__ = [
    "ClassifierFeatures",
    "ClassifierScore",
    "DatasetClassifier",
    "FeatureExtractor",
    "FeatureMoments",
    "FrechetDistance",
    "ImageFeatures",
    "InceptionFeatures",
    "KernelDistance",
    "Moments",
    "StoredReference",
    "TorchScriptFeatures",
    "as_saved",
    "class_consistency",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_classifier",
    "precision_recall",
    "save_classifier",
    "train_classifier",
]
