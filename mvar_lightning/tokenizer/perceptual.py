"""LPIPS (Zhang et al. 2018, arXiv 1801.03924): distance of two images as VGG16 sees them, weighted by learned heads.

VGG16's weights are a file that the user names; the linear heads come with torchmetrics. The formulas are torchmetrics'
(``torchmetrics/functional/image/lpips.py``), which needs torchvision for the network; here its feature layers are built
from plain modules.

Shapes: B batch, C channels of a VGG level, HW pixels, hw map of a level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import Size, height_width, short
from mvar_lightning.tokenizer.losses import LossPart
from mvar_lightning.tokenizer.tokenizer import TokenizerOutput
from mvar_lightning.tools.copies import fetched
from mvar_lightning.tools.drawing import as_rgb
from mvar_lightning.tools.files import kind_of, sha256_of
from mvar_lightning.tools.tensors import read_safetensors, read_torch

VGG_FILE = "vgg16-397923af.pth"
VGG_HASH = "397923af"
VGG_ADDRESS = f"https://download.pytorch.org/models/{VGG_FILE}"
WAY_OUT = f"download {VGG_ADDRESS} (SHA-256 starts with {VGG_HASH}; `mvar fetch vgg` does)"

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions between its poolings; LPIPS looks at the last map of each stage."""

SMALLEST = 2 ** (len(STAGES) - 1)  # side in pixels below which the last stage has no map


