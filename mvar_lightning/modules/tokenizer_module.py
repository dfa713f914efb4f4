"""Training of the multi-scale tokenizer as a LightningModule.

Shapes: B batch, L all tokens, K scales, HW pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import (
    CodebookUsage,
    L1Loss,
    L2Loss,
    LossPart,
    MultiScaleTokenizer,
    QuantizerLoss,
    fingerprint_of,
)
from mvar_lightning.tokenizer.losses import WeightedLoss

CHECKPOINT_FORMAT = 1


def warmup_cosine(step: int, warmup_steps: int, total_steps: float, final_ratio: float) -> float:
    """Factor of the learning rate at a step: linear from 1 / warmup_steps to 1, then half a cosine to ``final_ratio``.

    Stays at 1 after the warm-up where the number of steps is not known (infinite).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class TokenizerModule(L.LightningModule):
    """Fits a ``MultiScaleTokenizer`` to images.

    Batches are dictionaries with ``image``: float (B, 3, H, W) in [-1, 1].

    Args:
        scales, vocab_size, code_dim, channels, channel_multipliers, num_res_blocks, phi_layers, phi_ratio, beta,
            codebook_std, norm_groups: the tokenizer's (see ``MultiScaleTokenizer``).
        losses: parts of the loss; without any, L1, L2 and the quantizer's with weight 1.
        lr: peak learning rate of AdamW.
        betas: AdamW's.
        weight_decay: on convolution weights; none on biases, norms and codes.
        warmup: share of all steps with a rising learning rate.
        final_lr_ratio: last learning rate over the peak.
    """

    def __init__(
        self,
        scales: Sequence[int],
        vocab_size: int = 4096,
        code_dim: int = 32,
        channels: int = 160,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        phi_layers: int = 4,
        phi_ratio: float = 0.5,
        beta: float = 0.25,
        codebook_std: float = 0.1,
        norm_groups: int = 32,
        losses: list[LossPart] | None = None,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup: float = 0.05,
        final_lr_ratio: float = 0.05,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise UserError(f"lr {lr}: must be positive")
        if not 0 <= warmup < 1:
            raise UserError(f"warmup {warmup}: the share of steps with a rising learning rate must be in [0, 1)")
        self.tokenizer = MultiScaleTokenizer(
            scales,
            vocab_size=vocab_size,
            code_dim=code_dim,
            channels=channels,
            channel_multipliers=channel_multipliers,
            num_res_blocks=num_res_blocks,
            phi_layers=phi_layers,
            phi_ratio=phi_ratio,
            beta=beta,
            codebook_std=codebook_std,
            norm_groups=norm_groups,
        )
        self.loss = WeightedLoss([L1Loss(), L2Loss(), QuantizerLoss()] if losses is None else losses)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup, self.final_lr_ratio = warmup, final_lr_ratio
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.usage = CodebookUsage(self.tokenizer.pyramid, vocab_size)

    def setup(self, stage: str) -> None:
        size = self.tokenizer.image_size
        image_size = getattr(getattr(self.trainer, "datamodule", None), "image_size", size)
        if image_size != size:
            raise UserError(
                f"scales {self.tokenizer.pyramid}: with downsampling {self.tokenizer.downsampling} they make images of "
                f"{size} pixels, but data.image_size is {image_size}; change the scales, the number of "
                "channel_multipliers or image_size"
            )

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Reconstructions in [-1, 1]."""
        return self.tokenizer(image_B3HW).reconstruction_B3HW.clamp(-1, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image_B3HW = batch["image"]
        total, terms = self.loss(self.tokenizer(image_B3HW), image_B3HW)
        self._check_finite(total, terms)
        self.log("train/loss", total.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        return total

    def on_validation_epoch_start(self) -> None:
        """Start from zero, with tensors of this loop: those that inference mode left behind take no update in a fit."""
        for metric in (self.psnr, self.ssim, self.usage):
            metric.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        image_B3HW = batch["image"]
        output = self.tokenizer(image_B3HW)
        total, _ = self.loss(output, image_B3HW)
        reconstruction = (output.reconstruction_B3HW.float().clamp(-1, 1) + 1) / 2
        original = (image_B3HW.float() + 1) / 2
        self.psnr.update(reconstruction, original)
        self.ssim.update(reconstruction, original)
        self.usage.update(output.idx_BL)
        self.log("val/loss", total, batch_size=len(image_B3HW), sync_dist=True)
        self.log("val/psnr", self.psnr, prog_bar=True, batch_size=len(image_B3HW))
        self.log("val/ssim", self.ssim, batch_size=len(image_B3HW))

    def on_validation_epoch_end(self) -> None:
        """Codebook statistics need every token of the epoch, so they come last (reduced over the processes)."""
        for name, value_K in self.usage.compute().items():
            stem = name.removesuffix("_K")
            self.log_dict({f"codebook/{stem}_scale_{scale}": value for scale, value in enumerate(value_K)})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        decayed = [p for p in self.tokenizer.parameters() if p.requires_grad and p.ndim == 4]
        rest = [p for p in self.tokenizer.parameters() if p.requires_grad and p.ndim != 4]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        total_steps = self.trainer.estimated_stepping_batches
        warmup_steps = 0 if math.isinf(total_steps) else round(self.warmup * total_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps, self.final_lr_ratio)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what rebuilds the tokenizer, in plain values.

        The hash is that of the weights in the file: with averaging on they are not the ones in training.
        """
        state = {key.removeprefix("tokenizer."): tensor for key, tensor in checkpoint["state_dict"].items()}
        checkpoint["mvar_lightning"] = {
            "format": CHECKPOINT_FORMAT,
            "kind": "tokenizer",
            "tokenizer": self.tokenizer.config,
            "tokenizer_hash": fingerprint_of(self.tokenizer, state),
        }

    def _check_finite(self, total: Tensor, terms: dict[str, Tensor]) -> None:
        if torch.isfinite(total):
            return
        bad = {name: term.item() for name, term in terms.items() if not torch.isfinite(term)} or {"loss": total.item()}
        name, value = next(iter(bad.items()))
        raise UserError(
            f"loss term {name!r} is {value} at step {self.global_step}: "
            "check the images for NaN, lower lr, or resume from the last checkpoint with a smaller weight for it"
        )
