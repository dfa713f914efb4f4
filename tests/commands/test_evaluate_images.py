"""`mvar evaluate images`: the numbers are NumPy's, SciPy's and torchmetrics', every kind of input, and it goes on."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg

from mvar_lightning import load, save, save_refinement
from mvar_lightning.cli import main
from mvar_lightning.evaluation import features as judge
from mvar_lightning.evaluation import image_request as evaluation_plan
from mvar_lightning.evaluation.image_sources import FolderImages, ShardImages
from mvar_lightning.metrics import FrechetDistance, StoredReference, TorchScriptFeatures
from mvar_lightning.transformer.refinement import Refinement
from tests.faults.harness import completed

Fails = Callable[..., str]
FILES = ["features", "images.json", "images.md", "images.png", "samples", "samples.npz"]


def evaluate(*arguments: object) -> int:
    return main(["evaluate", "images", *(str(argument) for argument in arguments)])


def content(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "images.json").read_text())


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file: twelve numbers an image."""
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    path = tmp_path_factory.mktemp("features") / "means.pt"
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 16, 16)), str(path))
    return path


class Evaluated(NamedTuple):
    folder: Path
    checkpoint: Path
    options: list[object]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, shards: Path, features: Path) -> Evaluated:
    """Four images of each class of a model against the validation split."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    options: list[object] = ["--reference", shards, "--resize-ratio", 1.0, "--features", features]
    assert evaluate("--checkpoint", checkpoint, *options, "--count", 4, "--batch-size", 7, "--out", out) == 0
    return Evaluated(out, checkpoint, options)


@pytest.fixture
def copy(evaluated: Evaluated, workplace: Path) -> Path:
    shutil.copytree(evaluated.folder, "out")
    return Path("out")


def rows_of(images: np.ndarray) -> np.ndarray:
    """What the network of `features` gives: means of the four quarters."""
    return (images / 255.0).reshape(len(images), 2, 8, 2, 8, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(-1, 12)


def by_scipy(real: np.ndarray, fake: np.ndarray) -> float:
    (mu_r, cov_r), (mu_f, cov_f) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (real, fake))
    root = linalg.sqrtm(cov_r @ cov_f)
    return float(((mu_r - mu_f) ** 2).sum() + np.trace(cov_r) + np.trace(cov_f) - 2 * np.trace(root).real)


def kernel_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """The unbiased estimate from all images at once (the command takes draws of equally many)."""
    kernel = [(a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((real, real), (fake, fake), (real, fake))]
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    return float(sum(within) - 2 * kernel[2].mean())


def covered(points: np.ndarray, others: np.ndarray) -> float:
    within = np.sort(np.linalg.norm(points[:, None] - points, axis=2), axis=1)[:, 3]
    return float((np.linalg.norm(others[:, None] - points, axis=2) <= within).any(1).mean())


def test_a_model_against_shards(evaluated: Evaluated, shards: Path, features: Path) -> None:
    assert sorted(path.name for path in evaluated.folder.iterdir()) == FILES
    found = content(evaluated.folder)
    assert (found["images"], found["reference_images"], found["size"]) == (40, 32, [16, 16])
    with np.load(evaluated.folder / "samples.npz") as archive:
        fake, labels = archive["arr_0"], archive["arr_1"]
    assert sorted(labels) == sorted([*range(10)] * 4) and list(labels) != sorted(labels), "mixed, for the IS of ADM"
    source = ShardImages(str(shards), "val", 16, resize_ratio=1.0)
    pixels = torch.cat([batch for part in range(len(source.parts)) for batch in source.read(part, 5)])
    real = pixels.permute(0, 2, 3, 1).numpy()
    assert found["fid"] == pytest.approx(by_scipy(rows_of(real), rows_of(fake)), rel=1e-3)
    assert found["kid"] == pytest.approx(kernel_distance(rows_of(real), rows_of(fake)), rel=0.1)
    assert found["precision"] == pytest.approx(covered(rows_of(real), rows_of(fake)))
    assert found["recall"] == pytest.approx(covered(rows_of(fake), rows_of(real)))
    metric = FrechetDistance(TorchScriptFeatures(str(features)))
    metric.update(pixels / 255, real=True)
    metric.update(torch.from_numpy(fake).permute(0, 3, 1, 2) / 255, real=False)
    assert found["fid"] == pytest.approx(metric.compute(), rel=1e-3)
    assert found["floor"]["images"] == 40 and 0 < found["floor"]["fid"] < found["fid"]
    assert found["inception_score"] is None and found["sfid"] is None
    notes = " ".join(found["notes"])
    assert "means offers no class probabilities" in notes and "means offers no map" in notes
    assert (found["seed"], found["count"], found["cfg"], found["sampled_in"]) == (0, 4, 1.5, "32")


def test_it_goes_on_with_what_is_missing(evaluated: Evaluated, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = sorted((copy / "samples").glob("0*.png"))[7]
    whole = lost.read_bytes()
    lost.unlink()
    part = copy / "features" / "generated" / "part-00000.npz"
    part.unlink()
    (copy / "features" / "reference" / ".part-00009.npz.123").write_bytes(b"half of it")
    kept = {path: path.stat().st_mtime_ns for path in copy.rglob("*-0*.npz")}
    expected = content(copy)
    (copy / "images.json").unlink()
    again = ["--checkpoint", evaluated.checkpoint, *evaluated.options, "--count", 4, "--out", copy]
    assert evaluate(*again, "--plan") == 0
    assert "39 are there already" in capsys.readouterr().out and not lost.exists()
    assert evaluate(*again) == 0
    assert "1 made now" in capsys.readouterr().out
    assert lost.read_bytes() == whole and part.exists()
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "computed again"
    found = content(copy)
    assert {**found, "fid": 0} == {**expected, "fid": 0} and found["fid"] == pytest.approx(expected["fid"], rel=1e-6)


def test_it_draws_as_sample_does_with_a_cache_policy_and_a_refinement(
    evaluated: Evaluated, workplace: Path, fails: Fails
) -> None:
    model, tokenizer = load(evaluated.checkpoint)
    assert model is not None
    save_refinement(Path("refinement"), Refinement(model, 1), model, tokenizer)
    start: list[object] = ["--checkpoint", evaluated.checkpoint, "--count", 1, "--batch-size", 5]
    drawn = {}
    for name, own in {
        "plain": [],
        "cache": ["--cache-budget", 0.8, "--cache-drafters", 0],
        "refined": ["--refinement", "refinement", "--refinement-passes", "1:1,3"],
    }.items():
        out = Path(name)
        assert evaluate(*start, *evaluated.options, *own, "--no-floor", "--no-npz", "--out", out) == 0
        assert main(["sample", *map(str, [*start, *own, "--classes", "all", "--out", out / "same"])]) == 0
        drawn[name], same = (
            {path.name: path.read_bytes() for path in (out / folder).glob("0*.png")} for folder in ("samples", "same")
        )
        assert drawn[name] == same and len(same) == 10
    assert drawn["plain"] != drawn["refined"]
    assert "ScaleKV(budget=0.8" in Path("cache/samples/sampling.json").read_text(), "of 21 tokens nothing is dropped"
    given = ["evaluate", "images", *start, *evaluated.options]
    assert "holds images with refinement" in fails(*given, "--out", "refined")
    assert "--refinement-passes: needs --refinement" in fails(*given, "--refinement-passes", "1:1,3")
    assert "--cache-drafters: needs --cache-budget" in fails(*given, "--cache-drafters", 0)


def test_other_arguments_are_refused(evaluated: Evaluated, copy: Path, fails: Fails, features: Path) -> None:
    shutil.copy(features, "other.pt")
    start = ["evaluate", "images", "--checkpoint", evaluated.checkpoint, *evaluated.options, "--out", copy, "--count"]
    assert "holds features with count 4, these have 5; choose another --out" in fails(*start, 5)
    assert "holds images with top_k 900, these have 3; choose another --out" in fails(*start, 4, "--top-k", 3)
    assert "holds features with seed 0, these have 1" in fails(*start, 4, "--seed", 1)
    assert "resize_ratio 1.0, these have 1.125" in fails(*start, 4, "--resize-ratio", 1.125)
    assert "with split val, these have train" in fails(*start, 4, "--split", "train")
    assert "with feature_size None, these have 8" in fails(*start, 4, "--feature-size", 8)
    assert "with extractor means, these have other" in fails(*start, 4, "--features", "other.pt")


def test_memorization(evaluated: Evaluated, shards: Path, workplace: Path, fails: Fails) -> None:
    """Images that were trained on are found out, against shards and against an npz of them."""
    data = ShardImages(str(shards), "train", 16, resize_ratio=1.0)
    batches = [batch.numpy() for part in range(len(data.parts)) for batch in data.read(part, 64)]
    training = np.concatenate(batches).transpose(0, 2, 3, 1)
    np.savez("training.npz", training)
    np.savez("held_out.npz", np.roll(training[:40], 1, axis=2))
    np.savez("copies.npz", np.clip(training[:40].astype(int) + 1, 0, 255).astype(np.uint8))
    options = [*evaluated.options, "--reference", "held_out.npz", "--images", "copies.npz", "--memorization"]
    assert evaluate(*options, "--training", shards, "--out", "out") == 0
    found = content("out")["memorization"]
    assert found["images"] == len(training)
    assert found["features"]["p_value"] < 0.01 and found["pixels"]["p_value"] < 1e-6
    assert found["pixels"]["closer"] == 1.0
    with Image.open("out/memorization.png") as picture:
        assert picture.width > picture.height
    assert "C_T, features" in Path("out/images.md").read_text()
    assert evaluate(*options, "--training", "training.npz", "--out", "other") == 0
    assert {**content("other")["memorization"], "training": ""} == {**found, "training": ""}
    assert "no training split" in fails("evaluate", "images", *options)


def test_memorization_that_cannot_be_measured(evaluated: Evaluated, workplace: Path, fails: Fails) -> None:
    given = ["evaluate", "images", "--checkpoint", evaluated.checkpoint, *evaluated.options]
    assert "held out; choose --split val" in fails(*given, "--memorization", "--split", "train")
    assert "for --memorization alone" in fails(*given, "--training", "nowhere")
    assert "it takes 20" in fails(*given, "--memorization", "--count", 1)


def test_folder_and_npz_say_the_same(evaluated: Evaluated, workplace: Path) -> None:
    given = evaluated.folder / "samples"
    expected = content(evaluated.folder)
    assert evaluate("--images", given, *evaluated.options, "--out", "folder", "--save-moments", "ref.npz") == 0
    assert sorted(path.name for path in Path("folder").iterdir()) == [name for name in FILES if name != "samples"]
    archive = evaluated.folder / "samples.npz"
    assert evaluate("--images", archive, *evaluated.options, "--out", "npz", "--no-floor") == 0
    for folder in ("folder", "npz"):
        found = content(folder)
        assert found["fid"] == pytest.approx(expected["fid"], rel=1e-6)
        assert (found["precision"], found["recall"]) == (expected["precision"], expected["recall"])
    assert content("npz")["floor"] is None and not Path("npz/samples.npz").exists()
    with np.load("folder/samples.npz") as ours, np.load(archive) as first:
        assert len(ours["arr_0"]) == 40 and ours["arr_0"].sum() == first["arr_0"].sum()
    # against the file of moments, which holds features, too; and against a copy of the images: no distance
    options = ["--images", archive, "--features", evaluated.options[-1]]
    assert evaluate(*options, "--reference", "ref.npz", "--out", "moments") == 0
    found = content("moments")
    assert found["fid"] == pytest.approx(expected["fid"], rel=1e-6) and found["recall"] == expected["recall"]
    assert found["reference_images"] == 32
    assert evaluate(*options, "--reference", given, "--out", "itself") == 0
    assert content("itself")["fid"] == pytest.approx(0, abs=1e-9) and content("itself")["precision"] == 1


def test_a_reference_in_adms_form(evaluated: Evaluated, workplace: Path) -> None:
    with np.load(evaluated.folder / "samples.npz") as archive:
        images = archive["arr_0"]
    rows = rows_of(images).astype(np.float32)
    moments = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez("moments.npz", **moments)
    np.savez_compressed("both.npz", arr_0=images[:30], **moments)
    options = ["--images", evaluated.folder / "samples", "--features", evaluated.options[-1], "--reference"]
    assert evaluate(*options, "moments.npz", "--out", "one") == 0
    found = content("one")
    assert found["fid"] == pytest.approx(0, abs=1e-5) and found["precision"] is None
    assert found["reference_images"] is None
    assert any(
        "KID, precision and recall left out: the reference file holds moments alone" in n for n in found["notes"]
    )
    assert evaluate(*options, "both.npz", "--out", "two") == 0
    found = content("two")
    assert found["fid"] == pytest.approx(0, abs=1e-5), "of the stored moments, which are of all images"
    assert found["covered_reference"] == 30 and found["recall"] == 1


def test_the_classifier_gives_all_numbers(
    evaluated: Evaluated, shards: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "STEPS", (2, 2))
    shutil.copytree(shards, "shards")
    options = ["--resize-ratio", 1.0, "--images", evaluated.folder / "samples"]
    assert evaluate(*options, "--reference", "shards", "--out", "one", "--save-moments", "ref") == 2
    assert evaluate(*options, "--reference", "shards", "--out", "one", "--save-moments", "ref.npz") == 0
    found = content("one")
    assert (found["features"], found["num_features"], found["num_spatial"]) == ("classifier", 64, 7 * 16)
    assert found["sfid"] > 0 and 1 <= found["inception_score"][0] <= 10
    assert any("40 images" in note or "32 images are too few for 64 features" in note for note in found["notes"])
    assert StoredReference.load(Path("ref.npz")).spatial is not None
    assert evaluate(*options, "--reference", "ref.npz", "--data", "shards", "--out", "two") == 0
    assert content("two")["sfid"] == pytest.approx(found["sfid"], rel=1e-6)


def test_the_plan_comes_first(
    evaluated: Evaluated,
    workplace: Path,
    capfd: pytest.CaptureFixture[str],
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = ["--checkpoint", evaluated.checkpoint, *evaluated.options, "--count", 3, "--out", "new/out"]
    assert evaluate(*start, "--plan") == 0
    assert not Path("new").exists()
    printed = capfd.readouterr().out
    assert "30 images of 16 x 16, 3 of each of 10 classes; 0 are there already" in printed
    assert "time: " in printed and "(30 images to sample" in printed and "features of 110" in printed, printed
    assert "npz 23 kB, features 5 kB" in printed
    monkeypatch.setattr(evaluation_plan.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 20_000))  # type: ignore[attr-defined]
    told = fails("evaluate", "images", *start)
    assert "20 kB are free; free some space" in told and "--no-npz" in told


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0 s"), (0.2, "under 1 s"), (90, "2 min"), (12_000, "3 h 20 min"), (200_000, "2 d 7 h")]
)
def test_durations(seconds: float, told: str) -> None:
    assert evaluation_plan.duration(seconds) == told


def test_wrong_references(evaluated: Evaluated, workplace: Path, shards: Path, features: Path, fails: Fails) -> None:
    given = evaluated.folder / "samples"
    start = ["evaluate", "images", "--images", given, "--features", features, "--reference"]
    eye = np.eye(12)
    np.savez("pickled.npz", arr_0=np.array([{}, []], dtype=object))
    np.savez("float.npz", arr_0=np.full((4, 16, 16, 3), np.nan, np.float32))
    np.savez("else.npz", x=eye)
    np.savez("wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez("large.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    StoredReference(StoredReference.load(Path("wide.npz")).features, extractor="inception").save(Path("named.npz"))
    whole = (evaluated.folder / "samples.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[: len(whole) // 2])
    Path("text.txt").write_text("hello")
    Path("empty").mkdir()
    assert "pickled" in fails(*start, "pickled.npz")
    assert "arr_0 is float32 of shape (4, 16, 16, 3); it must be uint8" in fails(*start, "float.npz")
    assert "holds no mu (it has x)" in fails(*start, "else.npz")
    assert "moments of 2048 features, --features means gives 12" in fails(*start, "wide.npz")
    assert "of inception features, not of means" in fails(*start, "named.npz")
    assert "its images are 32 x 32, the generated ones 16 x 16" in fails(*start, "large.npz")
    assert "not a readable npz" in fails(*start, "cut.npz")
    assert "is a file, but no npz" in fails(*start, "text.txt")
    assert "holds no images" in fails(*start, "empty")
    assert "does not exist" in fails(*start, "nowhere")
    assert "no such file" in fails(*start, "nowhere.npz")
    assert "choose data, inception or a TorchScript" in fails(*start, shards, "--features", "none")
    assert "its classifier needs a shard folder; give one with --data" in fails(*start, given, "--features", "data")
    assert "--save-moments m.txt: give a name that ends in .npz" in fails(*start, shards, "--save-moments", "m.txt")
    assert "--count 0: must be at least 1" in fails(*start, shards, "--count", 0)
    assert "--workers -1: must be 0 or more" in fails(*start, shards, "--workers", -1)


def test_wrong_images(evaluated: Evaluated, workplace: Path, fails: Fails) -> None:
    options = [*evaluated.options, "--out", "out"]
    start = ["evaluate", "images", *options]
    assert "nothing to evaluate" in fails(*start)
    assert "two of them given" in fails(*start, "--images", ".", "--checkpoint", evaluated.checkpoint)
    assert "no such checkpoint" in fails(*start, "--checkpoint", "nothing")
    assert "no such folder" in fails(*start, "--images", "nothing")
    np.savez("moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert "holds no arr_0 (it has mu, sigma)" in fails(*start, "--images", "moments.npz")


def test_damaged_pictures(evaluated: Evaluated, workplace: Path, fails: Fails) -> None:
    Path("few").mkdir()
    for number in range(5):
        Image.effect_noise((16, 16), 90).convert("RGB").save(f"few/{number}.png")
    start = ["evaluate", "images", "--images", "few", *evaluated.options, "--out", "out"]
    Path("few/4.png").write_bytes(Path("few/3.png").read_bytes()[:120])
    assert "image few/4.png: damaged picture" in fails(*start)
    Image.new("RGB", (16, 20)).save("few/4.png")
    assert "image few/4.png: is 16 x 20, the first one here 16 x 16" in fails(*start)
    Path("few/0.png").write_text("no picture")
    assert "image few/0.png: not a readable" in fails(*start)


def test_few_and_enlarged_images(evaluated: Evaluated, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for count in (1, 3):
        np.savez("few.npz", arr_0=np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8))
        assert evaluate("--images", "few.npz", *evaluated.options, "--out", f"out{count}") == (2 if count == 1 else 0)
    assert "few.npz: 1 images; a Frechet distance needs two or more" in capfd.readouterr().err
    found = content("out3")
    notes = " ".join(found["notes"])
    assert "3 images are too few for 12 features" in notes and "more than 3 images of each are needed" in notes
    assert "smaller than the generated ones and enlarged" in notes
    assert found["precision"] is None and found["fid"] > 0


def test_shards_are_cut_to_wide_images(evaluated: Evaluated, workplace: Path) -> None:
    np.savez("wide.npz", arr_0=np.random.default_rng(0).integers(0, 256, (4, 8, 16, 3), np.uint8))
    assert evaluate("--images", "wide.npz", *evaluated.options, "--out", "wide") == 0
    assert content("wide")["fid"] > 0


def test_a_damaged_part_is_named(evaluated: Evaluated, copy: Path, fails: Fails) -> None:
    part = copy / "features" / "reference" / "part-00000.npz"
    part.write_bytes(part.read_bytes()[:300])
    told = fails(
        "evaluate", "images", "--checkpoint", evaluated.checkpoint, *evaluated.options, "--count", 4, "--out", copy
    )
    assert "part-00000.npz: damaged; remove it and run the command again" in told


def test_damaged_weights(evaluated: Evaluated, workplace: Path, fails: Fails) -> None:
    model, broken = load(evaluated.checkpoint)
    with torch.no_grad():
        broken.decoder.conv_out.bias[0] = math.nan
    save("broken", model, broken)
    told = fails("evaluate", "images", "--checkpoint", "broken", *evaluated.options, "--out", "out")
    assert "some pixels are NaN or infinite" in told


def test_features_that_are_not_finite(evaluated: Evaluated, workplace: Path, capfd: Any) -> None:
    class Broken(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.mean(dim=(2, 3)) / 0.0 * 0.0

    torch.jit.save(torch.jit.script(Broken()), "broken.pt")
    given = ["--images", evaluated.folder / "samples", *evaluated.options[:-1], "broken.pt", "--out", "out"]
    assert evaluate(*given) == 2
    assert "broken gives NaN or infinity" in capfd.readouterr().err


BOMB = """
import os, signal
from mvar_lightning.evaluation.images import FeatureStore
from mvar_lightning.sampling import jobs as sampling_jobs

