"""The data set's classifier: it learns, repeats itself, survives the disk, and judges classes exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvar_lightning.errors import UserError
from mvar_lightning.metrics import (
    ClassifierFeatures,
    DatasetClassifier,
    class_consistency,
    load_classifier,
    save_classifier,
    train_classifier,
)


class Loader:
    """Batches of fixed images in [-1, 1], in an order drawn from the global random state."""

    def __init__(self, image: Tensor, label: Tensor, batch_size: int = 50, shuffle: bool = False) -> None:
        self.image, self.label, self.batch_size, self.shuffle = image, label, batch_size, shuffle

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        count = len(self.image)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for index in order.split(self.batch_size):
            yield {"image": self.image[index], "label": self.label[index]}


def bars(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Class 0 has a bright left half, class 1 a bright upper half."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 2
    image = torch.rand(count, 3, 8, 8, generator=generator) - 1
    image[label == 0, :, :, :4] += 1
    image[label == 1, :, :4] += 1
    return image, label


def trained(seed: int = 0, steps: int = 30) -> DatasetClassifier:
    loader = Loader(*bars(200, 1), shuffle=True)
    return train_classifier(loader, Loader(*bars(60, 2)), num_classes=2, image_size=8, seed=seed, steps=steps)


def test_learns_and_records_its_score() -> None:
    model = trained()
    assert model.score.accuracy > 0.95 and model.score.images == 60
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_training_repeats_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = trained(seed=3, steps=5)
    assert torch.equal(torch.rand(1), expected)
    second, other = trained(seed=3, steps=5), trained(seed=4, steps=5)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.head.weight, other.head.weight)


def test_trains_under_inference_mode() -> None:
    with torch.inference_mode():
        assert trained(steps=2).score.images == 60


@pytest.mark.parametrize("size", [5, 16, 28, 256])
def test_any_image_size(size: int) -> None:
    model = DatasetClassifier(num_classes=4, image_size=size).eval()
    image = torch.rand(2, 3, size, size)
    assert model(image).shape == (2, 4) and model.features(image).shape == (2, model.num_features)


def test_wide_images_and_gray_ones(tmp_path: Path) -> None:
    """Gray is looked at as RGB; height and width survive the disk."""
    model = DatasetClassifier(3, (8, 96)).eval()
    save_classifier(model, tmp_path / "c.safetensors")
    again, gray = load_classifier(tmp_path / "c.safetensors"), torch.rand(2, 1, 8, 96)
    assert again.image_size == (8, 96) and again.map_shape == (1, 4)
    assert torch.equal(again(gray), model(gray.repeat(1, 3, 1, 1)))
    assert ClassifierFeatures(again).measure(gray).spatial_BS.shape == (2, ClassifierFeatures(again).num_spatial)


def test_disk_round_trip(tmp_path: Path) -> None:
    model, file = trained(steps=3), tmp_path / "new" / "folder" / "key.safetensors"
    save_classifier(model, file)
    again = load_classifier(file)
    image = torch.rand(4, 3, 8, 8)
    assert torch.equal(again(image), model(image))
    assert again.score == model.score
    assert sorted(path.name for path in file.parent.iterdir()) == ["key.json", "key.safetensors"]


def test_damaged_files_are_users_errors(tmp_path: Path) -> None:
    file = tmp_path / "key.safetensors"
    with pytest.raises(UserError, match="missing"):
        load_classifier(file)
    save_classifier(DatasetClassifier(2, 8), file)
    whole, about = file.read_bytes(), json.loads(file.with_suffix(".json").read_text())
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_classifier(file)
    file.write_bytes(whole)
    for change in ({"format": "other"}, {"config": {**about["config"], "width": 8}}):
        file.with_suffix(".json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match="remove it"):
            load_classifier(file)


@pytest.mark.parametrize(("count", "batch_size"), [(0, 50), (3, 1)])
def test_nothing_to_learn_from_is_a_users_error(count: int, batch_size: int) -> None:
    loader = Loader(torch.zeros(count, 3, 8, 8), torch.zeros(count, dtype=torch.long), batch_size)
    with pytest.raises(UserError, match="no batch of two images"):
        train_classifier(loader, loader, num_classes=2, image_size=8)


class FirstPixel(nn.Module):
    """Says the class that the first pixel names."""

    def forward(self, image: Tensor) -> Tensor:
        return F.one_hot((image[:, 0, 0, 0] * 10).round().long(), 10).float()


def test_class_consistency_by_hand() -> None:
    image = torch.zeros(4, 3, 2, 2)
    image[:, 0, 0, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    right = class_consistency(FirstPixel(), image, torch.tensor([1, 2, 5, 4]))  # type: ignore[arg-type]
    assert right.tolist() == [True, True, False, True]


@pytest.mark.slow
def test_handwritten_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    image = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    image = F.interpolate(image, (16, 16), mode="bilinear").expand(-1, 3, -1, -1)
    label = torch.tensor(digits.target)
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(0))
    train, val = order[:1500], order[1500:]
    model = train_classifier(Loader(image[train], label[train], 64, True), Loader(image[val], label[val]), 10, 16)
    assert model.score.accuracy > 0.97
