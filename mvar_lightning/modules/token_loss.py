"""The training objective: cross-entropy of the next scale's tokens, with its share by scale.

B batch, L tokens of the pyramid, K scales, V vocabulary, C width, N = B L tokens, n tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.transformer.products import linear


@dataclass(frozen=True)
class TokenLoss:
    """Mean cross-entropy (with gradient), and losses and accuracies by scale (without).

    Accuracy is the share of tokens whose most likely code is the right one; 4-6% is normal at V = 4096.
    """

    loss: Tensor
    accuracy: Tensor
    loss_K: Tensor
    accuracy_K: Tensor

    def named(self) -> dict[str, Tensor]:
        """Figures to log: overall, last scale, each scale."""
        figures = {
            "loss": self.loss.detach(),
            "accuracy": self.accuracy,
            "loss_last": self.loss_K[-1],
            "accuracy_last": self.accuracy_K[-1],
        }
        for scale in range(len(self.loss_K)):
            figures[f"loss_scale_{scale}"] = self.loss_K[scale]
            figures[f"accuracy_scale_{scale}"] = self.accuracy_K[scale]
        return figures


def token_loss(logits_BLV: Tensor, idx_BL: Tensor, pyramid: ScalePyramid) -> TokenLoss:
    """Mean cross-entropy over all B x L tokens, as VAR weighs them (`trainer.py`: every token the same)."""
    loss_BL = F.cross_entropy(logits_BLV.flatten(0, 1), idx_BL.flatten(), reduction="none").view_as(idx_BL)
    with torch.no_grad():
        correct_BL = (logits_BLV.argmax(dim=-1) == idx_BL).float()
    return _by_scale(loss_BL.mean(), loss_BL.detach(), correct_BL, pyramid)


def chunked_token_loss(
    h_BLC: Tensor, classifier: nn.Linear, idx_BL: Tensor, pyramid: ScalePyramid, tokens_at_once: int = 4096
) -> TokenLoss:
    """`token_loss` of the classifier's logits, without ever holding them all.

    Logits, their softmax and their gradient are made for ``tokens_at_once`` tokens at a time; what is kept for the
    backward pass is the gradient of ``h_BLC`` and of the classifier. In bf16 at 256 pixels that spares some 30 MB
    of memory an image.

    Args:
        h_BLC: what the classifier reads (`NextScaleTransformer.features`).
        classifier: the head's last product (``model.head.linear``).
    """
    weight_VC, bias_V = classifier.weight, classifier.bias
    loss, loss_N, correct_N = _ChunkedCrossEntropy.apply(
        h_BLC.flatten(0, 1), weight_VC, bias_V, idx_BL.flatten(), tokens_at_once
    )
    return _by_scale(loss, loss_N.view_as(idx_BL), correct_N.view_as(idx_BL), pyramid)


def _by_scale(loss: Tensor, loss_BL: Tensor, correct_BL: Tensor, pyramid: ScalePyramid) -> TokenLoss:
    loss_K = torch.stack([part.mean() for part in pyramid.split(loss_BL)])
    accuracy_K = torch.stack([part.mean() for part in pyramid.split(correct_BL)])
    return TokenLoss(loss, correct_BL.mean(), loss_K, accuracy_K)


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
                error_nV = logits_nV.softmax(dim=-1)
                error_nV[torch.arange(len(idx_n), device=idx_n.device), idx_n] -= 1
                error_nV /= len(h_NC)
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
        return (
            grad_h_NC * grad,
            (grad_weight_VC * grad).to(weight_dtype),
            (grad_bias_V * grad).to(bias_dtype),
            None,
            None,
        )
