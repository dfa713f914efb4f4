"""The training objective: cross-entropy of the next scale's tokens, with its share by scale.

B batch, l tokens of some scales, K scales, V vocabulary, C width, N = B l tokens, n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.transformer.linear import linear


@dataclass(frozen=True)
class TokenLoss:
    """Mean cross-entropy of some scales (with gradient), and losses and accuracies by scale (without).

    Accuracy is the share of tokens whose most likely code is the right one; 4-6% is normal at V = 4096. K counts the
    scales at hand, ``scales``; figures of other scales are not logged.
    """

    loss: Tensor
    accuracy: Tensor
    loss_K: Tensor
    accuracy_K: Tensor
    scales: range
    last_scale: int

    def named(self, prefix: str = "") -> dict[str, Tensor]:
        """Figures to log by name: overall, last scale, each scale."""
        figures = {"loss": self.loss.detach(), "accuracy": self.accuracy}
        if self.last_scale in self.scales:
            figures |= {"loss_last": self.loss_K[-1], "accuracy_last": self.accuracy_K[-1]}
        for scale, loss, accuracy in zip(self.scales, self.loss_K, self.accuracy_K, strict=True):
            figures |= {f"loss_scale_{scale}": loss, f"accuracy_scale_{scale}": accuracy}
        return {f"{prefix}{name}": figure for name, figure in figures.items()}


def token_loss(logits_BlV: Tensor, idx_Bl: Tensor, pyramid: ScalePyramid, scales: range | None = None) -> TokenLoss:
    """Mean cross-entropy over all B x l tokens of ``scales`` (all), as VAR weighs them (`trainer.py`: all the same)."""
    loss_Bl = F.cross_entropy(logits_BlV.flatten(0, 1), idx_Bl.flatten(), reduction="none").view_as(idx_Bl)
    with torch.no_grad():
        correct_Bl = (logits_BlV.argmax(dim=-1) == idx_Bl).float()
    return _by_scale(loss_Bl.mean(), loss_Bl.detach(), correct_Bl, pyramid, scales)


@torch.no_grad()
def evaluated_token_loss(
    h_BLC: Tensor,
    classify: Callable[[Tensor], Tensor],
    idx_BL: Tensor,
    pyramid: ScalePyramid,
    tokens_at_once: int = 4096,
) -> tuple[TokenLoss, Tensor]:
    """`token_loss` and the most likely codes (B, L), without gradient and without ever holding all logits.

    ``classify`` makes logits (n, V) of what the classifier reads, ``h_BLC``.
    """
    losses, predictions = [], []
    chunks = zip(h_BLC.flatten(0, 1).split(tokens_at_once), idx_BL.flatten().split(tokens_at_once), strict=True)
    for h_nC, idx_n in chunks:
        logits_nV = classify(h_nC)
        losses.append(F.cross_entropy(logits_nV, idx_n, reduction="none"))
        predictions.append(logits_nV.argmax(dim=-1))
    loss_BL, predicted_BL = torch.cat(losses).view_as(idx_BL), torch.cat(predictions).view_as(idx_BL)
    correct_BL = (predicted_BL == idx_BL).float()
    return _by_scale(loss_BL.mean(), loss_BL, correct_BL, pyramid, None), predicted_BL


def chunked_token_loss(
    h_BlC: Tensor,
    classifier: nn.Linear,
    idx_Bl: Tensor,
    pyramid: ScalePyramid,
    scales: range | None = None,
    tokens_at_once: int = 4096,
) -> TokenLoss:
    """`token_loss` of the classifier's logits, without ever holding them all.

    Logits, their softmax and their gradient are made for ``tokens_at_once`` tokens at a time; what is kept for the
    backward pass is the gradient of ``h_BlC`` and of the classifier. In bf16 at 256 pixels that spares some 30 MB
    of memory an image. ``h_BlC`` is what the classifier reads (`NextScaleTransformer.features`), ``classifier`` the
    head's last product, whose weights must be whole tensors.
    """
    products = h_BlC.flatten(0, 1), classifier.weight, classifier.bias
    loss, loss_N, correct_N = _ChunkedCrossEntropy.apply(*products, idx_Bl.flatten(), tokens_at_once)
    return _by_scale(loss, loss_N.view_as(idx_Bl), correct_N.view_as(idx_Bl), pyramid, scales)


def _by_scale(
    loss: Tensor, loss_Bl: Tensor, correct_Bl: Tensor, pyramid: ScalePyramid, scales: range | None
) -> TokenLoss:
    scales = range(pyramid.num_scales) if scales is None else scales
    counts = [pyramid.tokens_of(scale) for scale in scales]
    loss_K = torch.stack([part.mean() for part in loss_Bl.split(counts, dim=1)])
    accuracy_K = torch.stack([part.mean() for part in correct_Bl.split(counts, dim=1)])
    return TokenLoss(loss, correct_Bl.mean(), loss_K, accuracy_K, scales, pyramid.num_scales - 1)


def joined(parts: Sequence[TokenLoss], pyramid: ScalePyramid) -> TokenLoss:
    """Figures of groups of scales that follow each other, given in any order, together and without gradient."""
    parts = sorted(parts, key=lambda part: part.scales.start)
    scales = range(parts[0].scales.start, parts[-1].scales.stop)
    loss_K, accuracy_K = torch.cat([part.loss_K for part in parts]), torch.cat([part.accuracy_K for part in parts])
    counts = [pyramid.tokens_of(scale) for scale in scales]
    loss, accuracy = _weighted(loss_K, counts), _weighted(accuracy_K, counts)
    return TokenLoss(loss, accuracy, loss_K, accuracy_K, scales, pyramid.num_scales - 1)


def _weighted(value_K: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean with weights that are numbers: a tensor of them would make the device wait for its copy, in every step."""
    parts = [value * (count / sum(counts)) for value, count in zip(value_K.unbind(), counts, strict=True)]
    return torch.stack(parts).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear layer's logits; the gradients are computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, h_NC: Tensor, weight_VC: Tensor, bias_V: Tensor, idx_N: Tensor, tokens_at_once: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = h_NC.device.type
        # the products in the run's precision; autocast does not reach into a function's own operations otherwise
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_NC.dtype
        wants_gradient = any(ctx.needs_input_grad)
        weight, bias = weight_VC.to(dtype), bias_V.to(dtype)
        grad_h_NC = torch.empty_like(h_NC) if wants_gradient else None
        grad_weight_VC = torch.zeros_like(weight_VC, dtype=torch.float32) if wants_gradient else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_gradient else None
        loss_N = torch.empty(len(h_NC), dtype=torch.float32, device=h_NC.device)
        correct_N = torch.empty_like(loss_N)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(h_NC), tokens_at_once):
                chunk = slice(start, start + tokens_at_once)
                h_nC, idx_n = h_NC[chunk].to(dtype), idx_N[chunk]
                logits_nV = linear(h_nC, weight, bias).float()
                loss_N[chunk] = F.cross_entropy(logits_nV, idx_n, reduction="none")
                correct_N[chunk] = (logits_nV.argmax(dim=-1) == idx_n).float()
                if grad_h_NC is None or grad_weight_VC is None or grad_bias_V is None:
                    continue
                # gradient of cross-entropy in the logits: softmax - one-hot, made now because they are not kept
                error_nV = logits_nV.softmax(dim=-1)
                error_nV[torch.arange(len(idx_n), device=idx_n.device), idx_n] -= 1
                grad_bias_V += error_nV.sum(dim=0)
                error_nV = error_nV.to(dtype)
                grad_h_NC[chunk] = linear(error_nV, weight.t())
                grad_weight_VC += linear(error_nV.t(), h_nC.t())
        ctx.save_for_backward(grad_h_NC, grad_weight_VC, grad_bias_V)
        ctx.dtypes = weight_VC.dtype, bias_V.dtype
        ctx.mark_non_differentiable(loss_N, correct_N)
        return loss_N.mean(), loss_N, correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_NC, grad_weight_VC, grad_bias_V = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        grad = grad / len(grad_h_NC)  # of the mean; divided late, small numbers do not vanish in half precision
        weights = (grad_weight_VC * grad).to(weight_dtype), (grad_bias_V * grad).to(bias_dtype)
        return grad_h_NC * grad, *weights, None, None
