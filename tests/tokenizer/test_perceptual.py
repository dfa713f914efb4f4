"""LPIPS on random VGG weights against a plain computation, and the files that it takes or refuses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from safetensors.torch import save_file
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import LPIPS, L1Loss, MultiScaleTokenizer, PerceptualLoss
from mvar_lightning.tokenizer.losses import WeightedLoss

PLACES = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
PLACES |= {17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
"""Convolutions of torchvision's vgg16().features, with the channels they take and give."""

LAST_OF_STAGE = (2, 7, 14, 21, 28)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for place, (taken, given) in PLACES.items():
        scale = (2 / (9 * taken)) ** 0.5
        tensors[f"features.{place}.weight"] = torch.randn(given, taken, 3, 3, generator=generator) * scale
        tensors[f"features.{place}.bias"] = torch.randn(given, generator=generator) * 0.1
    return tensors


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    """As torchvision's file: all layers, the classifier's too."""
    file = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save(state | {"classifier.0.bias": torch.zeros(4096)}, file)
    return str(file)


@pytest.fixture(scope="module")
def network(weights: str) -> LPIPS:
    return LPIPS(weights)


def images(side: int = 32, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain_lpips(state: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """torchmetrics' formulas, layer by layer, with its own heads."""
    folder = Path(torchmetrics.__file__).parent / "functional/image/lpips_models"
    heads = torch.load(folder / "vgg.pth", map_location="cpu", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    levels = []
    for image in (a, b):
        x, maps = (image - shift) / scale, []
        for place in PLACES:
            if place in (5, 10, 17, 24):
                x = F.max_pool2d(x, 2, 2)
            x = F.relu(F.conv2d(x, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1))
            if place in LAST_OF_STAGE:
                maps.append(x / torch.sqrt(1e-8 + torch.sum(x**2, dim=1, keepdim=True)))
        levels.append(maps)
    total = torch.zeros(len(a), 1, 1, 1)
    for n, (one, other) in enumerate(zip(*levels, strict=True)):
        total += F.conv2d((one - other) ** 2, heads[f"lin{n}.model.1.weight"]).mean([2, 3], keepdim=True)
    return total.flatten()


@pytest.mark.parametrize("side", [16, 40])
def test_equals_the_plain_computation(network: LPIPS, state: dict[str, Tensor], side: int) -> None:
    a, b = images(side), images(side, seed=2)
    distance = network(a, b)
    assert distance.shape == (2,) and (distance > 0.01).all()
    torch.testing.assert_close(distance, plain_lpips(state, a, b), rtol=1e-4, atol=1e-6)
    assert torch.equal(network(a, a), torch.zeros(2))


def test_gray_and_transparent_images_are_seen_as_rgb(network: LPIPS) -> None:
    a, b = images(16)[:, :1], images(16, seed=2)[:, :1]
    torch.testing.assert_close(network(a, b), network(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))
    opaque, nothing = (torch.cat([a.expand(-1, 3, -1, -1), torch.full_like(a, alpha)], dim=1) for alpha in (1.0, -1.0))
    torch.testing.assert_close(network(opaque, nothing), network(a.expand(-1, 3, -1, -1), torch.ones(2, 3, 16, 16)))


def test_gradients_pass_to_the_images_alone(network: LPIPS) -> None:
    a = images(16).requires_grad_()
    network(a, images(16, seed=2)).sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0 and a.grad.isfinite().all()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    constant = torch.zeros(1, 3, 16, 16, requires_grad=True)
    network(constant, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert constant.grad is not None and constant.grad.isfinite().all()


def test_stays_in_float32_under_autocast_and_in_evaluation_mode(network: LPIPS) -> None:
    a, b = images(16), images(16, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = network(a.bfloat16(), b)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, network(a.bfloat16().float(), b))
    assert not network.train().training


@pytest.mark.parametrize("form", ["features.safetensors", "bare.pth"])
def test_other_files_with_the_same_tensors(form: str, network: LPIPS, state: dict[str, Tensor], tmp_path: Path) -> None:
    if form.endswith("safetensors"):
        save_file(state, tmp_path / form)
    else:
        torch.save({key.removeprefix("features."): tensor for key, tensor in state.items()}, tmp_path / form)
    a, b = images(16), images(16, seed=2)
    before = torch.get_rng_state()
    assert torch.equal(LPIPS(str(tmp_path / form))(a, b), network(a, b))
    assert torch.equal(torch.get_rng_state(), before), "loading must not move the run's random state"


def test_files_that_are_refused_name_address_and_hash(tmp_path: Path, state: dict[str, Tensor]) -> None:
    def refused(name: str, said: str, content: object = None) -> None:
        file = tmp_path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            torch.save(content, file)
        with pytest.raises(UserError, match=said) as error:
            LPIPS(str(file))
        text = str(error.value)
        assert name in text and "download.pytorch.org/models/vgg16-397923af.pth" in text and "397923af" in text
        assert "\n" not in text

    refused("missing.pth", "no such file")
    refused("vgg16-397923af.pth", "SHA-256 starts with", {"features.0.weight": torch.zeros(1)})
    refused("other.pth", r"features.0.weight should be \(64, 3, 3, 3\), it has nothing", {"a": torch.zeros(1)})
    wrong = {**state, "features.5.weight": torch.zeros(2, 2)}
    refused("shape.pth", r"features.5.weight should be \(128, 64, 3, 3\), it has \(2, 2\)", wrong)
    refused("list.pth", "holds a list", [torch.zeros(1)])
    refused("broken.pth", "not readable as a PyTorch file of tensors", b"no torch file")
    refused("code.pth", "nothing was executed", pickle.dumps(Path("x"), protocol=2))
    refused("broken.safetensors", "not a readable safetensors file", b"no safetensors")


def test_small_images_are_refused(network: LPIPS, weights: str) -> None:
    with pytest.raises(UserError, match="at least 16 x 16"):
        network(images(15), images(15))
    with pytest.raises(UserError, match="8 pixels"):
        PerceptualLoss(weights).prepare(CPU, 8)


def test_as_a_loss_part_it_leaves_no_trace_in_the_module(network: LPIPS, weights: str) -> None:
    part = PerceptualLoss(weights, weight=0.5)
    part.prepare(CPU, 32)
    loss = WeightedLoss([L1Loss(), part])
    assert not loss.state_dict() and not list(loss.parameters()) and not list(loss.buffers())
    assert copy.deepcopy(part).network is part.network
    tokenizer = MultiScaleTokenizer(
        [1, 2], vocab_size=8, code_dim=4, channels=8, channel_multipliers=[1, 1, 1, 1, 1], norm_groups=4
    )
    image = images(32)
    output = tokenizer(image)
    total, terms = loss(output, image)
    torch.testing.assert_close(terms["lpips"], network(output.reconstruction_B3HW, image).mean())
    torch.testing.assert_close(total, terms["l1"] + 0.5 * terms["lpips"])


def test_the_file_is_asked_for_when_the_run_starts_not_when_the_recipe_is_read() -> None:
    part = PerceptualLoss("nowhere.pth")
    with pytest.raises(UserError, match=r"nowhere.pth: no such file"):
        part.prepare(CPU, 32)
    with pytest.raises(UserError, match="-1"):
        PerceptualLoss("nowhere.pth", weight=-1)
