"""The Frechet distance is the formula's, and its traps (rounding, counting, memory of the real side) are closed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.metrics import FeatureExtractor, FrechetDistance, KernelDistance, as_saved
from tests.faults.harness import call, free_port, start


class Projection(FeatureExtractor):
    """Random linear features: the images' statistics decide the distance."""

    def __init__(self, num_features: int = 8) -> None:
        super().__init__("projection", num_features)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("matrix", torch.randn(3 * 16, num_features, generator=generator))

    def extract(self, image_B3HW: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled(image_B3HW.device.type)
        return image_B3HW.flatten(1) @ self.matrix


def images(count: int, seed: int, power: float = 1.0) -> Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) ** power


def formula(real_BF: np.ndarray, fake_BF: np.ndarray) -> float:
    (mu_r, cov_r), (mu_f, cov_f) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (real_BF, fake_BF))
    return float(((mu_r - mu_f) ** 2).sum() + np.trace(cov_r + cov_f - 2 * linalg.sqrtm(cov_r @ cov_f).real))


def features_of(extractor: FeatureExtractor, image_B3HW: Tensor) -> np.ndarray:
    return extractor(as_saved(image_B3HW)).double().numpy()


def test_equals_numpy_and_scipy() -> None:
    extractor, real, fake = Projection(), images(300, 1), images(200, 2, power=1.5)
    distance = FrechetDistance(extractor)
    for batch in real.split(64):
        distance.update(batch, real=True)
    for batch in fake.split(33):
        distance.update(batch, real=False)
    expected = formula(features_of(extractor, real), features_of(extractor, fake))
    assert distance.compute() == pytest.approx(expected, rel=1e-3)
    assert (distance.count(real=True), distance.count(real=False)) == (300, 200)


def test_real_side_is_kept_and_floor_is_small() -> None:
    distance = FrechetDistance(Projection())
    distance.update(images(1000, 1), real=True)
    distance.update(images(1000, 2, power=3.0), real=False)
    far = distance.compute()
    distance.reset_generated()
    assert distance.count(real=False) == 0
    distance.update(images(1000, 3), real=False)
    assert distance.compute() < 0.05 * far


def test_same_images_have_no_distance_and_autocast_changes_nothing() -> None:
    distance = FrechetDistance(Projection())
    real = images(100, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance.update(real, real=True)
    distance.update(real, real=False)
    assert distance.compute() == pytest.approx(0.0, abs=1e-6)


def test_images_are_rounded_to_nearest_as_in_a_file() -> None:
    levels = torch.tensor([0.0, 0.4, 0.6, 127.49, 127.51, 255.4, 300.0, -3.0]) / 255
    assert as_saved(levels).mul(255).round().tolist() == [0, 0, 1, 127, 128, 255, 255, 0]


def test_too_few_images_is_a_users_error() -> None:
    distance = FrechetDistance(Projection())
    distance.update(images(1, 1), real=True)
    distance.update(images(5, 2), real=False)
    with pytest.raises(UserError, match="num_images"):
        distance.compute()


def test_extractor_stays_in_evaluation_mode() -> None:
    extractor = Projection()
    assert not extractor.train().training


def features(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + shift


def unbiased(real_NF: Tensor, generated_NF: Tensor) -> float:
    """The estimate over all pairs of different images."""
    k_rr, k_gg, k_rg = (
        (one.double() @ other.double().T / one.shape[1] + 1) ** 3
        for one, other in ((real_NF, real_NF), (generated_NF, generated_NF), (real_NF, generated_NF))
    )
    own = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (k_rr, k_gg)]
    return float(own[0] + own[1] - 2 * k_rg.mean())


def test_a_kernel_distance_is_the_formula() -> None:
    kernel = KernelDistance()
    for part in features(30, 1).split(7):
        kernel.update(part, real=True)
    kernel.update(features(30, 2, shift=1.0), real=False)
    state = torch.get_rng_state()
    assert kernel.compute(8) == pytest.approx(unbiased(features(30, 1), features(30, 2, shift=1.0)), rel=1e-9)
    assert torch.equal(torch.get_rng_state(), state), "training must not notice"
    kernel.reset_generated()
    with pytest.raises(UserError, match="at least two"):
        kernel.compute(8)


def test_a_kernel_distance_of_few_images_is_right_on_average() -> None:
    """Where a Frechet distance is not: its mean over sets of ten is far above that of large sets, which is 0."""
    found = []
    for seed in range(60):
        kernel = KernelDistance()
        kernel.update(features(10, 2 * seed), real=True)
        kernel.update(features(10, 2 * seed + 1), real=False)
        found.append(kernel.compute(8))
    mean, apart = torch.tensor(found).mean(), torch.tensor(found).std() / len(found) ** 0.5
    assert abs(mean) < 3 * apart and min(found) < 0


def test_draws_of_many_images_come_near_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvar_lightning.metrics.kernel.SUBSET", 40)
    kernel, real, generated = KernelDistance(), features(300, 1), features(200, 2, shift=0.5)
    kernel.update(real, real=True)
    kernel.update(generated, real=False)
    assert kernel.compute(8) == pytest.approx(unbiased(real, generated), rel=0.1)
    again = KernelDistance()  # in another order, as of other processes
    again.update(real.flip(0), real=True)
    again.update(generated.roll(5, 0), real=False)
    assert again.compute(8) == pytest.approx(kernel.compute(8), rel=1e-9)


def _half(rank: int, port: str, folder: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    distance = FrechetDistance(Projection())
    # the second rank holds fewer images: sums must be weighted by count
    distance.update(images(301, 1)[rank * 200 : 301 if rank else 200], real=True)
    distance.update(images(200, 2, power=1.5)[rank * 150 : 200 if rank else 150], real=False)
    kernel = KernelDistance()
    kernel.update(features(40, 1)[rank * 30 : 40 if rank else 30], real=True)
    if rank == 0:  # the second rank has none of these
        kernel.update(features(50, 2), real=False)
    torch.save([distance.compute(), kernel.compute(8)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    port = free_port()
    for started in [start(code=call(_half, rank, port, str(tmp_path))) for rank in range(2)]:
        assert started.finish().status == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = FrechetDistance(Projection())
    whole.update(images(301, 1), real=True)
    whole.update(images(200, 2, power=1.5), real=False)
    kernel = KernelDistance()
    kernel.update(features(40, 1), real=True)
    kernel.update(features(50, 2), real=False)
    assert found[0] == found[1] == pytest.approx([whole.compute(), kernel.compute(8)], rel=1e-9)
