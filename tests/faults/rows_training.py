"""Rows of training and resume."""

from __future__ import annotations

import json
import signal
from typing import Any

import yaml

from .assets import tokenizer_recipe, var_recipe, write_yaml
from .rows_kit import Case, first, mistake, result, row, tail

RUN = """
def module(**changes):
    torch.manual_seed(0)
    given = {"num_classes": 2, "depth": 2, "width": 16, "heads": 2, "gamma_init": 0.1, "label_drop": 0.0,
             "drop_path": 0.0, "warmup": 0.0}
    return m.VARModule("tok", **{**given, **changes})

def data(batch=4):
    return m.ShardsDataModule("shards", image_size=8, batch_size=batch, num_workers=0, resize_ratio=1.0)

def trainer(*callbacks, **changes):
    given = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
             "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
             "limit_val_batches": 0, "default_root_dir": "."}
    return L.Trainer(callbacks=list(callbacks), **{**given, **changes})
"""
SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0")


@row("accumulation-last-window", "three batches an epoch, two a step: the gradient of the second step")
def _(case: Case) -> str | None:
    case.take("tok", "shards")
    code = """
class Norms(L.Callback):
    def __init__(self): self.seen = []
    def on_before_optimizer_step(self, trainer, module, optimizer):
        grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        self.seen.append(float(torch.cat(grads).norm()))
def norms(accumulate):
    seen = Norms()
    run = trainer(seen, limit_train_batches=3, accumulate_grad_batches=accumulate)
    run.fit(module(base_lr=0.0), data())
    return seen.seen
tell([norms(1)[2], norms(2)[1]])
"""
    said = case.script(RUN + code)
    if said.value is None:
        return said.reason
    alone, step = said.value
    return None if abs(step - alone) < 1e-3 * alone else f"norm {step:.3f} of {alone:.3f}"


@row("resume-rate", "resumed with another batch size or base_lr: the rate of the steps that follow")
def _(case: Case) -> str | None:
    case.take("tok", "shards")
    code = """
class Rates(L.Callback):
    def __init__(self): self.seen = []
    def on_train_batch_start(self, trainer, *_): self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])
class Save(L.Callback):
    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint("last.ckpt")
        trainer.should_stop = True
trainer(Save(), max_epochs=4).fit(module(base_lr=1e-3), data(4))
told = []
for batch, rate in ((2, 1e-3), (4, 1e-4)):
    rates = Rates()
    run = trainer(rates, max_epochs=4)
    run.fit(module(base_lr=rate), data(batch), ckpt_path="last.ckpt", weights_only=True)
    told.append([max(rates.seen), rate * batch / 256])
tell(told)
"""
    said = case.script(RUN + code)
    if said.value is None:
        return None if said.refused else said.reason
    wrong = [
        f"rate {found:.2e} where at most {most:.2e} is right" for found, most in said.value if found > most * 1.001
    ]
    return first(*wrong)


@row("tokenizer-recipe-override", "--tokenizer_recipe=OTHER and =null on the command line")
def _(case: Case) -> str | None:
    case.take("tok", "shards")
    write_yaml(case.folder / "recipes/tok.yaml", tokenizer_recipe())
    write_yaml(case.folder / "recipes/other.yaml", tokenizer_recipe())
    write_yaml(case.folder / "recipes/var.yaml", {**var_recipe(), "tokenizer_recipe": "recipes/tok.yaml"})
    none = case.ask("train", "recipes/var.yaml", "--tokenizer_recipe=null", "--run-folder", "a", *SHORT)
    trained = (case.folder / "runs/tok").exists()
    other = case.ask("train", "recipes/var.yaml", "--tokenizer_recipe=recipes/other.yaml", "--run-folder", "b", *SHORT)
    return first(
        result(none, "null"),
        "null: a tokenizer was trained none the less" if trained else None,
        result(other, "other"),
        None if (case.folder / "runs/other/model").is_dir() else "other: its tokenizer was not trained",
    )


