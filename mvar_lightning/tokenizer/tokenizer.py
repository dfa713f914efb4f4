"""The tokenizer: image <-> token pyramid (VAR's multi-scale VQ-VAE, ``models/vqvae.py`` of the reference).

    image --encoder, quant_conv--> latent --quantizer--> tokens --quantizer--> f_hat --post_quant_conv, decoder--> image

Shapes: B batch, L all tokens, K scales, V vocabulary, Z code dim, HW pixels, hw latent map. The 3 of image_B3HW is
``image_channels`` where that is another number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mvar_lightning.errors import UserError, check_kind
from mvar_lightning.pyramid import ScalePyramid, Scales, Size, short, size_of
from mvar_lightning.tokenizer.autoencoder import Decoder, Encoder, conv3x3
from mvar_lightning.tokenizer.nearest import CodeMetric
from mvar_lightning.tokenizer.quantizer import MultiScaleQuantizer
from mvar_lightning.tools.compute import runs_behind


class TokenizerOutput(NamedTuple):
    """A training forward: the reconstruction is not clamped, ``quantizer_loss`` is a scalar.

    ``residuals_BlZ`` holds for each scale the rows (B, l, Z) that were quantized there, float32, with the encoder's
    gradient: the area average of f - sg(f_hat so far). ``codes_VZ`` is the codebook's weight and
    ``metric`` what nearest means.
    """

    reconstruction_B3HW: Tensor
    quantizer_loss: Tensor
    idx_BL: Tensor
    latent_BZhw: Tensor
    f_hat_BZhw: Tensor
    residuals_BlZ: tuple[Tensor, ...]
    codes_VZ: Tensor
    metric: CodeMetric


class MultiScaleTokenizer(nn.Module):
    """Convolutional autoencoder around a multi-scale residual quantizer.

    Args:
        scales: side lengths of the token maps, coarse to fine, or [height, width] of maps that are no squares; the last
            is the latent's size.
        vocab_size: number of codes V.
        code_dim: length of a code Z.
        channels: width of the finest level.
        channel_multipliers: width of each level in units of ``channels``; n levels shrink the image by 2 ** (n - 1).
        num_res_blocks: residual blocks of a level (the decoder has one more).
        phi_layers, phi_ratio, beta, codebook_std: see ``MultiScaleQuantizer``.
        norm_groups: groups of every group normalization.
        codes: what the nearest code is, ``euclidean`` or ``cosine``; see ``MultiScaleQuantizer``.
        image_channels: of the images: 3 of RGB, 1 of gray ones, 4 of RGBA, or any other number.

    The defaults are VAR's released tokenizer for 256 x 256 pixels when ``scales`` is 1 2 3 4 5 6 8 10 13 16.
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
        codes: str = "euclidean",
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if num_res_blocks < 1:
            raise UserError(f"num_res_blocks {num_res_blocks}: must be at least 1")
        if image_channels < 1:
            raise UserError(f"image_channels {image_channels}: must be at least 1; 3 is RGB")
        self.pyramid = ScalePyramid(scales)
        self.config: dict[str, Any] = {
            "scales": self.pyramid.scales,
            "vocab_size": vocab_size,
            "code_dim": code_dim,
            "channels": channels,
            "channel_multipliers": list(channel_multipliers),
            "num_res_blocks": num_res_blocks,
            "phi_layers": phi_layers,
            "phi_ratio": phi_ratio,
            "beta": beta,
            "codebook_std": codebook_std,
            "norm_groups": norm_groups,
            "codes": codes,
            # written only where it says something: those of before read all others
            **({} if image_channels == 3 else {"image_channels": image_channels}),
        }
        self.vocab_size, self.code_dim, self.image_channels = vocab_size, code_dim, image_channels
        self.downsampling = 2 ** (len(channel_multipliers) - 1)
        self.encoder = Encoder(code_dim, channels, channel_multipliers, num_res_blocks, norm_groups, image_channels)
        self.quant_conv = conv3x3(code_dim, code_dim)
        self.quantizer = MultiScaleQuantizer(
            self.pyramid, vocab_size, code_dim, phi_layers, phi_ratio, beta, codebook_std, codes
        )
        self.post_quant_conv = conv3x3(code_dim, code_dim)
        self.decoder = Decoder(code_dim, channels, channel_multipliers, num_res_blocks, norm_groups, image_channels)

    @property
    def image_size(self) -> Size:
        """Side of the images in pixels, or (height, width) where they are no squares."""
        return size_of(*self.image_shape[1:])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        height, width = self.pyramid.last_shape
        return self.image_channels, height * self.downsampling, width * self.downsampling

    def forward(self, image_B3HW: Tensor, kept_scales_B: Tensor | None = None) -> TokenizerOutput:
        """Reconstruct images in [-1, 1] for training.

        Args:
            image_B3HW: the images.
            kept_scales_B: where given, image b is rebuilt from its first ``kept_scales_B[b]`` scales alone (int64).
        """
        latent_BZhw = self.latent(image_B3HW)
        quantized = self.quantizer(latent_BZhw, kept_scales_B)
        return TokenizerOutput(
            reconstruction_B3HW=self._decoded(quantized.f_hat_straight_through_BZhw),
            quantizer_loss=quantized.loss,
            idx_BL=quantized.idx_BL,
            latent_BZhw=latent_BZhw,
            f_hat_BZhw=quantized.f_hat_BZhw,
            residuals_BlZ=quantized.residuals_BlZ,
            codes_VZ=self.quantizer.codebook.weight,
            metric=self.quantizer.metric,
        )

    def latent(self, image_B3HW: Tensor) -> Tensor:
        """The continuous latent (B, Z, h, w) of images in [-1, 1].

        Raises:
            UserError: the images are not floats of shape ``(B, *image_shape)``.
        """
        check_kind("image_B3HW", image_B3HW, Tensor, "a tensor")
        if image_B3HW.ndim != 4 or image_B3HW.shape[1:] != self.image_shape:
            raise UserError(
                f"image of shape {tuple(image_B3HW.shape)}: this tokenizer takes (B, "
                f"{', '.join(map(str, self.image_shape))}), its last scale {short(self.pyramid.last_side)} times its "
                f"downsampling {self.downsampling}"
            )
        if not image_B3HW.is_floating_point():
            raise UserError(f"image of type {image_B3HW.dtype}: give floats in [-1, 1]")
        return self.quant_conv(self.encoder(image_B3HW.to(self.quant_conv.weight.dtype)))

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Token pyramid of images in [-1, 1]: int64 (B, L), coarse to fine.

        Raises:
            UserError: a wrong shape or type of image, or pixels that are not finite.
        """
        latent_BZhw = self.latent(image_B3HW)
        if not torch.isfinite(image_B3HW).all():
            raise UserError("image: some pixels are NaN or infinite; give finite values in [-1, 1]")
        return self.quantizer.encode(latent_BZhw)

    @torch.no_grad()
    def decode(self, idx_BL: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of a token pyramid.

        Raises:
            UserError: a wrong number of tokens, indices outside the codebook, or not integers.
        """
        self._check_tokens(idx_BL)
        return self.decode_latent(self.quantizer.f_hat(idx_BL))

    def decode_latent(self, f_hat_BZhw: Tensor) -> Tensor:
        """Images in [-1, 1] of a quantized latent."""
        return self._decoded(f_hat_BZhw).clamp(-1, 1)

    def _decoded(self, f_hat_BZhw: Tensor) -> Tensor:
        # the quantizer gives float32 whatever the precision of the weights
        return self.decoder(self.post_quant_conv(f_hat_BZhw.to(self.post_quant_conv.weight.dtype)))

    @torch.no_grad()
    def teacher_input(self, idx_BL: Tensor) -> Tensor:
        """The transformer's inputs for all scales but the first: float32 (B, L - first_tokens, Z).

        Raises:
            UserError: as ``decode``; of indices out of range on a CPU alone. A training step would wait for a GPU to
                tell, and there the lookup of the codes fails.
        """
        self._check_tokens(idx_BL, look_at_values=not runs_behind(idx_BL.device))
        return self.quantizer.teacher_input(idx_BL)

    @torch.no_grad()
    def progressive(self, idx_BL: Tensor) -> list[Tensor]:
        """The image (B, 3, H, W) in [-1, 1] after each scale, coarse to fine.

        Raises:
            UserError: as ``decode``.
        """
        return list(self.after_scales(idx_BL))

    @torch.no_grad()
    def after_scales(self, idx_BL: Tensor) -> Iterator[Tensor]:
        """``progressive``, each decoded when it is asked for."""
        self._check_tokens(idx_BL)
        for f_hat_BZhw in self.quantizer.f_hats(idx_BL):
            yield self.decode_latent(f_hat_BZhw)

    def _check_tokens(self, idx_BL: Tensor, look_at_values: bool = True) -> None:
        check_kind("idx_BL", idx_BL, Tensor, "a tensor")
        if idx_BL.ndim != 2 or idx_BL.shape[1] != self.pyramid.num_tokens:
            raise UserError(
                f"tokens of shape {tuple(idx_BL.shape)}: scales {self.pyramid} need (B, {self.pyramid.num_tokens})"
            )
        if idx_BL.dtype not in (torch.int32, torch.int64):
            raise UserError(f"tokens of type {idx_BL.dtype}: give int64 indices")
        if look_at_values and idx_BL.numel() and not 0 <= int(idx_BL.min()) <= int(idx_BL.max()) < self.vocab_size:
            raise UserError(
                f"token indices from {int(idx_BL.min())} to {int(idx_BL.max())}: "
                f"the codebook has 0 to {self.vocab_size - 1}"
            )


