"""Sweep files and the table their runs end in."""

from __future__ import annotations

import json
import math
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from scipy import stats

from mvar_lightning.cli import main
from mvar_lightning.errors import UserError
from mvar_lightning.runs.run import run_of
from mvar_lightning.runs.sweep import read_sweep
from mvar_lightning.runs.sweep_results import Column, Curve, Sweep, SweepResults, SweepRun, read_curves

CONTENT: dict[str, Any] = {
    "recipe": "recipes/var.yaml",
    "seeds": [0, 1],
    "overrides": {"trainer.max_epochs": 2},
    "variants": {"shallow": {"model.depth": 2}, "plain": None},
    "columns": [{"metric": "val/loss", "title": "loss"}, {"metric": "use_[1-9]", "title": "use", "format": ".0%"}],
    "curves": ["val/loss"],
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, **changes}, sort_keys=False))
    return path


def run(variant: str, seed: int, loss: float) -> SweepRun:
    report = {"steps": 10, "metrics": {"val/loss": loss, "use_0": 0.1, "use_1": 0.5, "use_2": 0.9}}
    return SweepRun(variant, seed, report, {"val/loss": Curve((1, 2, 3), (2.0, 3.0, loss))})


def results(folder: Path) -> SweepResults:
    runs = [run("shallow", 0, 1.0), run("shallow", 1, 2.0), run("plain", 0, 4.0), run("plain", 1, 4.0)]
    return SweepResults(read_sweep(write(folder)), runs)