@row("tokenizer-recipe-itself", "a recipe that names itself as its tokenizer's")
def _(case: Case) -> str | None:
    case.take("tok", "shards")
    write_yaml(case.folder / "recipes/var.yaml", {**var_recipe(), "tokenizer_recipe": "recipes/var.yaml"})
    return mistake(case.ask("train", "recipes/var.yaml", seconds=8), "var.yaml")


@row("recipe-judged-late", "mistakes of sampling settings and of a strategy where the tokenizer is to be trained")
def _(case: Case) -> str | None:
    case.take("shards")
    write_yaml(case.folder / "recipes/tok.yaml", tokenizer_recipe())
    recipe = {**var_recipe(), "tokenizer_recipe": "recipes/tok.yaml"}
    recipe["model"]["init_args"]["tokenizer"] = "runs/tok/model"
    strategy = {"class_path": "SpatialAttention", "init_args": {"kernel_size": 4}}
    reasons = []
    for name, value in (("cfg", float("nan")), ("top_p", 0), ("top_k", -1), ("attention", strategy)):
        changed = yaml.safe_load(yaml.safe_dump(recipe))
        changed["model"]["init_args"][name] = value
        write_yaml(case.folder / f"recipes/{name}.yaml", changed)
        answer = case.ask("train", f"recipes/{name}.yaml", seconds=30)
        late = "told after the tokenizer's training" if (case.folder / "runs/tok/model").exists() else None
        reasons.append(mistake(answer, name, what=name) or (f"{name}: {late}" if late else None))
        case.ask(code="import shutil; shutil.rmtree('runs', ignore_errors=True)")
    return first(*reasons)


@row("load-from-checkpoint", "VARModule.load_from_checkpoint of a run's checkpoint, without arguments")
def _(case: Case) -> str | None:
    case.take("tok", "shards", "runs/long/checkpoints/last.ckpt")
    code = """
path = "runs/long/checkpoints/last.ckpt"
found = m.VARModule.load_from_checkpoint(path)
saved = torch.load(path, weights_only=True)["state_dict"]
own = found.state_dict()
tell(own.keys() == saved.keys() and all(torch.equal(own[name], saved[name]) for name in saved))
"""
    said = case.script(code)
    return None if said.value is True else said.reason


@row("precision-true", "precision bf16-true, 16-true and 64-true")
def _(case: Case) -> str | None:
    case.take("tok", "shards")
    write_yaml(case.folder / "recipes/var.yaml", var_recipe())
    reasons = []
    for name in ("bf16-true", "16-true", "64-true"):
        given = (f"--trainer.precision={name}", "--trainer.accelerator=cpu", "--run-folder", name, *SHORT)
        answer = case.ask("train", "recipes/var.yaml", *given)
        reasons.append(None if answer.status == 0 else mistake(answer, "precision", what=name))
    return first(*reasons)


def watched(callbacks: list[Any]) -> dict[str, Any]:
    recipe = var_recipe(epochs=2)
    recipe["trainer"]["callbacks"] = [{"class_path": "sabotage.Sabotage"}, *callbacks]
    recipe["trainer"]["check_val_every_n_epoch"] = 2
    recipe["checkpoint"] = {"every_steps": 2, "every_minutes": None}
    return recipe


def reported(case: Case, folder: str) -> dict[str, Any]:
    return json.loads((case.folder / folder / "metrics.json").read_text())["metrics"]


def killed_and_whole(case: Case, order: str, callbacks: list[Any]) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """What a run reports that was killed and continued, and one that was not."""
    case.take("tok", "shards")
    write_yaml(case.folder / "recipes/var.yaml", watched(callbacks))
    whole = case.ask("train", "recipes/var.yaml", "--run-folder", "whole", env={"SABOTAGE": None})
    if whole.status:
        return result(whole), {}, {}
    killed = case.ask("train", "recipes/var.yaml", "--run-folder", "killed", env={"SABOTAGE": order})
    if killed.status != -signal.SIGKILL:
        return f"was not killed at {order}: {tail(killed)}", {}, {}
    go_on = case.ask("train", "recipes/var.yaml", "--run-folder", "killed", env={"SABOTAGE": None})
    if go_on.status:
        return result(go_on), {}, {}
    return None, reported(case, "killed"), reported(case, "whole")


