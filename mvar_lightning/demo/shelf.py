"""The models that the page shows: described at the start, their weights read when they are first asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mvar_lightning.checkpoints.classes import names_or_imagenets
from mvar_lightning.checkpoints.folder import open_checkpoint
from mvar_lightning.checkpoints.source import Source
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import height_width
from mvar_lightning.sampling.stages import Stages, load_stages
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import choose_device, choose_precision
from mvar_lightning.transformer import NextScaleTransformer
from mvar_lightning.transformer.acceleration import prepare

PRECISIONS = ("32", "bf16", "int8", "int8-weights", "int4-weights")
"""What a model may be computed in: without and with autocast, or quantized (`transformer.quantized`)."""

KEPT = 4
"""Models in memory at a time; the one that was not used for longest goes."""

GROWING_SIDE = 128
"""Larger images grow on a CPU only if asked to: there a decoding a scale would take longer than the sampling."""


@dataclass(frozen=True)
class Shown:
    """One model with its weights, ready to sample."""

    name: str
    path: str
    stages: Stages
    tokenizer: MultiScaleTokenizer
    class_names: Sequence[str]
    precision: str
    device: torch.device

    @property
    def model(self) -> NextScaleTransformer:
        return self.stages.first

    @property
    def autocast(self) -> str:
        """``32`` or ``bf16``: what `computing` takes. Quantized weights compute as they would without."""
        return "bf16" if self.precision == "bf16" else "32"

    @property
    def weight_bytes(self) -> int:
        """Of the transformer, as it lies in memory."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def cache_bytes(self) -> int:
        """Keys and values that sampling holds for one image without guidance; twice that with it."""
        element = torch.bfloat16 if self.autocast == "bf16" else torch.float32
        return 2 * self.model.backend.plan.cache_tokens * self.model.width * self.model.depth * element.itemsize


class Shelf:
    """All models of the page.

    Args:
        checkpoints: path by the name that is shown.
        device, precision: as of `SampleRequest`.

    Raises:
        UserError: a checkpoint that is not there, damaged, or of a tokenizer alone; no GPU where one is asked for.
    """

    def __init__(self, checkpoints: Mapping[str, str], device: str = "auto", precision: str = "auto") -> None:
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.paths = dict(checkpoints)
        self._described = [self._describe(name, path) for name, path in self.paths.items()]
        self._kept: OrderedDict[tuple[str, str], Shown] = OrderedDict()

    def described(self) -> dict[str, Any]:
        """Plain values: what the page asks for first."""
        return {"models": self._described, "precision": self.precision, "precisions": self._precisions()}

    def get(self, name: str, precision: str = "") -> Shown:
        """A model in a precision, by default the page's own; one thread at a time.

        Raises:
            UserError: no such model or precision, or weights that cannot be read.
        """
        precision = precision or self.precision
        if name not in self.paths:
            raise UserError(f"model {name[:80]!r}: is not here; choose one of {', '.join(self.paths)}")
        if precision not in self._precisions():
            raise UserError(f"precision {precision[:80]!r}: choose one of {', '.join(self._precisions())}")
        key = name, precision
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = self._load(*key)
        self._kept.move_to_end(key)
        return self._kept[key]

    def holds(self, name: str, precision: str = "") -> bool:
        """Whether `get` has nothing to read."""
        return (name, precision or self.precision) in self._kept

    def _precisions(self) -> list[str]:
        """Those that have kernels on the device."""
        return [each for each in PRECISIONS if each != "int8" or self.device.type == "cpu"]

    def _load(self, name: str, precision: str) -> Shown:
        path, quantized = self.paths[name], precision if precision.startswith("int") else None
        stages, tokenizer = load_stages(Source(path), self.device)
        prepare(stages.first, "bf16" if precision == "bf16" else "32", quantized=quantized)
        names = names_or_imagenets(Source(path).class_names(), stages.first.num_classes)
        return Shown(name, path, stages, tokenizer, names, precision, self.device)

    def _describe(self, name: str, path: str) -> dict[str, Any]:
        opened = open_checkpoint(path, whole=False)
        if opened.record.model is None:
            raise UserError(f"checkpoint {path}: holds a tokenizer alone; give one of a trained model")
        model, tokenizer = opened.empty_model(), opened.empty_tokenizer()
        return {
            "name": name,
            "path": path,
            "size": height_width(tokenizer.image_size),
            "channels": tokenizer.image_channels,
            "scales": tokenizer.pyramid.shapes,
            "codes": tokenizer.vocab_size,
            "blocks": model.depth,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention": repr(model.strategy),
            "history": repr(model.history_design),
            "num_classes": model.num_classes,
            "classes": list(names_or_imagenets(opened.record.class_names, model.num_classes)),
            "grow": self.device.type == "cuda" or max(height_width(tokenizer.image_size)) < GROWING_SIDE,
        }
