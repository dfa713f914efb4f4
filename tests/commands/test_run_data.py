"""Evaluations of a run cut images as the run did, and find out at the start whether their results can be written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mvar_lightning.cli import main
from mvar_lightning.data.index import read_index
from mvar_lightning.data.making.shards import ShardLimits, ShardsRequest, make_shards
from mvar_lightning.data.making.sources import Source
from mvar_lightning.errors import UserError
from mvar_lightning.runs.run import data_settings
from mvar_lightning.tools.files import check_folder

Fails = Callable[..., str]
RECIPE = {"class_path": "mvar_lightning.ShardsDataModule", "init_args": {"resize_ratio": 1.0, "val_crop": "adm"}}
LINE = "images are cut as its run validates"


def write_run(folder: str, saved: Path, data: Any = RECIPE) -> Path:
    """A run's folder, as far as its weights and the resolved recipe."""
    shutil.copytree(saved, Path(folder) / "model")
    (Path(folder) / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "data": data}))
    return Path(folder)


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], str]:
    """What an evaluation of a tokenizer wrote, and what it said."""
    options = [str(argument) for argument in (*arguments, "--features", "none", "--images", 8, "--out", "out")]
    assert main(["evaluate", "tokenizer", *options]) == 0
    return json.loads(Path("out/tokenizer.json").read_text()), capsys.readouterr().out


def test_a_run_is_evaluated_as_it_validated(
    tokenizer: Path, shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = write_run("run", tokenizer), ("--data", shards)
    plain, said = evaluated(capsys, "--checkpoint", tokenizer, *data)
    assert (plain["resize_ratio"], plain["crop"]) == (1.125, "center") and LINE not in said
    right, _ = evaluated(capsys, "--checkpoint", tokenizer, *data, "--resize-ratio", 1.0, "--crop", "adm")
    assert right["psnr"] != plain["psnr"], "the digits are not cut differently, so this shows nothing"
    for checkpoint in (run, run / "model"):
        found, said = evaluated(capsys, "--checkpoint", checkpoint, *data)
        assert (found["resize_ratio"], found["crop"], found["psnr"]) == (1.0, "adm", right["psnr"])
        assert f"{checkpoint}: {LINE}: --resize-ratio 1.0 --crop adm\n" in said
    found, said = evaluated(capsys, "--checkpoint", run, *data, "--resize-ratio", 1.25)
    assert (found["resize_ratio"], found["crop"]) == (1.25, "adm") and f"{LINE}: --crop adm\n" in said
    found, said = evaluated(capsys, "--checkpoint", run, *data, "--resize-ratio", 1.125, "--crop", "center")
    assert found["psnr"] == plain["psnr"] and LINE not in said


@pytest.mark.parametrize(
    "data", [{"class_path": "mvar_lightning.TokenShardsDataModule", "init_args": {"path": "tokens"}}, None, "shards"]
)
def test_a_run_that_does_not_say_keeps_the_published_cut(
    data: Any, tokenizer: Path, shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run("run", tokenizer, data)
    found, said = evaluated(capsys, "--checkpoint", run, "--data", shards)
    assert (found["resize_ratio"], found["crop"]) == (1.125, "center") and LINE not in said


def test_only_the_run_that_a_checkpoint_lies_in_is_asked(tokenizer: Path, workplace: Path) -> None:
    run = write_run("run", tokenizer)
    assert data_settings(run) == data_settings(run / "model") == RECIPE["init_args"]
    assert data_settings(run / "checkpoints" / "last.ckpt") == RECIPE["init_args"]
    assert data_settings(run / "vae.pth") == data_settings(run / "weights" / "vae.pth") == {}
    (run / "config.yaml").write_text("[1, 2]")
    with pytest.raises(UserError, match="must be a mapping"):
        data_settings(run)


def test_generated_images_are_compared_with_what_their_run_saw(
    checkpoint: Path, shards: Path, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 16, 16)), "means.pt")
    run = write_run("run", checkpoint)
    common = ["--features", "means.pt", "--count", "1", "--no-npz", "--no-floor"]
    options = ["evaluate", "images", "--checkpoint", str(run), *common]
    assert main([*options, "--reference", str(shards)]) == 0
    assert f"{LINE}: --resize-ratio 1.0 --crop adm\n" in capfd.readouterr().out
    found = json.loads(Path("run/evaluation/images.json").read_text())
    assert (found["resize_ratio"], found["crop"]) == (1.0, "adm")
    assert main([*options, "--reference", "run/evaluation/samples", "--out", "out"]) == 0
    assert LINE not in capfd.readouterr().out, "files are compared as they are"