calls = {"to_png": 0, "write": 0}

def counted(inner, name):
    def outer(*args, **kwargs):
        calls[name] += 1
        if os.environ["BOMB"] == f"{name} {calls[name]}":
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)
    return outer

sampling_jobs.to_png = counted(sampling_jobs.to_png, "to_png")
FeatureStore.write = counted(FeatureStore.write, "write")
"""
"""Kills the process at the n-th image or part of features."""


@pytest.mark.slow
def test_killed_twice_and_started_again(evaluated: Evaluated, workplace: Path) -> None:
    Path("bomb.py").write_text(BOMB)
    start = ["--import", "bomb", "evaluate", "images", "--checkpoint", evaluated.checkpoint, *evaluated.options]
    start += ["--count", 4, "--batch-size", 7, "--out", "out"]

    def run(bomb: str) -> int:
        return completed(*start, env={"BOMB": bomb}).returncode

    assert run("to_png 40") == -signal.SIGKILL  # 14 of them are the trial's
    made = len(list(Path("out/samples").glob("0*.png")))  # batches of 7, each written by threads
    assert 21 <= made <= 25 and not Path("out/features").exists()
    assert run("write 3") == -signal.SIGKILL
    assert len(list(Path("out/features").rglob("part-*"))) == 2 and not Path("out/images.json").exists()
    assert run("none") == 0
    found, expected = content("out"), content(evaluated.folder)
    assert {name for name in found if found[name] != expected[name]} <= {"fid", "floor"}
    assert found["fid"] == pytest.approx(expected["fid"], rel=1e-6)
    assert sorted(path.name for path in Path("out").iterdir()) == FILES


def test_our_overview_is_no_sample(evaluated: Evaluated, copy: Path) -> None:
    shutil.copy(copy / "images.png", copy / "samples" / "grid.png")
    assert len(FolderImages(copy / "samples")) == 40
