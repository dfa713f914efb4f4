"""The papers' analyses from a request to files: which model, which images, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvar_lightning.checkpoints.source import Source, beside
from mvar_lightning.data.image_data import ShardsDataModule
from mvar_lightning.errors import UserError, check_counts
from mvar_lightning.evaluation.features import open_features, open_lpips
from mvar_lightning.evaluation.image_sources import Numbered, numbered, open_data
from mvar_lightning.evaluation.papers import figures, scaling
from mvar_lightning.evaluation.papers.alignment import residual_feature_alignment
from mvar_lightning.evaluation.papers.attention_mass import attention_mass
from mvar_lightning.evaluation.papers.perturbation import perturb
from mvar_lightning.evaluation.reports import Draw, write_report
from mvar_lightning.metrics import FeatureExtractor, FrechetDistance
from mvar_lightning.sampling.sampler import SamplingSettings
from mvar_lightning.tools.compute import choose_device
from mvar_lightning.tools.drawing import normalize, to_unit
from mvar_lightning.tools.files import check_folder, read_json
from mvar_lightning.tools.ranks import Ranks


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
        devices: processes of this machine, each on its own GPU; one, or those of torchrun or SLURM, if not given.
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
    devices: int | None = None
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    features: str = "data"
    feature_size: int | None = None
    lpips: str | None = None

    def __post_init__(self) -> None:
        check_counts(images=self.images, batch_size=self.batch_size, devices=self.devices)

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out is not None else beside(Path(self.source.path).resolve(), "analysis")


class Analysis(NamedTuple):
    """The tables, and the files they, the numbers and the pictures went to."""

    markdown: str
    files: list[Path]


def analyze_attention(request: AnalyzeRequest) -> Analysis | None:
    """Attention of each scale to which scale, and inside which window (MVAR); None on all processes but the first.
    Raises `UserError` for input that does not fit."""
    return _shared(request, _attention)


def _attention(ranks: Ranks, request: AnalyzeRequest) -> Analysis | None:
    work = _begun(ranks, request)
    mass = attention_mass(work.model, work.tokenizer, work.batches(), ranks=ranks)
    if mass is None:
        return None
    drawings = {
        "attention_scales.png": partial(figures.draw_on_scale, mass),
        "attention_windows.png": partial(figures.draw_within, mass),
    }
    return work.write("attention", mass.content(), figures.attention_markdown(mass), drawings)


def analyze_alignment(request: AnalyzeRequest) -> Analysis | None:
    """Alignment of a scale's residual with the inputs of earlier ones (Markov-VAR). Answers likewise."""
    return _shared(request, _alignment)


def _alignment(ranks: Ranks, request: AnalyzeRequest) -> Analysis | None:
    work = _begun(ranks, request)
    found = residual_feature_alignment(work.model, work.tokenizer, work.batches(), ranks)
    if found is None:
        return None
    drawings = {"rfa.png": partial(figures.draw_alignment, found)}
    return work.write("rfa", found.content(), figures.alignment_markdown(found), drawings)


def analyze_perturbation(request: AnalyzeRequest) -> Analysis | None:
    """Damage that one wrong token does, scale by scale (Markov-VAR). Answers likewise."""
    return _shared(request, _perturbation)


def _perturbation(ranks: Ranks, request: AnalyzeRequest) -> Analysis | None:
    work = _begun(ranks, request)
    distance = work.distance() if request.features != "none" else None
    damages, pictures = perturb(
        work.model,
        work.tokenizer,
        request.settings,
        request.images,
        seed=request.seed,
        batch_size=request.batch_size,
        perceptual=open_lpips(request.lpips, work.device),
        distance=distance,
        ranks=ranks,
    )
    if not ranks.is_first:
        return None
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


def _shared(request: AnalyzeRequest, job: Callable[[Ranks, AnalyzeRequest], Analysis | None]) -> Analysis | None:
    return Ranks.of(choose_device(request.device).type, request.devices).run(job, request)


def _begun(ranks: Ranks, request: AnalyzeRequest) -> _Work:
    ranks.check_same(**vars(request))
    with ranks.agreed():
        return _Work(ranks, request)


class _Work:
    """The model, the images and the folder of a request. Raises `UserError` for what is missing."""

    def __init__(self, ranks: Ranks, request: AnalyzeRequest) -> None:
        self.ranks, self.request, self.out = ranks, request, request.folder
        self.source = request.source.inside_run()
        if ranks.is_first:
            check_folder(self.out, "``out``")
        self.device = torch.device(ranks.device)
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
        channels = self.tokenizer.image_channels
        data = open_data(path, self.tokenizer.image_size, "val", request.batch_size, *cutting, channels=channels)
        if data.num_classes != self.model.num_classes:
            raise UserError(
                f"``data`` {path}: has {data.num_classes} classes, the model {self.model.num_classes}; "
                "give the data that it was trained on"
            )
        return data

    def batches(self) -> Iterator[tuple[Tensor, Tensor] | None]:
        """This process' turns among the first validation images with their labels, on the device."""
        with self.ranks.agreed():
            data, count = self.data(), self.request.images
        if data.val_samples < count and self.ranks.is_first:
            print(f"--images {count}: {data.path} has {data.val_samples} validation images; all of them are used")
        for turn in numbered(self.ranks, self._turns(data), count):
            if turn is None:
                yield None
            else:
                image_B3HW, label_B = turn.batch["image"], turn.batch["label"]
                yield normalize(image_B3HW.to(self.device)), label_B.to(self.device)

    def distance(self) -> FrechetDistance:
        """To the validation images; on the first process, as the others have none of them."""
        request, ranks = self.request, self.ranks

        def opened() -> FeatureExtractor | None:
            return open_features(request.features, request.feature_size, data, self.out, self.device)

        with ranks.agreed():
            data = self.data()
            extractor = opened() if ranks.is_first else None  # before the others: it trains the classifier
        with ranks.agreed():
            extractor = extractor or opened()
        assert extractor is not None
        distance = FrechetDistance(extractor, alone=True).to(self.device)

        def features(turn: Numbered) -> Tensor:
            return distance.features(to_unit(turn.batch["image"].to(self.device))).cpu()

        for features_BF in ranks.each(features, numbered(ranks, self._turns(data))):
            distance.add(features_BF, real=True)
        return distance

    def _turns(self, data: ShardsDataModule) -> Iterable[Any]:
        return data.turn_loader("val", self.ranks.rank, self.ranks.size)

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
