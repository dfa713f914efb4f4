"""Training of the multi-scale tokenizer as a LightningModule.

Shapes: B batch, L all tokens, K scales, HW pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from mvar_lightning.checkpoints.folder import open_checkpoint, unwrap_names
from mvar_lightning.checkpoints.record import Record
from mvar_lightning.data.image_data import named, run_data
from mvar_lightning.errors import UserError
from mvar_lightning.metrics.quality import CodebookUsage
from mvar_lightning.pyramid import Scales
from mvar_lightning.tokenizer.adversarial import AdversarialLoss
from mvar_lightning.tokenizer.codebook import CodebookRemedy, DataDependentInit, DeadCodeRestart
from mvar_lightning.tokenizer.losses import EntropyLoss, L1Loss, L2Loss, LossPart, QuantizerLoss, WeightedLoss
from mvar_lightning.tokenizer.quantizer import FIRST_KEPT, check_scale_dropout, draw_kept_scales
from mvar_lightning.tokenizer.tokenizer import MultiScaleTokenizer, TokenizerOutput, fingerprint_of
from mvar_lightning.tools.compute import set_precision_policy
from mvar_lightning.tools.drawing import normalize
from mvar_lightning.training.distributed import check_precision, has_trainer, log_means, seed_batch, seed_of_batch
from mvar_lightning.training.loading import alone, module_of_folder, normalized, start_from
from mvar_lightning.training.manual_steps import (
    FiniteTerms,
    as_list,
    check_finite,
    check_weights,
    show_loss,
    warn_of_poor_data,
    window_of,
)
from mvar_lightning.training.optimizers import TokenizerAdamW, tokenizer_optimizers

log = logging.getLogger(__name__)


class TokenizerModule(L.LightningModule):
    """Fits a ``MultiScaleTokenizer`` to images.

    Batches are dictionaries with ``image``: uint8 (B, 3, H, W), or float in [-1, 1]. The module takes its optimizer
    steps itself (see ``manual_steps``), with or without a discriminator; ``global_step`` counts the tokenizer's.

    Args:
        scales: the tokenizer's, as are all arguments up to ``codes`` (see ``MultiScaleTokenizer``).
        image_channels: the tokenizer's, which a recipe takes from its data.
        losses: parts of the loss; null for L1, L2 and the quantizer's with weight 1 and `EntropyLoss` with 0.1. List
            them without the last for VAR's plain form.
        lr: peak learning rate of AdamW.
        betas: AdamW's.
        weight_decay: on convolution weights; none on biases, norms and codes.
        warmup: share of all steps with a rising learning rate.
        final_lr_ratio: last learning rate over the peak.
        adversarial: a discriminator with its losses; none leaves it out.
        remedies: what looks after the codebook (see ``CodebookRemedy``); null for `DataDependentInit` and
            `DeadCodeRestart`, and none with ``init_from`` or a frozen quantizer, whose codes stay; [] for none.
        scale_dropout: share of training images that are rebuilt from their first scales alone.
        scale_dropout_keeps: fewest scales that such an image keeps.
        accumulate_grad_batches: batches of a step.
        gradient_clip_val: largest norm of a step's gradient, of tokenizer and discriminator each; none for no limit.
        init_from: weights to start from: a folder (saved, a run's), a checkpoint, a released file (or FILE#KEY).
        frozen: parts that keep their weights, of encoder, quant_conv, quantizer, post_quant_conv, decoder.

    Raises:
        UserError: a value out of its range; at the start of a run, files or images that a loss cannot take.
    """

    def __init__(
        self,
        scales: Scales,
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
        codes: str = "euclidean",
        adversarial: AdversarialLoss | None = None,
        remedies: list[CodebookRemedy] | None = None,
        scale_dropout: float = 0.0,
        scale_dropout_keeps: int = FIRST_KEPT,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        init_from: str | None = None,
        frozen: Sequence[str] = (),
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = TokenizerAdamW(lr, betas, weight_decay, warmup, final_lr_ratio)
        if accumulate_grad_batches < 1 or (gradient_clip_val is not None and gradient_clip_val <= 0):
            raise UserError(
                f"accumulate_grad_batches {accumulate_grad_batches}, gradient_clip_val {gradient_clip_val}: "
                "give at least 1 batch and a positive norm, or null for no limit"
            )
        sizes = (vocab_size, code_dim, channels, channel_multipliers, num_res_blocks)
        quantizer = (phi_layers, phi_ratio, beta, codebook_std)
        self.tokenizer = MultiScaleTokenizer(scales, *sizes, *quantizer, norm_groups, codes, image_channels)
        hold_still(self.tokenizer, frozen, remedies, adversarial)
        check_scale_dropout(scale_dropout, self.tokenizer.pyramid.num_scales, scale_dropout_keeps)
        losses = default_losses() if losses is None else losses
        if remedies is None:
            # none where codes come trained or stay: what new images leave unused is not the tokenizer's loss
            fresh = init_from is None and "quantizer" not in frozen
            remedies = [DataDependentInit(), DeadCodeRestart()] if fresh else []
        self.loss, self.adversarial = WeightedLoss(losses), adversarial
        if adversarial is not None and image_channels != 3:
            adversarial.discriminator.take_channels(image_channels)
        self.remedies = cast(Sequence[CodebookRemedy], nn.ModuleList(remedies))
        for remedy in self.remedies:
            remedy.attach(self.tokenizer)
        self.init_from, self._started, self._data_checked, self._finite = init_from, False, False, FiniteTerms()
        self.scale_dropout, self.scale_dropout_keeps = scale_dropout, scale_dropout_keeps
        self.accumulate_grad_batches, self.gradient_clip_val = accumulate_grad_batches, gradient_clip_val
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.usage = CodebookUsage(self.tokenizer.pyramid, vocab_size)

    def configure_callbacks(self) -> list[L.Callback]:
        """Adds none: this is the one hook before Lightning refuses the trainer's settings in words of its own."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return []
        for name, unset in (("gradient_clip_val", (None, 0)), ("accumulate_grad_batches", (1,))):
            value = getattr(self.trainer, name)
            if value not in unset:
                raise UserError(
                    f"trainer.{name} {value}: this module takes its optimizer steps itself; set model.{name} instead"
                )
        self.check_precision(self.trainer.precision)
        return []

    @staticmethod
    def check_precision(precision: object) -> None:
        """Raise `UserError` for one that the module cannot train in."""
        why = "a tokenizer's weights are float32, and half precision would need one loss scale for two optimizers"
        check_precision(precision, ("32-true", "bf16-mixed"), why)

    def setup(self, stage: str) -> None:
        size = self.tokenizer.image_size
        set_precision_policy(self.trainer.strategy.root_device)
        run_data(self.trainer).check_model(self.tokenizer)
        if self.init_from is not None and not self._started:
            start_from(self.tokenizer, self.init_from)
            if stage == "fit" and any(isinstance(remedy, DataDependentInit) for remedy in self.remedies):
                rank_zero_only(log.warning)(
                    f"init_from {self.init_from}: DataDependentInit replaces its codes; leave it out to keep them"
                )
        self._started = True
        device = self.trainer.strategy.root_device
        for part in self.loss.parts:
            part.prepare(device, size)
        if self.adversarial is not None and stage == "fit":
            self.adversarial.discriminator.prepare(device, size)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Reconstructions in [-1, 1]."""
        return self.tokenizer(image_B3HW).reconstruction_B3HW.clamp(-1, 1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        image_B3HW = normalize(named(batch, "image")["image"])
        window = window_of(self.trainer, batch_idx, self.accumulate_grad_batches)
        if not self._data_checked:
            self._data_checked = True
            normalized(image_B3HW)
            warn_of_poor_data(self.trainer, self.tokenizer, image_B3HW)
        output = self._reconstruct(image_B3HW, batch_idx)
        loss, discriminator_loss, terms = self._losses(output, image_B3HW)
        self._finite.note({**terms, "loss": loss}, self.trainer)
        self.log("train/loss", loss.detach())
        show_loss(self.trainer, "train/loss", loss)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        # one pass for both losses, so that DDP reduces once (see `AdversarialLoss`), and only where the window closes
        strategy = self.trainer.strategy
        waiting = strategy if isinstance(strategy, ParallelStrategy) and not window.closes else None
        with waiting.block_backward_sync() if waiting else nullcontext():
            self.manual_backward((loss + discriminator_loss) / window.size)
        if window.closes:
            self._step(output)
        else:
            for remedy in self.remedies:
                remedy.between_batches(self.tokenizer, output)
        return loss.detach()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Reconstructions of a batch's images, (B, 3, H, W) in [-1, 1]; images alone make a batch, too."""
        return self.tokenizer.decode(self.tokenizer.encode(normalize(alone(batch, "image"))))

    def _reconstruct(self, image_B3HW: Tensor, batch_idx: int) -> TokenizerOutput:
        ours = as_list(self.optimizers())[0].optimizer
        for remedy in self.remedies:
            try:
                remedy.before_step(self.tokenizer, image_B3HW, ours)
            except UserError as error:
                raise UserError(f"at step {self.global_step}: {error}") from error
        # what one process would draw for the joined batch, rank zero's images first; of that this process' part
        own, processes, num_scales = len(image_B3HW), self.trainer.world_size, self.tokenizer.pyramid.num_scales
        seed = seed_of_batch(self, batch_idx, rank=0)
        generator = torch.Generator().manual_seed(seed) if processes > 1 else None
        dropout, device = (self.scale_dropout, self.scale_dropout_keeps), image_B3HW.device
        kept_B = draw_kept_scales(own * processes, num_scales, *dropout, device, generator)
        if kept_B is not None:
            kept_B = kept_B.view(processes, own)[self.global_rank]
        return self.tokenizer(image_B3HW, kept_B)

    def _losses(self, output: TokenizerOutput, image_B3HW: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss of the tokenizer, of the discriminator, and every term by name."""
        loss, terms = self.loss(output, image_B3HW)
        if self.adversarial is None:
            return loss, loss.new_zeros(()), terms
        last_layer = self.tokenizer.decoder.conv_out.weight
        added = self.adversarial(output.reconstruction_B3HW, image_B3HW, loss, last_layer, self.global_step)
        return loss + added.generator, added.discriminator, {**terms, **added.log}

    def _step(self, output: TokenizerOutput) -> None:
        """One step of each optimizer that is on, and of its schedule."""
        ours, *theirs = as_list(self.optimizers())
        schedule, *their_schedules = as_list(self.lr_schedulers())
        # the discriminator first: what it does depends on the count of steps, which the tokenizer's raises
        if self.adversarial is not None:
            if self.adversarial.active(self.global_step):
                # through strategy and precision as usual, but without Lightning's count
                self.trainer.strategy.optimizer_step(theirs[0].optimizer, closure=lambda: None)
                self.adversarial.after_step()
                their_schedules[0].step()
            theirs[0].zero_grad()
        ours.step()
        ours.zero_grad()
        schedule.step()
        for remedy in self.remedies:
            remedy.after_step(self.tokenizer, output, ours.optimizer)

    def on_train_end(self) -> None:
        for remedy in self.remedies:
            remedy.after_fit()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip; callbacks have seen the whole gradient by now."""
        if self.gradient_clip_val is not None:
            # not by Lightning: under bf16-mixed it refuses fused optimizers, though there is no loss scale to undo
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.gradient_clip_val)

    def on_validation_model_zero_grad(self) -> None:
        """Validation may come between the batches of a step: their gradients stay."""

    def on_validation_epoch_start(self) -> None:
        """Start from zero, with tensors of this loop: those that inference mode left behind take no update in a fit."""
        for metric in (self.psnr, self.ssim, self.usage):
            metric.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        image_B3HW = normalize(named(batch, "image")["image"])
        output = self.tokenizer(image_B3HW)
        total, terms = self.loss(output, image_B3HW)
        check_finite({f"val/{name}": term for name, term in terms.items()}, self.trainer)
        reconstruction = (output.reconstruction_B3HW.float().clamp(-1, 1) + 1) / 2
        original = (image_B3HW.float() + 1) / 2
        self.psnr.update(reconstruction, original)
        self.ssim.update(reconstruction, original)
        self.usage.update(output.idx_BL)
        log_means(self, {"val/loss": total}, images=len(image_B3HW))
        self.log("val/psnr", self.psnr, prog_bar=True, batch_size=len(image_B3HW))
        self.log("val/ssim", self.ssim, batch_size=len(image_B3HW))

    def on_validation_epoch_end(self) -> None:
        """Codebook statistics need every token of the epoch, so they come last (reduced over the processes)."""
        for name, value_K in self.usage.compute().items():
            stem = name.removesuffix("_K")
            self.log_dict({f"codebook/{stem}_scale_{scale}": value for scale, value in enumerate(value_K.reshape(-1))})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trainer = self.trainer
        steps = trainer.estimated_stepping_batches  # also makes the loaders, where their length is needed
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        if epochs in (-1, None) or math.isinf(steps) or math.isinf(batches):
            steps = steps if steps >= 0 else math.inf
        else:
            # Lightning's own number knows no accumulation
            steps = math.ceil(batches / self.accumulate_grad_batches) * max(epochs or 1, 1)
            steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
        batch = run_data(trainer).batch_size
        images = None if batch is None else batch * trainer.world_size * self.accumulate_grad_batches
        return tokenizer_optimizers(self.tokenizer, self.adversarial, self.settings, steps, images)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if has_trainer(self):
            self._finite.read(self.trainer)
        check_weights(checkpoint)
        # the hash of the weights in the file: with averaging on they are not the ones in training
        state = {key.removeprefix("tokenizer."): tensor for key, tensor in checkpoint["state_dict"].items()}
        Record(self.tokenizer.config, fingerprint_of(self.tokenizer, state)).write_into(checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **settings: Any) -> Any:
        """The module of any checkpoint that `load` takes; losses, discriminator and other settings are the defaults,
        remedies none, unless they are given. Nothing is unpickled. Raises `UserError` as `load`."""
        opened = open_checkpoint(checkpoint_path)
        opened.tokenizer()  # whole, or refused: what else is in the file may be there or not
        own = {**opened.record.tokenizer, "remedies": []}
        if opened.is_folder:
            return module_of_folder(cls, opened, "tokenizer", own, settings)
        own |= {"weights_only": True, "strict": False}
        return super().load_from_checkpoint(checkpoint_path, *args, **{**own, **settings})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        unwrap_names(checkpoint)
        # another set of optimizers is refused before any weight is touched
        state, own = checkpoint["state_dict"], self.state_dict()
        theirs = any(key.startswith("adversarial.") for key in state)
        if has_trainer(self) and theirs != (self.adversarial is not None):
            raise UserError(
                f"this checkpoint was written {'with' if theirs else 'without'} a discriminator, this run is "
                f"{'without' if theirs else 'with'} one: keep model.adversarial as it was, or start a new run with "
                "model.init_from"
            )
        for name in own if has_trainer(self) else ():
            if name in state and (there := tuple(state[name].shape)) != (here := tuple(own[name].shape)):
                raise UserError(
                    f"this checkpoint has {name} of {there}, this run of {here}: keep the model's sizes as they were, "
                    "or start a new run with model.init_from"
                )
        # of a checkpoint from before the module took its steps itself: Lightning counted these elsewhere
        loop, steps = checkpoint.get("loops", {}).get("fit_loop", {}), checkpoint["global_step"]
        progress = loop.get("epoch_loop.manual_optimization.optim_step_progress")
        if progress is not None and progress["total"]["completed"] == 0:
            progress["total"] = {"ready": steps, "completed": steps}


def default_losses() -> list[LossPart]:
    """VAR's plain form and, as that loses codes at every scale (docs/tokenizer.md), an entropy term."""
    return [L1Loss(), L2Loss(), QuantizerLoss(), EntropyLoss(0.1)]


PARTS = ("encoder", "quant_conv", "quantizer", "post_quant_conv", "decoder")


def hold_still(
    tokenizer: MultiScaleTokenizer,
    frozen: Sequence[str],
    remedies: list[CodebookRemedy] | None,
    adversarial: AdversarialLoss | None,
) -> None:
    """Take parts out of training: those named, and each phi that no scale uses (DDP would wait for its gradient).

    Raises:
        UserError: an unknown part, nothing left to train, or remedies or a discriminator that need a part to move.
    """
    if unknown := [name for name in frozen if name not in PARTS]:
        raise UserError(f"frozen {unknown[0]!r}: no part of a tokenizer; they are {', '.join(PARTS)}")
    for index, phi in enumerate(tokenizer.quantizer.phi):
        phi.requires_grad_(index in tokenizer.quantizer.phi_index)
    for name in frozen:
        tokenizer.get_submodule(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in tokenizer.parameters()):
        raise UserError(f"frozen {', '.join(frozen)}: nothing is left to train")
    if remedies and "quantizer" in frozen:
        raise UserError("frozen quantizer: remedies change its codes; leave out one of them")
    if adversarial is not None and adversarial.adaptive and "decoder" in frozen:
        raise UserError(
            "frozen decoder: the adaptive weight of AdversarialLoss looks at the gradient of its last layer; "
            "set adaptive: false"
        )