def test_analyses_cut_as_the_run_did(
    checkpoint: Path, shards: Path, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run("run", checkpoint)
    assert main(["analyze", "rfa", "--checkpoint", str(run), "--data", str(shards), "--images", "4"]) == 0
    assert f"{LINE}: --resize-ratio 1.0 --crop adm\n" in capfd.readouterr().out


def test_a_ratio_that_is_no_number(tokenizer: Path, shards: Path, workplace: Path, fails: Fails) -> None:
    start = ["evaluate", "tokenizer", "--checkpoint", tokenizer, "--data", shards, "--resize-ratio"]
    for value in ("nan", "inf"):
        assert f"resize_ratio {value}: not a finite number; give 1.0 or more" in fails(*start, value)
        assert f"resize_ratio {value}" in fails(*start, value, "--crop", "adm")


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    tokenizer: Path, checkpoint: Path, shards: Path, workplace: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("worked first")

    monkeypatch.setattr("mvar_lightning.checkpoints.folder.open_checkpoint", work)
    monkeypatch.setattr("mvar_lightning.checkpoints.load", work)
    Path("picture.png").touch()
    told = "cannot be written (No such file or directory); choose another folder"
    common = ["--checkpoint", tokenizer, "--data", shards]
    for out in ("/proc/out", "/proc"):  # no file can be made there, whoever tries it
        assert f"--out {out}: {told}" in fails("evaluate", "tokenizer", *common, "--out", out)
        assert f"--out {out}: {told}" in fails("analyze", "rfa", *common, "--out", out)
        images = ["evaluate", "images", "--checkpoint", checkpoint, "--reference", shards]
        assert f"--out {out}: {told}" in fails(*images, "--out", out)
        assert f"--save-moments {out}: {told}" in fails(*images, "--out", "new", "--save-moments", f"{out}/ref.npz")
    assert f"--out /proc: {told}" in fails(
        "reconstruct", "--checkpoint", tokenizer, "a.png", "--out", "/proc/strip.png"
    )


def test_the_proof_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "file").touch()
    for folder in ("old", "new/deep", "old/new"):
        check_folder(tmp_path / folder)
    for folder in ("file", "file/in/it"):
        with pytest.raises(UserError, match=r"--here .*/file is a file; choose another folder"):
            check_folder(tmp_path / folder, "--here")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "old"]


def test_too_few_images_for_a_classifier(tokenizer: Path, shards: Path, workplace: Path, fails: Fails) -> None:
    from mvar_lightning.data.making.embedded import digits

    whole = digits()
    make_shards(
        ShardsRequest(Source(whole.class_names, whole.train[:1], whole.val[:2]), Path("one"), ShardLimits(samples=4))
    )
    told = fails("evaluate", "tokenizer", "--checkpoint", tokenizer, "--data", "one")
    assert "--features data: one has too few training images for a classifier (1); choose --features inception" in told
    assert "or none" in told and "batch" not in told and "epoch" not in told
    Path("images").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(f"images/{number}.png")
    told = fails("evaluate", "images", "--images", "images", "--reference", "one")
    assert told.endswith("(1); choose --features inception or a TorchScript file"), "it refuses none"
    make_shards(
        ShardsRequest(Source(whole.class_names, whole.train[:5], whole.val[:5]), Path("five"), ShardLimits(samples=4))
    )
    assert read_index(Path("five")).split("train").samples == 5, "fewer than a batch of 32"
    assert main(["evaluate", "tokenizer", "--checkpoint", str(tokenizer), "--data", "five", "--out", "out"]) == 0
