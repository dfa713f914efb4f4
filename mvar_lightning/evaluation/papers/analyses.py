"""The papers' analyses from a request to files: which model, which images, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mvar_lightning.checkpoints.source import Source, beside
from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.errors import UserError, check_counts
from mvar_lightning.evaluation.features import open_features, open_lpips
from mvar_lightning.evaluation.image_sources import open_data
from mvar_lightning.evaluation.papers import figures, scaling
from mvar_lightning.evaluation.papers.alignment import residual_feature_alignment
from mvar_lightning.evaluation.papers.attention_mass import attention_mass
from mvar_lightning.evaluation.papers.perturbation import perturb
from mvar_lightning.evaluation.reports import Draw, write_report
from mvar_lightning.metrics import FrechetDistance
from mvar_lightning.sampling.sampler import SamplingSettings
from mvar_lightning.tools.compute import choose_device
from mvar_lightning.tools.drawing import normalize, to_unit
from mvar_lightning.tools.files import check_folder, read_json


@dataclass(frozen=True)
class AnalyzeRequest:
    """Which model is analyzed on which images.

    Args:
        source: of the model.
        data: shard folder whose validation images are looked at (perturb without features needs none).
        images: the first so many; of perturb, images that are sampled.
        batch_size: images at a time.
        resize_ratio, crop: how images are cut (`runs.run.settle_cutting` tells how a run's were).
        out: where to write; ``analysis/`` in the run, or beside a file, if not given.
        device: ``auto``, ``cpu`` or ``cuda``.
        settings, seed, features, feature_size, lpips: of perturb, as of the other evaluations.

    Raises:
        UserError: a number below 1.
    """

    source: Source
    data: str | None = None
    images: int = 256
    batch_size: int = 16
    resize_ratio: float = 1.125
    crop: str = "center"
    out: str | Path | None = None
    device: str = "auto"
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    features: str = "data"
    feature_size: int | None = None
    lpips: str | None = None

    def __post_init__(self) -> None:
        check_counts(images=self.images, batch_size=self.batch_size)

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out is not None else beside(Path(self.source.path).resolve(), "analysis")


class Analysis(NamedTuple):
    """The tables, and the files they, the numbers and the pictures went to."""

    markdown: str
    files: list[Path]


def analyze_attention(request: AnalyzeRequest) -> Analysis:
    """Attention of each scale to which scale, and inside which window (MVAR). Raises `UserError` for input that does
    not fit."""
    work = _Work(request)
    mass = attention_mass(work.model, work.tokenizer, work.batches())
    drawings = {
        "attention_scales.png": partial(figures.draw_on_scale, mass),
        "attention_windows.png": partial(figures.draw_within, mass),
    }
    return work.write("attention", mass.content(), figures.attention_markdown(mass), drawings)


def analyze_alignment(request: AnalyzeRequest) -> Analysis:
    """Alignment of a scale's residual with the inputs of earlier ones (Markov-VAR). Raises `UserError` likewise."""
    work = _Work(request)
    found = residual_feature_alignment(work.model, work.tokenizer, work.batches())
    drawings = {"rfa.png": partial(figures.draw_alignment, found)}
    return work.write("rfa", found.content(), figures.alignment_markdown(found), drawings)


def analyze_perturbation(request: AnalyzeRequest) -> Analysis:
    """Damage that one wrong token does, scale by scale (Markov-VAR). Raises `UserError` likewise."""
    work, distance = _Work(request), None
    if request.features != "none":
        data = work.data()
        extractor = open_features(request.features, request.feature_size, data, work.out, work.device)
        assert extractor is not None
        distance = FrechetDistance(extractor).to(work.device)
        for batch in data.ordered_dataloader("val"):
            distance.update(to_unit(batch["image"].to(work.device)), real=True)
    damages, pictures = perturb(
        work.model,
        work.tokenizer,
        request.settings,
        request.images,
        seed=request.seed,
        batch_size=request.batch_size,
        perceptual=open_lpips(request.lpips, work.device),
        distance=distance,
    )
    name, sides = None if distance is None else distance.extractor.name, work.model.pyramid.sides
    content = {
        "images": request.images,
        "features": name,
        "fid_reference_images": 0 if distance is None else distance.count(real=True),
        "damages": [asdict(damage) for damage in damages],
    }
    drawings = {
        "perturbation.png": partial(figures.draw_damages, damages, sides, name),
        "perturbed.png": partial(figures.draw_perturbed, pictures, sides),
    }
    markdown = figures.perturbation_markdown(damages, sides, request.images, name)
    return work.write("perturbation", content, markdown, drawings)


def analyze_scaling(sweep: str | Path, out: str | Path | None = None) -> Analysis:
    """Power laws of loss and error rate over the runs of a sweep's folder (VAR), written there unless ``out`` is given.

    Raises:
        UserError: no finished sweep over next-scale models of at least two sizes.
    """
    folder = Path(sweep)
    if not (folder / "sweep.json").is_file():
        raise UserError(f"{folder}: has no sweep.json; give the folder of a finished `mvar sweep`")
    content = read_json(folder / "sweep.json", "cannot be read ({error}); remove it and run again")
    runs = content.get("runs") if isinstance(content, dict) else None
    if not isinstance(runs, list):
        raise UserError(f"{folder / 'sweep.json'}: holds no runs; make it anew with mvar sweep")
    found = scaling.scaling_of(runs)
    numbers = {"sweep": str(folder), **scaling.scaling_content(found)}
    drawings = {"scaling.png": partial(scaling.draw_scaling, found)}
    return _written("scaling", numbers, scaling.scaling_markdown(found), drawings, Path(out or folder))


class _Work:
    """The model, the images and the folder of a request. Raises `UserError` for what is missing."""

    def __init__(self, request: AnalyzeRequest) -> None:
        self.request, self.out = request, request.folder
        self.source = request.source.inside_run()
        check_folder(self.out, "``out``")
        self.device = choose_device(request.device)
        self.model, self.tokenizer = self.source.load(self.device)

    def data(self) -> ShardsDataModule:
        """The model's shards, as far as the number of classes tells."""
        path, request = self.request.data, self.request
        if path is None:
            raise UserError(
                "``data``: the analysis looks at real images; name a shard folder (perturb runs without: "
                "``features`` none)"
            )
        cutting = (request.resize_ratio, request.crop)
        data = open_data(path, self.tokenizer.image_size, "val", request.batch_size, *cutting)
        if data.num_classes != self.model.num_classes:
            raise UserError(
                f"``data`` {path}: has {data.num_classes} classes, the model {self.model.num_classes}; "
                "give the data that it was trained on"
            )
        return data

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The first validation images with their labels, on the device."""
        data, left = self.data(), self.request.images
        if data.val_samples < left:
            print(f"--images {left}: {data.path} has {data.val_samples} validation images; all of them are used")
        for batch in data.ordered_dataloader("val"):
            image_B3HW = normalize(batch["image"][:left].to(self.device))
            label_B = batch["label"][:left].to(self.device)
            left -= len(image_B3HW)
            yield image_B3HW, label_B
            if left == 0:
                return

    def write(self, name: str, found: Mapping[str, Any], markdown: str, drawings: Mapping[str, Draw]) -> Analysis:
        about = {
            "checkpoint": self.source.path,
            "attention": repr(self.model.strategy),
            "depth": self.model.depth,
            "data": self.request.data,
        }
        return _written(name, {**about, **found}, markdown, drawings, self.out)


def _written(
    name: str, content: Mapping[str, Any], markdown: str, drawings: Mapping[str, Draw], folder: Path
) -> Analysis:
    """``NAME.json``, ``NAME.md`` and the drawings, all or none."""
    numbers = json.dumps(content, indent=1) + "\n"
    return Analysis(markdown, write_report(folder, {f"{name}.json": numbers, f"{name}.md": markdown, **drawings}))