def test_settings_become_overrides_variant_over_common_ones(tmp_path: Path) -> None:
    sweep = read_sweep(
        write(tmp_path, variants={"a": {"trainer.max_epochs": 5, "model.losses": [{"class_path": "L1Loss"}], "x": "y"}})
    )
    assert sweep.arguments("a", 3) == [
        "--trainer.max_epochs=5",
        '--model.losses=[{"class_path": "L1Loss"}]',
        "--x=y",
        "--seed_everything=3",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": {}}, "variants is missing or empty"),
        ({"variants": ["a"]}, "variants must map each name"),
        ({"variants": {"../a": None}}, "also a folder's name"),
        ({"seeds": "0"}, "must be a list of whole numbers"),
        ({"colums": []}, "'colums' is not known; it can have recipe"),
        ({"columns": [{"metric": "a", "measure": "mean"}]}, "measure 'mean'"),
        ({"columns": [{"metric": "a", "format": "%d"}]}, "'%d' formats no number"),
        ({"columns": [{"metric": "a", "tilte": "b"}]}, "unexpected keyword argument 'tilte'"),
        ({"against": "deep"}, "against 'deep' is no variant"),
        ({"against": 3}, "against 3 is no variant"),
        ({"plot": ["val/los"]}, "plot: 'val/los' is the metric of no column"),
        ({"columns": ["val/loss"]}, "columns must be a list of mappings"),
        ({"columns": [{"title": "a"}]}, "'metric'"),
        ({"columns": [{"metric": 3}]}, "column 3: metric 3 must be text"),
        ({"columns": [{"metric": "a", "title": ["b"]}]}, "title ['b'] must be text"),
        ({"columns": [{"metric": "a", "reduce": ["min"]}]}, "reduce ['min'] must be text"),
        ({"columns": [{"metric": "a", "format": 3}]}, "format 3 must be text"),
        ({"columns": [{"metric": "a", "divide": 0}]}, "divide 0 must be a number other than 0"),
        ({"columns": [{"metric": "a", "divide": "x"}]}, "divide 'x' must be a number"),
        ({"columns": [{"metric": "a", "divide": True}]}, "divide True must be a number"),
        ({"columns": [{"metric": "a", "divide": math.nan}]}, "divide nan must be a number"),
        ({"overrides": ["x"]}, "overrides ['x'] must be settings"),
        ({"overrides": "abc"}, "overrides 'abc' must be settings"),
        ({"overrides": {"a": date(2026, 1, 2)}}, "overrides: a datetime.date(2026, 1, 2) is no text"),
        ({"variants": {"a": {"b": date(2026, 1, 2)}}}, "variant a: b datetime.date(2026, 1, 2) is no text"),
        ({"variants": {"a": ["x"]}}, "variants must map each name"),
        ({"plot": 3}, "plot 3 must be a list of metrics"),
        ({"plot": [["val/loss"]]}, "plot [['val/loss']] must be a list of metrics"),
        ({"curves": "val/loss"}, "curves 'val/loss' must be a list of metrics"),
        ({"seeds": [-1]}, "seeds [-1] must be a list of whole numbers, 0 to 4294967295"),
        ({"seeds": [2**32]}, "must be a list of whole numbers"),
        ({"seeds": [True]}, "seeds [True] must be a list of whole numbers"),
        ({"seeds": []}, "seeds [] must be a list of whole numbers"),
        ({"recipe": ["a"]}, "recipe ['a'] must be the name of a YAML file"),
    ],
)
def test_a_wrong_sweep_is_told(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sweep .*sweep\.yaml: ") as error:
        read_sweep(write(tmp_path, **changes))
    assert said in str(error.value)


def test_a_missing_or_broken_sweep_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        read_sweep(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("recipe: 2026-13-45")
    with pytest.raises(UserError, match="not valid YAML"):
        read_sweep(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_sweep(tmp_path / "bad.yaml")


def test_cells_are_means_with_their_spread(tmp_path: Path) -> None:
    head, shallow, plain = results(tmp_path).rows()
    assert head == ["variant", "loss", "use"]
    assert shallow == ["shallow", "1.5 ± 0.707", "50%"]
    assert plain == ["plain", "4", "50%"]


def test_columns_measure_the_end_or_the_fall_of_one_or_several_metrics() -> None:
    one = run("a", 0, 1.0)
    assert one.value(Column("val/loss", measure="fall")) == 2.0
    assert one.value(Column("use_*", reduce="max")) == 0.9
    assert one.value(Column("steps", divide=5)) == 2.0
    assert one.value(Column("none")) != one.value(Column("none")), "a missing number is NaN"


def test_a_fall_counts_from_the_highest_value_so_far_even_if_it_was_made_good() -> None:
    dips = SweepRun("a", 0, {"metrics": {}}, {"use": Curve((0, 1, 2, 3), (0.2, 0.8, 0.5, 0.9))})
    assert dips.value(Column("use", measure="fall")) == pytest.approx(0.3)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    drawn = results(tmp_path)
    drawn.plot(tmp_path / "bars.png")
    drawn.plot_curves(tmp_path / "curves.png")
    for name in ("bars.png", "curves.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(100_000) or []) > 20


def test_the_footnote_says_steps_and_seeds(tmp_path: Path) -> None:
    assert "10 steps; mean ± standard deviation over seeds 0, 1" in results(tmp_path).markdown()


def test_failed_runs_and_missing_numbers_leave_gaps_that_are_told(tmp_path: Path) -> None:
    columns = [{"metric": "val/loss"}, {"metric": "val/lss"}, {"metric": "no/such"}]
    sweep = read_sweep(write(tmp_path, columns=columns, curves=["val/loss", "val/fid"]))
    found = SweepResults(sweep, [run("shallow", 0, 1.0), run("plain", 0, 4.0), run("plain", 1, math.nan)])
    assert found.rows()[1:] == [["shallow", "1 (1 of 2)", "-", "-"], ["plain", "4 (1 of 2)", "-", "-"]]
    assert "not run or failed: shallow, seed 1" in found.footnote()
    assert found.gaps() == [
        "column 'val/lss': no run has it; close to it: val/loss",
        "column 'no/such': no run has it; see metrics.json",
        "curve 'val/fid': no run has it; see metrics.json",
    ]
    assert "NaN" not in json.dumps(found.content())
    found.plot(tmp_path / "bars.png")
    found.plot_curves(tmp_path / "curves.png")


def test_the_numbers_tell_the_plan_and_the_spread(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path, variants={"shallow": {"model.depth": 2}, "plain": None, "late": None}))
    runs = [run("shallow", 0, 1.0), run("shallow", 1, 2.0), run("plain", 1, 4.0)]
    content = json.loads(json.dumps(SweepResults(sweep, runs).content(), allow_nan=False))
    assert content["variants"] == {"shallow": {"model.depth": 2}, "plain": {}, "late": {}}
    assert content["seeds"] == [0, 1]
    losses = {name: columns["loss"] for name, columns in content["table"].items()}
    assert losses["shallow"] == {"mean": 1.5, "spread": pytest.approx(0.5**0.5), "seeds": 2}
    assert losses["plain"] == {"mean": 4.0, "spread": None, "seeds": 1}
    assert losses["late"] == {"mean": None, "spread": None, "seeds": 0}
    told = [(entry["variant"], entry["seed"], entry["values"]["loss"]) for entry in content["runs"]]
    assert told == [("shallow", 0, 1.0), ("shallow", 1, 2.0), ("plain", 0, None), ("plain", 1, 4.0),
                    ("late", 0, None), ("late", 1, None)]  # fmt: skip
    assert [entry["report"] is None for entry in content["runs"]] == [False, False, True, False, True, True]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder with a recipe where training writes a report alone; the variants whose runs were asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mvar_lightning.runs.sweep.check_runs", lambda runs: None)
    Path("recipe.yaml").write_text("model: {depth: 1}")
    asked: list[str] = []

    def train(command: list[str]) -> int:
        folder = Path(command[command.index("--run-folder") + 1])
        asked.append(folder.parent.name)
        overrides = command[command.index("--run-folder") + 2 :]
        made = run_of("recipe.yaml", [word for word in overrides if word != "--fresh"], folder)
        if "--fresh" in overrides:
            made.forget()
        made.claim()
        made.metrics_file.write_text(json.dumps({"steps": 3, "metrics": {"val/loss": 1.5, "use_1": 0.5}}))
        return 0

    monkeypatch.setattr("mvar_lightning.runs.sweep._wait", train)
    return asked


@pytest.mark.parametrize("stale", [False, True], ids=["the same recipe", "another recipe"])
def test_only_keeps_the_finished_runs_of_other_variants(
    stale: bool, tmp_path: Path, trained: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, recipe="recipe.yaml", seeds=[0], curves=[], variants={"a": None, "b": None, "c": None})
    assert main(["sweep", str(path), "--out", "out", "--only", "a", "b"]) == 0
    if stale:
        Path("recipe.yaml").write_text("model: {depth: 2}")
    trained.clear()
    assert main(["sweep", str(path), "--out", "out", "--only", "b", *(["--fresh"] if stale else [])]) == 0
    assert trained == ["b"]
    content = json.loads(Path("out/sweep.json").read_text())
    assert [entry["report"] is not None for entry in content["runs"]] == [not stale, True, False]
    first = "-" if stale else "1.5"
    assert f"| a | {first} |" in Path("out/sweep.md").read_text() and "| c | - |" in Path("out/sweep.md").read_text()


def test_kept_runs_go_on_without_the_runs(
    tmp_path: Path, trained: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, recipe="recipe.yaml", seeds=[0], curves=[], variants={"a": None, "b": None})
    argv = ["sweep", str(path), "--keep", "kept"]
    assert main([*argv, "--draw"]) == 2 and "nothing to draw" in capfd.readouterr().err
    assert main([*argv, "--only", "a"]) == 0 and trained == ["a"]
    assert sorted(file.name for file in Path("kept").iterdir()) == [
        "a-seed0.json",
        "sweep.json",
        "sweep.md",
        "sweep.png",
    ]
    shutil.rmtree("runs")
    trained.clear()
    assert main([*argv, "--draw"]) == 0 and not trained
    assert "| a | 1.5 |" in Path("kept/sweep.md").read_text()
    assert main(argv) == 0 and trained == ["b"]
    assert "| b | 1.5 |" in Path("kept/sweep.md").read_text()
    trained.clear()
    assert main([*argv, "--fresh"]) == 0 and trained == ["a", "b"]
    for content, said in (("{", "cannot be read"), ("[]", "no run that a sweep kept")):
        Path("kept/b-seed0.json").write_text(content)
        capfd.readouterr()
        assert main(argv) == 2 and said in capfd.readouterr().err
    Path("recipe.yaml").write_text("model: {depth: 2}")
    Path("kept/b-seed0.json").unlink()
    assert main(argv) == 2 and "another version of recipe.yaml" in capfd.readouterr().err


def test_what_can_be_told_apart_is_marked(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path, seeds=[0, 1, 2], variants={"plain": None, "near": None, "far": None},
                             against="plain"))  # fmt: skip
    losses = {"plain": (1.0, 1.1, 0.9), "near": (1.05, 1.15, 0.95), "far": (1.5, 1.6, 1.45)}
    found = SweepResults(
        sweep, [run(name, seed, loss) for name, row in losses.items() for seed, loss in enumerate(row)]
    )
    loss, use = sweep.columns
    assert found.chances(use) == {}  # nothing varies
    chances = found.chances(loss)
    assert chances["near"] > 0.5 and chances["far"] < 0.01
    pair = stats.dunnett(losses["near"], losses["far"], control=losses["plain"], random_state=1)
    assert list(chances.values()) == pytest.approx(pair.pvalue, abs=2e-3)
    marked = [row[1].endswith(" *") for row in found.rows()[1:]]
    assert marked == [False, False, True] and "* told apart from plain" in found.footnote()
    alone = SweepResults(sweep, [run("plain", 0, 1.0), run("far", 0, 2.0)])
    assert alone.chances(loss) == {}


def test_curves_are_read_back_and_a_continued_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for values in ({1: 5.0, 2: 4.0, 3: 9.0}, {3: 3.0, 4: 2.0}):
        with SummaryWriter(str(tmp_path)) as writer:
            for step, value in values.items():
                writer.add_scalar("loss", value, step)
    assert read_curves(tmp_path) == {"loss": Curve((1, 2, 3, 4), (5.0, 4.0, 3.0, 2.0))}
    assert read_curves(tmp_path / "none") == {}


def test_every_sweep_that_ships_reads_and_names_a_recipe_that_ships() -> None:
    root = Path(__file__).parents[2]
    found = sorted([*(root / "recipes/ablations").glob("*.yaml"), *(root / "recipes/evidence").glob("*.yaml")])
    assert found
    for path in found:
        sweep = read_sweep(path)
        assert isinstance(sweep, Sweep) and (root / sweep.recipe).is_file()
        assert f"mvar sweep {path.relative_to(root)}" in path.read_text()
