"""Evaluation of a tokenizer: one pass over images, every number from it.

B batch, L all tokens, K scales, V vocabulary, N images kept for pictures, HW pixels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvar_lightning.checkpoints.source import beside, open_tokenizer
from mvar_lightning.data.reading.loader import loading
from mvar_lightning.errors import UserError, check_counts
from mvar_lightning.evaluation.features import OTHER_SPLIT, open_features, open_lpips
from mvar_lightning.evaluation.image_sources import SizeWatch, open_data
from mvar_lightning.evaluation.reports import Examples, FrechetReport, ScaleReport, TokenizerReport, write_evaluation
from mvar_lightning.metrics import FeatureExtractor, FrechetDistance, as_saved
from mvar_lightning.metrics.quality import SMALLEST_SSIM_SIDE, CodebookUsage, psnr, ssim
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.tools.compute import choose_device, evaluating
from mvar_lightning.tools.console import progress
from mvar_lightning.tools.drawing import normalize, to_unit
from mvar_lightning.tools.files import check_folder

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
    if num_images is not None and num_images < 1:
        raise UserError(f"images {num_images}: give 1 or more, or leave it out for all of them")
    if progressive_images < 1:
        raise UserError(f"progressive images {progressive_images}: give 1 or more")
    for name, parameter in tokenizer.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"tokenizer: its weight {name} is NaN or infinite; give an earlier checkpoint")
    work = _Evaluation(tokenizer.to(device), extractor, lpips, progressive_images, torch.device(device))
    with evaluating(tokenizer):
        for image_B3HW in _first(loader, num_images):
            work.see(image_B3HW)
            progress(len(image_B3HW))
    if work.images == 0:
        raise UserError("evaluation: there is not one image to reconstruct; fill the data folder or choose another")
    if work.distance is not None and work.images > 1:
        work.frechet = work.rfid(work.distance, () if floor_loader is None else _first(floor_loader, work.images))
    return work.report()


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
        self.distance = None if extractor is None else FrechetDistance(extractor).to(device)
        self.usage = CodebookUsage(tokenizer.pyramid, tokenizer.vocab_size).to(device)
        self.images = self.progressive = 0
        self.sums = {"psnr": 0.0, "ssim": 0.0, "lpips": 0.0}
        self.psnr_sum_K = torch.zeros(tokenizer.pyramid.num_scales, dtype=torch.float64)
        self.frechet: FrechetReport | None = None
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.strips: list[Tensor] = []

    def see(self, image_B3HW: Tensor) -> None:
        """Reconstruct a batch, as the loader gave it, and add what it says."""
        image_B3HW = normalize(image_B3HW.to(self.device)).float()
        idx_BL = self.tokenizer.encode(image_B3HW)
        self.usage.update(idx_BL)
        original_B3HW = to_unit(image_B3HW)
        again_B3HW = self._decode(idx_BL, original_B3HW)
        if not torch.isfinite(again_B3HW).all():
            raise UserError(
                f"reconstruction of images {self.images + 1} to {self.images + len(again_B3HW)}: some pixels are NaN "
                "or infinite; the tokenizer's weights are damaged, give an earlier checkpoint"
            )
        self.sums["psnr"] += float(psnr(original_B3HW, again_B3HW).double().sum())
        self.sums["ssim"] += float(ssim(original_B3HW, again_B3HW).double().sum())
        if self.lpips is not None:
            self.sums["lpips"] += float(self.lpips(as_saved(again_B3HW) * 2 - 1, image_B3HW).double().sum())
        if self.distance is not None:
            self.distance.update(original_B3HW, real=True)
            self.distance.update(again_B3HW, real=False)
        if self.images < NUM_PAIRS:
            wanted = NUM_PAIRS - self.images
            self.kept.append((original_B3HW[:wanted].cpu(), again_B3HW[:wanted].cpu()))
        self.images += len(image_B3HW)

    def _decode(self, idx_BL: Tensor, original_B3HW: Tensor) -> Tensor:
        """Reconstructions in [0, 1]; after each scale, too, where the image is still one of those wanted so."""
        wanted = min(max(self.progressive_images - self.progressive, 0), len(idx_BL))
        parts = []
        if wanted:
            after = [to_unit(image_B3HW) for image_B3HW in self.tokenizer.progressive(idx_BL[:wanted])]
            for scale, image_B3HW in enumerate(after):
                self.psnr_sum_K[scale] += psnr(original_B3HW[:wanted], image_B3HW).double().sum().cpu()
            if self.progressive < NUM_STRIPS:
                self.strips.append(torch.stack(after, dim=1)[: NUM_STRIPS - self.progressive].cpu())
            self.progressive += wanted
            parts.append(after[-1])
        if wanted < len(idx_BL):
            parts.append(to_unit(self.tokenizer.decode(idx_BL[wanted:])))
        return torch.cat(parts)

    def rfid(self, distance: FrechetDistance, others: Iterable[Tensor]) -> FrechetReport:
        """The distance of the reconstructions, and of other real images put in their place."""
        extractor, rfid = distance.extractor, distance.compute()
        distance.reset_generated()
        for image_B3HW in others:
            distance.update(to_unit(image_B3HW.to(self.device)), real=False)
        count = distance.count(real=False)
        floor = distance.compute() if count > 1 else None
        return FrechetReport(extractor.name, extractor.num_features, rfid, self.images, floor, count)

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
        if self.tokenizer.image_size < SMALLEST_SSIM_SIDE:
            yield f"SSIM left out: its window needs {SMALLEST_SSIM_SIDE} pixels or more."
        if self.progressive < self.images:
            yield f"PSNR after each scale: of the first {self.progressive:,} images."
        if float(self.usage.counts_KV.sum(dim=1).min()) < self.tokenizer.vocab_size:
            yield (
                "Scales with fewer tokens seen than codes: perplexity and entropy-coded bits are bounded by the tokens "
                "seen, not by the codebook; more images raise them."
            )


def _first(loader: Batches, count: int | None) -> Iterator[Tensor]:
    """The images of the first ``count`` samples, batch by batch."""
    left = sys.maxsize if count is None else count
    with loading(loader) as batches:
        for batch in batches:
            image_B3HW = batch["image"][:left]
            left -= len(image_B3HW)
            if len(image_B3HW):
                yield image_B3HW
            if left <= 0:
                return


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

    Raises:
        UserError: a number below 1.
    """

    checkpoint: str
    data: str
    out: str | Path | None = None
    split: str = "val"
    images: int | None = None
    progressive_images: int = 512
    image_size: int | None = None
    patch_nums: Sequence[int] | None = None
    resize_ratio: float = 1.125
    crop: str = "center"
    features: str = "data"
    feature_size: int | None = None
    lpips: str | None = None
    batch_size: int = 32
    workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        counts = ("images", "progressive_images", "batch_size", "feature_size")
        check_counts(**{name: getattr(self, name) for name in counts})


