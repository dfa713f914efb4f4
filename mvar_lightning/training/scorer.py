"""Training of a scorer as a LightningModule: real token pyramids against drawn ones (LSRS, arXiv 2512.03796).

B pairs, K scales, L tokens of the pyramid, N maps, Z code dim, hw latent map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F

from mvar_lightning.checkpoints import load_tokenizer
from mvar_lightning.checkpoints.folder import unwrap_names
from mvar_lightning.checkpoints.record import LIBRARY, Record
from mvar_lightning.data.image_data import run_data
from mvar_lightning.data.token_data import TokenReader
from mvar_lightning.data.tokens.cache import open_part, read_cache
from mvar_lightning.errors import UserError
from mvar_lightning.sampling.scorer import Scorer, save_scorer
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.tools.compute import set_precision_policy
from mvar_lightning.tools.remote import is_url
from mvar_lightning.training.distributed import check_precision, log_means, seed_batch
from mvar_lightning.training.loading import batch_size_of_run
from mvar_lightning.training.manual_steps import show_loss
from mvar_lightning.training.optimizers import HalfCosine, ScheduledAdamW


class ScorerModule(L.LightningModule):
    """Fits a `Scorer`: after every scale a real image's latent map is to score more than a drawn one's of its class.

    Batches are of a token cache (`TokenShards`), ``tokens``, int64 (B, L), and ``label``, int64 (B,): the real side.
    The other one comes from a cache of drawn tokens (`mvar tokens draw`), for each image one of its class at random.

    Args:
        tokenizer: of both caches: a saved folder, a run's folder or a Lightning checkpoint.
        num_classes: classes of the data (on the command line it comes from them).
        drawn: folder of the cache of drawn tokens.
        channels, embedding, hidden, dropout: the scorer's.
        label_drop: share of pairs in training that are judged without their class, so that "no class" is one, too
            (not in the paper).
        lr: peak learning rate of Adam.
        warmup: share of all steps with a rising learning rate; half a cosine down to 0 follows (published: one epoch of
            four).

    Raises:
        UserError: a missing tokenizer, sizes that cannot be; at the start of a run, caches of other tokenizers or
            classes.
    """

    def __init__(
        self,
        tokenizer: str,
        num_classes: int,
        drawn: str,
        channels: Sequence[int] = (64, 128, 256),
        embedding: int = 128,
        hidden: Sequence[int] = (512, 256, 128),
        dropout: float = 0.05,
        label_drop: float = 0.1,
        lr: float = 3e-4,
        warmup: float = 0.25,
    ) -> None:
        super().__init__()
        if not lr > 0 or not 0 <= warmup < 1 or not 0 <= label_drop < 1:
            raise UserError(
                f"lr {lr}, warmup {warmup}, label_drop {label_drop}: give a positive rate, and shares below 1"
            )
        self.tokenizer = own = load_tokenizer(tokenizer).eval().requires_grad_(False)
        sizes = (own.pyramid.sides, own.code_dim, num_classes, channels, embedding, hidden, dropout)
        self.scorer = Scorer(fingerprint(own), *sizes)
        self.drawn, self.label_drop, self.lr, self.warmup = drawn, label_drop, lr, warmup
        self._pools: dict[str, DrawnTokens] = {}

    @classmethod
    def core_on_meta(cls, made: MultiScaleTokenizer, settings: dict[str, Any], num_classes: int = 1) -> Scorer:
        """The scorer of such settings over a tokenizer without memory for weights. Raises as the scorer."""
        own = {name: settings[name] for name in signature(Scorer).parameters.keys() & settings}
        own["num_classes"] = own.get("num_classes") or num_classes
        with torch.device("meta"):
            return Scorer("", made.pyramid.sides, made.code_dim, **own)

    def train(self, mode: bool = True) -> ScorerModule:
        """The tokenizer stays in evaluation mode, whatever the trainer asks for."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @staticmethod
    def check_precision(precision: object) -> None:
        """Raise `UserError` for one that the module cannot train in."""
        check_precision(precision, ("32-true", "bf16-mixed"), "the frozen tokenizer needs float32 weights")

    def setup(self, stage: str) -> None:
        data = run_data(self.trainer)
        data.check_model(self.tokenizer, self.scorer.tokenizer_hash)
        if data.holds_images:
            raise UserError("data: a scorer learns from tokens; give TokenShards with a cache of `mvar tokens make`")
        self.check_precision(self.trainer.precision)
        set_precision_policy(self.trainer.strategy.root_device)
        self._pools = {name: DrawnTokens(self.drawn, name, self.scorer) for name in ("train", "val")}

    def scores(self, idx_BL: Tensor, label_B: Tensor) -> Tensor:
        """Of each image's map after each scale, (K, B)."""
        with torch.no_grad(), torch.autocast(idx_BL.device.type, enabled=False):
            f_hat_KBZhw = torch.stack(self.tokenizer.quantizer.f_hats(idx_BL))
        scales, images = f_hat_KBZhw.shape[:2]
        scale_N = torch.arange(scales, device=idx_BL.device).repeat_interleave(images)
        return self.scorer(f_hat_KBZhw.flatten(0, 1), label_B.repeat(scales), scale_N).view(scales, images)

    def margins(self, batch: dict[str, Tensor], split: str, generator: torch.Generator | None = None) -> Tensor:
        """How much more each real map scores than a drawn one, (K, B)."""
        label_B, images = batch["label"], len(batch["label"])
        drawn_BL = self._pools[split].of_classes(label_B, generator)
        if self.training:
            dropped_B = torch.rand(images, device=label_B.device) < self.label_drop
            label_B = torch.where(dropped_B, self.scorer.num_classes, label_B)
        score_KN = self.scores(torch.cat([batch["tokens"], drawn_BL]), label_B.repeat(2))
        return score_KN[:, :images] - score_KN[:, images:]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        margin_KB = self.margins(batch, "train")
        loss = -F.logsigmoid(margin_KB).mean()
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": (margin_KB > 0).float().mean()})
        show_loss(self.trainer, "loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int, stage: str) -> None:
        """Loss, and the share of pairs in the right order, on pairs that are always the same."""
        generator = torch.Generator().manual_seed(batch_idx * self.trainer.world_size + self.global_rank)
        margin_KB = self.margins(batch, "val", generator)
        right_K = (margin_KB > 0).float().mean(dim=1)
        means = {f"{stage}/loss": -F.logsigmoid(margin_KB).mean(), f"{stage}/accuracy": right_K.mean()}
        means |= {f"{stage}/accuracy_scale_{scale}": right for scale, right in enumerate(right_K)}
        log_means(self, means, images=len(batch["label"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        steps = self.trainer.estimated_stepping_batches
        images = batch_size_of_run(self.trainer) * self.trainer.world_size * self.trainer.accumulate_grad_batches
        optimizer = torch.optim.Adam(self.scorer.parameters(), lr=self.lr, fused=True)
        warmup_steps = 0 if math.isinf(steps) else round(self.warmup * steps)
        schedule = ScheduledAdamW(optimizer, HalfCosine(steps, warmup_steps, 0.0), images=images)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save(self, folder: Path) -> None:
        """What a run leaves in its ``model/``."""
        save_scorer(folder, self.scorer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        Record(self.tokenizer.config, self.scorer.tokenizer_hash).write_into(checkpoint)
        checkpoint[LIBRARY]["scorer"] = self.scorer.config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = checkpoint.get(LIBRARY)
        ours = {"tokenizer_hash": self.scorer.tokenizer_hash, "scorer": self.scorer.config}
        for name, value in ours.items():
            if not isinstance(found, dict) or found.get(name) != value:
                raise UserError(f"this checkpoint has another {name} than the run; train under another run folder")
        unwrap_names(checkpoint)


class DrawnTokens:
    """The drawn side of the pairs: rows of a token cache by class, mapped, not read as a whole.

    Args:
        folder: of the cache.
        split: ``train`` or ``val``.
        scorer: that is trained on it.

    Raises:
        UserError: no such cache, one of images, of another tokenizer or other classes, or a class without samples.
    """

    def __init__(self, folder: str, split: str, scorer: Scorer) -> None:
        if not is_url(folder) and not Path(folder).exists():
            raise UserError(f"model.drawn {folder}: does not exist; make it with `mvar tokens draw --out {folder}`")
        cache = read_cache(folder)
        if not cache.settings.drawn:
            raise UserError(
                f"model.drawn {folder}: holds tokens of images, the real side; draw the other one from a model (mvar "
                "tokens draw)"
            )
        if cache.settings.tokenizer_hash != scorer.tokenizer_hash:
            raise UserError(
                f"model.drawn {folder}: tokens of tokenizer {cache.settings.tokenizer_hash[:12]}, model.tokenizer is "
                f"{scorer.tokenizer_hash[:12]}; draw them from a model of that one (mvar tokens draw)"
            )
        self.reader = TokenReader(cache, split)
        labels_N = np.concatenate([np.asarray(open_part(cache, part)[1]) for part in self.reader.parts])
        count_C = np.bincount(labels_N, minlength=scorer.num_classes)
        if len(count_C) != scorer.num_classes or not count_C.all():
            raise UserError(
                f"model.drawn {folder}: {split} has samples of {np.count_nonzero(count_C)} classes, the data "
                f"{scorer.num_classes}; draw them from a model of the same classes (mvar tokens draw)"
            )
        self.order_N = torch.from_numpy(np.argsort(labels_N, kind="stable"))
        self.count_C = torch.from_numpy(count_C)
        self.start_C = self.count_C.cumsum(0) - self.count_C

    def of_classes(self, label_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens of one sample of each class at random, int64 (B, L) on the labels' device."""
        label_b = label_B.cpu()
        uniform_B = torch.rand(len(label_b), generator=generator, dtype=torch.float64)
        numbers_B = self.order_N[self.start_C[label_b] + (uniform_B * self.count_C[label_b]).long()]
        tokens_BL, _ = self.reader.read(numbers_B.numpy(), 0)
        return torch.from_numpy(tokens_BL.astype(np.int64)).to(label_B.device)
