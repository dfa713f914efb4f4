"""Multi-scale residual quantizer: latent map <-> token pyramid (VAR, section 3.2; the reference's ``models/quant.py``).

Scale after scale, coarse to fine: shrink the rest of the latent to the scale's map, take the nearest code of every
position, enlarge the codes to the full map, blend them with a convolution (phi), add the result to ``f_hat`` and
subtract it from the rest.

Everything here computes in IEEE float32, outside autocast and TF32: residuals of residuals do not survive less.

Shapes: B batch, L all tokens, l tokens of one scale, K scales, V vocabulary, Z code dim, ij map of a scale (tu of a
resized one), hw latent map. Public methods take and give channel-first maps (BZhw); inside, maps are
channel-last (BhwZ), so that a map's positions are token rows without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.tokenizer.nearest import NearestCode, code_metric
from mvar_lightning.tools.compute import exact_float32, runs_behind, table


# Resizing between the maps of the pyramid as two small matrix products. Area averaging and bicubic interpolation are
# linear and separable, so a map changes its size by one matrix applied to its rows and one to its columns, of a square
# the same. They are read off ``F.interpolate`` itself, and working channel-last spares the permutations between token
# rows and maps.
@table(maxsize=256)
def resize_matrix(source: int, target: int, mode: str, device: torch.device) -> Tensor:
    """The (target, source) float32 matrix of ``F.interpolate(..., mode=mode)`` along one dimension."""
    basis = torch.eye(source).reshape(source, 1, source, 1)
    return F.interpolate(basis, size=(target, 1), mode=mode).reshape(source, target).t().contiguous().to(device)


def resize(map_BijZ: Tensor, target: tuple[int, int], mode: str) -> Tensor:
    """(B, i, j, Z) -> (B, t, u, Z), equal to ``F.interpolate`` on the channel-first map."""
    (B, i, j, Z), (t, u) = map_BijZ.shape, target
    if i != t:
        rows = torch.matmul(resize_matrix(i, t, mode, map_BijZ.device), map_BijZ.reshape(B, i, j * Z))
        map_BijZ = rows.reshape(B, t, j, Z)
    if j != u:
        columns = torch.matmul(resize_matrix(j, u, mode, map_BijZ.device), map_BijZ.reshape(B * t, j, Z))
        map_BijZ = columns.reshape(B, t, u, Z)
    return map_BijZ


# Scale dropout: some images of a batch are rebuilt from their first scales alone, so these must carry an image.

FIRST_KEPT = 3  # fewest scales an image keeps, where nothing else is said


def check_scale_dropout(probability: float, num_scales: int, first: int = FIRST_KEPT) -> None:
    """Raise UserError where dropping scales makes no sense."""
    if not 0 <= probability <= 1:
        raise UserError(f"scale_dropout {probability}: must be in [0, 1]; 0.1 is usual, 0 switches it off")
    if first < 1:
        raise UserError(f"scale_dropout_keeps {first}: an image needs at least 1 scale; {FIRST_KEPT} is usual")
    if probability and num_scales <= first:
        raise UserError(
            f"scale_dropout {probability}: keeps at least {first} scales and the pyramid has {num_scales}; lower "
            "scale_dropout_keeps, or set scale_dropout to 0"
        )


def draw_kept_scales(
    batch: int,
    num_scales: int,
    probability: float,
    first: int = FIRST_KEPT,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """How many scales each image keeps, int64 (B,): with ``probability`` any number from ``first`` to all but one.

    None where nothing is dropped. Draws on the CPU, from torch's own generator if none is given.
    """
    if not probability:
        return None
    dropped_B = torch.rand(batch, generator=generator) < probability
    fewer_B = torch.randint(first, num_scales, (batch,), generator=generator)
    kept_B = torch.where(dropped_B, fewer_B, num_scales)
    if device is not None and device.type == "cuda":
        return kept_B.pin_memory().to(device, non_blocking=True)
    return kept_B.to(device)


class QuantizerOutput(NamedTuple):
    """What a training step needs; ``f_hat_straight_through_BZhw`` has f_hat's values and passes gradients to f.

    ``residuals_BlZ`` are the rows that each scale quantized, K tensors; gradients pass through them to f.
    """

    f_hat_straight_through_BZhw: Tensor
    f_hat_BZhw: Tensor
    loss: Tensor
    idx_BL: Tensor
    residuals_BlZ: tuple[Tensor, ...]


class Phi(nn.Conv2d):
    """phi(h) = (1 - ratio) h + ratio conv3x3(h), on channel-last maps."""

    def __init__(self, code_dim: int, ratio: float) -> None:
        super().__init__(code_dim, code_dim, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, h_BhwZ: Tensor) -> Tensor:
        assert self.bias is not None
        weight, bias = self.weight.float(), self.bias.float()  # of a tokenizer in half precision, too
        conv_BhwZ = F.conv2d(h_BhwZ.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
        return h_BhwZ.mul(1 - self.ratio).add(conv_BhwZ, alpha=self.ratio)


def _channel_first(map_BhwZ: Tensor) -> Tensor:
    return map_BhwZ.permute(0, 3, 1, 2).contiguous()


def _mse(a_BhwZ: Tensor, b_BhwZ: Tensor, weight_B: Tensor | None) -> Tensor:
    """Mean squared difference, where given with a weight for each image."""
    if weight_B is None:
        return F.mse_loss(a_BhwZ, b_BhwZ)
    return ((a_BhwZ - b_BhwZ).square().mean(dim=(1, 2, 3)) * weight_B).mean()


def phi_of_scales(num_scales: int, num_phi: int) -> list[int]:
    """Which phi each scale uses: the one whose tick is nearest to the scale's position in [0, 1].

    The ticks are the reference's (``PhiPartiallyShared``), with its two spacings and numpy's rounding: positions
    halfway between two ticks must fall on the same side as there.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    positions = [scale / max(num_scales - 1, 1) for scale in range(num_scales)]
    return [int(np.argmin(np.abs(ticks - position))) for position in positions]


