"""`python -m benchmarks data`: it runs, its sides agree, and a user's mistakes are told."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.__main__ import main
from benchmarks.data import (
    LoaderOptions,
    compare_decoding,
    decoding_sides,
    differences,
    plain,
    some_jpegs,
    synthetic_shards,
    trainer_rate,
)
from mvar_lightning.data.check import check
from mvar_lightning.data.transforms import TOLERANCE
from mvar_lightning.errors import UserError


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "photographs"
    synthetic_shards(folder, 16, size=(100, 75))
    assert check(folder) == []
    return str(folder)


def test_all_sides_make_the_same_pictures(photographs):
    images = some_jpegs(photographs, 16)
    assert len(images) == 16
    want = plain(images, 48, random.Random(3))
    for name, decode in decoding_sides().items():
        apart = differences(decode(images, 48, random.Random(3)), want)
        largest, mean = TOLERANCE if name == "fast" else (0, 0)
        assert (apart["largest_difference"] <= largest, apart["mean_difference"] <= mean) == (True, True), name
    rows = compare_decoding(images, 48, 1)
    assert rows["plain"]["times_plain"] == 1
    assert rows["exact"]["images_per_second"] > 0


def test_a_no_op_model_runs_as_long_as_told(photographs):
    options = LoaderOptions(photographs, image_size=16, batch_size=4, workers=0, seconds=0.05)
    assert trainer_rate(options, "exact") > 0


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_figures(photographs, tmp_path, capsys):
    out = tmp_path / "results" / "data.json"
    options = ["--image-size", "16", "--batch-size", "4", "--seconds", "0.1", "--passes", "3", "--repeats", "1"]
    assert main(["data", "--data", photographs, *options, "--workers", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "times plain" in printed
    assert "memory of all workers" in printed
    figures = json.loads(out.read_text())
    assert len(figures["worker_mib_by_pass"]) == 3
    assert figures["trainer_images_per_second"].keys() == figures["loader_images_per_second"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "0"], "--image-size 0: must be 1 or more"),
        (["--workers", "-1"], "--workers -1"),
        (["--seconds", "0"], "--seconds 0.0"),
        (["--samples", "3"], "--samples 3: less than a batch"),
        (["--data", "nowhere"], "nowhere: does not exist"),
    ],
)
def test_mistakes_are_told(options, message, capsys):
    assert main(["data", *options]) == 2
    assert message in capsys.readouterr().err


def test_shards_without_training_images(photographs):
    with pytest.raises(UserError, match="does not exist"):
        some_jpegs(photographs + "-not", 1)
