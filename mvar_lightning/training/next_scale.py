"""Training of a next-scale transformer as a LightningModule: one module for every strategy, history and block, and the
published families as its defaults.

B batch, L tokens of the pyramid, Z code dim, HW pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from typing import Any
from zlib import crc32

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from mvar_lightning.attention import AdjacentAttention, AttentionStrategy, FullAttention, SpatialAttention
from mvar_lightning.checkpoints import load_initial_weights, load_tokenizer
from mvar_lightning.checkpoints.assign import on_meta
from mvar_lightning.checkpoints.classes import ALL, InitClasses, check_names
from mvar_lightning.checkpoints.finetune import other_codes
from mvar_lightning.checkpoints.folder import open_checkpoint, unwrap_names
from mvar_lightning.checkpoints.record import Record
from mvar_lightning.data.image_data import named, run_data
from mvar_lightning.errors import UserError
from mvar_lightning.metrics.quality import CodebookUsage
from mvar_lightning.sampling import Generated, generate
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.tools.compute import set_precision_policy
from mvar_lightning.tools.processes import sum_over_ranks
from mvar_lightning.training.distributed import check_precision, has_trainer, log_means, seed_batch, shard_where_asked
from mvar_lightning.training.loading import alone, batch_size_of_run, module_of_folder, normalized
from mvar_lightning.training.manual_steps import SAME_WEIGHTS, show_loss, window_of
from mvar_lightning.training.objectives import Objective, Target
from mvar_lightning.training.optimizers import next_scale_optimizer
from mvar_lightning.training.scale_groups import ScaleGroups, kept_of_token
from mvar_lightning.training.token_loss import TokenLoss, evaluated_token_loss, token_loss
from mvar_lightning.transformer import acceleration
from mvar_lightning.transformer.blocks import BlockDesign, LlamaBlocks, VARBlocks
from mvar_lightning.transformer.history import History, NoHistory, SlidingWindowHistory
from mvar_lightning.transformer.transformer import NextScaleTransformer, axes_of

SCHEDULE = ("base_lr", "betas", "weight_decay", "weight_decay_end", "warmup", "final_lr_ratio")
PLAIN_SETTINGS = (*SCHEDULE, "cfg", "top_k", "top_p")
"""Settings that a checkpoint keeps beside the architecture, for a module that is made of it."""


class NextScaleModule(L.LightningModule):
    """Fits a `NextScaleTransformer` to the tokens of a frozen tokenizer, encoding images on the fly or from a cache.

    Batches are dictionaries with ``image``, uint8 (B, 3, H, W) or float in [-1, 1], or ``tokens``, int64 (B, L), and
    with ``label``, int64 (B,).

    Args:
        tokenizer: a saved folder, a run's folder or a Lightning checkpoint; scales, V and Z are read from it.
        num_classes: classes of the data (on the command line it comes from the data folder).
        depth: the one dial of size: width 64 d, heads d, drop path 0.1 d / 24, unless given.
        attention, history, blocks: the axes of variation.
        backend: how attention is computed (auto, dense, per_scale, flex, natten).
        base_lr: learning rate for a global batch of 256; the peak is base_lr x global batch / 256.
        betas, weight_decay, weight_decay_end, warmup, final_lr_ratio: AdamW and its schedule (see `HeldLine`);
            ``warmup`` is the share of all steps (VAR: 1/50).
        gamma_init: initial factor of the AdaLN gates.
        label_drop: share of labels dropped in training, for guidance.
        cfg, top_k, top_p: sampling of this run's pictures and metrics.
        init_from: weights to start from: a saved folder, a run's, a checkpoint, or a released file (or FILE#KEY).
        init_classes: what the classes start from then: ``fresh``, ``mean``, or a mapping such as ``{corgi: 263, cat:
            tabby}`` from classes here to classes there, by name or index (`load_initial_weights`).
        init_scales: ``resize`` or ``fresh``: what positions start from where the scales there are others.
        class_names: of the classes, by index; a recipe's are the data's.
        compile_blocks: `torch.compile` every block.
        checkpoint_activations: recompute blocks in the backward pass.
        scale_groups: run a training step group of scales after group, exact and in less memory: lists such as
            [[0..7], [8], [9]], ``auto``, the share of the activations that a group may have, or their size on each
            device, such as 4GB (`ScaleGroups`).
        scale_cycle: train one group a step instead, each so many steps in a row (MVAR: [8, 1, 1]).
        objective: what is minimized; cross-entropy, unless one of `training.objectives` is given.
        train_scales: train these scales alone, in a row, such as [8, 9] (CoDe's specialists).

    Raises:
        UserError: a missing or broken tokenizer, sizes or strategy that do not fit it.
    """

    default_attention: AttentionStrategy
    default_history: History
    default_blocks: BlockDesign

    _summed: Tensor | float = 0.0  # of the losses of this validation

    def __init__(
        self,
        tokenizer: str,
        num_classes: int,
        depth: int = 16,
        attention: AttentionStrategy | None = None,
        history: History | None = None,
        blocks: BlockDesign | None = None,
        width: int | None = None,
        heads: int | None = None,
        drop_path: float | None = None,
        backend: str = "auto",
        base_lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        weight_decay_end: float | None = None,
        warmup: float = 0.02,
        final_lr_ratio: float = 0.1,
        gamma_init: float = 1e-3,
        label_drop: float = 0.1,
        cfg: float = 1.5,
        top_k: int | None = 900,
        top_p: float | None = 0.96,
        init_from: str | None = None,
        init_classes: dict[str, int | str] | str | None = None,
        compile_blocks: bool = False,
        checkpoint_activations: bool = False,
        scale_groups: list[list[int | str]] | float | str | None = None,
        scale_cycle: list[int] | None = None,
        class_names: tuple[str, ...] | None = None,
        objective: Objective | None = None,
        train_scales: list[int] | None = None,
        init_scales: str | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = own = load_tokenizer(tokenizer).eval().requires_grad_(False)
        self.tokenizer_hash = fingerprint(own)
        of_tokens = {"vocab_size": own.vocab_size, "code_dim": own.code_dim}
        sizes: dict[str, Any] = {"num_classes": num_classes, "depth": depth, "width": width, "heads": heads}
        rates: dict[str, Any] = {"drop_path": drop_path, "label_drop": label_drop, "gamma_init": gamma_init}
        self.model = NextScaleTransformer(
            own.pyramid.sides,
            attention=attention or self.default_attention,
            history=history or self.default_history,
            blocks=blocks or self.default_blocks,
            backend=backend,
            checkpoint_activations=checkpoint_activations,
            **of_tokens | sizes | rates,
        )
        self.scale_groups = ScaleGroups.read(scale_groups, scale_cycle, self.model.backend.plan)
        self.target = Target.of(objective, train_scales, self.scale_groups, self.model.pyramid)
        self.class_names = check_names(class_names or (), num_classes)
        self.init_from = self.target.start(self.model, self._start_from(init_from, init_classes, init_scales))
        if compile_blocks:
            acceleration.compile_blocks(self.model)
        self.base_lr, self.betas, self.warmup, self.final_lr_ratio = base_lr, betas, warmup, final_lr_ratio
        end = weight_decay if weight_decay_end is None else weight_decay_end
        self.weight_decay, self.weight_decay_end = weight_decay, end
        self.cfg, self.top_k, self.top_p = cfg, top_k, top_p
        self.usage = CodebookUsage(self.tokenizer.pyramid, self.tokenizer.vocab_size)

    def _start_from(self, path: str | None, classes: InitClasses, scales: str | None) -> str | None:
        """Take weights, if any are named, and give the name back."""
        if path is not None:
            words = load_initial_weights(self.model, path, classes, self.class_names, scales)
            words += other_codes(path, self.tokenizer)
            if not words.endswith(ALL):
                rank_zero_info(words)
        elif classes is not None:
            raise UserError(f"init_classes {classes!r}: needs init_from, the weights that classes are taken from")
        elif scales is not None:
            raise UserError(f"init_scales {scales!r}: needs init_from, the weights whose scales are others")
        return path

    @classmethod
    def check_settings(cls, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Whether a module can be made over a tokenizer that is still to be trained; takes no memory for weights.

        Args:
            tokenizer: arguments of its module.
            settings: arguments of this one, with objects on the axes.

        Raises:
            UserError: sizes, an attention strategy or scale groups that do not fit.
        """
        of_tokenizer = signature(MultiScaleTokenizer).parameters.keys() & tokenizer
        made = on_meta(lambda: MultiScaleTokenizer(**{name: tokenizer[name] for name in of_tokenizer}))
        model = cls.transformer_on_meta(made, settings)
        groups = ScaleGroups.read(settings.get("scale_groups"), settings.get("scale_cycle"), model.backend.plan)
        Target.of(settings.get("objective"), settings.get("train_scales"), groups, model.pyramid)

    @classmethod
    def transformer_on_meta(
        cls, made: MultiScaleTokenizer, settings: Mapping[str, Any], num_classes: int = 1
    ) -> NextScaleTransformer:
        """The transformer of such settings over a tokenizer without memory for weights. Raises as `check_settings`."""
        own = {name: settings[name] for name in signature(NextScaleTransformer).parameters.keys() & settings}
        axes = {"attention": cls.default_attention, "history": cls.default_history, "blocks": cls.default_blocks}
        own |= {name: own.get(name) or axis for name, axis in axes.items()}
        own |= {"vocab_size": made.vocab_size, "code_dim": made.code_dim, "num_classes": num_classes}
        return on_meta(lambda: NextScaleTransformer(made.pyramid.sides, **own))

    def train(self, mode: bool = True) -> NextScaleModule:
        """The tokenizer stays in evaluation mode, whatever the trainer asks for."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @staticmethod
    def check_precision(precision: object) -> None:
        """Raise `UserError` for one that the module cannot train in."""
        taken = ("32-true", "bf16-mixed", "16-mixed")
        check_precision(precision, taken, "the frozen tokenizer needs float32 weights")

    def setup(self, stage: str) -> None:
        run_data(self.trainer).check_model(self.tokenizer, self.tokenizer_hash)
        if stage != "predict":  # there nothing is encoded
            self.check_precision(self.trainer.precision)
        if self.scale_groups.splits_steps and self.trainer.precision == "16-mixed":
            raise UserError("scale_groups: go with precision 32-true or bf16-mixed, not 16-mixed with its loss scaling")
        set_precision_policy(device := self.trainer.strategy.root_device)
        if stage == "fit":
            self.target.load(self.model, self.tokenizer_hash, self.init_from, device)
        if len(self.scale_groups.groups) > 1 and self.scale_groups.target is None:
            rank_zero_info(f"scale groups of a training step: {self.scale_groups}")
        rank_zero_info(f"attention: {self.model.backend!r} rendered by backend {self.model.backend.name!r}")

    def configure_model(self) -> None:
        """Under `FullySharded` the transformer is divided over the processes; the frozen tokenizer stays whole."""
        if has_trainer(self):
            shard_where_asked(self.model, self.trainer.strategy)

    @torch.no_grad()
    def tokens(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Token indices (B, L) and transformer inputs (B, L - first, Z) of a batch; float32 in any precision."""
        # tokens must be those of the cache and of sampling: a rounded residual has another nearest code
        with torch.autocast(batch["label"].device.type, enabled=False):
            if "tokens" in batch:
                idx_BL = batch["tokens"]
            elif batch["image"].is_floating_point():
                idx_BL = self.tokenizer.encode(normalized(batch["image"]).float())
            else:  # bytes are finite; asking, as `encode` does, would make every step wait for the device
                latent_BZhw = self.tokenizer.latent(normalized(batch["image"]).float())
                idx_BL = self.tokenizer.quantizer.encode(latent_BZhw)
            return idx_BL, self.tokenizer.teacher_input(idx_BL)

    def forward(self, batch: dict[str, Tensor]) -> tuple[TokenLoss, Tensor]:
        """Loss of a batch and the logits (B, L, V) it came from."""
        idx_BL, x_BLZ = self.tokens(batch)
        logits_BLV = self.model(x_BLZ, batch["label"])
        return token_loss(logits_BLV, idx_BL, self.model.pyramid), logits_BLV

    def _evaluated(self, batch: dict[str, Tensor]) -> tuple[TokenLoss, Tensor]:
        """Loss of a batch and the predicted tokens (B, L); at no time are there logits of all tokens."""
        idx_BL, x_BLZ = self.tokens(batch)
        label_B, images = batch["label"], len(idx_BL)
        if self.model.equal_rows and 0 < images < (size := batch_size_of_run(self.trainer)):
            # compiled blocks would be compiled anew for a last, smaller batch: fill it up with its first image
            x_BLZ, label_B = (torch.cat([x, x[:1].expand(size - images, *x.shape[1:])]) for x in (x_BLZ, label_B))
        h_BLC = self.model.features(self.model.inputs(x_BLZ, label_B), range(self.model.pyramid.num_scales))[:images]
        return evaluated_token_loss(h_BLC, self.model.head.classify, idx_BL, self.model.pyramid)

    def on_train_start(self) -> None:
        """Scale groups of a given size: now the device, the precision and the batch are known."""
        if self.scale_groups.target is None:
            return
        images, pyramid = batch_size_of_run(self.trainer), self.model.pyramid
        with self.trainer.precision_plugin.forward_context():
            kept = kept_of_token(self.model)
        self.scale_groups = self.scale_groups.within(kept, images, pyramid)
        largest = max(span.stop - span.start for span in map(pyramid.span, self.scale_groups.groups))
        rank_zero_info(
            f"scale groups of a training step: {self.scale_groups}; the largest keeps "
            f"{kept * images * largest / 1e6:.0f} MB, all at once {kept * images * pyramid.num_tokens / 1e6:.0f} MB"
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        batch = named(batch, "label")
        idx_BL, x_BLZ = self.tokens(batch)
        if self.scale_groups.splits_steps and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.trainer.optimizers[0].zero_grad()  # Lightning's own comes after this step's first backward passes
        groups, accumulated = self.scale_groups.at(self.global_step), self.trainer.accumulate_grad_batches
        size = window_of(self.trainer, batch_idx, accumulated).size
        loss, figures = self.target.loss(self.model, (x_BLZ, batch["label"], idx_BL), groups, size)
        self.log_dict(figures.named("train/"))
        show_loss(self.trainer, "loss", figures.loss)
        # Lightning divides by the usual number of batches, also where an epoch's last step has fewer
        return loss if size == accumulated else loss * (accumulated / size)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.scale_groups.splits_steps:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        batch = named(batch, "label")
        result, predicted_BL = self._evaluated(batch)
        self.usage.update(predicted_BL)
        self._summed = self._summed + result.loss.detach().float()
        log_means(self, result.named("val/"), images=len(batch["label"]))

    def on_validation_epoch_end(self) -> None:
        """Codebook usage and perplexity of the predictions, over all tokens of the epoch.

        Raises:
            UserError: a loss that is NaN or infinite, on all ranks together.
        """
        loss, self._summed = sum_over_ranks(torch.as_tensor(self._summed, device=self.device)), 0.0
        if not loss.isfinite():
            raise UserError(
                f"val/loss at step {self.trainer.global_step}: not finite; {SAME_WEIGHTS}; lower the "
                "learning rate, clip gradients harder, or try precision 32-true, and train anew"
            )
        for name, value_K in self.usage.compute().items():
            stem = name.removesuffix("_K")
            self.log_dict({f"predictions/{stem}_scale_{scale}": value for scale, value in enumerate(value_K)})
        self.usage.reset()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        batch = named(batch, "label")
        result, _ = self._evaluated(batch)
        log_means(self, result.named("test/"), images=len(batch["label"]))

    def predict_step(self, batch: Any, batch_idx: int) -> Generated:
        """Images of a batch's classes, each with a seed of its own; labels (B,) alone make a batch, too."""
        label_B, place = alone(batch, "label"), f"{batch_idx}/{self.global_rank}"
        return self.generate(label_B, [crc32(f"{place}/{i}".encode()) for i in range(len(label_B))])

    def generate(self, label_B: Tensor, seeds: list[int]) -> Generated:
        """Images (B, 3, H, W) in [0, 1] and their tokens (B, L), with this run's sampling settings."""
        return generate(
            self.model, self.tokenizer, label_B, cfg=self.cfg, top_k=self.top_k, top_p=self.top_p, seeds=seeds
        )

    @property
    def trained(self) -> torch.nn.Module:
        """What the optimizer changes."""
        return self.model

    def configure_optimizers(self) -> OptimizerLRScheduler:
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError("trainer.max_steps: -1 never ends, but the schedule needs the number of steps; set it")
        return next_scale_optimizer(self, self.trained, int(steps), self.global_batch_size())

    def global_batch_size(self) -> int:
        """Images of one optimizer step over all processes."""
        return batch_size_of_run(self.trainer) * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _record(self) -> Record:
        return Record(self.tokenizer.config, self.tokenizer_hash, self.model.config, self.class_names)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._record().write_into(checkpoint)
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {name: getattr(self, name) for name in PLAIN_SETTINGS}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **settings: Any) -> Any:
        """The module of any checkpoint that `load` takes: sizes, axes and tokenizer are those in it. Other settings,
        such as ``backend`` and ``scale_groups``, are the defaults; ``settings`` replace any. Nothing is unpickled.

        Raises:
            UserError: as `load`; or a checkpoint of a tokenizer.
        """
        opened = open_checkpoint(checkpoint_path)
        if opened.record.model is None:
            raise UserError(f"{checkpoint_path}: holds a tokenizer alone; load it with TokenizerModule")
        if opened.record.model.get("quantized"):
            raise UserError(f"{checkpoint_path}: holds quantized weights, for sampling; take those they were made of")
        own = {**axes_of(opened.record.model), "tokenizer": str(checkpoint_path)}
        own["class_names"] = opened.record.class_names
        del own["scales"]  # the tokenizer's
        if opened.is_folder:
            return module_of_folder(cls, opened, "model", own, settings)
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **own, **settings})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._record().check_resumed(checkpoint)
        unwrap_names(checkpoint)


# The published families: each names its defaults on the three axes and changes nothing else.
class VARModule(NextScaleModule):
    """VAR (arXiv 2404.02905): full attention, no history, VAR's blocks."""

    default_attention = FullAttention()
    default_history = NoHistory()
    default_blocks = VARBlocks()


class MVARModule(NextScaleModule):
    """MVAR (arXiv 2505.12742): adjacent attention, a 7x7 neighborhood at the last two scales, VAR's blocks."""

    default_attention = SpatialAttention(kernel_size=7, scales=2)
    default_history = NoHistory()
    default_blocks = VARBlocks()


class MarkovVARModule(NextScaleModule):
    """Markov-VAR (arXiv 2511.23334): adjacent attention, a history window of three scales, LLaMA-style blocks."""

    default_attention = AdjacentAttention()
    default_history = SlidingWindowHistory(size=3)
    default_blocks = LlamaBlocks()
