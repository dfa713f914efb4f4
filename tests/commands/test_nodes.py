"""Jobs of several processes and machines: the same bytes, one line where something is wrong, going on after a kill."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvar_lightning.errors import UserError
from mvar_lightning.tools import ranks as ranks_module
from mvar_lightning.tools.ranks import Ranks
from tests.faults.harness import Answer, Started, ask, broken_promise, free_port, start

Environment = dict[str, str | None]


def by_torchrun(rank: int, processes: int, port: str, address: str = "127.0.0.1", nodes: int = 1) -> Environment:
    """What torchrun gives a process, but for the store of its agent."""
    on_each = processes // nodes
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % on_each),
        "GROUP_RANK": str(rank // on_each),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(on_each),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def by_srun(rank: int, processes: int, port: str, address: str = "127.0.0.1", nodes: int = 1) -> Environment:
    """What `srun` gives a task."""
    on_each = processes // nodes
    return {
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NAME": "job",
        "SLURM_NTASKS": str(processes),
        "SLURM_NTASKS_PER_NODE": str(on_each),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODELIST": address,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % on_each),
        "SLURM_NODEID": str(rank // on_each),
        "MASTER_PORT": port,
    }


Launcher = Callable[..., Environment]


def together(launcher: Launcher, processes: int, *argv: object, cwd: Path) -> list[Answer]:
    """A command in several processes of this machine."""
    port = free_port()
    started = [start(*argv, cwd=cwd, env=launcher(rank, processes, port)) for rank in range(processes)]
    return [one.finish() for one in started]


def content_of(folder: Path) -> dict[str, object]:
    """Everything in a folder; of an npz its arrays, as its comment holds the times of the images."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
        if path.suffix == ".npz":
            with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
                found[str(path.relative_to(folder))] = {name: archive.read(name) for name in archive.namelist()}
    return found


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file: twelve numbers an image."""
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    path = tmp_path_factory.mktemp("features") / "means.pt"
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 16, 16)), str(path))
    return path


@pytest.fixture
def jobs(checkpoint: Path, tokenizer: Path, shards: Path, features: Path) -> dict[str, list[object]]:
    """Commands that write to ``out``."""
    by = ["--features", features]
    model, few = ["--checkpoint", checkpoint], ["--data", shards, "--images", 10, "--batch-size", 3]
    code = ["--checkpoint", tokenizer, "--resize-ratio", 1.0]
    cut = ["--resize-ratio", 1.0, "--crop", "center"]
    made: dict[str, list[object]] = {
        "sample": ["sample", *model, "--classes", "0-2", "--count", 3, "--batch-size", 2, "--format", "npz"],
        "tokens": ["tokens", "make", *code, "--data", shards, "--num-workers", 0, "--accelerator", "cpu"],
        "tokenizer": ["evaluate", "tokenizer", *code, *few, *by, "--progressive-images", 6],
        "images": ["evaluate", "images", *model, *cut, "--reference", shards, "--count", 1, "--batch-size", 3, *by],
        "attention": ["analyze", "attention", *model, *cut, *few],
        "rfa": ["analyze", "rfa", *model, *cut, *few],
        "perturb": ["analyze", "perturb", *model, *cut, *few, *by],
    }
    return {name: [*argv, "--out", "out"] for name, argv in made.items()}


BOTH = ((by_srun, 2), (by_torchrun, 3))
NUMBERS = {
    "sample": BOTH,
    "tokens": BOTH[1:],
    "perturb": BOTH[:1],
    "tokenizer": BOTH[1:],
    "images": BOTH[1:],
    "attention": BOTH[1:],
    "rfa": BOTH[:1],
}
"""How many processes a job is tried in; those that share the work in one way need not all try both numbers."""


@pytest.mark.parametrize("name", NUMBERS)
def test_one_two_and_three_processes_write_the_same_bytes(
    name: str, jobs: dict[str, list[object]], tmp_path: Path
) -> None:
    for folder in ("1", "2", "3"):
        (tmp_path / folder).mkdir()
    whole = ask(*jobs[name], cwd=tmp_path / "1")
    assert whole.status == 0, whole.err
    for launcher, processes in NUMBERS[name]:
        first, *others = together(launcher, processes, *jobs[name], cwd=tmp_path / str(processes))
        assert first.status == 0, first.err
        assert [(one.status, one.out) for one in others] == [(0, "")] * len(others), "the first alone reports"
        found, expected = (content_of(tmp_path / folder / "out") for folder in (str(processes), "1"))
        assert found.keys() == expected.keys()
        assert [path for path in found if found[path] != expected[path]] == []


KILLER = """
import os, signal
from mvar_lightning.data.tokens import making
from mvar_lightning.sampling import jobs
def bomb(function):
    def made(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return made
if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID")) == "1":
    left = 3
    making.write_array = bomb(making.write_array)
    jobs.to_png = bomb(jobs.to_png)
"""

Hosts = Callable[..., list[Started]]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Starts a command in two processes, each of a machine of its own where that can be had: a network namespace with
    its own address, and the folder of the test in common."""
    names = [f"mvar{os.getpid()}{side}" for side in "ab"]
    try:
        for command in network(names):
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        clear(names)
        pytest.skip(f"network namespaces are not allowed here ({error})")

    def there(launcher: Launcher, *argv: object) -> list[Started]:
        port = free_port()
        started = []
        for rank, name in enumerate(names):
            env = launcher(rank, 2, port, "10.77.0.1", 2) | {"GLOO_SOCKET_IFNAME": f"{name}v"}
            started.append(start(code=inside(name, argv), cwd=tmp_path, env=env))
        return started

    yield there
    clear(names)


def network(names: Sequence[str]) -> list[str]:
    """What `ip` is told: two namespaces, and a cable between them."""
    one, other = names
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add {one}v netns {one} type veth peer name {other}v netns {other}")
    for number, name in enumerate(names, 1):
        commands.append(f"-n {name} address add 10.77.0.{number}/24 dev {name}v")
        commands += [f"-n {name} link set {device} up" for device in (f"{name}v", "lo")]
    return commands


def clear(names: Sequence[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def inside(name: str, argv: Sequence[object]) -> str:
    """Code that runs a command in a network namespace."""
    return (
        "import ctypes, os, sys; from mvar_lightning.cli import main\n"
        f"assert ctypes.CDLL(None, use_errno=True).setns(os.open('/run/netns/{name}', os.O_RDONLY), 0x40000000) == 0\n"
        f"sys.exit(main({[str(one) for one in argv]!r}))"
    )


@pytest.mark.parametrize(("name", "launcher"), [("sample", by_torchrun), ("tokens", by_srun)])
def test_a_machine_is_killed_the_other_says_so_and_the_same_command_goes_on(
    name: str, launcher: Launcher, hosts: Hosts, jobs: dict[str, list[object]], tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    assert ask(*jobs[name], cwd=tmp_path / "whole").status == 0
    (tmp_path / "killer.py").write_text(KILLER)
    first, second = (one.finish() for one in hosts(launcher, "--import", "killer", *jobs[name]))
    assert second.status == -signal.SIGKILL, second.err
    assert broken_promise(first) is None and first.status == 2, first.err
    assert "another process of this job has ended, so this one ends too" in first.line and "goes on" in first.line
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*[0-9].[np][pn]*")}
    assert there, "what was finished is kept"
    for one in (answers := [one.finish() for one in hosts(launcher, *jobs[name])]):
        assert one.status == 0, one.err
    assert not answers[1].out
    assert {path: path.stat().st_mtime_ns for path in there} == there
    found, expected = (content_of(folder / "out") for folder in (tmp_path, tmp_path / "whole"))
    assert {path for path in found if ".partial" not in path} == expected.keys()
    if name == "tokens":
        assert found == expected
    for path in tmp_path.glob("out/0*.png"):  # in other batches, so to the last bit of a product
        pixels = [
            np.asarray(Image.open(folder / "out" / path.name)).astype(int) for folder in (tmp_path, tmp_path / "whole")
        ]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


# what is wrong is told in one line, by all


def test_processes_of_other_arguments_or_folders_are_refused(jobs: dict[str, list[object]], tmp_path: Path) -> None:
    (tmp_path / "quick.py").write_text("from mvar_lightning.tools import ranks\nranks.VISIBLE_SECONDS = 0.3\n")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "quick.py").symlink_to(tmp_path / "quick.py")
    seeds = [("--seed", seed) for seed in (0, 1)]
    for name in ("tokens", "perturb"):
        port = free_port()
        both = [start(*jobs[name], *seeds[n], cwd=tmp_path, env=by_srun(n, 2, port)) for n in range(2)]
        for answer in (one.finish() for one in both):
            assert broken_promise(answer) is None and answer.status == 2
            assert "--seed: process 0 has 0, process 1 1" in answer.line or "seed 0" in answer.line, answer.err
        assert not (tmp_path / "out" / "sampling.json").exists()
    for name in ("sample", "tokens"):
        port = free_port()
        argv = ["--import", "quick", *jobs[name], "--out", f"of_{name}"]
        both = [start(*argv, cwd=tmp_path / "ab"[n], env=by_torchrun(n, 2, port)) for n in range(2)]
        for answer in (one.finish() for one in both):
            assert broken_promise(answer) is None and answer.status == 2
            assert "use a shared file system" in answer.line, answer.err


def test_a_mistake_of_one_process_is_told_by_all(jobs: dict[str, list[object]], tmp_path: Path) -> None:
    """A model that one machine does not have."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "model").symlink_to(jobs["sample"][2], target_is_directory=True)
    port = free_port()
    argv = ["sample", "--checkpoint", "model", "--out", "out"]
    both = [start(*argv, cwd=tmp_path / "ab"[n], env=by_torchrun(n, 2, port)) for n in range(2)]
    for answer in (one.finish() for one in both):
        assert broken_promise(answer) is None and answer.status == 2 and "no such checkpoint" in answer.line


@pytest.mark.parametrize(
    ("env", "numbers", "said"),
    [
        ({}, (1, 2), "num_nodes 2: nothing has started processes on other machines"),
        (by_torchrun(1, 4, "1", nodes=2), (3, None), "devices 3: on 2 machines, but 4 processes were started"),
        (by_srun(1, 4, "1", nodes=2), (None, 3), "devices 2: on 3 machines, but 4 processes were started"),
        ({**by_srun(0, 4, "1"), "SLURM_NTASKS_PER_NODE": "3"}, (None, None), "4 processes were started"),
    ],
)
def test_numbers_that_disagree(
    env: dict[str, str], numbers: tuple[int | None, int | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        Ranks.of("cpu", *numbers)


def test_a_task_alone_may_start_others_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in by_srun(0, 1, "1").items():
        monkeypatch.setenv(name, str(value))
    assert (Ranks.of("cpu", 2).here, Ranks.of("cpu").here, Ranks.of("cpu", on_its_own=3).here) == (2, 1, 3)


def test_turns_are_as_many_for_all() -> None:
    items = list(range(5))
    assert [Ranks(rank, 2).turns(items) for rank in (0, 1)] == [[0, 2, 4], [1, 3, None]]
    assert list(ranks_module.ALONE.each(lambda item: item + 1, items)) == [1, 2, 3, 4, 5]
