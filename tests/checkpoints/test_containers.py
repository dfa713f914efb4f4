"""Weights as trainers save them: wrapped, prefixed, nested, beside settings; found by the names in them."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from mvar_lightning.checkpoints import import_official, is_released, load_initial_weights, save
from mvar_lightning.checkpoints.containers import MODEL, TOKENIZER, read_state
from mvar_lightning.cli import main
from mvar_lightning.errors import UserError
from mvar_lightning.training.loading import start_from
from mvar_lightning.transformer import NextScaleTransformer
from tests.faults.harness import call, start
from tests.group_of_one import group_of_one

Files = dict[str, tuple[Path, Path]]
Pairs = dict[str, Any]
State = dict[str, Tensor]


def module_of(state: State) -> nn.Module:
    """A module whose parameters and buffers have these names."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        inside = root
        for part in path:
            if part not in dict(inside.named_children()):
                inside.add_module(part, nn.Module())
            inside = dict(inside.named_children())[part]
        if tensor.is_floating_point():
            inside.register_parameter(last, nn.Parameter(tensor.clone()))
        else:
            inside.register_buffer(last, tensor.clone())
    return root


@pytest.fixture(scope="module")
def state(released: Files) -> State:
    return torch.load(released["var_tiny"][0], weights_only=True)


@pytest.fixture(scope="module")
def codes(released: Files) -> State:
    return torch.load(released["var_tiny"][1], weights_only=True)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A process group of this process alone."""
    with group_of_one(tmp_path_factory.mktemp("group")):
        yield


class Both(L.LightningModule):
    """Somebody's LightningModule: a transformer, a tokenizer and something else."""

    def __init__(self, state: State, codes: State) -> None:
        super().__init__()
        self.net, self.vae, self.judge = module_of(state), module_of(codes), nn.Linear(2, 2)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.judge(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.judge.parameters(), lr=0.1)


def wrapped(make: Callable[[nn.Module], nn.Module]) -> Callable[[State, State, Path], Any]:
    return lambda state, codes, folder: make(module_of(state)).state_dict()


def by_lightning(state: State, codes: State, folder: Path) -> Any:
    quiet: dict[str, Any] = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", default_root_dir=folder, **quiet)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 2)))
    trainer.fit(Both(state, codes), data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return torch.load(folder / "last.ckpt", weights_only=True)


def sharded(state: State, codes: State, folder: Path) -> Any:
    module = module_of(state)
    fully_shard(module, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in module.state_dict().items()}


def trained(state: State, codes: State) -> dict[str, Any]:
    """After a step, what FoundationVision/VAR's train.py and trainer.py save, part by part."""
    model, tokenizer = module_of(state), module_of(codes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95))
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11)
    trainer = {
        "config": {"patch_nums": (1, 2, 3), "label_smooth": 0.0, "prog_it": 0, "first_prog": True},
        "var_wo_ddp": model.state_dict(),
        "vae_local": tokenizer.state_dict(),
        "var_opt": {"scaler": scaler.state_dict(), "optimizer": optimizer.state_dict()},
    }
    arguments = {"depth": 16, "tblr": 1e-4, "pn": "1_2_3", "device": "cpu", "patch_nums": (1, 2, 3)}
    return {"epoch": 3, "iter": 0, "trainer": trainer, "args": arguments}


