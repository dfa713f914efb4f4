"""Discriminators: networks that tell images from reconstructions, patch by patch or through frozen features, and what
images go through before they see them.

None of them has batch normalization: its statistics would tie an image's logits to what else is in its process' batch,
so that two processes with half a batch each would not be one with the whole, and real images would be told from
reconstructions by the company they are in. Group normalization knows one image alone.

Shapes: B batch, C channels, HW pixels, hw map of logits, N positions of a feature level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from mvar_lightning.axis import AxisMember
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import Size, height_width, short
from mvar_lightning.tokenizer.autoencoder import GroupNorm
from mvar_lightning.tokenizer.perceptual import Frozen
from mvar_lightning.tools.drawing import as_rgb

SLOPE = 0.2  # of the leaky ReLUs


class Discriminator(nn.Module, ABC):
    """Logits of images in [-1, 1]: high for real ones. Its state changes in ``after_step`` alone, not in a forward."""

    def take_channels(self, image_channels: int) -> None:
        """Called once, before anything is trained, where images are not RGB."""

    def prepare(self, device: torch.device, image_size: Size) -> None:
        """Called once before training: load and check what it needs. Raises `UserError` where it cannot work."""

    @abstractmethod
    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Logits (B, n) in float32."""

    def after_step(self) -> None:
        """Called after each step of its optimizer."""


