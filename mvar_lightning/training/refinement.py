"""Training of a masked refinement as a LightningModule: the model it belongs to stays as it is (HMAR, arXiv 2506.04421;
written from its description alone).

B batch, L tokens, l tokens of one scale, Z code dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.attention import FullAttention
from mvar_lightning.checkpoints.refinement import IN_RUN, save_refinement
from mvar_lightning.data.image_data import named
from mvar_lightning.errors import UserError
from mvar_lightning.sampling import Generated, generate
from mvar_lightning.sampling.refinement import PASSES, InPasses, known_codes
from mvar_lightning.sampling.stages import Stages
from mvar_lightning.tools.processes import sum_over_ranks
from mvar_lightning.training.distributed import log_means
from mvar_lightning.training.manual_steps import SAME_WEIGHTS, show_loss
from mvar_lightning.training.next_scale import NextScaleModule
from mvar_lightning.transformer.blocks import VARBlocks
from mvar_lightning.transformer.history import NoHistory
from mvar_lightning.transformer.refinement import Refinement

WHOLE = ("objective", "train_scales", "scale_groups", "scale_cycle")
"""Settings of a model's own training."""


class MaskedLoss(NamedTuple):
    """Mean cross-entropy of masked tokens, with its gradient, and the share whose most likely code is the right one."""

    loss: Tensor
    accuracy: Tensor

    def named(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}loss": self.loss.detach(), f"{prefix}accuracy": self.accuracy}


class RefinementModule(NextScaleModule):
    """Fits a `Refinement` to the masked tokens of every scale but the first.

    One share is drawn for each batch, and of each scale the same so many places are masked in all of its images.

    Args:
        refined_blocks: the last so many blocks are copied and trained (8, or all that there are).
        refinement_passes: how this run's pictures and metrics are sampled, as of `InPasses`: the published passes where
            the pyramid has maps of 2 x 2 or 3 x 3, else one draw a map, without the refinement.
        settings: as of `NextScaleModule`; ``init_from`` names the trained model, whose sizes and axes stand here too.

    Raises:
        UserError: no ``init_from``, more blocks than there are, or a setting of a model's own training, or
            passes that do not fit the scales.
    """

    default_attention = FullAttention()
    default_history = NoHistory()
    default_blocks = VARBlocks()

    def __init__(
        self,
        refined_blocks: int | None = None,
        refinement_passes: dict[int, list[int]] | None = None,
        **settings: Any,
    ) -> None:
        if given := [name for name in WHOLE if settings.get(name) is not None]:
            raise UserError(f"{given[0]}: is of a model's own training; a refinement is trained without")
        if settings.get("init_from") is None:
            raise UserError("init_from: a refinement belongs to a trained model; name it")
        super().__init__(**settings)
        self.refinement = Refinement(self.model, refined_blocks)
        self.model.requires_grad_(False).eval()
        self.passes: InPasses | None = None
        if refinement_passes is not None or any(shape in PASSES for shape in self.model.pyramid.shapes[1:]):
            self.passes = InPasses(self.refinement, refinement_passes)
            self.passes.of(Stages.of(self.model))

    @property
    def trained(self) -> torch.nn.Module:
        return self.refinement

    def train(self, mode: bool = True) -> RefinementModule:
        """The model and the tokenizer stay in evaluation mode, whatever the trainer asks for."""
        super().train(mode)
        self.model.eval()
        return self

    def masked_loss(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> MaskedLoss:
        """Of the scales after the first, with numbers from ``generator`` or torch's own."""
        idx_BL, x_BLZ = self.tokens(batch)
        label_B, pyramid, quantizer = batch["label"], self.model.pyramid, self.tokenizer.quantizer
        if self.training and self.model.label_drop > 0:
            dropped_B = torch.rand(len(label_B), device=label_B.device) < self.model.label_drop
            label_B = torch.where(dropped_B, self.model.num_classes, label_B)
        inputs_BLC = self.model.embed(x_BLZ, self.model.class_embedding(label_B))
        conditions = self.refinement.conditions(self.model, label_B)
        share, losses, right = float(torch.rand((), generator=generator, device="cpu")), [], []
        for scale in range(1, pyramid.num_scales):
            own, tokens = pyramid.slice_of(scale), pyramid.tokens_of(scale)
            places = torch.randperm(tokens, generator=generator, device="cpu")[: max(1, -int(-share * tokens // 1))]
            places = places.to(idx_BL.device)
            masked_Bl = torch.zeros_like(idx_BL[:, own], dtype=torch.bool).index_fill_(1, places, True)
            codes_BlZ = known_codes(quantizer.lookup(idx_BL[:, own]), masked_Bl, quantizer, scale)
            logits_BlV = self.refinement(self.model, conditions, scale, inputs_BLC[:, own], codes_BlZ, masked_Bl)
            logits_NV, idx_N = logits_BlV[:, places].flatten(0, 1), idx_BL[:, own][:, places].flatten()
            losses.append(F.cross_entropy(logits_NV, idx_N, reduction="none"))
            right.append((logits_NV.detach().argmax(dim=-1) == idx_N).float())
        return MaskedLoss(torch.cat(losses).mean(), torch.cat(right).mean())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        found = self.masked_loss(named(batch, "label"))
        self.log_dict(found.named("train/"))
        show_loss(self.trainer, "loss", found.loss)
        return found.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._summed = self._summed + self._evaluate(batch, batch_idx, "val/").loss.detach()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test/")

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int, prefix: str) -> MaskedLoss:
        batch = named(batch, "label")
        found = self.masked_loss(batch, torch.Generator().manual_seed(batch_idx))  # the same places each time
        log_means(self, found.named(prefix), images=len(batch["label"]))
        return found

    def on_validation_epoch_end(self) -> None:
        """Raises `UserError` for a loss that is NaN or infinite, on all ranks together."""
        loss, self._summed = sum_over_ranks(torch.as_tensor(self._summed, device=self.device)), 0.0
        if not loss.isfinite():
            raise UserError(f"val/loss at step {self.trainer.global_step}: not finite; {SAME_WEIGHTS}; train anew")

    def generate(self, label_B: Tensor, seeds: list[int]) -> Generated:
        """As of `NextScaleModule`, in this run's passes."""
        filters = {"cfg": self.cfg, "top_k": self.top_k, "top_p": self.top_p}
        return generate(self.model, self.tokenizer, label_B, **filters, seeds=seeds, refinement=self.passes)  # type: ignore[arg-type]

    def save_beside(self, folder: Path) -> None:
        """Write the refinement into a run's folder."""
        save_refinement(folder / IN_RUN, self.refinement, self.model, self.tokenizer)