WRITERS: dict[str, tuple[Callable[[State, State, Path], Any], str]] = {
    "DistributedDataParallel": (wrapped(nn.parallel.DistributedDataParallel), ""),
    "torch.compile": (wrapped(lambda module: torch.compile(module)), ""),  # type: ignore[arg-type, return-value]
    "compile of DDP": (wrapped(lambda m: torch.compile(nn.parallel.DistributedDataParallel(m))), ""),  # type: ignore[arg-type, return-value]
    "FSDP2": (sharded, ""),
    "Lightning": (by_lightning, "state_dict.net"),
    "one key": (lambda state, codes, folder: {"model_state_dict": state, "epoch": 3}, "model_state_dict"),
    "deep": (lambda state, codes, folder: {"a": {"b": {"c": {"net.": 1, "d": state}}}}, "a.b.c.d"),
    "EMA's own": (lambda s, codes, folder: {"ema": {f"shadow.{k}": t for k, t in s.items()}, "n": 3}, "ema.shadow"),
    "argparse": (lambda s, codes, folder: {"model": s, "args": argparse.Namespace(depth=16, lr=[1e-4])}, "model"),
    "OmegaConf": (
        lambda state, codes, folder: {"module": state, "config": OmegaConf.create({"a": {"b": [1, "x", None]}})},
        "module",
    ),
    "VAR's trainer": (lambda state, codes, folder: trained(state, codes), "trainer.var_wo_ddp"),
    # thu-ml/CCA's trainer gives its model alone; CoDe's and DDO's releases are flat, under VAR's names
    "CCA's trainer": (lambda s, c, folder: {**trained(s, c), "trainer": module_of(s).state_dict()}, "trainer"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_weights_as_trainers_write_them(name: str, state: State, codes: State, tmp_path: Path, group: Any) -> None:
    write, key = WRITERS[name]
    torch.save(write(state, codes, tmp_path), tmp_path / "file.pth")
    found = read_state(tmp_path / "file.pth", MODEL)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    if key:
        assert read_state(tmp_path / "file.pth", MODEL, key).keys() == state.keys()


def test_both_parts_of_one_file(state: State, codes: State, released: Files, tmp_path: Path) -> None:
    """A Lightning checkpoint of somebody else's gives transformer and tokenizer, and a fine-tuning starts from it."""
    content = {f"net.{name}": t for name, t in state.items()} | {f"vae.{name}": t for name, t in codes.items()}
    torch.save({"state_dict": content, "hparams": argparse.Namespace(depth=2)}, tmp_path / "theirs.ckpt")
    arguments: dict[str, Any] = {"architecture": "var", "patch_nums": (1, 2, 3, 4)}
    model, tokenizer = import_official(tmp_path / "theirs.ckpt", tmp_path / "theirs.ckpt", **arguments)
    wanted, known = import_official(*released["var_tiny"], **arguments)
    for found, expected in ((model, wanted), (tokenizer, known)):
        assert all(torch.equal(found.state_dict()[name], t) for name, t in expected.state_dict().items())


def test_a_container_of_two_models_needs_a_key(
    state: State, released: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaged = {name: t + 1 if name == "pos_1LC" else t for name, t in state.items()}
    torch.save({"model": state, "ema": averaged}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"several weights of .*: 'model', 'ema'; say which with key"):
        read_state(tmp_path / "two.pth", MODEL)
    assert torch.equal(read_state(tmp_path / "two.pth", MODEL, "ema")["pos_1LC"], averaged["pos_1LC"])
    with pytest.raises(UserError, match="under the key 'emma'; there are 'model', 'ema'"):
        read_state(tmp_path / "two.pth", MODEL, "emma")
    command = ["import", "--architecture", "var", "--model", str(tmp_path / "two.pth"), "--patch-nums", "1,2,3,4"]
    command += ["--tokenizer", str(released["var_tiny"][1]), "--out", str(tmp_path / "out")]
    assert main(command) == 2 and "say which with --key" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--key", "ema"]) == 0 and (tmp_path / "out" / "config.json").is_file()


def test_a_folder_as_accelerate_writes_it(state: State, tmp_path: Path) -> None:
    (tmp_path / "checkpoint_0").mkdir()
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "checkpoint_0" / "model.safetensors")
    torch.save({"step": 1}, tmp_path / "checkpoint_0" / "optimizer.bin")
    assert read_state(tmp_path / "checkpoint_0", MODEL).keys() == state.keys()
    (tmp_path / "checkpoint_0" / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"a folder with 2 of model\.safetensors"):
        read_state(tmp_path / "checkpoint_0", MODEL)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_parts_as_accelerate_writes_large_ones(kind: str, state: State, tmp_path: Path) -> None:
    save = save_file if kind == "safetensors" else torch.save
    stem = "model" if kind == "safetensors" else "pytorch_model"
    tensors, places = {name: t.contiguous() for name, t in state.items()}, {}
    for number in range(3):
        part = dict(list(tensors.items())[number::3])
        save(part, tmp_path / f"{stem}-0000{number + 1}-of-00003.{kind}")
        places |= dict.fromkeys(part, f"{stem}-0000{number + 1}-of-00003.{kind}")
    table = tmp_path / f"{stem}.{kind}.index.json"
    table.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    for path in (tmp_path, table):
        found = read_state(path, MODEL)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert is_released(tmp_path) and is_released(table)
    last = f"{stem}-00003-of-00003.{kind}"
    missing = next(name for name, file in places.items() if file == last)
    for wrong, words in (
        ({missing: f"../{last}"}, "no file of weights beside it"),
        ({missing: "notes.txt"}, "no file of weights beside it"),
        ({"another": last}, f"{last}: lacks what {table.name} says is in it, such as another"),
    ):
        table.write_text(json.dumps({"weight_map": {**places, **wrong}}))
        with pytest.raises(UserError, match=re.escape(words)):
            read_state(table, MODEL)
    (tmp_path / last).unlink()
    table.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=last):
        read_state(table, MODEL)
    table.write_text("[]")
    with pytest.raises(UserError, match="is no table of weights in parts"):
        read_state(table, MODEL)


class Runs:
    """What a pickle would call; here only a name."""

    def __reduce__(self) -> Any:
        return (print, ("executed",))


def sharded(folder: Path, tensors: Any) -> Path:
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)  # type: ignore[attr-defined]
    return folder


