"""What a training step of a next-scale model minimizes: an axis, as attention strategies are one.

Cross-entropy is the default and the papers'. The others start from, or learn from, a trained model, which stays frozen
and outside of the run's checkpoints.

B batch, L tokens, K scales, V vocabulary, Z code dim.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mvar_lightning.axis import AxisMember
from mvar_lightning.checkpoints.folder import load
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.sampling import LinearGuidance
from mvar_lightning.tokenizer import check_pair, fingerprint
from mvar_lightning.training.scale_groups import ScaleGroups, loss_of_groups
from mvar_lightning.training.token_loss import TokenLoss, token_loss
from mvar_lightning.transformer import NextScaleTransformer


class Objective(AxisMember, ABC):
    """What is minimized, from the tokens of a batch."""

    def frozen(
        self, model: NextScaleTransformer, tokenizer_hash: str, init_from: str | None
    ) -> NextScaleTransformer | None:
        """The trained model that the objective compares with, in evaluation mode; None where it needs none.

        Raises:
            UserError: it cannot be read, reads other tokens, or is not what the objective needs.
        """
        return None

    def check(self, pyramid: ScalePyramid) -> None:
        """Raise `UserError` where the objective does not fit the scales."""

    def check_start(self, model: NextScaleTransformer, init_from: str | None) -> None:
        """Raise `UserError` where ``model``, as it came from there, is not what the objective has to start from."""

    @abstractmethod
    def loss(
        self,
        model: NextScaleTransformer,
        frozen: NextScaleTransformer | None,
        x_BLZ: Tensor,
        label_B: Tensor,
        idx_BL: Tensor,
    ) -> TokenLoss:
        """The loss with its gradient, beside the cross-entropy and accuracy of each scale.

        Args:
            model: in training mode.
            frozen: what `frozen` gave.
            x_BLZ, label_B: as in `NextScaleTransformer.forward`; labels before any are dropped.
            idx_BL: the images' tokens.
        """


class CrossEntropy(Objective):
    """The mean over all tokens (VAR). It alone goes scale group after scale group, in chunks of logits."""

    def loss(
        self,
        model: NextScaleTransformer,
        frozen: NextScaleTransformer | None,
        x_BLZ: Tensor,
        label_B: Tensor,
        idx_BL: Tensor,
    ) -> TokenLoss:
        return token_loss(model(x_BLZ, label_B), idx_BL, model.pyramid)


class WeightedScales(Objective):
    """Cross-entropy with a weight for each scale: the sum over scales of w_k times the mean over its tokens.

    Args:
        weights: ``hmar`` (arXiv 2506.04421: a normal density over the sides in reverse order, most in the
            middle), ``flat`` (a scale's tokens: `CrossEntropy`), ``equal``, or a list of one number for each scale.
            They are divided by their sum.
    """

    def __init__(self, weights: str | list[float] = "hmar") -> None:
        if isinstance(weights, str):
            if weights not in SCALE_WEIGHTS:
                known = ", ".join(SCALE_WEIGHTS)
                raise UserError(f"WeightedScales {weights!r}: unknown; choose one of {known}, or give a list")
        elif not isinstance(weights, (list, tuple)) or not _are_numbers(*weights) or not weights or min(weights) < 0:
            raise UserError(f"WeightedScales {weights!r}: give numbers of at least 0, one for each scale")
        elif not 0 < sum(weights) < float("inf"):
            raise UserError(f"WeightedScales {weights}: give numbers of at least 0, one for each scale, not all 0")
        self.weights = weights

    def check(self, pyramid: ScalePyramid) -> None:
        if not isinstance(self.weights, str) and len(self.weights) != pyramid.num_scales:
            raise UserError(
                f"WeightedScales: {len(self.weights)} weights for {pyramid.num_scales} scales; give each one"
            )

    def of_scales(self, pyramid: ScalePyramid) -> list[float]:
        """One for each scale, of sum 1."""
        self.check(pyramid)
        given = SCALE_WEIGHTS[self.weights](pyramid) if isinstance(self.weights, str) else self.weights
        return [weight / sum(given) for weight in given]

    def loss(
        self,
        model: NextScaleTransformer,
        frozen: NextScaleTransformer | None,
        x_BLZ: Tensor,
        label_B: Tensor,
        idx_BL: Tensor,
    ) -> TokenLoss:
        logits_BLV, pyramid = model(x_BLZ, label_B), model.pyramid
        loss_BL = F.cross_entropy(logits_BLV.flatten(0, 1), idx_BL.flatten(), reduction="none").view_as(idx_BL)
        means = [
            part.mean() for part in loss_BL.split([pyramid.tokens_of(k) for k in range(pyramid.num_scales)], dim=1)
        ]
        loss = torch.stack([mean * weight for mean, weight in zip(means, self.of_scales(pyramid), strict=True)]).sum()
        return replace(token_loss(logits_BLV.detach(), idx_BL, pyramid), loss=loss)


def _hmar(pyramid: ScalePyramid) -> list[float]:
    """HMAR's weights: densities at the shares of the last side, in reverse order and in standard deviations."""
    sizes = [pyramid.tokens_of(scale) ** 0.5 for scale in range(pyramid.num_scales)]
    if len(sizes) < 2:
        return [1.0]
    shares = [size / sizes[-1] for size in reversed(sizes)]
    mean, spread = statistics.mean(shares), statistics.stdev(shares)
    density = statistics.NormalDist()
    return [density.pdf((share - mean) / spread) for share in shares]


SCALE_WEIGHTS = {
    "hmar": _hmar,
    "flat": lambda pyramid: [float(pyramid.tokens_of(scale)) for scale in range(pyramid.num_scales)],
    "equal": lambda pyramid: [1.0] * pyramid.num_scales,
}


class CCA(Objective):
    """Condition contrastive alignment (arXiv 2410.09347): one epoch after which no guidance is needed.

    An image's own label is to become more likely, against a frozen copy of the start, and another image's less: the
    labels rolled by one. A tenth of the rows is unconditional in both halves and only becomes more likely. So does a
    batch of a single class, or of one image: the rolled label is its own, and nothing is left to tell it from.

    Args:
        reference: the frozen model; by default the run's ``init_from``, from which training has to start: the same
            weights under another name, never the folder that the run writes.
        beta: how far the likelihoods may move (0.02).
        weight: of the pairs that do not belong together (published: 50 for d16 and d20, 100 for d24, 1000 for d30).
        unconditional: share of rows without a class.
    """

    def __init__(
        self, reference: str | None = None, beta: float = 0.02, weight: float = 50.0, unconditional: float = 0.1
    ) -> None:
        numbers = _are_numbers(beta, weight, unconditional)
        if not numbers or not beta > 0 or not weight > 0 or not 0 <= unconditional < 1:
            raise UserError(
                f"CCA: beta {beta!r}, weight {weight!r}, unconditional {unconditional!r}; positive, and a share"
            )
        self.reference, self.beta, self.weight, self.unconditional = reference, beta, weight, unconditional

    def check_start(self, model: NextScaleTransformer, init_from: str | None) -> None:
        if self.reference is None or init_from is None or self.reference == init_from:
            return
        found, start = load(self.reference)[0], model.state_dict()
        theirs = {} if found is None else found.state_dict()
        if theirs.keys() != start.keys() or not all(
            torch.equal(start[name].float(), t.float()) for name, t in theirs.items()
        ):
            raise UserError(
                f"CCA: reference {self.reference} is not what training starts from (init_from {init_from}): the run's "
                "own folder, or another model; leave reference out"
            )

    def frozen(
        self, model: NextScaleTransformer, tokenizer_hash: str, init_from: str | None
    ) -> NextScaleTransformer | None:
        if init_from is None:
            raise UserError("CCA: goes on from a trained model; name it by model.init_from")
        found = frozen_model("CCA", self.reference or init_from, model, tokenizer_hash)
        if found.num_classes != model.num_classes:
            raise UserError(f"CCA: the reference has {found.num_classes} classes, the model {model.num_classes}")
        return found

    def loss(
        self,
        model: NextScaleTransformer,
        frozen: NextScaleTransformer | None,
        x_BLZ: Tensor,
        label_B: Tensor,
        idx_BL: Tensor,
    ) -> TokenLoss:
        assert frozen is not None
        free_B = torch.rand(len(label_B), device=label_B.device) < self.unconditional
        rolled_B = label_B.roll(-1)
        positive_B = free_B | (rolled_B == label_B)
        none = torch.full_like(label_B, model.num_classes)
        label_NB = torch.cat([torch.where(free_B, none, label_B), torch.where(free_B, none, rolled_B)])
        x_NLZ, idx_NL = x_BLZ.repeat(2, 1, 1), idx_BL.repeat(2, 1)
        logits_NLV = _logits(model, x_NLZ, label_NB)
        with torch.no_grad():
            reference_N = _log_likelihood(_logits(frozen, x_NLZ, label_NB), idx_NL)
        own_B, other_B = (self.beta * (_log_likelihood(logits_NLV, idx_NL) - reference_N)).chunk(2)
        sign_B, weight_B = torch.where(positive_B, 1.0, -1.0), torch.where(positive_B, 1.0, self.weight)
        loss = -(F.logsigmoid(own_B).mean() + (weight_B * F.logsigmoid(sign_B * other_B)).mean()) / max(
            self.weight, 1.0
        )
        return replace(token_loss(logits_NLV[: len(idx_BL)].detach(), idx_BL, model.pyramid), loss=loss)


class Distillation(Objective):
    """Learning from a trained model's distribution over the codes instead of the tokens alone (arXiv 1503.02531).

    The loss is (1 - hard) T^2 KL(teacher || student) at temperature T, and ``hard`` times cross-entropy. Labels are
    dropped for both alike.

    Args:
        teacher: a checkpoint of the same tokenizer and scales, of any depth and strategy.
        temperature: T, of both distributions.
        cfg: guidance of the teacher's logits, growing over the scales as in sampling; 0 takes them plain. A student of
            a guided teacher is sampled without guidance, at half of the cost.
        hard: share of cross-entropy.
    """

    def __init__(self, teacher: str, temperature: float = 1.0, cfg: float = 0.0, hard: float = 0.0) -> None:
        if not _are_numbers(temperature, cfg, hard) or not temperature > 0 or not cfg >= 0 or not 0 <= hard <= 1:
            raise UserError(f"Distillation: temperature {temperature!r}, cfg {cfg!r}, hard {hard!r}; out of range")
        self.teacher, self.temperature, self.cfg, self.hard = teacher, temperature, cfg, hard

    def frozen(
        self, model: NextScaleTransformer, tokenizer_hash: str, init_from: str | None
    ) -> NextScaleTransformer | None:
        found = frozen_model("Distillation", self.teacher, model, tokenizer_hash)
        if found.num_classes != model.num_classes:
            raise UserError(f"Distillation: the teacher has {found.num_classes} classes, the model {model.num_classes}")
        return found

    def loss(
        self,
        model: NextScaleTransformer,
        frozen: NextScaleTransformer | None,
        x_BLZ: Tensor,
        label_B: Tensor,
        idx_BL: Tensor,
    ) -> TokenLoss:
        assert frozen is not None
        dropped_B = torch.rand(len(label_B), device=label_B.device) < model.label_drop
        label_B = torch.where(dropped_B, model.num_classes, label_B)
        logits_BLV = _logits(model, x_BLZ, label_B)
        with torch.no_grad():
            teacher_BLV = self._teachers(frozen, x_BLZ, label_B) / self.temperature
        figures = token_loss(logits_BLV, idx_BL, model.pyramid)
        student_BLV = (logits_BLV / self.temperature).log_softmax(dim=-1)
        divergence = F.kl_div(
            student_BLV.flatten(0, 1), teacher_BLV.log_softmax(-1).flatten(0, 1), log_target=True, reduction="batchmean"
        )
        soft = self.temperature**2 * divergence
        return replace(figures, loss=(1 - self.hard) * soft + self.hard * figures.loss)

    def _teachers(self, teacher: NextScaleTransformer, x_BLZ: Tensor, label_B: Tensor) -> Tensor:
        logits_BLV = _logits(teacher, x_BLZ, label_B)
        if self.cfg == 0:
            return logits_BLV
        free_BLV = _logits(teacher, x_BLZ, torch.full_like(label_B, teacher.num_classes))
        schedule, pyramid = LinearGuidance(self.cfg), teacher.pyramid
        strengths = [schedule.strength(scale, pyramid.num_scales) for scale in range(pyramid.num_scales)]
        counts = torch.tensor([pyramid.tokens_of(scale) for scale in range(pyramid.num_scales)])
        strength_L1 = torch.tensor(strengths).repeat_interleave(counts)[:, None].to(logits_BLV)
        return logits_BLV + strength_L1 * (logits_BLV - free_BLV)


def frozen_model(who: str, path: str, model: NextScaleTransformer, tokenizer_hash: str) -> NextScaleTransformer:
    """A trained model to compare with, without gradients.

    Raises:
        UserError: it cannot be read, or was trained on other tokens or scales.
    """
    found, tokenizer = load(path)
    if found is None:
        raise UserError(f"{who}: {path} holds a tokenizer alone; give a trained model")
    check_pair(model, tokenizer)
    if (theirs := fingerprint(tokenizer)) != tokenizer_hash:
        raise UserError(
            f"{who}: {path} reads tokens of another tokenizer ({theirs[:12]}; this run's {tokenizer_hash[:12]})"
        )
    return found.eval().requires_grad_(False)


def _are_numbers(*values: object) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)  # type: ignore[arg-type]


