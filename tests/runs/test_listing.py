"""`mvar runs` and `mvar recipe new`: which run is which, and recipes for a data set that really train."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mvar_lightning import UserError
from mvar_lightning.cli import main
from mvar_lightning.runs.listing import list_runs
from mvar_lightning.runs.naming import in_words
from mvar_lightning.runs.new_recipe import Fit, write_recipes
from mvar_lightning.runs.recipe import RecipeCheck
from mvar_lightning.runs.run import Run, run_of

RECIPE = "var/digits"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ""),
        (["--model.depth=6"], "+depth=6"),
        (["--model.init_args.depth=6", "--trainer.max_epochs=3"], "+depth=6,trainer.max_epochs=3"),
        (["--model.base_lr=1e-3"], "+base_lr=1e-3"),
    ],
)
def test_folders_carry_overrides_in_words(overrides: list[str], words: str) -> None:
    assert in_words(overrides) == words
    assert run_of(RECIPE, overrides).folder == Path(f"runs/var/digits{words}")


def test_words_that_cannot_say_all_have_a_hash() -> None:
    awkward = [
        ["--data.path=/a/b"],
        ["--data.path=/a/c"],
        ["--config", "more.yaml"],
        [f"--model.{name}=1" for name in ("a" * 30, "b" * 40)],
        ["--model.depth=6", "--model.init_args.depth=8"],
        ["--model.depth=6", "--data.path=x/y"],
    ]
    names = [in_words(overrides) for overrides in awkward]
    assert len(set(names)) == len(names)
    for name in names:
        assert "/" not in name and len(name) < 80 and name != "+depth=6"
    assert names[-1].startswith("+depth=6~")


def test_a_folder_of_an_earlier_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = in_words(["--data.path=/a/b"])
    (tmp_path / "runs" / "var" / f"digits{name}").mkdir(parents=True)
    assert run_of(RECIPE, ["--data.path=/a/b"]).folder.name == f"digits{name}"


def run_folder(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


HOLDS = """
import sys, time
from pathlib import Path
from mvar_lightning.runs.run import Run
Run(Path(), (), Path(sys.argv[1])).lock.take()
print("held", flush=True)
time.sleep(60)
"""


def test_runs_are_listed_with_their_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = {
        "recipe": "r.yaml",
        "steps": 1234,
        "metrics": {"val/loss": 4.5, "val/loss_last": 1.0, "val/fid_images": 500},
    }
    run_folder(tmp_path / "var" / "done", run={"overrides": ["--model.depth=6"]}, metrics=report)
    run_folder(tmp_path / "sweeps" / "s" / "wide" / "0", run={"overrides": []})
    run_folder(tmp_path / "broken", run={"overrides": []}, metrics=[1])
    busy = run_folder(tmp_path / "busy", run={"overrides": []})
    (tmp_path / "data").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(busy)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        found = {run.folder.removeprefix(f"{tmp_path}/"): run for run in list_runs(tmp_path)}
        holder.kill()
    states = {name: run.state for name, run in found.items()}
    assert states == {"var/done": "finished", "sweeps/s/wide/0": "begun", "broken": "unreadable", "busy": "running"}
    assert found["var/done"].figures == {"val/loss": 4.5} and found["var/done"].step == 1234
    assert "no report" in found["broken"].problem
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1,234" in out and "depth=6" in out and "loss 4.5" in out
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert main(["runs", str(tmp_path / "data")]) == 0 and "no runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "downsampling", "scales"),
    [
        (16, 4, [1, 2, 3, 4]),
        (28, 4, [1, 2, 3, 4, 5, 7]),
        (32, 4, [1, 2, 3, 4, 5, 6, 8]),
        (64, 8, [1, 2, 3, 4, 5, 6, 8]),
        (96, 8, [1, 2, 3, 4, 5, 6, 8, 10, 12]),
        (256, 16, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]),
        (512, 16, [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]),
        ((16, 32), 4, [1, (1, 2), (2, 4), (3, 6), (4, 8)]),
        ((48, 32), 4, [1, (2, 1), (3, 2), (4, 3), (6, 4), (8, 5), (9, 6), (12, 8)]),
    ],
)
def test_scales_fit_the_size(size: Any, downsampling: int, scales: list[Any]) -> None:
    fit = Fit(size, 5000, gpu=False)
    assert (fit.downsampling, fit.scales) == (downsampling, scales)


def test_every_size_makes_recipes_that_the_parser_and_the_model_take(tmp_path: Path, shards: Path) -> None:
    for number, size in enumerate((8, 10, 16, 28, 30, 64, 128, 256, (16, 32), (48, 32))):
        model = ("var", "mvar", "markov_var")[number % 3]
        tokenizer, recipe = write_recipes(str(shards), size, model, tmp_path / str(size))
        check = RecipeCheck.of(recipe)
        check.build(RecipeCheck.of(tokenizer))


def test_new_recipes_train(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", "new", "--data", str(shards), "--size", "16", "--out", "recipes/own"]) == 0
    few = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.callbacks=[]"]
    tokenizer, recipe = (f"recipes/own/{name}.yaml" for name in ("tokenizer", "mvar"))
    assert main(["train", tokenizer, *few, "--run-folder", "runs/own/tokenizer"]) == 0
    assert main(["train", recipe, *few, "--model.tokenizer=runs/own/tokenizer/model"]) == 0
    assert main(["recipe", "new", "--data", str(shards), "--size", "16", "--out", "recipes/own"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_mistakes_of_a_new_recipe_are_one_line(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for arguments, words in (
        ((str(tmp_path / "pictures"), 16), "mvar shards make"),
        ((str(tmp_path / "none"), 16), "none"),
        ((str(shards), 7), "size"),
        ((str(shards), 130), "128"),
        ((str(shards), (16, 33)), "16x33"),
        ((str(shards), (120, 256)), "128x256"),
        ((str(shards), 16, "gan"), "gan"),
    ):
        with pytest.raises(UserError, match=words):
            write_recipes(*arguments, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_identity_of_a_run_knows_the_files_laid_over_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("trainer: {max_epochs: 3}\n")
    for overrides in (("--config", str(more)), (f"--config={more}",)):
        run = Run(Path(run_of(RECIPE, ()).recipe), overrides, tmp_path / "run")
        before = run.identity()
        more.write_text("trainer: {max_epochs: 4}\n")
        assert run.identity() != before
        more.write_text("trainer: {max_epochs: 3}\n")
        assert run.identity() == before


def test_a_plan_reads_the_sizes_of_a_tokenizer_that_is_there_and_of_one_beside_its_recipe(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "var/digits_cca"]) == 0
    out = capsys.readouterr().out
    assert "peak of a device" in out and not re.search(r"not there yet +│ digits ", out)
    _, recipe = write_recipes(str(shards), 16, "var", tmp_path / "own")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["plan", str(recipe)]) == 0
    assert "peak of a device" in capsys.readouterr().out
