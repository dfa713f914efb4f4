"""Evaluation of a tokenizer: one pass over images, every number from it.

B batch, L all tokens, K scales, V vocabulary, N images kept for pictures, HW pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvar_lightning.checkpoints.source import beside, open_tokenizer
from mvar_lightning.errors import UserError, check_counts
from mvar_lightning.evaluation.features import OTHER_SPLIT, open_features, open_lpips
from mvar_lightning.evaluation.image_sources import Numbered, SizeWatch, numbered, open_data
from mvar_lightning.evaluation.reports import Examples, FrechetReport, ScaleReport, TokenizerReport, write_evaluation
from mvar_lightning.metrics import FeatureExtractor, FrechetDistance, as_saved
from mvar_lightning.metrics.quality import SMALLEST_SSIM_SIDE, CodebookUsage, psnr, ssim
from mvar_lightning.pyramid import Scales, Size, height_width, short
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.tools.compute import choose_device, evaluating
from mvar_lightning.tools.console import progress
from mvar_lightning.tools.drawing import normalize, to_unit
from mvar_lightning.tools.files import check_folder
from mvar_lightning.tools.ranks import ALONE, Ranks

Batches = Iterable[Mapping[str, Any]]
"""Batches with ``image``: uint8 (B, 3, H, W), or float in [-1, 1]."""

NUM_PAIRS, NUM_STRIPS = 16, 6
"""Images kept for the pictures: with their reconstruction, and after each scale."""


def evaluate_tokenizer(
    tokenizer: MultiScaleTokenizer,
    loader: Batches,
    *,
    extractor: FeatureExtractor | None = None,
    floor_loader: Batches | None = None,
    lpips: nn.Module | None = None,
    num_images: int | None = None,
    progressive_images: int = 512,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda images: None,
) -> TokenizerReport:
    """Everything about a tokenizer on the images of ``loader``, each read once; no randomness.

    Args:
        tokenizer: any; it is moved to ``device``, and left in its own mode.
        loader: the images to reconstruct.
        extractor: features of the rFID; none leaves it out.
        floor_loader: other real images, as many of which as of ``loader``'s give the floor beside the rFID.
        lpips: (images, images), both in [-1, 1], to distances (B,); none leaves LPIPS out.
        num_images: the first so many images; all if not given.
        progressive_images: how many of them are decoded after each scale, which costs K decodings instead of one.
        device: where to compute, in float32.
        progress: called with the number of images after each batch.

    Raises:
        UserError: no image, images of another size or not finite, or weights that are not finite.
    """
    arguments = (extractor, floor_loader, lpips, num_images, progressive_images, device)
    report = _evaluate(ALONE, tokenizer, loader, *arguments, progress)
    assert report is not None
    return report


def _evaluate(
    ranks: Ranks,
    tokenizer: MultiScaleTokenizer,
    loader: Batches,
    extractor: FeatureExtractor | None,
    floor_loader: Batches | None,
    lpips: nn.Module | None,
    num_images: int | None,
    progressive_images: int,
    device: torch.device | str,
    progress: Callable[[int], None],
) -> TokenizerReport | None:
    """`evaluate_tokenizer` by several processes, each with loaders of its own turns; None on all but the first."""
    if num_images is not None and num_images < 1:
        raise UserError(f"images {num_images}: give 1 or more, or leave it out for all of them")
    if progressive_images < 1:
        raise UserError(f"progressive images {progressive_images}: give 1 or more")
    for name, parameter in tokenizer.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"tokenizer: its weight {name} is NaN or infinite; give an earlier checkpoint")
    work = _Evaluation(tokenizer.to(device), extractor, lpips, progressive_images, torch.device(device))
    with evaluating(tokenizer):
        for seen in ranks.each(work.look, numbered(ranks, loader, num_images)):
            work.add(seen)
            progress(seen.images)
    images = ranks.from_first(lambda: work.images)
    if images == 0:
        raise UserError("evaluation: there is not one image to reconstruct; fill the data folder or choose another")
    if work.distance is not None and images > 1:
        others = () if floor_loader is None else numbered(ranks, floor_loader, images)
        work.compare(ranks, work.distance, others)
    return work.report() if ranks.is_first else None


class _Seen(NamedTuple):
    """What a batch says: sums over its images, its tokens, features of originals and copies, and some pictures."""

    images: int
    idx_BL: Tensor
    sums: dict[str, float]
    progressive: int
    psnr_sum_K: Tensor
    features: tuple[Tensor, Tensor] | None
    kept: tuple[Tensor, Tensor] | None
    strips: Tensor | None


class _Evaluation:
    """Sums over the images seen so far."""

    def __init__(
        self,
        tokenizer: MultiScaleTokenizer,
        extractor: FeatureExtractor | None,
        lpips: nn.Module | None,
        progressive_images: int,
        device: torch.device,
    ) -> None:
        self.tokenizer, self.device, self.progressive_images = tokenizer, device, progressive_images
        self.lpips = None if lpips is None else lpips.to(device).eval()
        self.distance = None if extractor is None else FrechetDistance(extractor, alone=True).to(device)
        self.usage = CodebookUsage(tokenizer.pyramid, tokenizer.vocab_size, alone=True).to(device)
        self.images = self.progressive = 0
        self.sums = {"psnr": 0.0, "ssim": 0.0, "lpips": 0.0}
        self.psnr_sum_K = torch.zeros(tokenizer.pyramid.num_scales, dtype=torch.float64)
        self.frechet: FrechetReport | None = None
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.strips: list[Tensor] = []

    def look(self, turn: Numbered) -> _Seen:
        """Reconstruct a batch, as the loader gave it; says what it tells."""
        first, image_B3HW = turn.first, normalize(turn.batch["image"].to(self.device)).float()
        idx_BL = self.tokenizer.encode(image_B3HW)
        original_B3HW = to_unit(image_B3HW)
        wanted = min(max(self.progressive_images - first, 0), len(idx_BL))
        after = [to_unit(image_B3HW) for image_B3HW in self.tokenizer.progressive(idx_BL[:wanted])] if wanted else []
        rest = [to_unit(self.tokenizer.decode(idx_BL[wanted:]))] if wanted < len(idx_BL) else []
        again_B3HW = torch.cat([*after[-1:], *rest])
        if not torch.isfinite(again_B3HW).all():
            raise UserError(
                f"reconstruction of images {first + 1} to {first + len(again_B3HW)}: some pixels are NaN "
                "or infinite; the tokenizer's weights are damaged, give an earlier checkpoint"
            )
        sums = {
            "psnr": float(psnr(original_B3HW, again_B3HW).double().sum()),
            "ssim": float(ssim(original_B3HW, again_B3HW).double().sum()),
        }
        if self.lpips is not None:
            sums["lpips"] = float(self.lpips(as_saved(again_B3HW) * 2 - 1, image_B3HW).double().sum())
        features, distance = None, self.distance
        if distance is not None:
            features = (distance.features(original_B3HW).cpu(), distance.features(again_B3HW).cpu())
        pairs, strips = max(NUM_PAIRS - first, 0), max(NUM_STRIPS - first, 0)
        return _Seen(
            images=len(image_B3HW),
            idx_BL=idx_BL.cpu(),
            sums=sums,
            progressive=wanted,
            psnr_sum_K=torch.stack([psnr(original_B3HW[:wanted], image).double().sum().cpu() for image in after])
            if after
            else torch.zeros_like(self.psnr_sum_K),
            features=features,
            kept=(original_B3HW[:pairs].cpu(), again_B3HW[:pairs].cpu()) if pairs else None,
            strips=torch.stack(after, dim=1)[:strips].cpu() if after and strips else None,
        )

    def add(self, seen: _Seen) -> None:
        """Add what a batch says, batch after batch."""
        self.images += seen.images
        self.progressive += seen.progressive
        self.usage.update(seen.idx_BL.to(self.device))
        for name, value in seen.sums.items():
            self.sums[name] += value
        self.psnr_sum_K += seen.psnr_sum_K
        if self.distance is not None and seen.features is not None:
            self.distance.add(seen.features[0], real=True)
            self.distance.add(seen.features[1], real=False)
        self.kept += [] if seen.kept is None else [seen.kept]
        self.strips += [] if seen.strips is None else [seen.strips]

    def compare(self, ranks: Ranks, distance: FrechetDistance, others: Iterable[Numbered | None]) -> None:
        """The distance of the reconstructions, and of other real images put in their place."""

        def features(turn: Numbered) -> Tensor:
            return distance.features(to_unit(turn.batch["image"].to(self.device))).cpu()

        with ranks.agreed():
            rfid = distance.compute() if ranks.is_first else math.nan
        distance.reset_generated()
        for features_BF in ranks.each(features, others):
            distance.add(features_BF, real=False)
        count = distance.count(real=False)
        floor = distance.compute() if count > 1 else None
        extractor = distance.extractor
        self.frechet = FrechetReport(extractor.name, extractor.num_features, rfid, self.images, floor, count)

    def report(self) -> TokenizerReport:
        mean = {name: value / self.images for name, value in self.sums.items()}
        originals, copies = zip(*self.kept, strict=True)
        return TokenizerReport(
            images=self.images,
            image_size=self.tokenizer.image_size,
            vocab_size=self.tokenizer.vocab_size,
            psnr=mean["psnr"],
            ssim=None if math.isnan(mean["ssim"]) else mean["ssim"],
            lpips=None if self.lpips is None else mean["lpips"],
            frechet=self.frechet,
            scales=self._scales(),
            progressive_images=self.progressive,
            examples=Examples(torch.cat(originals), torch.cat(copies), torch.cat(self.strips)),
            notes=tuple(self._notes()),
        )

    def _scales(self) -> tuple[ScaleReport, ...]:
        perplexity_K = self.usage.compute()["perplexity_K"].reshape(-1).tolist()  # torchmetrics squeezes a single scale
        psnr_K, counts_KV = (self.psnr_sum_K / self.progressive).tolist(), self.usage.counts_KV.cpu()
        scales = []
        for scale, counts_V in enumerate(counts_KV):
            side, seen, used = self.tokenizer.pyramid.sides[scale], int(counts_V.sum()), int((counts_V > 0).sum())
            perplexity = max(perplexity_K[scale], 1.0)  # rounding may leave it a hair below
            scales.append(ScaleReport(side, seen, used, min(seen, len(counts_V)), perplexity, psnr_K[scale]))
        return tuple(scales)

    def _notes(self) -> Iterator[str]:
        if self.lpips is None:
            yield "LPIPS left out: no VGG weights were given."
        if self.distance is not None and self.frechet is None:
            yield "rFID left out: it needs two images or more."
        if self.frechet is not None and self.images <= self.frechet.num_features:
            yield (
                f"rFID: {self.images:,} images are too few for {self.frechet.num_features:,} features; "
                "read it only beside the FID of other real images."
            )
        if min(height_width(self.tokenizer.image_size)) < SMALLEST_SSIM_SIDE:
            yield f"SSIM left out: its window needs {SMALLEST_SSIM_SIDE} pixels or more."
        if self.progressive < self.images:
            yield f"PSNR after each scale: of the first {self.progressive:,} images."
        if float(self.usage.counts_KV.sum(dim=1).min()) < self.tokenizer.vocab_size:
            yield (
                "Scales with fewer tokens seen than codes: perplexity and entropy-coded bits are bounded by the tokens "
                "seen, not by the codebook; more images raise them."
            )


# The whole of it, from paths to files.


@dataclass(frozen=True)
class EvaluateTokenizerRequest:
    """Which tokenizer, on which images, and where the report goes.

    Args:
        checkpoint: a run's folder, a saved folder, a Lightning checkpoint, or a released file.
        data: shard folder; an embedded data set is made if it is missing.
        out: where to write; ``evaluation/`` beside the checkpoint if not given.
        split: images to reconstruct, ``val`` or ``train``.
        images: the first so many; all if not given.
        progressive_images: how many of them are decoded after each scale.
        image_size, patch_nums: what a released file does not tell (see `open_tokenizer`).
        resize_ratio, crop: how images are cut (`runs.run.settle_cutting` tells how a run's were).
        features: of the rFID: ``data``, ``inception``, ``none``, or a TorchScript file.
        feature_size: to which images are resized for such a file.
        lpips: VGG weights; without them LPIPS is left out.
        batch_size, workers: images at a time, and loading processes.
        device: ``auto``, ``cpu`` or ``cuda``.
        devices: processes of this machine, each on its own GPU; one, or those of torchrun or SLURM, if not given.

    Raises:
        UserError: a number below 1.
    """

    checkpoint: str
    data: str
    out: str | Path | None = None
    split: str = "val"
    images: int | None = None
    progressive_images: int = 512
    image_size: Size | None = None
    patch_nums: Scales | None = None
    resize_ratio: float = 1.125
    crop: str = "center"
    features: str = "data"
    feature_size: int | None = None
    lpips: str | None = None
    batch_size: int = 32
    workers: int = 0
    device: str = "auto"
    devices: int | None = None

    def __post_init__(self) -> None:
        counts = ("devices", "images", "progressive_images", "batch_size", "feature_size")
        check_counts(**{name: getattr(self, name) for name in counts})


class EvaluatedTokenizer(NamedTuple):
    """The numbers, and the files they went to."""

    report: TokenizerReport
    files: list[Path]


def run_tokenizer_evaluation(request: EvaluateTokenizerRequest) -> EvaluatedTokenizer | None:
    """`evaluate_tokenizer` on a split of shards, with the other split as its floor, written as a report; None on all
    processes but the first.

    Raises:
        UserError: as `evaluate_tokenizer`; a checkpoint, data or features that are missing or do not fit together.
    """
    return Ranks.of(choose_device(request.device).type, request.devices).run(_run, request)


def _run(ranks: Ranks, request: EvaluateTokenizerRequest) -> EvaluatedTokenizer | None:
    ranks.check_same(**vars(request))
    device = torch.device(ranks.device)
    out = Path(request.out) if request.out is not None else beside(request.checkpoint)
    with ranks.agreed():
        if ranks.is_first:
            check_folder(out, "``out``")
        tokenizer = open_tokenizer(request.checkpoint, request.patch_nums, request.image_size)
        size, split, other = tokenizer.image_size, request.split, OTHER_SPLIT[request.split]
        cutting = (request.resize_ratio, request.crop)
        channels = tokenizer.image_channels
        data = open_data(request.data, size, split, request.batch_size, *cutting, request.workers, channels)
        watch = data.val_transform = SizeWatch(data.val_transform, size)
        lpips = open_lpips(request.lpips, device)
        extractor = None
        if ranks.is_first:  # before the others: it trains the classifier where there is none
            extractor = open_features(request.features, request.feature_size, data, out, device)
    with ranks.agreed():
        if not ranks.is_first:
            extractor = open_features(request.features, request.feature_size, data, out, device)
    total = data.index.split(split).samples
    turn = (ranks.rank, ranks.size)
    with progress("images", min(total, request.images or total)) if ranks.is_first else nullcontext() as bar:
        report = _evaluate(
            ranks,
            tokenizer,
            data.turn_loader(split, *turn),
            extractor,
            data.turn_loader(other, *turn) if extractor and data.index.split(other).samples else None,
            lpips,
            request.images,
            request.progressive_images,
            device,
            (lambda images: None) if bar is None else bar.advance,
        )
    enlarged = any(ranks.exchange(watch.enlarged))
    if report is None:
        return None
    if enlarged:
        note = f"Images of less than {short(size)} pixels were enlarged: the figures are of blurred images."
        report = replace(report, notes=(*report.notes, note))
    about = {
        "checkpoint": str(request.checkpoint),
        "tokenizer_hash": fingerprint(tokenizer),
        "data": str(request.data),
        "split": split,
        "crop": request.crop,
        "resize_ratio": request.resize_ratio,
        "lpips_weights": request.lpips,
    }
    return EvaluatedTokenizer(report, write_evaluation(report, about, out))
