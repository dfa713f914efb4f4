"""State dicts and checkpoints of other programs, and the Python interface: only names that the README documents."""
# ruff: noqa: E501 - one case a row

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .fault import EITHER, REFUSED, RIGHT, Fault, Step, fault, has_files
from .generator_files import GO_ON, IMPORT, LONG
from .generator_places import OFFICIAL

State = dict[str, Any]
IMPORTED = has_files("out/*.safetensors", 2)


def state(name: str, change: Callable[[State], Any], **options: Any) -> Step:
    """A `.pth` file with other content; `change` works in place, or returns the new content."""

    def step(folder: Path) -> None:
        content = torch.load(folder / name, weights_only=True)
        changed = change(content)
        torch.save(content if changed is None else changed, folder / name, **options)

    return step


def first_weight(content: State) -> str:
    return next(key for key, value in content.items() if value.dim() == 2)


def set_first(value: Callable[[torch.Tensor], Any]) -> Callable[[State], None]:
    def change(content: State) -> None:
        key = first_weight(content)
        content[key] = value(content[key])

    return change


def cast(kind: torch.dtype) -> Callable[[State], State]:
    return lambda content: {
        key: value.to(kind) if value.is_floating_point() else value for key, value in content.items()
    }


class Odd:
    """Something that no loader of weights should build."""


STATES: dict[str, tuple[Callable[[State], Any], str]] = {
    "half": (cast(torch.float16), RIGHT),
    "bfloat": (cast(torch.bfloat16), RIGHT),
    "double": (cast(torch.float64), RIGHT),
    "parameters": (lambda s: {k: torch.nn.Parameter(v, v.is_floating_point()) if v.is_floating_point() else v for k, v in s.items()}, RIGHT),
    "transposed-memory": (lambda s: {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in s.items()}, RIGHT),
    "ordered": (lambda s: __import__("collections").OrderedDict(s), RIGHT),
    "shuffled": (lambda s: dict(sorted(s.items(), key=lambda kv: hash(kv[0]) % 97)), RIGHT),
    "large-storage": (set_first(lambda t: torch.cat([t, t])[: len(t)]), RIGHT),
    "nested-trainer": (lambda s: {"trainer": {"var_wo_ddp": s}, "epoch": 3, "args": {"lr": 1e-4}}, RIGHT),
    "nested-unknown": (lambda s: {"weights": s}, REFUSED),
    "nested-state-dict": (lambda s: {"state_dict": s}, EITHER),
    "ddp-prefix": (lambda s: {f"module.{k}": v for k, v in s.items()}, EITHER),
    "compiled-prefix": (lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}, EITHER),
    "other-prefix": (lambda s: {f"var.{k}": v for k, v in s.items()}, REFUSED),
    "one-missing": (lambda s: s.pop(first_weight(s)) and None, REFUSED),
    "one-extra": (lambda s: s.update(extra=torch.zeros(2)), REFUSED),
    "one-renamed": (lambda s: s.update(renamed=s.pop(first_weight(s))), REFUSED),
    "empty": (lambda s: {}, REFUSED),
    "list": (lambda s: list(s.values()), REFUSED),
    "tensor": (lambda s: torch.zeros(3), REFUSED),
    "number": (lambda s: 3, REFUSED),
    "text-values": (set_first(lambda t: "weights"), REFUSED),
    "none-value": (set_first(lambda t: None), REFUSED),
    "wrong-shape": (set_first(lambda t: t[:-1]), REFUSED),
    "flattened": (set_first(lambda t: t.flatten()), REFUSED),
    "scalar": (set_first(lambda t: torch.tensor(1.0)), REFUSED),
    "transposed": (set_first(lambda t: torch.cat([t, t], 1)), REFUSED),
    "integers": (set_first(lambda t: t.to(torch.int32)), REFUSED),
    "complex": (set_first(lambda t: t.to(torch.complex64)), REFUSED),
    "bool": (set_first(lambda t: t > 0), REFUSED),
    "sparse": (set_first(lambda t: t.to_sparse()), EITHER),
    "meta": (set_first(lambda t: t.to("meta")), REFUSED),
    "not-finite": (set_first(lambda t: t * float("nan")), EITHER),
    "one-infinite": (set_first(lambda t: torch.where(t == t.max(), torch.inf, t)), EITHER),
    "object": (lambda s: {**s, "config": Odd()}, REFUSED),
    "number-keys": (lambda s: dict(enumerate(s.values())), REFUSED),
    "mixed-keys": (lambda s: {**s, 3: torch.zeros(1)}, REFUSED),
    "quantized": (set_first(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)), REFUSED),
    "eight-bits": (set_first(lambda t: t.to(torch.float8_e4m3fn)), EITHER),
}  # fmt: skip


