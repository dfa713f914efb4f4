"""Rows of a run: what it reports when it was killed, whose folder it is, which recipe it takes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import MODEL_SIZES, TOKENIZER_SIZES

from mvar_lightning.runs.bounds import object_of
from mvar_lightning.runs.recipe import RecipeCheck
from tests.faults.harness import Answer, ask, broken_promise, start_ranks

Recipe = dict[str, Any]
TESTS = Path(__file__).parents[1]
PATHS = "import sys; sys.path.insert(0, {path!r}); from mvar_lightning.cli import main; sys.exit(main({argv!r}))"


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path, shards: Path) -> Recipe:
    """Content of ``recipes/var.yaml``: three epochs of six steps, measured after the second and the third."""
    sizes = {name: value for name, value in MODEL_SIZES.items() if name != "num_classes"}
    data = {"path": str(shards), "image_size": 16, "batch_size": 16, "num_workers": 0}
    return {
        "seed_everything": 0,
        "model": {"class_path": "mvar_lightning.VARModule", "init_args": {"tokenizer": str(tokenizer), **sizes}},
        "data": {"class_path": "mvar_lightning.ShardsDataModule", "init_args": data},
        "trainer": {
            "max_epochs": 3,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def to(content: Recipe, name: str = "var") -> Path:
        path = tmp_path / "recipes" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return to


def train(folder: Path, *argv: str, **settings: Any) -> Answer:
    """`mvar train` with the classes of `tests` at hand."""
    code = PATHS.format(path=str(TESTS), argv=["train", *argv])
    return ask(code=code, cwd=folder, seconds=90, **settings)


def report_of(run: Path) -> Any:
    """What a run reports, but for times and memory."""
    report = json.loads((run / "metrics.json").read_text())
    for name in ("seconds", "seconds_per_step", "peak_memory_bytes"):
        report.pop(name)
    report["metrics"] = {n: v for n, v in report["metrics"].items() if not n.startswith(("speed/", "memory/"))}
    return report


@pytest.mark.slow
def test_a_run_killed_at_several_points_reports_what_one_run_reports(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    """In the second epoch, after its validation, and after the last step; the floor among the numbers."""
    colors = {"class_path": "sabotage.Colors"}
    metrics = {"extractor": colors, "consistency": False, "num_images": 8, "batch_size": 8, "every_n_epochs": 2}
    recipe["trainer"]["callbacks"] = [
        {"class_path": "sabotage.Sabotage"},
        {"class_path": "mvar_lightning.callbacks.SampleMetrics", "init_args": metrics},
    ]
    recipe["checkpoint"] = {"every_steps": 2, "every_minutes": None}
    path = str(write(recipe))
    whole = train(tmp_path, path, "--run-folder", "runs/whole", env={"SABOTAGE": None})
    assert whole.status == 0, whole.err
    for order in ("SIGKILL@8", "SIGKILL@13", "validation:SIGKILL@18", "end:SIGKILL@18"):
        killed = train(tmp_path, path, env={"SABOTAGE": order})
        assert killed.status == -signal.SIGKILL, (order, killed.err)
    assert train(tmp_path, path, env={"SABOTAGE": None}).status == 0
    found, expected = report_of(tmp_path / "runs/var"), report_of(tmp_path / "runs/whole")
    assert {"train/loss", "val/fid_colors_floor"} < set(expected["metrics"])
    assert found == expected


# Whose folder it is


def test_a_run_sees_what_its_recipe_takes_from_the_environment(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    """The same text with another value in the environment is another run; one that a version before wrote is known."""
    recipe["model"]["init_args"]["base_lr"] = "${oc.decode:${oc.env:LR}}"
    recipe["trainer"] |= {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    path = str(write(recipe))
    assert train(tmp_path, path, env={"LR": "1e-3"}).status == 0
    again = train(tmp_path, path, env={"LR": "1e-3"})
    assert again.status == 0 and "already trained" in again.out
    other = train(tmp_path, path, env={"LR": "2e-3"})
    assert other.status == 2 and "takes from the environment" in other.line and broken_promise(other) is None
    stamp = tmp_path / "runs/var/run.json"
    stamp.write_text(json.dumps({k: v for k, v in json.loads(stamp.read_text()).items() if k != "resolved_sha256"}))
    assert train(tmp_path, path, env={"LR": "1e-3"}).status == 0


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"metrics": 3, "steps": 1}', "\xff", '{"steps": 1, "metrics": {"a": "b"}}']
)
@pytest.mark.parametrize("name", ["run.json", "metrics.json"])
def test_damaged_notes_of_a_run_are_one_line(
    name: str, content: str, recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    path, folder = write(recipe), tmp_path / "runs/var"
    folder.mkdir(parents=True)
    from mvar_lightning.runs.run import Run

    (folder / "run.json").write_text(json.dumps(Run(path, (), folder).identity()))
    (folder / "metrics.json").write_text("{}")
    (folder / name).write_bytes(content.encode("latin-1"))
    answer = ask("train", path, cwd=tmp_path, seconds=20)
    assert answer.status == 2 and broken_promise(answer) is None, answer.err
    assert str(Path("runs/var")) in answer.line


def test_what_killed_processes_left_is_swept(recipe: Recipe, write: Callable[..., Path], tmp_path: Path) -> None:
    recipe["trainer"] |= {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    folder = tmp_path / "runs/var"
    (folder / ".aside-abc/new").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    left = [folder / ".partial-1-metrics.json", folder / "checkpoints/.partial-1-last.ckpt", folder / ".writable.1"]
    for file in left:
        file.touch()
    left.append(folder / ".partial-1-model")  # weights: a folder
    left[-1].mkdir()
    assert train(tmp_path, str(write(recipe))).status == 0
    assert not [path for path in [*left, folder / ".aside-abc"] if path.exists()]


# Which tokenizer, which recipe


def test_the_tokenizers_recipe_of_the_command_line_is_obeyed(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path, shards: Path, tokenizer: Path
) -> None:
    short = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    recipe["trainer"] |= short
    own = {"class_path": "mvar_lightning.TokenizerModule", "init_args": {**TOKENIZER_SIZES, "codes": "cosine"}}
    write({**recipe, "model": own}, "other")
    missing = {**recipe, "tokenizer_recipe": "recipes/none.yaml"}
    path = str(write(missing))
    none = train(tmp_path, path)
    assert none.status == 2 and "recipes/none.yaml: no such file" in none.line
    assert train(tmp_path, path, "--tokenizer_recipe=null", "--run-folder", "runs/a").status == 0
    assert train(tmp_path, path, "--tokenizer_recipe=recipes/other.yaml", "--run-folder", "runs/b").status == 0
    assert (tmp_path / "runs/other/model/config.json").is_file()
    found = json.loads((tmp_path / "runs/b/model/config.json").read_text())["tokenizer"]["codes"]
    assert found == "cosine"


def test_recipes_that_wait_for_one_another_are_one_line(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    for name, other in (("var", "b"), ("b", "c"), ("c", "b"), ("self", "self")):
        write({**recipe, "tokenizer_recipe": f"recipes/{other}.yaml"}, name)
    for name in ("var", "self"):
        answer = ask("train", f"recipes/{name}.yaml", cwd=tmp_path, seconds=10)
        assert answer.status == 2 and "leads back" in answer.line and answer.seconds < 1
    assert not (tmp_path / "runs").exists()


def test_a_mistake_of_the_tokenizers_run_names_its_recipe(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    own = {"class_path": "mvar_lightning.TokenizerModule", "init_args": dict(TOKENIZER_SIZES)}
    large = {**recipe["data"], "init_args": {**recipe["data"]["init_args"], "batch_size": 1000}}
    write({**recipe, "model": own, "data": large}, "tok")
    path = write({**recipe, "tokenizer_recipe": "recipes/tok.yaml"})
    answer = train(tmp_path, str(path), "--data.batch_size=4")
    assert answer.status == 2 and broken_promise(answer) is None
    assert "tokenizer_recipe recipes/tok.yaml" in answer.line and "batch of 1000" in answer.line


def test_a_callback_without_arguments_is_told_with_its_class(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path
) -> None:
    recipe["trainer"]["callbacks"] = [{"class_path": "mvar_lightning.callbacks.EMA", "init_args": None}]
    answer = train(tmp_path, str(write(recipe)))
    assert answer.status == 2 and broken_promise(answer) is None
    assert "trainer.callbacks: init_args of EMA is null; leave init_args out" in answer.line


def test_callbacks_are_built_once_to_be_judged(
    recipe: Recipe, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left behind: those of the run itself are others."""
    built: list[object] = []
    init = ModelCheckpoint.__init__

    @wraps(init)
    def counting(self: ModelCheckpoint, *arguments: Any, **named: Any) -> None:
        built.append(self)
        init(self, *arguments, **named)

    monkeypatch.setattr(ModelCheckpoint, "__init__", counting)
    monkeypatch.chdir(tmp_path)
    own = {"class_path": "mvar_lightning.TokenizerModule", "init_args": dict(TOKENIZER_SIZES)}
    kept = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "kept"}}
    recipe["trainer"]["callbacks"] = [kept, {"class_path": "mvar_lightning.callbacks.EMA"}]
    recipes = [write({**recipe, "model": own}, "tok"), write(recipe)]
    before = set(tmp_path.rglob("*"))
    tokenizers, judged = map(RecipeCheck.of, recipes)
    assert not built
    judged.build(tokenizers)
    assert len(built) == 1 and set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"seed: 2026-13-01", b"a: " + b"[" * 1000, b"a: " + b"9" * 5000, b"- 1"]
)
def test_a_recipe_that_is_no_text_or_no_recipe_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    for command in (("train", "r.yaml"), ("fit", "--config", "r.yaml")):
        answer = ask(*command, cwd=tmp_path, seconds=10)
        assert answer.status == 2 and broken_promise(answer) is None, answer.err
        assert "r.yaml" in answer.line and answer.seconds < 5