def _logits(model: NextScaleTransformer, x_BLZ: Tensor, label_B: Tensor) -> Tensor:
    """Float32, of labels as they are: none is dropped here."""
    return model.transform(model.unchecked_inputs(x_BLZ, label_B), range(model.pyramid.num_scales))


def _log_likelihood(logits_BLV: Tensor, idx_BL: Tensor) -> Tensor:
    """Of each image's tokens together, (B,)."""
    return -F.cross_entropy(logits_BLV.flatten(0, 1), idx_BL.flatten(), reduction="none").view_as(idx_BL).sum(dim=1)


class Target:
    """A run's objective, the scales that it trains alone, and the frozen model that it compares with: that one is in
    no checkpoint, and has no part in the module's weights.

    Raises:
        UserError: an objective that does not fit the scales, or does not go with scale groups or some scales alone.
    """

    def __init__(self, objective: Objective, scales: range | None) -> None:
        self.objective, self.scales = objective, scales
        self._frozen: NextScaleTransformer | None = None

    @classmethod
    def of(
        cls, objective: Objective | None, train_scales: Sequence[int] | None, groups: ScaleGroups, pyramid: ScalePyramid
    ) -> Target:
        """What a recipe says."""
        objective, scales = objective or CrossEntropy(), trained_scales(train_scales, pyramid.num_scales)
        objective.check(pyramid)
        split = len(groups.groups) > 1 or groups.target is not None
        if split and (scales is not None or not isinstance(objective, CrossEntropy)):
            raise UserError("scale_groups: go with cross-entropy of all scales; leave out objective and train_scales")
        if scales is not None and not isinstance(objective, CrossEntropy):
            raise UserError(f"train_scales {list(scales)}: go with cross-entropy; leave out {type(objective).__name__}")
        return cls(objective, scales)

    def start(self, model: NextScaleTransformer, init_from: str | None) -> str | None:
        """The name of the weights that ``model`` has come from, checked. Raises as `Objective.check_start`."""
        self.objective.check_start(model, init_from)
        return init_from

    def load(
        self, model: NextScaleTransformer, tokenizer_hash: str, init_from: str | None, device: torch.device
    ) -> None:
        """Read the frozen model. Raises as `Objective.frozen`."""
        found = self.objective.frozen(model, tokenizer_hash, init_from)
        self._frozen = None if found is None else found.to(device)

    def loss(
        self,
        model: NextScaleTransformer,
        batch: tuple[Tensor, Tensor, Tensor],
        groups: Sequence[range],
        accumulated: int,
    ) -> tuple[Tensor, TokenLoss]:
        """A training step's loss with its gradient, and its figures.

        Args:
            batch: ``x_BLZ``, ``label_B`` and ``idx_BL`` of `Objective.loss`.
            groups, accumulated: as of `loss_of_groups`.
        """
        if self.scales is not None:
            return range_loss(model, *batch, self.scales)
        if isinstance(self.objective, CrossEntropy):
            x_BLZ, label_B, idx_BL = batch
            return loss_of_groups(model, x_BLZ, label_B, idx_BL, groups, accumulated)
        figures = self.objective.loss(model, self._frozen, *batch)
        return figures.loss, figures