def safetensors(name: str, change: Callable[[State], Any], metadata: dict[str, str] | None = None) -> Step:
    def step(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        content = load_file(folder / name)
        changed = change(content)
        save_file(content if changed is None else changed, folder / name, metadata)

    return step


def states(rng: random.Random) -> list[Fault]:
    made = []
    for slug, (change, want) in STATES.items():
        for name in ("var.pth", "var_tok.pth"):
            if slug == "nested-trainer" and name == "var_tok.pth":
                continue
            options = (
                {"_use_new_zipfile_serialization": False}
                if slug in ("half", "ordered", "object", "one-missing") and name == "var.pth"
                else {}
            )
            argv = IMPORT.format("official/var.pth", "official/var_tok.pth")
            made.append(
                fault(
                    "states",
                    "reading",
                    f"{name}-{slug}",
                    OFFICIAL,
                    argv,
                    state(f"official/{name}", change, **options),
                    want=want,
                    check=IMPORTED,
                    names=name.replace(".", r"\."),
                )
            )
    ours = {
        "half": (cast(torch.float16), EITHER),
        "double": (cast(torch.float64), EITHER),
        "metadata": (lambda s: None, RIGHT),
        "one-missing": (lambda s: s.pop(first_weight(s)) * 0, REFUSED),
        "one-extra": (lambda s: s.update(extra=torch.zeros(2)), REFUSED),
        "wrong-shape": (set_first(lambda t: t[:-1].contiguous()), REFUSED),
        "integers": (set_first(lambda t: t.to(torch.int32)), REFUSED),
        "not-finite": (set_first(lambda t: t * float("nan")), REFUSED),
        "empty": (lambda s: {}, REFUSED),
    }
    for slug, (change, want) in ours.items():
        for name, argv in (
            ("var/model.safetensors", "sample --checkpoint var --count 1 --out out"),
            ("var/tokenizer.safetensors", "edit --checkpoint var --image ant.png --box 0,0,4,4 --count 1 --out out"),
        ):
            act = (lambda c: lambda s: None if isinstance(r := c(s), torch.Tensor) else r)(change)
            made.append(
                fault(
                    "states",
                    "reading",
                    f"{name.split('/')[1]}-{slug}",
                    "var ant.png",
                    argv,
                    safetensors(name, act, {"format": "pt", "made": "elsewhere"} if slug == "metadata" else None),
                    want=want,
                    names=name.split("/")[1].replace(".", r"\.") + r"|\bvar\b",
                )
            )
    return made + checkpoints(rng)


def checkpoint(change: Callable[[State], Any]) -> Step:
    def step(folder: Path) -> None:
        path = folder / "runs/long/checkpoints/last.ckpt"
        content = torch.load(path, weights_only=False)
        changed = change(content)
        torch.save(content if changed is None else changed, path)

    return step


def with_value(key: str, value: Any) -> Callable[[State], None]:
    return lambda content: content.update({key: value})


def checkpoints(rng: random.Random) -> list[Fault]:
    """Lightning checkpoints with parts that are gone or of another type, continued and looked at."""
    keys = (
        "state_dict",
        "epoch",
        "global_step",
        "loops",
        "optimizer_states",
        "lr_schedulers",
        "callbacks",
        "hyper_parameters",
        "pytorch-lightning_version",
    )
    changes: dict[str, Callable[[State], Any]] = {}
    for key in keys:
        changes |= {
            f"no-{key}": without_any(key),
            f"null-{key}": with_value(key, None),
            f"text-{key}": with_value(key, "x"),
        }
    changes |= {
        "epoch-negative": with_value("epoch", -3),
        "step-huge": with_value("global_step", 10**9),
        "optimizers-empty": with_value("optimizer_states", []),
        "weights-empty": with_value("state_dict", {}),
        "weights-nan": lambda c: c["state_dict"].update(
            {k: v * float("nan") for k, v in c["state_dict"].items() if v.is_floating_point() and v.dim() == 2}
        ),
        "object": with_value("note", Odd()),
        "list": lambda c: [c],
        "weights-alone": lambda c: c["state_dict"],
    }
    made = []
    for slug, change in changes.items():
        strict = slug in (
            "no-state_dict",
            "null-state_dict",
            "text-state_dict",
            "no-loops",
            "no-optimizer_states",
            "weights-empty",
            "weights-nan",
            "object",
            "list",
            "weights-alone",
        )
        made.append(
            fault(
                "states",
                "resuming",
                f"ckpt-{slug}",
                LONG,
                GO_ON,
                checkpoint(change),
                want=REFUSED if strict else EITHER,
                names="last|ckpt|checkpoint|runs/long",
                may_change=() if strict else ("runs/long/*",),
            )
        )
        if rng.random() < 0.4:
            made.append(
                fault(
                    "states",
                    "reading",
                    f"ckpt-{slug}",
                    "runs/long",
                    "sample --checkpoint runs/long/checkpoints/last.ckpt --count 1 --out out",
                    checkpoint(change),
                    want=REFUSED
                    if slug
                    in (
                        "no-state_dict",
                        "null-state_dict",
                        "text-state_dict",
                        "weights-empty",
                        "weights-nan",
                        "object",
                        "list",
                    )
                    else EITHER,
                    names=r"last\.ckpt",
                )
            )
    return made


def without_any(key: str) -> Callable[[State], None]:
    return lambda content: content.pop(key, None) and None


# --- Python ----------------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import numpy as np, torch
from mvar_lightning import UserError, edit, generate, import_official, load, save
model, tokenizer = load("var")
image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
mask = torch.zeros(2, 8, 8); mask[:, :4] = 1
label = torch.tensor([0, 1])
def same(a, b): assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), (a, b)
def close(a, b): assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()
try:
{body}
except UserError as error:
    assert isinstance(error, ValueError) and "\\n" not in str(error), "more than one line"
    print(f"mvar: error: {{error}}", file=sys.stderr)
    sys.exit(2)
