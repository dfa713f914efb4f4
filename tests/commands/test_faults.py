"""Faults, injected: what a run says, and that the last good checkpoint outlives them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mvar_lightning import VARModule
from mvar_lightning.callbacks.last_checkpoint import DurableCheckpointIO
from mvar_lightning.cli import main
from mvar_lightning.errors import UserError
from mvar_lightning.tools import files

Recipe = dict[str, Any]

LAST = Path("runs/var/checkpoints/last.ckpt")
PARTIAL = ".partial-{process}-last.ckpt"


def content(value: float) -> dict[str, Any]:
    return {"weights": torch.full((100_000,), value)}


def test_a_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, path = DurableCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint(content(1.0), path)
    write = files._Watched.write

    def killed(file: Any, data: Any) -> int:
        if len(data) > 100_000:
            write(file, data[: len(data) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(files._Watched, "write", killed)
        writer.save_checkpoint(content(2.0), path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    partial = tmp_path / PARTIAL.format(process=child)
    assert 150_000 < partial.stat().st_size < 400_000
    assert float(writer.load_checkpoint(path, weights_only=True)["weights"][0]) == 1.0
    writer.save_checkpoint(content(3.0), path)
    assert float(writer.load_checkpoint(path, weights_only=True)["weights"][-1]) == 3.0
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    writer, path = DurableCheckpointIO(), tmp_path / "last.ckpt"
    (tmp_path / PARTIAL.format(process=os.getpid())).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"last\.ckpt: could not be written \(No space left on device; .*there is none"):
        writer.save_checkpoint(content(1.0), path)
    writer.save_checkpoint(content(1.0), path)
    (tmp_path / PARTIAL.format(process=os.getpid())).symlink_to("/dev/full")
    with pytest.raises(UserError, match="the one written before it is intact"):
        writer.save_checkpoint(content(2.0), path)
    assert float(torch.load(path, weights_only=True)["weights"][0]) == 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_a_run_on_a_full_disk_stops_in_one_line_and_goes_on_later(
    recipe: Recipe, rewrite: Callable[[Recipe], None], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    recipe["checkpoint"] = {"every_steps": 2}
    rewrite(recipe)
    step = VARModule.training_step

    def filled(module: VARModule, batch: Any, batch_idx: int) -> Any:
        if module.global_step == 3:
            LAST.with_name(PARTIAL.format(process=os.getpid())).symlink_to("/dev/full")
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VARModule, "training_step", filled)
        assert main(["train", "recipes/var.yaml"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"mvar: error: checkpoint .*/last\.ckpt: could not be written \(No space left on device", error)
    assert "the one written before it is intact" in error
    assert torch.load(LAST, weights_only=True)["global_step"] == 2
    assert main(["train", "recipes/var.yaml"]) == 0
    assert f"continuing from {LAST} (epoch 0, step 2)" in capfd.readouterr().out


def test_a_disk_that_fills_up_elsewhere_is_told_too(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def full(module: VARModule, batch: Any, batch_idx: int) -> Any:
        with Path("/dev/full").open("w") as file:
            file.write("a picture, a log, a table")

    monkeypatch.setattr(VARModule, "training_step", full)
    assert main(["train", "recipes/var.yaml"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "mvar: error: runs/var: No space left on device" in error
    assert "there is no checkpoint yet, the same command starts anew" in error


HOLD = """
import sys, time
from pathlib import Path
from mvar_lightning.runs.run import Run
Run(Path("recipe.yaml"), (), Path(sys.argv[1])).lock.take()
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_on_one_folder_are_refused_until_the_first_ends(recipe: Recipe, capfd: Any) -> None:
    """Whatever its end is: the system gives the lock back."""
    folder = Path("runs/var")
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        for command in (["train", "recipes/var.yaml"], ["train", "recipes/var.yaml", "--fresh"]):
            assert main(command) == 2
            error = capfd.readouterr().err
            assert f"run folder runs/var: another run is at work in it (process {first.pid} on " in error
        assert main(["fit", "--config", "recipes/var.yaml"]) == 2
        assert "another run is at work in it" in capfd.readouterr().err
        assert [path.name for path in folder.iterdir()] == [".lock"]
        first.send_signal(signal.SIGKILL)
    assert main(["train", "recipes/var.yaml"]) == 0


def test_an_output_folder_that_cannot_be_written(recipe: Recipe, fails: Callable[..., str]) -> None:
    Path("file").write_text("")
    said = fails("train", "recipes/var.yaml", "--run-folder", "file/run")
    assert "run folder file/run: cannot be written (Not a directory); choose another with --run-folder" in said
    if os.geteuid() == 0:  # who may write everywhere may not write here
        assert "/proc/run: cannot be written" in fails("train", "recipes/var.yaml", "--run-folder", "/proc/run")