class EvaluatedTokenizer(NamedTuple):
    """The numbers, and the files they went to."""

    report: TokenizerReport
    files: list[Path]


def run_tokenizer_evaluation(request: EvaluateTokenizerRequest) -> EvaluatedTokenizer:
    """`evaluate_tokenizer` on a split of shards, with the other split as its floor, written as a report.

    Raises:
        UserError: as `evaluate_tokenizer`; a checkpoint, data or features that are missing or do not fit together.
    """
    device = choose_device(request.device)
    out = Path(request.out) if request.out is not None else beside(request.checkpoint)
    check_folder(out, "``out``")
    tokenizer = open_tokenizer(request.checkpoint, request.patch_nums, request.image_size)
    size, split, other = tokenizer.image_size, request.split, OTHER_SPLIT[request.split]
    cutting = (request.resize_ratio, request.crop)
    data = open_data(request.data, size, split, request.batch_size, *cutting, request.workers)
    watch = data.val_transform = SizeWatch(data.val_transform, size)
    lpips = open_lpips(request.lpips, device)
    extractor = open_features(request.features, request.feature_size, data, out, device)
    total = data.index.split(split).samples
    with progress("images", min(total, request.images or total)) as bar:
        report = evaluate_tokenizer(
            tokenizer,
            data.ordered_dataloader(split),
            extractor=extractor,
            floor_loader=data.ordered_dataloader(other) if extractor and data.index.split(other).samples else None,
            lpips=lpips,
            num_images=request.images,
            progressive_images=request.progressive_images,
            device=device,
            progress=bar.advance,
        )
    if watch.enlarged:
        note = f"Images of less than {size} pixels were enlarged: the figures are of blurred images."
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