class MultiScaleQuantizer(nn.Module):
    """Residual vector quantization over a pyramid of maps with one codebook.

    Args:
        pyramid: sizes of the token maps; the last one is the latent's.
        vocab_size: number of codes V.
        code_dim: length of a code Z.
        phi_layers: number of phi convolutions that the scales share; 1 is one for all, 0 is one for each scale.
        phi_ratio: share of the convolution in phi; 0 leaves phi out.
        beta: weight of the commitment term.
        codebook_std: standard deviation of the initial codes (normal, truncated at two deviations).
        codes: ``euclidean`` takes the code at the smallest distance, ``cosine`` the one at the smallest angle. What is
            added is the code as it is, in both.
    """

    def __init__(
        self,
        pyramid: ScalePyramid,
        vocab_size: int,
        code_dim: int,
        phi_layers: int = 4,
        phi_ratio: float = 0.5,
        beta: float = 0.25,
        codebook_std: float = 0.1,
        codes: str = "euclidean",
    ) -> None:
        super().__init__()
        if vocab_size < 2:
            raise UserError(f"vocab_size {vocab_size}: a codebook needs at least 2 codes")
        if code_dim < 1:
            raise UserError(f"code_dim {code_dim}: must be at least 1")
        if phi_layers < 0:
            raise UserError(f"phi_layers {phi_layers}: give 0 (one for each scale), 1 (shared) or more")
        if not 0 <= phi_ratio <= 1:
            raise UserError(f"phi_ratio {phi_ratio}: must be in [0, 1]")
        if codebook_std <= 0:
            raise UserError(f"codebook_std {codebook_std}: must be positive")
        self.pyramid, self.beta, self.metric = pyramid, beta, code_metric(codes)
        self.codebook = nn.Embedding(vocab_size, code_dim)
        nn.init.trunc_normal_(self.codebook.weight, std=codebook_std, a=-2 * codebook_std, b=2 * codebook_std)
        num_phi = phi_layers or pyramid.num_scales
        self.phi = nn.ModuleList(Phi(code_dim, phi_ratio) if phi_ratio else nn.Identity() for _ in range(num_phi))
        self.phi_index = phi_of_scales(pyramid.num_scales, num_phi)
        # Codes that a remedy wrote anew since weight averaging last asked (``replace_codes``).
        self.replaced_codes: set[int] = set()
        # Running hit counts that the released checkpoints carry; kept so that they leave as they came.
        self.ema_hits_KV = nn.Buffer(torch.zeros(pyramid.num_scales, vocab_size))

    def forward(self, f_BZhw: Tensor, kept_scales_B: Tensor | None = None) -> QuantizerOutput:
        """Quantize a latent map for training (the reference's ``forward``).

        The loss is the mean over scales of mse(f_hat, sg f) + beta mse(sg f_hat, f) with the f_hat of that scale.

        Args:
            f_BZhw: latent map.
            kept_scales_B: where given, image b's f_hat ends with its first ``kept_scales_B[b]`` scales, and its loss is
                the mean over these. Tokens and residuals are those of all scales.
        """
        with exact_float32(f_BZhw.device):
            f_BhwZ = self._channel_last(f_BZhw)
            target_BhwZ = f_BhwZ.detach()
            keep_KB = self._keep(kept_scales_B, len(f_BhwZ), f_BhwZ.device)
            f_hat_BhwZ, loss = torch.zeros_like(target_BhwZ), target_BhwZ.new_zeros(())
            indices, residuals = [], []
            for keep_B, (idx_Bl, rows_BlZ, h_BhwZ) in zip(keep_KB, self._residual_steps(f_BhwZ), strict=True):
                f_hat_BhwZ = f_hat_BhwZ + (h_BhwZ if keep_B is None else h_BhwZ * (keep_B > 0).view(-1, 1, 1, 1))
                loss = loss + _mse(f_hat_BhwZ, target_BhwZ, keep_B)
                loss = loss + self.beta * _mse(f_hat_BhwZ.detach(), f_BhwZ, keep_B)
                indices.append(idx_Bl)
                residuals.append(rows_BlZ)
            f_hat_BhwZ = f_hat_BhwZ.detach()
            straight_through_BZhw = _channel_first((f_hat_BhwZ - target_BhwZ) + f_BhwZ)
            loss, idx_BL = loss / self.pyramid.num_scales, torch.cat(indices, dim=1)
            return QuantizerOutput(straight_through_BZhw, _channel_first(f_hat_BhwZ), loss, idx_BL, tuple(residuals))

    @torch.no_grad()
    def encode(self, f_BZhw: Tensor) -> Tensor:
        """Token pyramid of a latent map: int64 (B, L), coarse to fine."""
        with exact_float32(f_BZhw.device):
            return torch.cat([idx_Bl for idx_Bl, _, _ in self._residual_steps(self._channel_last(f_BZhw))], dim=1)

    def f_hat(self, idx_BL: Tensor) -> Tensor:
        """The quantized latent of a token pyramid: float32 (B, Z, h, w)."""
        return self.f_hats(idx_BL)[-1]

    def f_hats(self, idx_BL: Tensor) -> list[Tensor]:
        """The quantized latent after each scale: K maps (B, Z, h, w)."""
        return list(self._f_hats(idx_BL))

    def _f_hats(self, idx_BL: Tensor) -> Iterator[Tensor]:
        f_hat_BZhw = self.empty_f_hat(idx_BL.shape[0])
        for scale, idx_Bl in enumerate(self.pyramid.split(idx_BL)):
            f_hat_BZhw = self.accumulate(f_hat_BZhw, self.lookup(idx_Bl), scale)
            yield f_hat_BZhw

    def empty_f_hat(self, batch_size: int) -> Tensor:
        """The quantized latent before the first scale: zeros (B, Z, h, w), on the codebook's device."""
        codes_VZ = self.codebook.weight
        return codes_VZ.new_zeros(batch_size, codes_VZ.shape[1], *self.pyramid.last_shape, dtype=torch.float32)

    def lookup(self, idx_Bl: Tensor) -> Tensor:
        """Codes of token indices: (B, l) -> (B, l, Z) float32."""
        return self.codebook(idx_Bl).float()

    def accumulate(self, f_hat_BZhw: Tensor, codes_BlZ: Tensor, scale: int) -> Tensor:
        """Add one scale's codes (or mixtures of codes) to the quantized latent; gives a new map."""
        with exact_float32(f_hat_BZhw.device):
            return f_hat_BZhw + _channel_first(self._contribution(codes_BlZ.float(), scale))

    def next_input(self, f_hat_BZhw: Tensor, scale: int) -> Tensor:
        """What the transformer reads for ``scale``: f_hat averaged down to its map, (B, l, Z) float32."""
        with exact_float32(f_hat_BZhw.device):
            return self._rows(self._channel_last(f_hat_BZhw), scale)

    def teacher_input(self, idx_BL: Tensor) -> Tensor:
        """Inputs of all scales but the first, given the right tokens: (B, L - first, Z) float32.

        A pyramid of one scale has none: (B, 0, Z).
        """
        none_B0Z = self.codebook.weight.new_zeros(idx_BL.shape[0], 0, self.codebook.embedding_dim, dtype=torch.float32)
        # the range comes first, so that the last scale's f_hat, which nobody reads, is never made
        later = zip(range(1, self.pyramid.num_scales), self._f_hats(idx_BL), strict=False)
        return torch.cat([none_B0Z, *(self.next_input(f_hat_BZhw, scale) for scale, f_hat_BZhw in later)], dim=1)

    def _residual_steps(self, f_BhwZ: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Tokens (B, l), the rows they stand for (B, l, Z) and contribution (B, h, w, Z) of each scale.

        The rows carry f's gradient and none of earlier codes.
        """
        rest_BhwZ = f_BhwZ
        # prepared once: codes stay the same from scale to scale
        nearest = NearestCode(self.codebook.weight.float(), self.metric)
        for scale in range(self.pyramid.num_scales):
            rows_BlZ = self._rows(rest_BhwZ, scale)
            idx_Bl = nearest(rows_BlZ.flatten(0, 1)).view(rows_BlZ.shape[:2])
            h_BhwZ = self._contribution(self.lookup(idx_Bl), scale)
            yield idx_Bl, rows_BlZ, h_BhwZ
            # detached: a finer scale's rows must not pull on the codes of the coarser ones
            rest_BhwZ = rest_BhwZ - h_BhwZ.detach()

    def _keep(self, kept_scales_B: Tensor | None, batch: int, device: torch.device) -> list[Tensor | None]:
        """For each scale the weight of every image in its loss: 0 where the scale is dropped, 1 on average."""
        num_scales = self.pyramid.num_scales
        if kept_scales_B is None:
            return [None] * num_scales
        kept_B = kept_scales_B.to(device)
        if kept_B.shape != (batch,) or kept_B.is_floating_point():
            raise UserError(f"kept_scales_B of shape {tuple(kept_B.shape)}, {kept_B.dtype}: give int64 ({batch},)")
        # where the numbers are on a GPU, looking at them would make every step wait
        asked = batch and not runs_behind(kept_B.device)
        if asked and not 1 <= int(kept_B.min()) <= int(kept_B.max()) <= num_scales:
            raise UserError(f"kept_scales_B {kept_B.tolist()}: each image keeps 1 to {num_scales} scales")
        scale_K1 = torch.arange(num_scales, device=device).unsqueeze(1)
        return list((scale_K1 < kept_B) * (num_scales / kept_B))

    def _rows(self, map_BhwZ: Tensor, scale: int) -> Tensor:
        return resize(map_BhwZ, self.pyramid.shapes[scale], "area").flatten(1, 2)

    def _contribution(self, codes_BlZ: Tensor, scale: int) -> Tensor:
        map_BijZ = codes_BlZ.unflatten(1, self.pyramid.shapes[scale])
        return self.phi[self.phi_index[scale]](resize(map_BijZ, self.pyramid.last_shape, "bicubic"))

    def _channel_last(self, f_BZhw: Tensor) -> Tensor:
        Z, (h, w) = self.codebook.embedding_dim, self.pyramid.last_shape
        if tuple(f_BZhw.shape[1:]) != (Z, h, w):
            raise UserError(
                f"latent of shape {tuple(f_BZhw.shape)}: this quantizer takes (B, {Z}, {h}, {w}), the code length and "
                f"the last of the scales {self.pyramid.scales}"
            )
        return f_BZhw.float().permute(0, 2, 3, 1).contiguous()