# Numbers, and all that a recipe builds, before anything is trained

NUMBERS = (
    "--model.cfg=.nan",
    "--model.top_p=0",
    "--model.top_k=-1",
    "--model.width=0",
    "--model.heads=-4",
    "--model.heads=3",
    "--model.depth=1000000",
    "--model.drop_path=2",
    "--model.base_lr=.nan",
    "--model.label_drop=1.5",
    "--data.num_classes=0",
    "--data.shuffle_buffer=-1",
    "--data.shuffle_buffer=1000000000000",
    "--seed_everything=-1",
    "--seed_everything=4294967296",
    "--trainer.accumulate_grad_batches=0",
    "--trainer.devices=-3",
    "--trainer.precision=bf16-true",
    "--trainer.precision=16-true",
    "--trainer.precision=64-true",
    "--trainer.precision=transformer-engine",
    "--ckpt_path=last.ckpt",
)
LATER = (
    "--model.scale_groups=[[9]]",
    "--model.backend=foo",
    "--trainer.accelerator=quantum",
    "--trainer.callbacks+={class_path: mvar_lightning.callbacks.SampleMetrics, init_args: {num_images: -1}}",
    "--data.crop=oval",
)


@pytest.mark.parametrize("override", [*NUMBERS, *(pytest.param(each, marks=pytest.mark.slow) for each in LATER)])
def test_a_recipe_is_judged_before_anything_is_made_or_trained(override: str, tmp_path: Path) -> None:
    """Of numbers without torch; what only objects know, once they are made, before the tokenizer is trained."""
    (tmp_path / "recipes").symlink_to(TESTS.parent / "recipes")
    answer = ask("train", "recipes/var/digits.yaml", override, cwd=tmp_path, seconds=30)
    assert answer.status == 2 and broken_promise(answer) is None, answer.err
    named = override.partition("=")[0].rpartition(".")[2].strip("+-").replace("callbacks", "num_images")
    assert named.replace("_", "-") in answer.line.replace("_", "-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipes"]