def range_loss(
    model: NextScaleTransformer, x_BLZ: Tensor, label_B: Tensor, idx_BL: Tensor, scales: range
) -> tuple[Tensor, TokenLoss]:
    """Cross-entropy of some scales alone, the mean over their tokens. Where no keys are read across scales nothing of
    the others is computed; else what comes after them is not."""
    pyramid, inputs = model.pyramid, model.inputs(x_BLZ, label_B)
    run = range(scales.stop) if model.backend.plan.crosses_scales else scales
    own, ran = pyramid.span(scales), pyramid.span(run)
    h_BlC = model.features(replace(inputs, x_BlC=inputs.x_BlC[:, ran]), run)[:, own.start - ran.start :]
    figures = token_loss(model.head.classify(h_BlC), idx_BL[:, own], pyramid, scales)
    return figures.loss, figures


def trained_scales(given: Sequence[int] | None, num_scales: int) -> range | None:
    """The scales that a run trains alone, in a row. Raises `UserError` for others than the model has."""
    if given is None:
        return None
    scales = range(given[0], given[-1] + 1) if given else range(0)
    if not scales or list(scales) != list(given) or scales.start < 0 or scales.stop > num_scales:
        raise UserError(f"train_scales {list(given)}: give scales that follow each other, from 0 to {num_scales - 1}")
    return None if len(scales) == num_scales else scales