def test_a_distributed_checkpoint_is_made_whole_on_the_way(state: State, codes: State, tmp_path: Path) -> None:
    inside = {
        "model": {f"module.{key}": value for key, value in state.items()},
        "epoch": 3,
        "optimizer": {"a": torch.ones(2)},
    }
    for number, content in enumerate((state, inside, {"state_dict": {"vae": codes, "gpt": state}})):
        folder = sharded(tmp_path / str(number), content)
        found = read_state(folder, MODEL)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) for key, value in state.items())
    assert read_state(tmp_path / "2", TOKENIZER).keys() == codes.keys()
    two = sharded(tmp_path / "two", {"model": state, "ema": {key: value + 1 for key, value in state.items()}})
    with pytest.raises(UserError, match="say which"):
        read_state(two, MODEL)
    name = next(iter(state))
    assert torch.equal(read_state(two, MODEL, "ema")[name], state[name] + 1)


def test_a_distributed_checkpoint_of_two_processes(tmp_path: Path) -> None:
    """Each writes its half of every weight."""
    begun = [start(code=call(write_half, rank, str(tmp_path / "dcp"), str(tmp_path / "meeting"))) for rank in range(2)]
    for process in begun:
        answer = process.finish()
        assert answer.status == 0, answer.err
    from mvar_lightning.checkpoints.distributed import outline, read_distributed

    whole = read_distributed(tmp_path / "dcp", outline(tmp_path / "dcp"))
    assert torch.equal(whole["model.weight"], torch.arange(12.0).view(4, 3))


def write_half(rank: int, folder: str, meeting: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    dcp.save(
        {"model": {"weight": distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)])}}, checkpoint_id=folder
    )  # type: ignore[attr-defined]
    dist.destroy_process_group()


def test_a_bad_distributed_checkpoint_is_one_line_and_runs_nothing(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, spoil, words in (
        ("code", lambda f: (f / ".metadata").write_bytes(pickle.dumps(Runs())), "nothing was executed"),
        ("cut", lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:-20]), "not readable"),
        ("other", lambda f: (f / ".metadata").write_bytes(pickle.dumps({"a": 1})), "no table"),
        ("gone", lambda f: (f / "__0_0.distcp").unlink(), "not what its"),
        ("short", lambda f: (f / "__0_0.distcp").write_bytes(b"x" * 100), "not what its"),
    ):
        folder = sharded(tmp_path / name, state)
        spoil(folder)
        with pytest.raises(UserError, match=words):
            read_state(folder, MODEL)
    assert "executed" not in capsys.readouterr().out
    empty = sharded(tmp_path / "empty", {"a": torch.ones(2)})
    assert not read_state(empty, MODEL).keys() & state.keys()  # what is missing is told by name, later


@pytest.mark.parametrize("content", [{}, {"a": 1}, [1], {"state_dict": {"w": torch.ones(1)}}, {"x": {"y": {}}}])
def test_nothing_that_is_known(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match="holds no weights of"):
        read_state(tmp_path / "file.pth", MODEL)


def test_a_tokenizers_file_is_no_models(codes: State, tmp_path: Path) -> None:
    torch.save({"vae": codes}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="holds no weights of var or mvar or markov_var"):
        read_state(tmp_path / "file.pth", MODEL)
    assert read_state(tmp_path / "file.pth", TOKENIZER).keys() == codes.keys()


class Other:
    """An object that is no setting."""


