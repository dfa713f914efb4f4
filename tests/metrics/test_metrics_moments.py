"""Moments, Frechet distance, Inception score, precision and recall: equal to torchmetrics and to plain NumPy/SciPy."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from mvar_lightning.errors import UserError
from mvar_lightning.metrics import (
    FeatureMoments,
    Moments,
    StoredReference,
    frechet_distance,
    inception_score,
    precision_recall,
)
from tests.faults.harness import call, free_port, start


def rows(count: int, features: int, seed: int, stretch: float = 1.0) -> Tensor:
    """Correlated features with a mean far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=torch.Generator().manual_seed(features)) / features**0.5
    return (torch.randn(count, features, generator=generator) * stretch) @ mixing + 3 + 0.1 * stretch


def moments_of(rows_NF: Tensor) -> Moments:
    sums = FeatureMoments(rows_NF.shape[1])
    for batch in rows_NF.split(37):
        sums.update(batch)
    return sums.moments()


def by_scipy(real: np.ndarray, fake: np.ndarray) -> float:
    (mu_r, cov_r), (mu_f, cov_f) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (real, fake))
    root = linalg.sqrtm(cov_r @ cov_f)
    return float(((mu_r - mu_f) ** 2).sum() + np.trace(cov_r) + np.trace(cov_f) - 2 * np.trace(root).real)


def by_torchmetrics(real: Tensor, fake: Tensor) -> float:
    class AsTheyAre(torch.nn.Module):
        num_features = real.shape[1]

        def forward(self, image: Tensor) -> Tensor:
            return image.double().flatten(1)

    metric = FrechetInceptionDistance(feature=AsTheyAre(), input_img_size=(real.shape[1], 1, 1))
    metric.update(real[:, :, None, None], real=True)
    metric.update(fake[:, :, None, None], real=False)
    return float(metric.compute())


def test_moments_are_numpys() -> None:
    found, features = moments_of(rows(200, 6, 0)), rows(200, 6, 0).double().numpy()
    assert found.images == 200
    np.testing.assert_allclose(found.mean_F, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance_FF, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("count", "features"), [(500, 16), (2000, 64), (60, 100)], ids=["small", "large", "degenerate"]
)
def test_frechet_distance_equals_torchmetrics_and_scipy(count: int, features: int) -> None:
    real, fake = rows(count, features, 1), rows(count - 7, features, 2, stretch=1.3)
    found = frechet_distance(moments_of(real), moments_of(fake))
    assert found == pytest.approx(by_scipy(real.double().numpy(), fake.double().numpy()), rel=1e-3)
    assert found == pytest.approx(by_torchmetrics(real, fake), rel=1e-3)
    assert found == pytest.approx(frechet_distance(moments_of(fake), moments_of(real)), rel=1e-9)


def test_frechet_distance_by_hand() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    one, four = Moments(torch.zeros(3).double(), eye), Moments(torch.ones(3).double(), 4 * eye)
    assert frechet_distance(one, four) == pytest.approx(3 + 3 * (1 - 2) ** 2)
    assert frechet_distance(four, four) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(one, Moments(torch.zeros(3).double(), 0 * eye)) == pytest.approx(3)
    with pytest.raises(UserError, match="of 3 and of 2 features"):
        frechet_distance(one, moments_of(rows(5, 2, 0)))


def test_merging_is_adding() -> None:
    whole, parts = moments_of(rows(50, 4, 0)), FeatureMoments(4)
    for batch in rows(50, 4, 0).split([20, 30]):
        part = FeatureMoments(4)
        part.update(batch)
        parts.merge(part)
    assert torch.allclose(parts.moments().covariance_FF, whole.covariance_FF, rtol=1e-12)
    assert parts.reduced().images == 50, "without a process group"


@pytest.mark.parametrize("wrong", [rows(3, 5, 0), torch.full((3, 4), math.nan)])
def test_wrong_features(wrong: Tensor) -> None:
    sums = FeatureMoments(4)
    with pytest.raises(UserError, match=r"\(images, 4\)|NaN"):
        sums.update(wrong)
    assert sums.images == 0
    with pytest.raises(UserError, match="at least two"):
        sums.moments()
    with pytest.raises(UserError, match="of 5 features: these are of 4"):
        sums.merge(FeatureMoments(5))


