"""Every way to plug features in, and the error for every file that is not what it should be."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvar_lightning.errors import UserError
from mvar_lightning.metrics import ClassifierFeatures, DatasetClassifier, InceptionFeatures, TorchScriptFeatures
from mvar_lightning.metrics import features as features_file


class Means(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean(dim=(2, 3))


class Scalar(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.sum()


def script(module: nn.Module, file: Path) -> str:
    torch.jit.save(torch.jit.script(module), str(file))
    return str(file)


def test_torchscript_file(tmp_path: Path) -> None:
    extractor = TorchScriptFeatures(script(Means(), tmp_path / "means.pt"))
    assert (extractor.name, extractor.num_features) == ("means", 3)
    image = torch.rand(5, 3, 8, 8)
    assert torch.equal(extractor(image), image.mean(dim=(2, 3)))


def test_torchscript_resizes_and_scales(tmp_path: Path) -> None:
    extractor = TorchScriptFeatures(script(Means(), tmp_path / "means.pt"), name="x", size=4, as_bytes=True)
    assert extractor.name == "x"
    assert torch.allclose(extractor(torch.full((2, 3, 8, 8), 0.5)), torch.full((2, 3), 127.5))


def test_torchscript_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        TorchScriptFeatures(str(tmp_path / "missing.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="not a TorchScript file"):
        TorchScriptFeatures(str(tmp_path / "text.pt"))
    with pytest.raises(UserError, match=r"\(2, features\)"):
        TorchScriptFeatures(script(Scalar(), tmp_path / "scalar.pt"))


def test_inception_errors_name_file_address_and_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"https://github\.com/toshas/torch-fidelity/releases/download/v0\.2\.0/weights"
    ):
        InceptionFeatures(str(tmp_path / "missing.pth"))
    file = tmp_path / "weights.pth"
    file.write_bytes(b"not the weights")
    with pytest.raises(UserError, match="not 6726825d"):
        InceptionFeatures(str(file))
    pretend_hash(monkeypatch, file)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r"mvar-lightning\[fid\]"):
        InceptionFeatures(str(file))


def test_inception_feeds_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeInception(nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert features_list == ["2048", "logits_unbiased"] and Path(feature_extractor_weights_path).is_file()
            self.Mixed_6d = nn.ModuleDict({"branch1x1": nn.Conv2d(3, 192, 1)})
            self.Mixed_6d.branch1x1 = self.Mixed_6d["branch1x1"]

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            assert image.dtype == torch.uint8
            self.map = self.Mixed_6d.branch1x1(F.interpolate(image.float(), 17))
            mean = image.float().mean(dim=(1, 2, 3))[:, None]
            return mean.expand(-1, 2048), mean.expand(-1, 1008)

    fake = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fake.FeatureExtractorInceptionV3 = FakeInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    file = tmp_path / "weights.pth"
    file.write_bytes(b"weights")
    pretend_hash(monkeypatch, file)
    extractor = InceptionFeatures(str(file))
    found = extractor(torch.full((2, 3, 8, 8), 0.499))
    assert (extractor.name, found.shape) == ("inception", (2, 2048))
    assert found[0, 0] == 127
    everything = extractor.measure(torch.rand(2, 3, 8, 8))
    assert everything.logits_BN is not None and everything.logits_BN.shape == (2, extractor.num_logits) == (2, 1008)
    assert everything.spatial_BS is not None and everything.spatial_BS.shape == (2, extractor.num_spatial) == (2, 2023)
    # TensorFlow's order, in which moments for sFID are stored: the seven channels of a place lie together
    assert torch.equal(everything.spatial_BS[1, 7 * (17 * 2 + 5) :][:7], extractor.network.map[1, :7, 2, 5])


def pretend_hash(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Makes the file's own hash the expected one."""
    start = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(features_file, "INCEPTION_FILE", f"weights-{start}.pth")


def test_classifier_features_need_no_gradient_and_any_size() -> None:
    extractor = ClassifierFeatures(DatasetClassifier(num_classes=3, image_size=16))
    for side in (16, 32):
        found = extractor(torch.rand(2, 3, side, side, requires_grad=True))
        assert found.shape == (2, extractor.num_features) and not found.requires_grad


def test_a_classifier_offers_logits_and_a_map() -> None:
    classifier = DatasetClassifier(num_classes=3, image_size=16).eval()
    extractor, image = ClassifierFeatures(classifier), torch.rand(2, 3, 16, 16)
    found = extractor.measure(image)
    assert torch.equal(found.features_BF, extractor(image))
    assert found.logits_BN is not None and torch.allclose(found.logits_BN, classifier(image))
    assert found.spatial_BS is not None and found.spatial_BS.shape == (2, extractor.num_spatial) == (2, 7 * 4 * 4)
    expected = classifier.maps(image)[1, :7, 0, 1]
    assert torch.equal(found.spatial_BS[1, 7:14], expected), "the channels of the second place of the first row"


def test_torchscript_offers_features_alone(tmp_path: Path) -> None:
    extractor = TorchScriptFeatures(script(Means(), tmp_path / "means.pt"))
    found = extractor.measure(torch.rand(2, 3, 8, 8))
    assert found.logits_BN is None and found.spatial_BS is None
    assert (extractor.num_logits, extractor.num_spatial) == (0, 0)