def test_other_objects_are_refused_as_before(state: State, tmp_path: Path) -> None:
    torch.save({"model": state, "args": argparse.Namespace(other=Other())}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"refused, it asks to run .*Other"):
        read_state(tmp_path / "file.pth", MODEL)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(out=Path("x"), lr=[1e-4]),
        {"best": np.float64(1.0)},
        {"seen": np.zeros(2)},
        np.random.RandomState,
    ],
    ids=["paths", "a number", "an array", "a draw"],
)
def test_what_else_trainers_put_beside_weights(beside: Any, zipped: bool, state: State, tmp_path: Path) -> None:
    beside = beside(0).get_state() if isinstance(beside, type) else beside
    torch.save({"model": state, "args": beside}, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    assert read_state(tmp_path / "file.pth", MODEL).keys() == state.keys()


class Loads:
    """Asks numpy to open a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (np.savetxt, (str(self.path), [1.0]))


def test_nothing_of_numpys_is_called(state: State, tmp_path: Path) -> None:
    torch.save({"model": state, "args": Loads(tmp_path / "made.txt")}, tmp_path / "file.pth")
    assert read_state(tmp_path / "file.pth", MODEL).keys() == state.keys()
    assert not (tmp_path / "made.txt").exists()


def test_names_that_become_one_matter_where_weights_lie_alone(state: State, tmp_path: Path) -> None:
    twice = {"module.a": torch.ones(1), "a": torch.ones(1)}
    torch.save({"model": state, "extra": twice}, tmp_path / "file.pth")
    assert read_state(tmp_path / "file.pth", MODEL).keys() == state.keys()
    torch.save({"model": state | twice}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="differ by a wrapper's prefix alone"):
        read_state(tmp_path / "file.pth", MODEL)


def test_a_training_starts_from_what_other_trainers_leave(
    state: State, codes: State, pairs: Pairs, tmp_path: Path
) -> None:
    """By PATH#KEY of several weights; from folders and Lightning's files without our record, model and tokenizer."""
    sizes: dict[str, Any] = dict(vocab_size=64, code_dim=32, num_classes=10, depth=2, width=128, heads=2)
    model, tokenizer = NextScaleTransformer([1, 2, 3, 4], **sizes), copy.deepcopy(pairs["var_tiny"][1])
    averaged = {name: t + 1 if name == "class_emb.weight" else t for name, t in state.items()}
    other = {name: t + 1 if name == "quant_conv.bias" else t for name, t in codes.items()}
    content = {"model": state, "ema": averaged, "vae": codes, "vae_ema": other}
    torch.save(content, tmp_path / "several.pth")
    torch.save({"state_dict": {"gpt": state, "vae": codes}}, tmp_path / "theirs.ckpt")
    both = sharded(tmp_path / "sharded", {"gpt": state, "vae": codes})
    (tmp_path / "folder").mkdir()
    torch.save({"gpt": state, "vae": codes}, tmp_path / "folder" / "model.pt")
    with pytest.raises(UserError, match=r"say which with key \(of init_from: PATH#KEY\)"):
        load_initial_weights(model, tmp_path / "several.pth")
    for path, more in (
        (f"{tmp_path}/several.pth#", 1),
        (tmp_path / "theirs.ckpt", 0),
        (both, 0),
        (tmp_path / "folder", 0),
    ):
        assert "all taken" in load_initial_weights(model, f"{path}ema" if more else path)
        assert torch.equal(model.state_dict()["class_embedding.weight"], state["class_emb.weight"] + more)
        start_from(tokenizer, f"{path}vae_ema" if more else str(path))
        assert torch.equal(tokenizer.state_dict()["quant_conv.bias"], codes["quant_conv.bias"] + more)
    save(tmp_path / "ours", *pairs["var_tiny"])
    assert not is_released(tmp_path / "ours")
    for begin in (partial(load_initial_weights, model), partial(start_from, tokenizer)):
        with pytest.raises(UserError, match="ours#ema: is no released file that holds several"):
            begin(f"{tmp_path}/ours#ema")


def test_a_fine_tuning_starts_from_a_container(state: State, pairs: Pairs, tmp_path: Path) -> None:
    torch.save({"module": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "file.pth")
    sizes: dict[str, Any] = dict(vocab_size=64, code_dim=32, num_classes=10, depth=2, width=128, heads=2)
    model = NextScaleTransformer([1, 2, 3, 4], **sizes)
    load_initial_weights(model, tmp_path / "file.pth")
    assert torch.equal(model.state_dict()["class_embedding.weight"], state["class_emb.weight"])