"""
# what a user may write, and gets what the documents say
FINE = {
    "one-label": "images, idx = generate(model, tokenizer, 1, seeds=[3])\nassert images.shape == (1, 3, 8, 8) and idx.shape == (1, 5) and idx.dtype == torch.int64",
    "label-list": "images, _ = generate(model, tokenizer, [0, 1], seeds=[3, 4])\nassert images.shape[0] == 2 and images.min() >= 0 and images.max() <= 1",
    "label-tuple": "assert generate(model, tokenizer, (0, 1), seeds=(3, 4))[0].shape[0] == 2",
    "label-numpy": "same(generate(model, tokenizer, np.array([0, 1]), seeds=[3, 4])[1], generate(model, tokenizer, [0, 1], seeds=[3, 4])[1])",
    "label-numpy-scalar": "assert generate(model, tokenizer, np.int64(1), seeds=[3])[0].shape[0] == 1",
    "label-int32": "same(generate(model, tokenizer, label.int(), seeds=[3, 4])[1], generate(model, tokenizer, label, seeds=[3, 4])[1])",
    "label-uint8": "same(generate(model, tokenizer, label.to(torch.uint8), seeds=[3, 4])[1], generate(model, tokenizer, label, seeds=[3, 4])[1])",
    "label-scalar-tensor": "assert generate(model, tokenizer, torch.tensor(1), seeds=[3])[0].shape[0] == 1",
    "label-range": "assert generate(model, tokenizer, range(2), seeds=[3, 4])[0].shape[0] == 2",
    "seeds-range": "assert generate(model, tokenizer, 1, seeds=range(3))[0].shape[0] == 3",
    "seeds-numpy": "same(generate(model, tokenizer, label, seeds=np.array([3, 4]))[1], generate(model, tokenizer, label, seeds=[3, 4])[1])",
    "seeds-tensor": "same(generate(model, tokenizer, label, seeds=torch.tensor([3, 4]))[1], generate(model, tokenizer, label, seeds=[3, 4])[1])",
    "seeds-largest": "generate(model, tokenizer, 1, seeds=[2**32 - 1])",
    "seeds-none": "torch.manual_seed(5); a = generate(model, tokenizer, label)[1]\ntorch.manual_seed(5); same(a, generate(model, tokenizer, label)[1])",
    "batch-invariant": "a = generate(model, tokenizer, [0, 1, 0], seeds=[3, 4, 5])[1]\nsame(a[1], generate(model, tokenizer, [1], seeds=[4])[1][0])",
    "order-invariant": "a = generate(model, tokenizer, [0, 1], seeds=[3, 4])[1]\nsame(a.flip(0), generate(model, tokenizer, [1, 0], seeds=[4, 3])[1])",
    "no-class": "same(generate(model, tokenizer, -1, seeds=[3])[1], generate(model, tokenizer, 2, seeds=[3])[1])",
    "cfg-none": "same(generate(model, tokenizer, 1, seeds=[3], cfg=None)[1], generate(model, tokenizer, 1, seeds=[3], cfg=0)[1])",
    "cfg-int": "same(generate(model, tokenizer, 1, seeds=[3], cfg=2)[1], generate(model, tokenizer, 1, seeds=[3], cfg=2.0)[1])",
    "cfg-numpy": "generate(model, tokenizer, 1, seeds=[3], cfg=np.float32(1.5))",
    "top-k-numpy": "same(generate(model, tokenizer, 1, seeds=[3], top_k=np.int64(1))[1], generate(model, tokenizer, 1, seeds=[9], top_k=1)[1])",
    "top-k-above": "same(generate(model, tokenizer, 1, seeds=[3], top_k=10**9)[1], generate(model, tokenizer, 1, seeds=[3], top_k=None)[1])",
    "greedy": "same(generate(model, tokenizer, 1, seeds=[3], top_k=1)[1], generate(model, tokenizer, 1, seeds=[8], top_k=1)[1])",
    "tokens-out": "images, idx = generate(model, tokenizer, 1, seeds=[3])\nclose(tokenizer.decode(idx).clamp(-1, 1).add(1).div(2), images)",
    "images-alone": "assert isinstance(generate(model, tokenizer, 1, seeds=[3], return_tokens=False), torch.Tensor)",
    "train-mode": "model.train(); a = generate(model, tokenizer, 1, seeds=[3])[1]; assert model.training\nmodel.eval(); same(a, generate(model, tokenizer, 1, seeds=[3])[1])",
    "no-grad-left": "images, _ = generate(model, tokenizer, 1, seeds=[3])\nassert not images.requires_grad and torch.is_grad_enabled()",
    "global-random": "torch.manual_seed(1); a = torch.rand(1); torch.manual_seed(1)\ngenerate(model, tokenizer, 1, seeds=[3]); same(a, torch.rand(1))",
    "inference-mode": "with torch.inference_mode():\n    a = generate(model, tokenizer, 1, seeds=[3])[1]\nsame(a, generate(model, tokenizer, 1, seeds=[3])[1])",
    "default-double": "a = generate(model, tokenizer, 1, seeds=[3])[1]\ntorch.set_default_dtype(torch.float64)\nsame(a, generate(model, tokenizer, 1, seeds=[3])[1])",
    "decode-chunk": "same(generate(model, tokenizer, label, seeds=[3, 4], decode_chunk=1)[1], generate(model, tokenizer, label, seeds=[3, 4])[1])",
    "encode": "idx = tokenizer.encode(image)\nassert idx.shape == (2, 5) and idx.dtype == torch.int64 and 0 <= idx.min() and idx.max() < 16",
    "encode-one": "assert tokenizer.encode(image[:1]).shape == (1, 5)",
    "encode-strided": "same(tokenizer.encode(image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), tokenizer.encode(image))",
    "encode-channels-last": "same(tokenizer.encode(image.to(memory_format=torch.channels_last)), tokenizer.encode(image))",
    "encode-grad": "tokenizer.encode(image.requires_grad_())",
    "decode-int32": "close(tokenizer.decode(tokenizer.encode(image).int()), tokenizer.decode(tokenizer.encode(image)))",
    "decode-range": "out = tokenizer.decode(tokenizer.encode(image))\nassert out.shape == (2, 3, 8, 8) and out.min() >= -1 and out.max() <= 1",
    "teacher": "x = tokenizer.teacher_input(tokenizer.encode(image))\nassert x.shape == (2, 4, 4) and x.dtype == torch.float32\nassert model(x, label).shape == (2, 5, 16)",
    "teacher-eval": "x = tokenizer.teacher_input(tokenizer.encode(image))\nclose(model(x, label), model(x, label))",
    "edit-all": "images, idx = edit(model, tokenizer, image, torch.ones(2, 8, 8))\nassert images.shape == (2, 3, 8, 8)",
    "edit-bool": "edit(model, tokenizer, image, mask.bool())",
    "edit-label": "edit(model, tokenizer, image, mask, label_B=[0, 1])",
    "edit-nothing-changed": "before = image.clone(), mask.clone()\nedit(model, tokenizer, image, mask)\nsame(before[0], image); same(before[1], mask)",
    "save-load": "save('new', model, tokenizer)\nm, t = load('new')\nsame(generate(m, t, 1, seeds=[3])[1], generate(model, tokenizer, 1, seeds=[3])[1])",
    "save-path": "from pathlib import Path\nsave(Path('a/b/new'), model, tokenizer); load(Path('a/b/new'))",
    "save-tokenizer": "save('new', None, tokenizer); assert load('new')[0] is None",
    "save-keeps-mode": "model.train(); save('new', model, tokenizer); assert model.training",
    "load-run": "m, t = load('runs/var'); generate(m, t, 1, seeds=[3])",
    "load-checkpoint": "m, t = load('runs/var/checkpoints/last.ckpt'); assert generate(m, t, 1, seeds=[3])[0].shape == (1, 3, 8, 8)",
    "load-twice": "a, b = load('var')[0], load('var')[0]\nassert a is not b",
    "load-eval": "assert not load('var')[0].training and not load('var')[1].training",
    "import": "m, t = import_official('official/var.pth', 'official/var_tok.pth', architecture='var', patch_nums=(1, 2))\nsame(generate(m, t, 1, seeds=[3])[1], generate(model, tokenizer, 1, seeds=[3])[1])",
    "import-list": "import_official('official/var.pth', 'official/var_tok.pth', architecture='var', patch_nums=[1, 2])",
    "copy": "import copy\nsame(generate(copy.deepcopy(model), tokenizer, 1, seeds=[3])[1], generate(model, tokenizer, 1, seeds=[3])[1])",
    "empty-batch-teacher": "assert tokenizer.encode(image[:0]).shape == (0, 5)",
    "user-error-type": "try:\n    load('nowhere')\nexcept ValueError as e:\n    assert isinstance(e, UserError)",
    "star-import": "exec('from mvar_lightning import *')",
}  # fmt: skip
# mistakes: the code, and what the line must name
MISTAKES = {
    "label-large": ("generate(model, tokenizer, 7, seeds=[3])", "7|label|class"),
    "label-negative": ("generate(model, tokenizer, -2, seeds=[3])", "-2|label|class"),
    "label-float": ("generate(model, tokenizer, 1.5, seeds=[3])", "label|class"),
    "label-float-tensor": ("generate(model, tokenizer, torch.tensor([0.5, 1.0]), seeds=[3, 4])", "label|class"),
    "label-nan": ("generate(model, tokenizer, float('nan'), seeds=[3])", "label|class"),
    "label-none": ("generate(model, tokenizer, None, seeds=[3])", "label|class"),
    "label-text": ("generate(model, tokenizer, 'ant', seeds=[3])", "label|class"),
    "label-texts": ("generate(model, tokenizer, ['ant', 'bee'], seeds=[3, 4])", "label|class"),
    "label-bool": ("generate(model, tokenizer, torch.tensor([True, False]), seeds=[3, 4])", "label|class"),
    "label-matrix": ("generate(model, tokenizer, label[None], seeds=[3])", "label|class|shape"),
    "label-ragged": ("generate(model, tokenizer, [[0], [1, 0]], seeds=[3, 4])", "label|class"),
    "label-empty": ("generate(model, tokenizer, [], seeds=[])", "label|class|seed"),
    "label-huge": ("generate(model, tokenizer, 2**70, seeds=[3])", "label|class"),
    "label-one-hot": ("generate(model, tokenizer, torch.eye(2), seeds=[3, 4])", "label|class"),
    "seeds-count": ("generate(model, tokenizer, label, seeds=[3, 4, 5])", "seed"),
    "seeds-int": ("generate(model, tokenizer, label, seeds=3)", "seed"),
    "seeds-negative": ("generate(model, tokenizer, 1, seeds=[-1])", "seed"),
    "seeds-large": ("generate(model, tokenizer, 1, seeds=[2**32])", "seed"),
    "seeds-float": ("generate(model, tokenizer, 1, seeds=[0.5])", "seed"),
    "seeds-text": ("generate(model, tokenizer, 1, seeds=['3'])", "seed"),
    "seeds-none-inside": ("generate(model, tokenizer, 1, seeds=[None])", "seed"),
    "seeds-empty": ("generate(model, tokenizer, 1, seeds=[])", "seed"),
    "seeds-bool": ("generate(model, tokenizer, 1, seeds=True)", "seed"),
    "cfg-nan": ("generate(model, tokenizer, 1, seeds=[3], cfg=float('nan'))", "cfg|guidance"),
    "cfg-inf": ("generate(model, tokenizer, 1, seeds=[3], cfg=float('inf'))", "cfg|guidance"),
    "cfg-text": ("generate(model, tokenizer, 1, seeds=[3], cfg='1.5')", "cfg|guidance"),
    "cfg-list": ("generate(model, tokenizer, 1, seeds=[3], cfg=[1.5, 2])", "cfg|guidance"),
    "top-k-zero": ("generate(model, tokenizer, 1, seeds=[3], top_k=0)", "top_k"),
    "top-k-negative": ("generate(model, tokenizer, 1, seeds=[3], top_k=-1)", "top_k"),
    "top-k-float": ("generate(model, tokenizer, 1, seeds=[3], top_k=1.5)", "top_k"),
    "top-k-text": ("generate(model, tokenizer, 1, seeds=[3], top_k='all')", "top_k"),
    "top-p-zero": ("generate(model, tokenizer, 1, seeds=[3], top_p=0)", "top_p"),
    "top-p-large": ("generate(model, tokenizer, 1, seeds=[3], top_p=1.5)", "top_p"),
    "top-p-nan": ("generate(model, tokenizer, 1, seeds=[3], top_p=float('nan'))", "top_p"),
    "top-p-text": ("generate(model, tokenizer, 1, seeds=[3], top_p='0.9')", "top_p"),
    "temperature-zero": ("generate(model, tokenizer, 1, seeds=[3], temperature=0)", "temperature"),
    "temperature-negative": ("generate(model, tokenizer, 1, seeds=[3], temperature=-1)", "temperature"),
    "temperature-none": ("generate(model, tokenizer, 1, seeds=[3], temperature=None)", "temperature"),
    "decode-chunk-zero": ("generate(model, tokenizer, 1, seeds=[3], decode_chunk=0)", "chunk"),
    "decode-chunk-negative": ("generate(model, tokenizer, 1, seeds=[3], decode_chunk=-2)", "chunk"),
    "swapped": ("generate(tokenizer, model, 1, seeds=[3])", "model|tokenizer"),
    "no-model": ("generate(load('tok')[0], tokenizer, 1, seeds=[3])", "model"),
    "no-tokenizer": ("generate(model, None, 1, seeds=[3])", "tokenizer"),
    "other-tokenizer": ("generate(model, load('tok16')[1], 1, seeds=[3])", "scales|vocab|tokenizer"),
    "model-path": ("generate('var', tokenizer, 1, seeds=[3])", "model"),
    "edit-size": ("edit(model, tokenizer, torch.zeros(2, 3, 16, 16), torch.ones(2, 16, 16))", "16|size|image"),
    "edit-mask-size": ("edit(model, tokenizer, image, torch.ones(2, 4, 4))", "mask"),
    "edit-mask-batch": ("edit(model, tokenizer, image, torch.ones(3, 8, 8))", "mask"),
    "edit-mask-none": ("edit(model, tokenizer, image, None)", "mask"),
    "edit-mask-nan": ("edit(model, tokenizer, image, mask * float('nan'))", "mask"),
    "edit-mask-levels": ("edit(model, tokenizer, image, mask * 255)", "mask"),
    "edit-mask-negative": ("edit(model, tokenizer, image, -mask)", "mask"),
    "edit-mask-empty": ("edit(model, tokenizer, image, mask * 0)", "mask"),
    "edit-image-levels": ("edit(model, tokenizer, (image + 1) * 127, mask)", "image|pixel|\\[-1"),
    "edit-image-bytes": ("edit(model, tokenizer, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), mask)", "image|uint8|float"),
    "edit-image-nan": ("edit(model, tokenizer, image * float('nan'), mask)", "image|finite|nan"),
    "edit-image-numpy": ("edit(model, tokenizer, image.numpy(), mask)", "image|tensor"),
    "edit-label-count": ("edit(model, tokenizer, image, mask, label_B=[0, 1, 0])", "label|class"),
    "encode-size": ("tokenizer.encode(torch.zeros(2, 3, 16, 16))", "16|size"),
    "encode-channels": ("tokenizer.encode(torch.zeros(2, 1, 8, 8))", "channel|shape|3"),
    "encode-no-batch": ("tokenizer.encode(torch.zeros(3, 8, 8))", "shape|batch|dim"),
    "encode-last": ("tokenizer.encode(torch.zeros(2, 8, 8, 3))", "shape|channel"),
    "encode-bytes": ("tokenizer.encode(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))", "uint8|float"),
    "encode-nan": ("tokenizer.encode(image * float('nan'))", "finite|nan"),
    "encode-numpy": ("tokenizer.encode(image.numpy())", "tensor|image"),
    "encode-none": ("tokenizer.encode(None)", "tensor|image"),
    "decode-large": ("tokenizer.decode(torch.full((1, 5), 16))", "16|token|index|code"),
    "decode-negative": ("tokenizer.decode(torch.full((1, 5), -1))", "-1|token|index|code"),
    "decode-length": ("tokenizer.decode(torch.zeros(1, 4, dtype=torch.int64))", "4|5|token"),
    "decode-float": ("tokenizer.decode(torch.zeros(1, 5))", "int|float|token"),
    "decode-flat": ("tokenizer.decode(torch.zeros(5, dtype=torch.int64))", "shape|token|dim"),
    "decode-list": ("tokenizer.decode([[0] * 5])", "tensor|token"),
    "teacher-length": ("tokenizer.teacher_input(torch.zeros(1, 6, dtype=torch.int64))", "6|5|token"),
    "teacher-large": ("tokenizer.teacher_input(torch.full((1, 5), 99))", "99|token|index|code"),
    "forward-label": ("model(tokenizer.teacher_input(tokenizer.encode(image)), torch.tensor([0, 9]))", "9|label|class"),
    "forward-length": ("model(torch.zeros(2, 3, 4), label)", "3|4|token|shape"),
    "forward-width": ("model(torch.zeros(2, 4, 7), label)", "7|4|shape"),
    "forward-batch": ("model(torch.zeros(2, 4, 4), torch.tensor([0]))", "batch|label|shape"),
    "load-nothing": ("load('nowhere')", "nowhere"),
    "load-empty": ("load('')", "''|checkpoint|empty|\\."),
    "load-none": ("load(None)", "None|path"),
    "load-picture": ("load('ant.png')", "ant"),
    "load-data": ("load('shards')", "shards"),
    "save-over": ("save('var', model, tokenizer)", "var"),
    "save-file": ("save('ant.png', model, tokenizer)", "ant"),
    "save-below-file": ("save('ant.png/new', model, tokenizer)", "ant"),
    "save-other-tokenizer": ("save('new', model, load('tok16')[1])", "scales|vocab|tokenizer"),
    "save-no-tokenizer": ("save('new', model, None)", "tokenizer"),
    "save-swapped": ("save('new', tokenizer, model)", "model|tokenizer"),
    "save-none": ("save(None, model, tokenizer)", "None|folder|path"),
    "import-architecture": ("import_official('official/var.pth', 'official/var_tok.pth', architecture='VAR', patch_nums=(1, 2))", "VAR|architecture"),
    "import-unknown-scales": ("import_official('official/var.pth', 'official/var_tok.pth', architecture='var')", "patch|scales"),
    "import-wrong-scales": ("import_official('official/var.pth', 'official/var_tok.pth', architecture='var', patch_nums=(1, 3))", "patch|scales|1, 3|1 3|tokens"),
    "import-text-scales": ("import_official('official/var.pth', 'official/var_tok.pth', architecture='var', patch_nums='1,2')", "patch|scales"),
    "import-int-scales": ("import_official('official/var.pth', 'official/var_tok.pth', architecture='var', patch_nums=2)", "patch|scales"),
    "import-swapped": ("import_official('official/var_tok.pth', 'official/var.pth', architecture='var', patch_nums=(1, 2))", "var"),
    "import-missing": ("import_official('none.pth', 'official/var_tok.pth', architecture='var', patch_nums=(1, 2))", "none"),
    "import-folder": ("import_official('official', 'official/var_tok.pth', architecture='var', patch_nums=(1, 2))", "official"),
}  # fmt: skip
STRICT_SHAPE = {
    "edit-mask-empty",
    "edit-mask-levels",
    "load-empty",
    "save-over",
    "edit-image-levels",
    "label-bool",
    "top-k-zero",
    "edit-mask-nan",
    "label-empty",
}
"""What a function may take in some sense that the documents leave open."""


def interface(rng: random.Random) -> list[Fault]:
    made = []
    for slug, body in FINE.items():
        made.append(fault("python", "calling", slug, needs(body), "", code=script(body), want=RIGHT, command="api"))
    for slug, (body, names) in MISTAKES.items():
        want = EITHER if slug in STRICT_SHAPE else REFUSED
        may_change = ("var/*",) if slug == "save-over" else ()
        made.append(
            fault(
                "python",
                "calling",
                f"not-{slug}",
                needs(body),
                "",
                code=script(body),
                want=want,
                names=names,
                command="api",
                may_change=may_change,
            )
        )
    return made


def script(body: str) -> str:
    return SCRIPT.format(body=textwrap.indent(body, "    "))


def needs(body: str) -> str:
    return " ".join(
        [
            "var",
            *(name for name in ("tok16", "official", "ant.png", "shards", "runs/var") if name in body),
            *(["tok"] if "'tok'" in body else []),
        ]
    )