def test_all_processes_of_a_refused_run_end(assets: Path) -> None:
    """What rank zero alone was told, the other one waited for."""
    argv = ["train", "recipes/var.yaml", "--run-folder", "runs/long", "--trainer.devices=2"]
    for answer in [begun.finish() for begun in start_ranks(2, *argv, cwd=assets, seconds=30)]:
        assert answer.status == 2 and broken_promise(answer) is None, answer.err
        assert "run folder runs/long belongs to another version" in answer.line


def test_a_run_folder_is_no_reference(assets: Path) -> None:
    answer = ask("train", "recipes/var.yaml", "--run-folder", "a${oc.env:HOME}", cwd=assets)
    assert answer.status == 2 and broken_promise(answer) is None, answer.err
    assert "run folder a${oc.env:HOME}: " in answer.line


def test_both_groups_of_arguments_are_an_objects() -> None:
    """The parser's ``dict_kwargs`` are for classes that take any; they were left out of what is judged."""
    node = {"class_path": "x.Y", "init_args": {"a": 1}, "dict_kwargs": {"b": 2}}
    assert object_of(node) == ("x.Y", {"a": 1, "b": 2})


@pytest.mark.parametrize("section", ["modle: {}", "modle:", "model:", "data:", "trainer:", "trainer: 3"])
def test_a_misspelt_or_empty_section_is_one_line(section: str, tmp_path: Path) -> None:
    text = (TESTS.parent / "recipes/var/digits.yaml").read_text()
    content = {**yaml.safe_load(text), **yaml.safe_load(section)}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    answer = ask("train", "r.yaml", cwd=tmp_path, seconds=30)
    assert answer.status == 2 and broken_promise(answer) is None, answer.err
    assert section.partition(":")[0] in answer.line or "tokenizer_recipe" in answer.line
