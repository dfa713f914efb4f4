"""Small stand-ins for the project's modules and data: the interfaces are real, the networks are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mvar_lightning.pyramid import ScalePyramid

SIDE, LEVELS, CLASSES = 8, 16, 3


class FakeTokenizer(nn.Module):
    """Tokens are gray levels of the image at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = ScalePyramid([1, 4])
        self.weight = nn.Parameter(torch.rand(50), requires_grad=False)
        self.register_buffer("count", torch.full((4,), 7))

    def encode(self, image_B3HW: Tensor) -> Tensor:
        gray = (image_B3HW.mean(dim=1, keepdim=True) + 1) / 2
        maps = [F.adaptive_avg_pool2d(gray, side).flatten(1) for side in self.pyramid.sides]
        return torch.cat(maps, dim=1).mul(LEVELS - 1).round().long()

    def progressive(self, idx_BL: Tensor) -> list[Tensor]:
        images = []
        for side, idx in zip(self.pyramid.sides, self.pyramid.split(idx_BL), strict=True):
            gray = idx.view(-1, 1, side, side).float() / (LEVELS - 1) * 2 - 1
            images.append(F.interpolate(gray, (SIDE, SIDE)).expand(-1, 3, -1, -1))
        return images

    def decode(self, idx_BL: Tensor) -> Tensor:
        return self.progressive(idx_BL)[-1]


class FakeModel(nn.Module):
    num_classes = CLASSES
    width, depth = 4, 1
    backend = SimpleNamespace(plan=SimpleNamespace(cache_tokens=0))
    equal_rows = False

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = ScalePyramid([1, 4])
        self.linear = nn.Linear(3 * SIDE * SIDE, CLASSES)

    def mask(self) -> Tensor:
        scale = self.pyramid.scale_of_tokens()
        return scale[:, None] >= scale[None, :]


class FakeModule(pl.LightningModule):
    """Stands for both kinds of runs; learns classes with a linear map. Samples are bright where the class says."""

    cfg = 1.5

    def __init__(self, lr: float = 0.003) -> None:
        super().__init__()
        self.tokenizer = FakeTokenizer()
        self.model = FakeModel()
        self.lr = lr
        self.losses: list[float] = []
        self.asked: list[tuple[list[int], list[int]]] = []
        self.bias_when_sampling: list[float] = []
        self.poison_at = -1

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model.linear(F.dropout(batch["image"].flatten(1), 0.2)), batch["label"])
        if self.global_step == self.poison_at:
            loss = loss * float("nan")
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.model.linear(batch["image"].flatten(1)), batch["label"]))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr)

    def generate(self, label_B: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor]:
        self.asked.append((label_B.tolist(), seeds))
        self.bias_when_sampling.append(float(self.model.linear.bias.sum()))
        draws = [torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        image = torch.stack(draws) * 0.3
        for row, label in enumerate(label_B.tolist()):
            image[row, label] += 0.6
        return image, self.tokenizer.encode(image * 2 - 1)


class Colors(Dataset):
    """Class c is bright in color channel c."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.label = torch.arange(count) % CLASSES
        self.image = torch.rand(count, 3, SIDE, SIDE, generator=generator) * 0.6 - 1
        for label in range(CLASSES):
            self.image[self.label == label, label] += 1.2

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.image[index], "label": self.label[index]}


class FakeData(pl.LightningDataModule):
    image_size, num_classes = SIDE, CLASSES

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = str(path)
        self.loaders_made = 0

    def train_dataloader(self) -> DataLoader[Any]:
        self.loaders_made += 1
        # always the same order: a resumed run then sees what an uninterrupted one does
        return DataLoader(Colors(90, 1), batch_size=15)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Colors(48, 2), batch_size=16)

    test_dataloader = val_dataloader


@pytest.fixture
def module() -> FakeModule:
    torch.manual_seed(0)
    return FakeModule()


@pytest.fixture
def make_module() -> Callable[[], FakeModule]:
    def make() -> FakeModule:
        torch.manual_seed(0)
        return FakeModule()

    return make


@pytest.fixture
def data(tmp_path: Path) -> FakeData:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps({"format": "fake"}))
    return FakeData(folder)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
        standard = dict(
            default_root_dir=tmp_path / "run",
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=2,
            log_every_n_steps=2,
        )
        return pl.Trainer(callbacks=list(callbacks), **(standard | settings))

    return make
