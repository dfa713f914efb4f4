"""Rows of checkpoints: saving, loading, exporting, and who may read what."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .rows_kit import NOBODY, Case, first, mistake, needs_root, refused, result, row


@row("export-into-one-file", "export of both parts into one file")
def _(case: Case) -> str | None:
    case.take("var")
    answer = case.ask("export", "var", "--model", "same.pth", "--tokenizer", "same.pth")
    return "status 0, and one of the parts is lost" if answer.status == 0 else mistake(answer, "same.pth")


STOP = """
import os
def stop_at(folder, number, end):
    left = number
    def watch(event, arguments):
        nonlocal left
        if event == "os.rename" and any(Path(str(path)).name == folder for path in arguments[:2]):
            left -= 1
            if left == 0:
                end()
    sys.addaudithook(watch)
def interrupt(): raise KeyboardInterrupt
def die(): os._exit(9)
"""


@row("save-interrupted", "Ctrl-C, or an end, between the two renames of save over a folder")
def _(case: Case) -> str | None:
    reasons = []
    for end in ("interrupt", "die"):
        case.ask(code="import shutil; shutil.rmtree('var', ignore_errors=True)")
        case.take("var")
        case.script(STOP + f"_, tok = m.load('var')\nstop_at('var', 2, {end})\nm.save('var', None, tok)\ntell(0)")
        said = case.script("model, tok = m.load('var')\ntell(model is not None)")
        kept = [path.name for path in case.folder.iterdir()]
        if said.value is not True and not (
            said.refused and any(name in said.refused for name in kept if name != "var")
        ):
            reasons.append(f"{end}: {said.reason}; beside it: {kept}")
    return first(*reasons)


@row("disk-full", "a disk that is full at the end of train, in export and in import")
def _(case: Case) -> str | None:
    case.take("var", "official", "tok", "shards", "recipes")
    official = ("--architecture", "var", "--model", "official/var.pth", "--tokenizer", "official/var_tok.pth")
    commands: list[tuple[Any, ...]] = [
        ("export", "var", "--model", "m.pth", "--tokenizer", "t.pth"),
        ("export", "var", "--model", "m.safetensors", "--tokenizer", "t.safetensors"),
        ("import", *official, "--patch-nums", "1,2", "--out", "again"),
        ("train", "recipes/var.yaml"),
    ]
    reasons = []
    for command in commands:
        answer = case.ask(*command, file_mb=0.02)
        status = None if answer.status in (0, 2) else f"{command[0]}: status {answer.status}, 2 is documented"
        reasons.append(mistake(answer, what=" ".join(map(str, command[:4]))) or status)
    return first(*reasons)


@row("modes-of-files", "weights and classifier saved under umask 022")
def _(case: Case) -> str | None:
    case.take("var")
    code = """
from mvar_lightning.metrics.classifier import DatasetClassifier, save_classifier
model, tok = m.load("var")
m.save("out", model, tok)
save_classifier(DatasetClassifier(2, 8), Path("out.safetensors"))
files = [path for path in [*Path("out").iterdir(), Path("out.safetensors")]]
tell({str(path): oct(path.stat().st_mode & 0o777) for path in files})
"""
    said = case.script(code, umask=0o022)
    if said.value is None:
        return said.reason
    odd = {name: mode for name, mode in said.value.items() if mode != "0o644"}
    return f"modes {odd} where 0o644 is right" if odd else None


@row("may-not-be-read", "an unreadable folder, config.json or recipe, and the .lock of somebody's finished run")
def _(case: Case) -> str | None:
    needs_root()
    case.take("var", "tok", "shards", "recipes", "runs")
    case.folder.chmod(0o755)
    reasons = []
    for hidden in ("var", "var/config.json"):
        (case.folder / hidden).chmod(0)
        reasons.append(mistake(case.ask("info", "var", uid=NOBODY), "permission", what=hidden))
        (case.folder / hidden).chmod(0o755)
    (case.folder / "recipes/var.yaml").chmod(0)
    reasons.append(mistake(case.ask("train", "recipes/var.yaml", uid=NOBODY), "permission", what="recipe"))
    (case.folder / "recipes/var.yaml").chmod(0o644)
    for lock in (case.folder / "runs").rglob(".lock"):
        lock.chmod(0o600)
    answer = case.ask("train", "recipes/long.yaml", uid=NOBODY)
    return first(*reasons, None if answer.status == 0 else mistake(answer, "permission", what=".lock"))


@row("weights-not-finite", "sampling from weights with NaN or infinity")
def _(case: Case) -> str | None:
    case.take("var")
    reasons = []
    for value in ("nan", "inf"):
        code = f"""