class LPIPS(nn.Module):
    """Perceptual distance of two batches of images, frozen, in float32 whatever the precision around it.

    Args:
        vgg_weights: torchvision's ``vgg16-397923af.pth``, or its tensors (all, or those of ``features`` alone) as a
            PyTorch or safetensors file.

    Raises:
        UserError: no such file, or not VGG16's weights.
    """

    def __init__(self, vgg_weights: str) -> None:
        super().__init__()
        self.vgg = _vgg(fetched(vgg_weights))
        file = Path(str(files("torchmetrics.functional.image"))) / "lpips_models" / "vgg.pth"
        if not file.is_file():
            raise UserError(f"LPIPS heads {file}: no such file; install torchmetrics again, it brings them")
        state = read_torch(file)
        # (C, 1, 1) each: weights of a level's channels
        self.heads = nn.ParameterList(state[f"lin{level}.model.1.weight"][0] for level in range(len(STAGES)))
        # from [-1, 1] to the statistics of VGG's training images
        self.shift_311 = nn.Buffer(torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.scale_311 = nn.Buffer(torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
        """Distance (B,) of images in [-1, 1], differentiable in both; of gray and RGBA ones as VGG's RGB (`as_rgb`).

        Raises:
            UserError: the shapes differ, or the images are smaller than 16 x 16 pixels.
        """
        if a_B3HW.shape != b_B3HW.shape or min(a_B3HW.shape[2:]) < SMALLEST:
            raise UserError(
                f"LPIPS of images {tuple(a_B3HW.shape)} and {tuple(b_B3HW.shape)}: give two batches of one shape, "
                f"at least {SMALLEST} x {SMALLEST} pixels (VGG16 halves them {len(STAGES) - 1} times)"
            )
        with torch.autocast(a_B3HW.device.type, enabled=False):
            a_B3HW, b_B3HW = as_rgb(a_B3HW, black=-1), as_rgb(b_B3HW, black=-1)
            levels = zip(self._features(a_B3HW), self._features(b_B3HW), self.heads, strict=True)
            distances = [
                ((a_BChw - b_BChw).square() * head_C11).sum(1).mean((1, 2)) for a_BChw, b_BChw, head_C11 in levels
            ]
            return torch.stack(distances).sum(0)

    def _features(self, image_B3HW: Tensor) -> list[Tensor]:
        x_BChw, levels = (image_B3HW.float() - self.shift_311) / self.scale_311, []
        for stage in self.vgg:
            x_BChw = stage(x_BChw)
            levels.append(x_BChw / (x_BChw.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return levels


class PerceptualLoss(LossPart):
    """LPIPS between reconstruction and image. Its networks are in no checkpoint, average or fingerprint.

    Args:
        vgg_weights: file of VGG16's weights, see ``LPIPS``; read when the run starts.
        weight: factor of this term in the total.
    """

    name = "lpips"

    def __init__(self, vgg_weights: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.network = Frozen(partial(LPIPS, vgg_weights))

    def prepare(self, device: torch.device, image_size: Size) -> None:
        if min(height_width(image_size)) < SMALLEST:
            raise UserError(
                f"PerceptualLoss: images of {short(image_size)} pixels: VGG16 needs at least {SMALLEST}; leave it out"
            )
        self.network.on(device)

    def forward(self, output: TokenizerOutput, image_B3HW: Tensor) -> Tensor:
        return self.network.on(image_B3HW.device)(output.reconstruction_B3HW, image_B3HW).mean()


def _vgg(file: Path) -> nn.ModuleList:
    """VGG16's feature layers up to the last convolution, cut into stages; all but the first begin with a pooling."""
    state = _read(file)
    stages, index, channels = nn.ModuleList(), 0, 3
    for widths in STAGES:
        layers: list[nn.Module] = []
        if len(stages):
            layers.append(nn.MaxPool2d(2))
            index += 1
        for width in widths:
            # on the meta device: drawing weights to replace them would move the run's random state
            conv = nn.Conv2d(channels, width, kernel_size=3, padding=1, device="meta")
            for name, parameter in list(conv.named_parameters()):
                tensor = state.get(f"features.{index}.{name}", state.get(f"{index}.{name}"))
                if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
                    found = tuple(tensor.shape) if isinstance(tensor, Tensor) else "nothing"
                    raise UserError(
                        f"VGG16 weights {file}: features.{index}.{name} should be {tuple(parameter.shape)}, it has "
                        f"{found}; {WAY_OUT}"
                    )
                setattr(conv, name, nn.Parameter(tensor.float()))
            layers += [conv, nn.ReLU(inplace=True)]
            index, channels = index + 2, width
        stages.append(nn.Sequential(*layers))
    return stages


def _read(file: Path) -> Mapping[str, Any]:
    if kind_of(file) != "file":
        raise UserError(f"VGG16 weights {file}: no such file; {WAY_OUT}")
    if file.name == VGG_FILE and not (found := sha256_of(file)).startswith(VGG_HASH):
        raise UserError(f"VGG16 weights {file}: SHA-256 starts with {found[:8]}: damaged; {WAY_OUT}")
    try:
        state = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    except UserError as error:
        raise UserError(f"VGG16 weights {error.marked}; {WAY_OUT}") from error
    if not isinstance(state, Mapping):
        raise UserError(f"VGG16 weights {file}: holds a {type(state).__name__}, not named tensors; {WAY_OUT}")
    return state


# A network that is used in training but neither trained nor saved.

M = TypeVar("M", bound=nn.Module)


class Frozen(Generic[M]):
    """Holds such a network outside of the module tree, and loads it when it is first asked for.

    A submodule would be in every checkpoint, in the averaged copy of the weights (EMA), in DDP's broadcasts and on the
    meta device where recipes are only checked. Deep copies share the network.

    Args:
        load: makes the network, on the CPU.
    """

    def __init__(self, load: Callable[[], M]) -> None:
        self._load = load
        self._network: M | None = None
        self._device = torch.device("cpu")

    def on(self, device: torch.device) -> M:
        """The network on a device: in evaluation mode, without gradients of its own (they pass through it)."""
        # validation may be the first to ask: tensors made in inference mode could not be trained through
        with torch.inference_mode(False), torch.no_grad():
            if self._network is None:
                self._network = self._load().eval()
                for parameter in self._network.parameters():  # TorchScript has no requires_grad_ of its own
                    parameter.requires_grad_(False)
            if device != self._device:
                self._network, self._device = self._network.to(device), device
        return self._network

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen[M]:
        return self