def naive_score(logits: np.ndarray, splits: int) -> tuple[float, float]:
    scores = []
    for part in np.split(logits, splits):
        odds = np.exp(part - part.max(1, keepdims=True))
        p = odds / odds.sum(1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def test_inception_score_equals_numpy_and_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
    assert inception_score(logits, seed=None) == pytest.approx(naive_score(logits.double().numpy(), 10), rel=1e-6)

    metric = InceptionScore(feature=torch.nn.Identity())
    metric.features = [logits]
    torch.manual_seed(5)
    mean, deviation = metric.compute()
    ours = inception_score(logits, seed=5)
    assert ours[0] == pytest.approx(float(mean), rel=1e-3)
    assert ours[1] == pytest.approx(float(deviation) * (9 / 10) ** 0.5, rel=1e-3), "theirs divides by n - 1"


def test_inception_score_does_not_hang_on_the_order_of_classes() -> None:
    certain = 50 * torch.eye(10).repeat_interleave(100, dim=0)
    mean, _ = inception_score(certain)
    assert 9 < mean <= 10
    assert inception_score(certain, seed=None)[0] == pytest.approx(1), "each split holds a single class"
    assert inception_score(certain[:3])[0] == pytest.approx(1), "three images, three splits"
    with pytest.raises(UserError, match="0 images"):
        inception_score(certain[:0])


def naive_precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def covered(points: np.ndarray, others: np.ndarray) -> float:
        within = np.sort(np.linalg.norm(points[:, None] - points, axis=2), axis=1)[
            :, k
        ]  # the first is the point itself
        return float((np.linalg.norm(others[:, None] - points, axis=2) <= within).any(1).mean())

    return covered(real, fake), covered(fake, real)


@pytest.mark.parametrize(("block", "neighbors"), [(4096, 3), (16, 3), (1, 2), (7, 5)])
def test_precision_and_recall_equal_numpy(block: int, neighbors: int) -> None:
    real, fake = rows(90, 8, 1), rows(70, 8, 2, stretch=1.2) + 0.8
    found = precision_recall(real, fake, neighbors, block)
    assert found == pytest.approx(naive_precision_recall(real.double().numpy(), fake.double().numpy(), neighbors))
    assert all(0.05 < share < 1 for share in found), "else the case decides nothing"


def test_precision_and_recall_say_what_is_missing() -> None:
    real = rows(400, 4, 1)
    narrow = real.mean(0) + 0.1 * (real[:200] - real.mean(0))
    precision, recall = precision_recall(real, narrow)
    assert precision > 0.99 and recall < 0.2
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    for real_part, fake_part in ((real, real[:3]), (real[:3], real), (real, rows(9, 5, 0))):
        with pytest.raises(UserError, match=r"neighbors need more|features a real image"):
            precision_recall(real_part, fake_part)


def test_a_reference_file_survives_and_is_adms(tmp_path: Path) -> None:
    features, spatial = rows(40, 5, 1), rows(40, 3, 2)
    stored = StoredReference(moments_of(features), moments_of(spatial), "means", features[:10])
    stored.save(tmp_path / "new" / "reference.npz")
    again = StoredReference.load(tmp_path / "new" / "reference.npz")
    assert (again.extractor, again.features.images) == ("means", 40)
    assert again.features_NF is not None and torch.equal(again.features_NF, features[:10])
    assert again.spatial is not None and torch.equal(again.spatial.covariance_FF, stored.spatial.covariance_FF)  # type: ignore[union-attr]
    assert frechet_distance(again.features, stored.features) == pytest.approx(0, abs=1e-9)
    # as ADM's script keeps them
    x = features.numpy()
    np.savez(tmp_path / "adm.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    adm = StoredReference.load(tmp_path / "adm.npz")
    assert adm.spatial is None and adm.features.images is None
    assert frechet_distance(adm.features, stored.features) == pytest.approx(0, abs=1e-4)


def test_reference_files_that_are_none(tmp_path: Path) -> None:
    def told(content: object) -> str:
        path = tmp_path / "file.npz"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.savez(path, **content)  # type: ignore[arg-type]
        with pytest.raises(UserError) as caught:
            StoredReference.load(path)
        return str(caught.value)

    eye = np.eye(2)
    assert "holds no sigma (it has mu)" in told({"mu": np.zeros(2)})
    assert "(3,) and a covariance of shape (2, 2)" in told({"mu": np.zeros(3), "sigma": eye})
    assert "NaN" in told({"mu": np.full(2, np.nan), "sigma": eye})
    assert "features of shape (4, 3), moments of 2" in told({"mu": eye[0], "sigma": eye, "features": np.zeros((4, 3))})
    assert "give real numbers" in told({"mu": np.array("text"), "sigma": eye})
    assert "pickled" in told({"mu": np.array([{}, []], dtype=object), "sigma": eye})
    assert "pickled" in told(pickle.dumps({"mu": [0]}))
    assert "not a readable npz" in told(b"PK\x03\x04 cut off")
    np.save(tmp_path / "single.npy", eye)
    for name, said in (("single.npy", "a single array"), ("missing.npz", "no such file")):
        with pytest.raises(UserError, match=said):
            StoredReference.load(tmp_path / name)


def test_a_compressed_file_damaged_anywhere_is_told(tmp_path: Path) -> None:
    x, path = rows(50, 6, 0).numpy(), tmp_path / "reference.npz"
    np.savez_compressed(path, mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    whole, told = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            StoredReference.load(path)  # a few places matter to no one, such as a date
        except UserError as error:
            told += str(path) in str(error)
    assert told > len(whole) / 3 / 2


def test_a_covariance_of_no_images_is_refused(tmp_path: Path) -> None:
    def told(sigma: np.ndarray) -> str:
        np.savez(tmp_path / "file.npz", mu=np.zeros(3), sigma=sigma)
        with pytest.raises(UserError, match=r"file\.npz") as caught:
            StoredReference.load(tmp_path / "file.npz")
        return str(caught.value)

    lopsided = np.eye(3)
    lopsided[0, 2] = 0.9
    assert "not symmetric, two halves differ by 0.9" in told(lopsided)
    assert "a negative variance, -1" in told(-np.eye(3))
    assert "a negative variance, -1e-05" in told(np.diag([1, 1, -1e-5]))
    zeros, eye = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    with pytest.raises(UserError, match="negative variance"):
        frechet_distance(Moments(zeros, -eye), Moments(zeros, eye))


def test_rounding_makes_no_covariance_invalid(tmp_path: Path) -> None:
    sigma = np.cov(rows(20, 50, 0).numpy(), rowvar=False).astype(np.float32)  # of low rank: zeros by rounding alone
    np.savez(tmp_path / "single.npz", mu=np.zeros(50, np.float32), sigma=sigma)
    assert StoredReference.load(tmp_path / "single.npz").features.num_features == 50
    alike = moments_of(rows(1, 50, 0).expand(300, -1))
    StoredReference(alike).save(tmp_path / "alike.npz")
    again = StoredReference.load(tmp_path / "alike.npz").features
    assert frechet_distance(again, alike) == pytest.approx(0, abs=1e-9)


def _share(rank: int, port: str, folder: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    sums = FeatureMoments(8)
    sums.update(rows(301, 8, 1)[slice(0, 200) if rank == 0 else slice(200, 301)])
    StoredReference(sums.reduced().moments()).save(Path(folder) / f"{rank}.npz")
    assert sums.images == (200, 101)[rank], "reducing again would count twice"
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_the_moments_of_all_images(tmp_path: Path) -> None:
    port = free_port()
    for started in [start(code=call(_share, rank, port, str(tmp_path))) for rank in range(2)]:
        assert started.finish().status == 0
    whole = moments_of(rows(301, 8, 1))
    for rank in range(2):
        found = StoredReference.load(tmp_path / f"{rank}.npz").features
        assert found.images == 301
        assert torch.allclose(found.covariance_FF, whole.covariance_FF, rtol=1e-9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": np.array(1)}, "images 1: must be one whole number of at least 2"),
        ({"images": np.array(-1)}, "images -1: must be one whole number"),
        ({"images": np.array([1, 2])}, r"images \[1, 2\]: must be one whole number"),
        ({"images": np.array(2.5)}, "images 2.5: must be one whole number"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "mu is empty: there are no features"),
    ],
)
def test_counts_and_features_that_cannot_be(changes: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "file.npz", **{"mu": np.zeros(3), "sigma": np.eye(3), **changes})
    with pytest.raises(UserError, match=f"file.npz: {words}"):
        StoredReference.load(tmp_path / "file.npz")