class PatchDiscriminator(Discriminator):
    """One logit for each of many overlapping patches (Isola et al. 2017, arXiv 1611.07004; as in VQGAN).

    Args:
        channels: width of the first layer; doubles up to eightfold.
        layers: number of halvings; 3 sees patches of 70 pixels. The image's side must be at least 3 x 2 ** layers.
        norm_groups: groups of the normalizations; 0 leaves them out.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm_groups: int = 8) -> None:
        super().__init__()
        if channels < 1 or layers < 1 or norm_groups < 0:
            raise UserError(
                f"PatchDiscriminator: channels {channels}, layers {layers}, norm_groups {norm_groups}: "
                "give at least 1 channel and 1 layer, and 0 or more groups"
            )
        if norm_groups and channels * 2 % norm_groups:
            raise UserError(
                f"PatchDiscriminator: norm_groups {norm_groups} does not divide the {channels * 2} channels of the "
                "second layer; change either, or give 0 for no normalization"
            )
        self.smallest, self.channels = 3 * 2**layers, channels
        widths = [channels * min(2**level, 8) for level in range(layers + 1)]
        parts: list[nn.Module] = [_conv4x4(3, channels, 2), nn.LeakyReLU(SLOPE)]
        for level, (before, width) in enumerate(pairwise(widths), start=1):
            norm = GroupNorm(norm_groups, width) if norm_groups else nn.Identity()
            parts += [_conv4x4(before, width, 1 if level == layers else 2), norm, nn.LeakyReLU(SLOPE)]
        self.net = nn.Sequential(*parts, _conv4x4(widths[-1], 1, 1))

    def take_channels(self, image_channels: int) -> None:
        self.net[0] = _conv4x4(image_channels, self.channels, 2)

    def prepare(self, device: torch.device, image_size: Size) -> None:
        if min(height_width(image_size)) < self.smallest:
            raise UserError(
                f"PatchDiscriminator: images of {short(image_size)} pixels are too small, it needs {self.smallest} "
                "with this many layers; give fewer"
            )

    def forward(self, image_B3HW: Tensor) -> Tensor:
        return self.net(image_B3HW).float().flatten(1)


def _conv4x4(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    """A convolution with the initial weights of pix2pix."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=stride, padding=1)
    nn.init.normal_(conv.weight, std=0.02)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class FrozenFeatureDiscriminator(Discriminator):
    """Small heads on the levels of a frozen network, such as the layers of DINO (Sauer et al. 2023, arXiv 2301.09515).
    Gray and RGBA images are given to it as RGB (`as_rgb`).

    Each level is a sequence of positions; its head is convolutions along it, with spectral and group normalization.

    Args:
        network: a TorchScript file (a program: use files you trust). It takes images (B, 3, size, size) normalized by
            ``mean`` and ``std`` and gives one tensor a level: tokens (B, N, C) or maps (B, C, h, w).
        channels: width C of each level.
        size: side of the square to which images are resized (bilinear, antialiased where they shrink); their own height
            and width if null.
        kernel: positions that the middle convolution of a head sees.
        mean, std: of the images the network was trained on, per channel, in [0, 1].
        norm_groups: groups of the heads' normalizations.

    Raises:
        UserError: sizes that do not fit together; when the run starts, no such file or other levels.
    """

    def __init__(
        self,
        network: str,
        channels: Sequence[int],
        size: int | None = 224,
        kernel: int = 9,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        norm_groups: int = 8,
    ) -> None:
        super().__init__()
        if not channels or kernel < 1 or kernel % 2 == 0 or norm_groups < 1 or any(c % norm_groups for c in channels):
            raise UserError(
                f"FrozenFeatureDiscriminator: channels {list(channels)}, kernel {kernel}, norm_groups {norm_groups}: "
                "give each level's width, an odd kernel, and groups that divide every width"
            )
        self.file, self.channels, self.size = network, list(channels), size
        self.network = Frozen(partial(_scripted, Path(network)))
        self.heads = nn.ModuleList(_Head(width, kernel, norm_groups) for width in channels)
        self.mean_311 = nn.Buffer(torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.std_311 = nn.Buffer(torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenFeatureDiscriminator:
        """Stays in evaluation mode: in the other one, every forward would move the spectral norms' state."""
        return super().train(False)

    def prepare(self, device: torch.device, image_size: Size) -> None:
        size = self.size or image_size
        with torch.no_grad():
            probe = torch.zeros(1, 3, *height_width(size), device=device)
            levels = _levels(self.network.on(device)(probe), self.file)
        found = [level_BCN.shape[1] for level_BCN in levels]
        if found != self.channels:
            raise UserError(
                f"FrozenFeatureDiscriminator: {self.file} gives levels of widths {found} for images of {short(size)} "
                f"pixels, but channels says {self.channels}; set channels to what it gives"
            )

    def forward(self, image_B3HW: Tensor) -> Tensor:
        with torch.autocast(image_B3HW.device.type, enabled=False):
            image_B3HW = as_rgb(image_B3HW.float(), black=-1)
            if self.size is not None and image_B3HW.shape[-2:] != (self.size, self.size):
                image_B3HW = F.interpolate(image_B3HW, (self.size, self.size), mode="bilinear", antialias=True)
            normalized_B3HW = ((image_B3HW + 1) / 2 - self.mean_311) / self.std_311
            levels = _levels(self.network.on(image_B3HW.device)(normalized_B3HW), self.file)
        return torch.cat([head(level).float() for head, level in zip(self.heads, levels, strict=True)], dim=1)

    @torch.no_grad()
    def after_step(self) -> None:
        """One power iteration of each spectral norm; once a step, whatever the number of batches in it."""
        for module in self.heads.modules():
            if isinstance(module, nn.Conv1d):
                module.train()
                _ = module.weight
                module.eval()


class _Head(nn.Module):
    """(B, C, N) -> (B, N): position by position, then a residual look around, then a logit."""

    def __init__(self, width: int, kernel: int, norm_groups: int) -> None:
        super().__init__()

        def block(kernel: int) -> nn.Sequential:
            conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
            return nn.Sequential(spectral_norm(conv), GroupNorm(norm_groups, width), nn.LeakyReLU(SLOPE))

        self.each, self.around = block(1), block(kernel)
        self.logit = spectral_norm(nn.Conv1d(width, 1, kernel_size=1))

    def forward(self, x_BCN: Tensor) -> Tensor:
        x_BCN = self.each(x_BCN)
        x_BCN = (x_BCN + self.around(x_BCN)) * 0.5**0.5
        return self.logit(x_BCN).squeeze(1)


def _levels(features: Any, file: str) -> list[Tensor]:
    """Each level as (B, C, N)."""
    tensors = list(features) if isinstance(features, (list, tuple)) else [features]
    kinds = [tuple(level.shape) if isinstance(level, Tensor) else type(level).__name__ for level in tensors]
    if not tensors or any(not isinstance(kind, tuple) or len(kind) not in (3, 4) for kind in kinds):
        raise UserError(
            f"FrozenFeatureDiscriminator: {file} gives {kinds}; it must give one or several tensors, "
            "tokens (B, N, C) or maps (B, C, h, w)"
        )
    return [level.flatten(2) if level.ndim == 4 else level.transpose(1, 2) for level in tensors]


def _scripted(file: Path) -> nn.Module:
    if not file.is_file():
        raise UserError(
            f"FrozenFeatureDiscriminator: network {file}: no such file; give a TorchScript file (torch.jit.save)"
        )
    try:
        return torch.jit.load(str(file), map_location="cpu")
    except RuntimeError as error:
        raise UserError(
            f"FrozenFeatureDiscriminator: network {file}: not a TorchScript file; write it with torch.jit.save"
        ) from error


class Augmentation(AxisMember):
    """What real and reconstructed images go through before the discriminator sees them."""

    def __call__(self, image_B3HW: Tensor) -> Tensor:
        """Images in the same range; gradients pass. Draws from torch's global generator, each process its own."""
        raise NotImplementedError


class DiffAugment(Augmentation):
    """Color, translation and cutout, drawn for each image (Zhao et al. 2020, arXiv 2006.10738).

    Args:
        color: brightness within 0.5, saturation up to double, contrast within 50%; not of an alpha channel.
        translation: largest shift in each direction, as a share of the side; what comes in is 0 (gray).
        cutout: side of the square that is set to 0, as a share of the image's side.
    """

    def __init__(self, color: bool = True, translation: float = 0.125, cutout: float = 0.5) -> None:
        for name, value in (("translation", translation), ("cutout", cutout)):
            if not 0 <= value < 1:
                raise UserError(f"DiffAugment: {name} {value}: must be a share of the side in [0, 1)")
        self.color, self.translation, self.cutout = color, translation, cutout

    def __call__(self, image_B3HW: Tensor) -> Tensor:
        if self.color:
            image_B3HW = change_color(image_B3HW)
        if self.translation:
            image_B3HW = translate(image_B3HW, self.translation)
        return cut_out(image_B3HW, self.cutout) if self.cutout else image_B3HW


def change_color(image_B3HW: Tensor) -> Tensor:
    """Brightness, saturation, contrast; a fourth channel stays."""
    if image_B3HW.shape[1] == 4:
        return torch.cat([change_color(image_B3HW[:, :3]), image_B3HW[:, 3:]], dim=1)
    brightness, saturation, contrast = torch.rand(3, len(image_B3HW), 1, 1, 1, device=image_B3HW.device)
    image_B3HW = image_B3HW + (brightness - 0.5)
    gray_B1HW = image_B3HW.mean(1, keepdim=True)
    image_B3HW = gray_B1HW + (image_B3HW - gray_B1HW) * (2 * saturation)
    mean_B111 = image_B3HW.mean((1, 2, 3), keepdim=True)
    return mean_B111 + (image_B3HW - mean_B111) * (contrast + 0.5)


def translate(image_B3HW: Tensor, share: float) -> Tensor:
    """Shift by whole pixels, up to ``share`` of the side."""
    (batch, _, height, width), device = image_B3HW.shape, image_B3HW.device
    most_y, most_x = round(height * share), round(width * share)
    shift_y = torch.randint(0, 2 * most_y + 1, (batch, 1), device=device)
    shift_x = torch.randint(0, 2 * most_x + 1, (batch, 1), device=device)
    padded = F.pad(image_B3HW, (most_x, most_x, most_y, most_y))
    rows_BH = torch.arange(height, device=device) + shift_y
    columns_BW = torch.arange(width, device=device) + shift_x
    images_B = torch.arange(batch, device=device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[images_B, rows_BH.unsqueeze(2), columns_BW.unsqueeze(1)].permute(0, 3, 1, 2)


def cut_out(image_B3HW: Tensor, share: float) -> Tensor:
    """Set a square around a random pixel to 0; it may reach over the border."""
    outside, device = [], image_B3HW.device
    for side in image_B3HW.shape[2:]:
        size, position = round(side * share), torch.arange(side, device=device)
        first_B1 = torch.randint(0, side + 1 - size % 2, (len(image_B3HW), 1), device=device) - size // 2
        outside.append((position < first_B1) | (position >= first_B1 + size))
    keep_BHW = outside[0].unsqueeze(2) | outside[1].unsqueeze(1)
    return image_B3HW * keep_BHW.unsqueeze(1)