# Whose tokens they are: a transformer has to speak its tokenizer's, and a hash says which tokenizer that was.
class SpeaksTokens(Protocol):
    """What of a transformer has to agree with its tokenizer."""

    pyramid: ScalePyramid
    vocab_size: int
    code_dim: int


def check_pair(model: SpeaksTokens, tokenizer: MultiScaleTokenizer) -> None:
    """Raise `UserError` where the tokenizer is not of the kind that the model was made for, or the two are swapped."""
    check_kind("tokenizer", tokenizer, MultiScaleTokenizer, "a MultiScaleTokenizer")
    if isinstance(model, MultiScaleTokenizer):
        raise UserError("``model``: is a tokenizer; give the transformer first, then its tokenizer")
    for name, ours, theirs in (
        ("scales", model.pyramid.scales, tokenizer.pyramid.scales),
        ("vocab_size", model.vocab_size, tokenizer.vocab_size),
        ("code_dim", model.code_dim, tokenizer.code_dim),
    ):
        if ours != theirs:
            raise UserError(
                f"{name}: the model has {ours}, the tokenizer {theirs}; take the tokenizer it was trained with"
            )


TRAINING_ONLY = frozenset({"beta", "codebook_std"})
"""Entries of the configuration that change no token and no image once the weights are there."""

UNCHANGED = {"codes": "euclidean", "image_channels": 3}
"""Entries that came later, with the value that leaves a tokenizer as it was: old hashes stay valid."""


def fingerprint(tokenizer: MultiScaleTokenizer) -> str:
    """SHA-256 (64 hexadecimal digits) of what turns images into tokens and back.

    Covers the configuration and the parameters as float32 in the order of their names, so it is the same on any device
    and for any way of building the module; buffers (running statistics) do not count.
    """
    return fingerprint_of(tokenizer, dict(tokenizer.named_parameters()))


def fingerprint_of(tokenizer: MultiScaleTokenizer, state: Mapping[str, Tensor]) -> str:
    """The fingerprint that ``tokenizer`` would have with the parameters in ``state`` (which may hold more)."""
    config = {
        key: value
        for key, value in tokenizer.config.items()
        if key not in TRAINING_ONLY and not (key in UNCHANGED and value == UNCHANGED[key])
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(name for name, _ in tokenizer.named_parameters()):
        parameter = state[name]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        array = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(array.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
