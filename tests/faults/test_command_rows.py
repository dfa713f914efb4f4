"""The command line where it was wrong: output that ends, signals, names, classes, modules of one's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import MODEL_SIZES, TOKENIZER_SIZES

from mvar_lightning import NextScaleTransformer, UserError, load, save
from mvar_lightning.cli import _line_of, main
from mvar_lightning.sampling.class_choice import class_indices
from tests.faults.harness import Answer, ask, broken_promise, start

MANY = 20


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A saved model of more than sixteen classes."""
    folder = tmp_path_factory.mktemp("many") / "model"
    sizes = {**MODEL_SIZES, "num_classes": MANY, "depth": 1}
    save(
        folder, NextScaleTransformer(TOKENIZER_SIZES["scales"], vocab_size=32, code_dim=8, **sizes), load(tokenizer)[1]
    )
    return folder


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path, shards: Path) -> Path:
    """Six steps of the smallest model."""
    sizes = {name: value for name, value in MODEL_SIZES.items() if name != "num_classes"}
    data = {"path": str(shards), "image_size": 16, "batch_size": 16, "num_workers": 0}
    content: dict[str, Any] = {"seed_everything": 0}
    content["model"] = {"class_path": "mvar_lightning.VARModule", "init_args": {"tokenizer": str(tokenizer), **sizes}}
    content["data"] = {"class_path": "mvar_lightning.ShardsDataModule", "init_args": data}
    content["trainer"] = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}
    (tmp_path / "var.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "var.yaml"


def one_line(answer: Answer, *words: str, status: int = 2) -> None:
    assert broken_promise(answer) is None
    assert answer.status == status, answer.err
    for word in words:
        assert word in answer.line


# What is printed and cannot be.


def samples(checkpoint: Path, folder: Path, **streams: str) -> Answer:
    given = ["--checkpoint", checkpoint, "--classes", 1, "--count", 2, "--out", folder / "out", "--device", "cpu"]
    return ask("sample", *given, cwd=folder, **streams)


@pytest.mark.parametrize("stdout", ["closed", "shut"])
def test_sampling_goes_on_when_nobody_listens(stdout: str, many_classes: Path, tmp_path: Path) -> None:
    answer = samples(many_classes, tmp_path, stdout=stdout)
    assert (answer.status, answer.err) == (0, "")
    assert (tmp_path / "out" / "grid.png").is_file() and len(list((tmp_path / "out").glob("0*.png"))) == 2


def test_sampling_goes_on_when_both_streams_are_gone(many_classes: Path, tmp_path: Path) -> None:
    assert samples(many_classes, tmp_path, stdout="closed", stderr="closed").status == 0
    assert (tmp_path / "out" / "grid.png").is_file()


def test_training_goes_on_when_nobody_listens(recipe: Path) -> None:
    answer = ask("train", recipe, "--run-folder", "run", cwd=recipe.parent, stdout="closed")
    assert answer.status == 0, answer.err
    run = recipe.parent / "run"
    assert (run / "metrics.json").is_file() and (run / "model" / "model.safetensors").is_file()


def test_a_full_stdout_is_one_line_after_the_work(many_classes: Path, tmp_path: Path) -> None:
    one_line(samples(many_classes, tmp_path, stdout="full"), "No space left on device", "all else is done")
    assert (tmp_path / "out" / "grid.png").is_file()
    one_line(ask("info", many_classes, stdout="full"), "No space left on device")
    one_line(ask("--help", stdout="full"), "No space left on device")


# Told to stop.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports(number: signal.Signals, many_classes: Path, tmp_path: Path) -> None:
    """The command is at work as soon as it has a name; heavy imports follow."""
    command = [sys.executable, "-m", "mvar_lightning.cli", "sample", "--checkpoint", str(many_classes)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ})
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "mvar: sample: interrupted; the same command goes on\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_work(number: signal.Signals, many_classes: Path, tmp_path: Path) -> None:
    given = ["--checkpoint", many_classes, "--classes", "all", "--count", 2000, "--device", "cpu", "--batch-size", 4]
    started = start("sample", *given, cwd=tmp_path, seconds=60)
    while len(list((tmp_path / "samples").glob("0*.png"))) < 8:
        time.sleep(0.005)
    started.send(number)
    one_line(started.finish(), "mvar: sample: interrupted; the same command goes on", status=130)
    assert not list((tmp_path / "samples").glob(".partial*"))


# Names and surroundings.