model, tok = m.load("var")
torch.nn.init.constant_(model.word_embedding.weight, float({value!r}))
m.save({value!r}, model, tok)
tell(0)
"""
        case.script(code)
        answer = case.ask(
            "sample", "--checkpoint", value, "--classes", 0, "--count", 1, "--device", "cpu", "--out", f"o-{value}"
        )
        reasons.append(mistake(answer, "nan|infinit|finite", what=value))
    return first(*reasons)


WEIGHTS: dict[str, str] = {
    "int8": "{**state, name: state[name].to(torch.int8)}",
    "bool": "{**state, name: state[name].to(torch.bool)}",
    "complex64": "{**state, name: state[name].to(torch.complex64)}",
    "no mapping": "3",
    "names that are no text": "{1: torch.zeros(1)}",
    "values that are no tensors": "{name: 1}",
}

CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "depth -1": lambda config: config["model"].update(depth=-1),
    "depth 1e6": lambda config: config["model"].update(depth=10**6),
    "width 1e30": lambda config: config["model"].update(width=10**30),
    "heads as text": lambda config: config["model"].update(heads="many"),
    "scales 1e9": lambda config: config["model"].update(scales=[1, 2, 10**9]),
    "vocab_size 2**62": lambda config: config["tokenizer"].update(vocab_size=2**62),
    "channels -8": lambda config: config["tokenizer"].update(channels=-8),
}


@row("weights-of-another-kind", "weights of other kinds, odd state dicts, sizes that the weights contradict, deep JSON")
def _(case: Case) -> str | None:
    case.take("var", "runs/long/checkpoints/last.ckpt")
    reasons = []
    for name, state in WEIGHTS.items():
        code = f"""
content = torch.load("runs/long/checkpoints/last.ckpt", weights_only=True)
state, name = content["state_dict"], "model.word_embedding.weight"
content["state_dict"] = {state}
torch.save(content, "odd.ckpt")
m.load("odd.ckpt")
tell("loaded")
"""
        reasons.append(refused(case.script(code, seconds=15), "odd.ckpt|word_embedding", what=name))
    file = case.folder / "var/config.json"
    whole = file.read_text()
    for name, change in CHANGES.items():
        content = json.loads(whole)
        change(content)
        file.write_text(json.dumps(content))
        reasons.append(mistake(case.ask("info", "var", seconds=8, memory_mb=3000), "var", what=name))
    file.write_text('{"format": ' + "[" * 100_000 + "]" * 100_000 + "}")
    reasons.append(mistake(case.ask("info", "var", seconds=8), "config.json", what="deep JSON"))
    return first(*reasons)


@row("checkpoint-flipped", "a flipped byte in the weights of a Lightning checkpoint")
def _(case: Case) -> str | None:
    case.take("tok", "runs/long/checkpoints/last.ckpt")
    code = """
path = Path("runs/long/checkpoints/last.ckpt")
weight = torch.load(path, weights_only=True)["state_dict"]["model.word_embedding.weight"]
content = bytearray(path.read_bytes())
content[content.index(weight.numpy().tobytes()[:16]) + 5] ^= 0x10
path.write_bytes(content)
m.load(path)
tell("loaded without a word")
"""
    return refused(case.script(code), "last.ckpt")


@row("resume-odd-files", "resume from a file of weights alone, and from names with _orig_mod. or _forward_module.")
def _(case: Case) -> str | None:
    case.take("tok", "shards", "recipes", "runs/long/checkpoints/last.ckpt")
    code = """
content = torch.load("runs/long/checkpoints/last.ckpt", weights_only=True)
for prefix in ("_orig_mod.", "_forward_module."):
    state = {prefix + name: tensor for name, tensor in content["state_dict"].items()}
    torch.save({**content, "state_dict": state}, prefix + "ckpt")
lost = ("optimizer_states", "lr_schedulers", "loops", "callbacks")
torch.save({name: value for name, value in content.items() if name not in lost}, "weights.ckpt")
tell(0)
"""
    case.script(code)
    reasons = []
    for name in ("weights.ckpt", "_orig_mod.ckpt", "_forward_module.ckpt"):
        given = ("--config", "recipes/long.yaml", "--ckpt-path", name, "--run-folder", f"run-{name}")
        answer = case.ask("fit", *given)
        reasons.append(result(answer, name) if answer.status == 0 else mistake(answer, name, what=name))
    return first(*reasons)
