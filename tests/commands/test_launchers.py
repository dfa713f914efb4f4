"""Two processes as torchrun, SLURM and Lightning start them: who prepares, who reports, and how they end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sabotage import losses

from mvar_lightning import load
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import fingerprint
from mvar_lightning.tools import processes
from tests.faults.harness import as_here, completed, free_port, start

Recipe = dict[str, Any]

TESTS = Path(__file__).parents[1]
TRAIN = ["-m", "mvar_lightning.cli", "train", "recipes/var.yaml"]
LAST = "runs/var/checkpoints/last.ckpt"


@pytest.fixture
def two(recipe: Recipe, rewrite: Callable[[Recipe], None]) -> Recipe:
    """Two processes, twice three steps."""
    recipe["trainer"] |= {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 2}
    recipe["model"]["init_args"] |= {"drop_path": 0.3, "base_lr": 0.05}
    recipe["trainer"]["callbacks"] = [{"class_path": f"sabotage.{name}"} for name in ("LossLog", "Sabotage")]
    recipe["checkpoint"] = {"every_steps": 2, "every_minutes": None}
    rewrite(recipe)
    return recipe


@pytest.fixture
def two_and_tokenizer(tokenizer_recipe: Recipe, two: Recipe, rewrite: Callable[[Recipe], None]) -> Recipe:
    """The same with a sharded model, after a tokenizer that the two processes train first."""
    tokenizer_recipe["trainer"] |= {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    Path("recipes/tok.yaml").write_text(yaml.safe_dump(tokenizer_recipe))
    two["tokenizer_recipe"] = "recipes/tok.yaml"
    two["model"]["init_args"] |= {"tokenizer": "runs/tok/model", "checkpoint_activations": True}
    two["trainer"]["strategy"] = {"class_path": "mvar_lightning.training.FullySharded"}
    two["trainer"] |= {"gradient_clip_val": 1.0}
    two["trainer"]["callbacks"].append({"class_path": "mvar_lightning.callbacks.EMA", "init_args": {"decay": 0.9}})
    rewrite(two)
    return two


def environment(**more: str) -> dict[str, str]:
    path = f"{TESTS}:{TESTS.parent}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def torchrun() -> tuple[int, str, str]:
    options = ["--nproc-per-node", "2", "--master-port", free_port(), *TRAIN]
    code = f"from torch.distributed.run import main; main({options!r})"
    done = completed(code=code, env=environment())
    return done.returncode, done.stdout, done.stderr


def slurm(folder: Path, **more: str) -> list[tuple[int, str, str]]:
    """What `srun` with two tasks on one node gives its processes; `scontrol` writes down what it is asked."""
    folder.mkdir(exist_ok=True)
    (folder / "scontrol").write_text('#!/bin/sh\necho "$@" >> requeued.txt\n')
    (folder / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_PORT": free_port()}
    job |= {"PATH": f"{folder}:{os.environ['PATH']}", **more}
    ranks = [as_here(environment(**job, SLURM_PROCID=rank, SLURM_LOCALID=rank)) for rank in ("0", "1")]
    tasks = [start(*TRAIN[2:], env=rank, cwd=Path.cwd(), seconds=60) for rank in ranks]
    return [(done.status, done.out, done.err) for done in (task.finish() for task in tasks)]


def result() -> tuple[dict[Any, str], dict[str, torch.Tensor]]:
    model, _ = load("runs/var/model")
    assert model is not None
    return losses(Path("losses.txt")), model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.slow
def test_torchrun_and_a_requeued_slurm_job_train_the_same(two_and_tokenizer: Recipe, tmp_path: Path) -> None:
    """All ranks train the tokenizer, rank zero reports; the job's time is up amid the second epoch."""
    status, out, err = torchrun()
    assert status == 0, err
    assert out.count("runs/var/metrics.json") == 1 and "already trained" not in out
    whole = result()
    assert len(whole[0]) == 2 * (6 + 2)
    report = json.loads(Path("runs/var/metrics.json").read_text())
    assert report["steps"] == 6 and fingerprint(load("runs/var/model")[1]) == fingerprint(load("runs/tok/model")[1])
    Path("runs/var").rename("runs/torchrun")
    Path("losses.txt").unlink()

    ended = slurm(tmp_path / "bin", SABOTAGE="SIGUSR1@4@1")
    assert [status for status, _, _ in ended] == [130, 130], ended
    for _, _, err in ended:
        assert f"mvar: runs/var: told to stop at step 5; the same command continues from {LAST}" in err
        assert "Traceback" not in err
    assert Path("requeued.txt").read_text() == "requeue 1234\n"
    assert not list(Path().rglob("hpc_ckpt*"))
    again = slurm(tmp_path / "bin")
    assert [status for status, _, _ in again] == [0, 0], again
    outs = [out for _, out, _ in again]
    assert f"runs/var: continuing from {LAST} (epoch 1, step 5)" in outs[0] and "metrics.json" in outs[0]
    assert "continuing" not in outs[1] and "metrics.json" not in outs[1]
    continued = result()
    assert continued[0] == whole[0] and same(continued[1], whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_in_one_line(rank: int, two: Recipe, tmp_path: Path) -> None:
    """With nobody to end them, as torchrun and `srun --kill-on-bad-exit` would."""
    ended = slurm(tmp_path / "bin", SABOTAGE=f"SIGKILL@3@{rank}")
    assert ended[rank][0] == -signal.SIGKILL
    status, _, err = ended[1 - rank]
    assert status == 2, err
    assert "mvar: error: runs/var: another process of this run has ended, so this one ends too (" in err
    assert f"the same command continues from {LAST}" in err and "Traceback" not in err
    assert torch.load(LAST, weights_only=True)["global_step"] == 3


@pytest.mark.slow
def test_lightning_starts_the_second_process_and_stops_it_with_the_first(two: Recipe) -> None:
    stopped = completed(*TRAIN[2:], env=environment(SABOTAGE="SIGTERM@4@0"))
    assert stopped.returncode == 130, stopped.stderr
    assert f"mvar: runs/var: told to stop at step 5; the same command continues from {LAST}" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    done = completed(*TRAIN[2:], "--fresh", env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("runs/var/metrics.json") == 1


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
LAUNCHED = (
    ({}, 0, False),
    ({**TORCHRUN, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 3, False),
    ({"RANK": "3"}, 0, False),  # left in the environment by something else
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_JOB_NAME": "train"}, 2, False),
    ({**TORCHRUN, "RANK": "3", "WORLD_SIZE": "4", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, 3, False),  # in SLURM
    ({"RANK": "3", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}, 0, False),  # exported to srun
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_JOB_NAME": "bash"}, 0, False),  # a shell in an allocation
    ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, 0, False),
    ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, 1, True),
)


@pytest.mark.parametrize(("given", "rank", "by_lightning"), LAUNCHED)
def test_ranks_and_numbers_of_processes(
    given: dict[str, str], rank: int, by_lightning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launchers = ("LOCAL_RANK", "NODE_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NAME", *TORCHRUN)
    for name in ("RANK", "WORLD_SIZE", *launchers):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert processes.global_rank() == rank and processes.is_main() == (rank == 0)
    assert processes.started_by_lightning() == by_lightning
    processes.check_number(4)
    if TORCHRUN.keys() <= given.keys() or given.get("SLURM_JOB_NAME") == "train":
        with pytest.raises(UserError, match=r"num_nodes is 1, but 4 processes were started; make them agree"):
            processes.check_number(1)


@pytest.mark.parametrize(
    "script", sorted((TESTS.parent / "docs" / "slurm").glob("*.sbatch")), ids=lambda path: path.stem
)
def test_the_examples_for_slurm_start_what_they_say(script: Path, tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands and the environment's: the right command, once for each recipe."""
    for name, does in (("srun", 'shift; echo "$@" > asked.txt'), ("scontrol", "echo node7; echo node8")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node[7-8]"}
    job |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script), "--model.depth=4"], env=job, cwd=tmp_path, check=True)
    asked = (tmp_path / "asked.txt").read_text()
    assert asked.endswith("train recipes/var/d30.yaml --trainer.num_nodes=2 --trainer.devices=8 --model.depth=4\n")
    assert ("--rdzv-endpoint=node7:29500" in asked) == (script.stem == "torchrun")