@pytest.mark.parametrize(("typed", "meant"), [("smaple", "sample"), ("trian", "train"), ("shard", "shards")])
def test_a_misspelt_command_names_the_nearest(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([typed])
    assert capsys.readouterr().err.endswith(f"mvar: error: no command {typed!r}; did you mean mvar {meant}?\n")


def test_a_command_like_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["xyzzy"])
    assert "no command 'xyzzy'; mvar --help lists them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise RuntimeError('no license')", "RuntimeError: no license"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ("def f(:", "SyntaxError: invalid syntax"),
    ],
)
def test_a_module_of_ones_own_that_fails(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(content)
    one_line(ask("--import", "mine", "info", "x", cwd=tmp_path), "--import mine: ", reason)


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    answer = ask("info", "x", cwd=tmp_path / "here", delete_cwd=True)
    one_line(answer, "the current folder has been removed")


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "a" * 300),
        ("train", "a" * 300),
        ("train", "recipe", "--run-folder", "a" * 300),
        ("shards", "make", "digits", "a" * 300),
        ("shards", "check", "a" * 300),
        ("sample", "--checkpoint", "model", "--classes", "1", "--out", "a" * 300),
        ("export", "model", "--model", "a" * 300),
        ("reconstruct", "--checkpoint", "model", "--data", "a" * 300),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_name_too_long_for_the_file_system(arguments: tuple[str, ...], many_classes: Path, recipe: Path) -> None:
    known = {"model": str(many_classes), "recipe": str(recipe)}
    one_line(ask(*[known.get(argument, argument) for argument in arguments], cwd=recipe.parent))


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("command", [("shards", "make", "digits", "out"), ("sample", "--checkpoint", "model")])
def test_another_user_where_nothing_may_be_written(
    command: tuple[str, ...], many_classes: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    for folder in many_classes.parents:
        folder.chmod(folder.stat().st_mode | 0o055)
    argv = [str(many_classes) if argument == "model" else argument for argument in command]
    one_line(ask(*argv, cwd=tmp_path, uid=65534), "ermission denied")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "x/y"), "x/y: No space left on device"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\nmore"),
            "not enough",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "not enough memory (CUDA out of"),
        (MemoryError(), "not enough memory (of this machine)"),
        (UserError("``count`` 0: bad"), "--count 0: bad"),
    ],
)
def test_what_the_machine_says_is_one_line(error: Exception, line: str) -> None:
    said = _line_of(error)
    assert said is not None and line in said and "\n" not in said


def test_what_is_a_bug_of_ours_stays_one() -> None:
    assert _line_of(RuntimeError("shapes do not match")) is None and _line_of(OSError("odd")) is None


# Classes.


def test_of_many_classes_some_are_sampled(many_classes: Path, tmp_path: Path) -> None:
    answer = ask("sample", "--checkpoint", many_classes, "--device", "cpu", cwd=tmp_path)
    assert answer.status == 0, answer.err
    assert "16 of 20 classes (0, 1, 2, ...); --classes 3,7 or --classes all for others" in answer.out
    names = sorted(path.name[:4] for path in (tmp_path / "samples").glob("0*.png"))
    assert names == [f"{label:04d}" for label in range(16)]


def test_all_classes_where_they_are_asked_for(many_classes: Path, tmp_path: Path) -> None:
    given = ("--classes", "all", "--count", 1, "--device", "cpu")
    answer = ask("sample", "--checkpoint", many_classes, *given, cwd=tmp_path)
    assert answer.status == 0 and len(list((tmp_path / "samples").glob("0*.png"))) == MANY


def test_more_images_than_a_folder_takes(many_classes: Path, tmp_path: Path) -> None:
    given = ("--classes", 0, "--count", 10**12, "--device", "cpu")
    one_line(
        ask("sample", "--checkpoint", many_classes, *given, cwd=tmp_path, seconds=20), "--count", "one folder takes"
    )


def test_a_number_is_an_index_whatever_classes_are_called() -> None:
    names = [str(number) for number in range(12)]
    assert class_indices("10", 12, names) == [10] and class_indices("10-11", 12, names) == [10, 11]
    assert class_indices("all", 3) == [0, 1, 2]
    with pytest.raises(UserError, match="class '7': an index, and the name of class 1"):
        class_indices("7", 9, ["3", "7", *"abcdefg"])


# How soon it answers.


def test_help_of_a_benchmark_is_there_at_once() -> None:
    """In processor seconds, which a busy machine does not stretch as it does those of the clock."""
    code = """
import resource, sys
from benchmarks.__main__ import main
try:
    main(["attention", "--help"])
except SystemExit:
    pass
used = resource.getrusage(resource.RUSAGE_SELF)
sys.exit(used.ru_utime + used.ru_stime > 0.6)
"""
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False).returncode == 0