@row("killed-floor", "a floor of FID after a kill between validations")
def _(case: Case) -> str | None:
    settings = {"extractor": {"class_path": "sabotage.Colors"}, "num_images": 4, "batch_size": 4}
    callback = {"class_path": "mvar_lightning.callbacks.SampleMetrics"}
    callback["init_args"] = settings | {"consistency": False, "every_n_epochs": 2}
    wrong, found, right = killed_and_whole(case, "SIGKILL@6", [callback])
    name = "val/fid_colors_floor"
    if wrong or name not in right:
        return wrong or f"no {name} in {sorted(right)}"
    same = abs(found[name] - right[name]) <= 1e-4 * abs(right[name])
    return None if same else f"{name} {right[name]:.4f} becomes {found[name]:.4f}"


@row("killed-at-the-end", "metrics.json after a kill behind the last step")
def _(case: Case) -> str | None:
    wrong, found, right = killed_and_whole(case, "validation:SIGKILL@8", [])
    lost = sorted(right.keys() - found.keys())
    return wrong or (f"lost: {lost}" if lost else None)


@row("identity-of-the-environment", "base_lr from a variable of the environment, which has another value now")
def _(case: Case) -> str | None:
    case.take("tok", "shards")
    recipe = var_recipe()
    recipe["model"]["init_args"]["base_lr"] = "${oc.decode:${oc.env:LR}}"
    write_yaml(case.folder / "recipes/var.yaml", recipe)
    one = case.ask("train", "recipes/var.yaml", *SHORT, env={"LR": "1e-3"})
    if one.status:
        return result(one)
    other = case.ask("train", "recipes/var.yaml", *SHORT, env={"LR": "2e-3"})
    return "the finished run is reported again" if "already trained" in other.out else mistake(other)


@row("rank-without-launcher", "RANK left in the environment without a launcher")
def _(case: Case) -> str | None:
    case.take("tok", "shards")
    write_yaml(case.folder / "recipes/var.yaml", var_recipe())
    answer = case.ask("train", "recipes/var.yaml", "--run-folder", "run", *SHORT, env={"RANK": "1"})
    run = case.folder / "run"
    missing = [name for name in ("run.json", "metrics.json") if not (run / name).exists()]
    return result(answer) or (f"status 0 and no {' and no '.join(missing)}" if missing else None)


NUMBERS = (
    *("seed_everything=-1", "seed_everything=4294967296", "model.width=0", "model.heads=-4", "model.depth=1000000"),
    *("model.drop_path=2", "model.base_lr=.nan", "trainer.accumulate_grad_batches=0", "trainer.devices=-3"),
    *("model.label_drop=1.5", "data.num_classes=0", "data.shuffle_buffer=-1", "data.shuffle_buffer=1000000000000"),
)


@row("recipe-numbers", "numbers of a recipe that cannot be: seeds, sizes, rates, counts; a misspelt empty section")
def _(case: Case) -> str | None:
    case.take("tok", "shards")
    write_yaml(case.folder / "recipes/var.yaml", var_recipe())
    write_yaml(case.folder / "recipes/odd.yaml", {**var_recipe(), "modle": {}})
    reasons = [mistake(case.ask("train", "recipes/odd.yaml", seconds=6), "modle", what="modle: {}")]
    for number in NUMBERS:
        answer = case.ask("train", "recipes/var.yaml", f"--{number}", *SHORT, seconds=6, memory_mb=4000)
        reasons.append(mistake(answer, number.split("=")[0].split(".")[-1], what=number))
        case.ask(code="import shutil; shutil.rmtree('runs', ignore_errors=True)")
    return first(*reasons)
