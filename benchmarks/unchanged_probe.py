"""What a checkout of the suite computes, as one JSON: losses, orders, tokens, images, hashes and files.

    python -P benchmarks/unchanged_probe.py FOLDER CHECKOUT

runs the `mvar_lightning` of CHECKOUT (PYTHONPATH must point there) in the empty FOLDER and writes FOLDER/probe.json.
`benchmarks.unchanged` runs it on two revisions and compares, so it uses what both have: the command line, public names,
and the class paths of the recipes. Weights are filled with numbers that are the same on every machine.

An item has up to four parts. ``exact`` is the same on every machine; ``losses`` and ``tokens`` follow from sums of
floats, whose order is the machine's; ``digests`` are of the last bits and can be compared on one machine alone.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from operator import methodcaller
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import mvar_lightning
from mvar_lightning import cli

Item = dict[str, Any]

TOKENIZER = {
    "scales": [1, 2, 3, 4],
    "vocab_size": 256,
    "code_dim": 8,
    "channels": 8,
    "channel_multipliers": [1, 2, 4],
    "num_res_blocks": 1,
    "norm_groups": 4,
}
CODE_SIZE = 0.5
"""About the spread of the filled encoder's latents, so that the digits use many codes."""
MODEL: dict[str, Any] = {"num_classes": 10, "depth": 2, "width": 64, "heads": 2}

DATA, TOKENS, SAVED = "data/digits", "data/tokens", "saved"
BY_THE_CLOCK = ("speed/", "memory/", "epoch", "step")
"""Columns of the log that say nothing of what is computed."""

FIT = (
    "--trainer.max_steps=10",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks=[{class_path: mvar_lightning.callbacks.EMA, init_args: {decay: 0.9}}]",
)
"""Ten steps in two epochs with a validation after each; the recipes' metrics and pictures take minutes."""

AUGMENTED = ("--data.resize_ratio=1.125", "--data.flip=true", "--data.shuffle_buffer=100")
NEXT_SCALE = ("--model.tokenizer=saved/tokenizer", "--model.depth=2", "--model.width=64", "--model.heads=2")
LOSSES = {
    "losses, tokenizer": ("tokenizer/digits.yaml", ("--data.epoch_samples=160", *AUGMENTED)),
    "losses, VAR": ("var/digits.yaml", ("--data.epoch_samples=320", "--model.drop_path=0.1", *AUGMENTED, *NEXT_SCALE)),
    "losses, VAR on tokens": (
        "var/digits_tokens.yaml",
        ("--data.epoch_samples=320", f"--data.path={TOKENS}", f"--data.images={DATA}", *NEXT_SCALE),
    ),
    "losses, MVAR in scale groups": (
        "mvar/digits.yaml",
        (
            "--data.epoch_samples=320",
            '--model.scale_groups=[["0..1"], [2], [3]]',
            "--model.scale_cycle=[3, 1, 1]",
            *AUGMENTED,
            *NEXT_SCALE,
        ),
    ),
    "losses, MVAR in exact groups": (
        "mvar/digits.yaml",
        ("--data.epoch_samples=320", '--model.scale_groups=[["0..1"], [2], [3]]', *AUGMENTED, *NEXT_SCALE),
    ),
    "losses, Markov-VAR": ("markov_var/digits.yaml", ("--data.epoch_samples=320", *AUGMENTED, *NEXT_SCALE)),
}
SAMPLES, BATCH, RANKS = 200, 20, 2


def main(folder: Path, checkout: Path) -> None:
    """Run every item in ``folder``, which becomes the current folder, and write ``probe.json`` there."""
    found = Path(mvar_lightning.__file__).resolve()
    assert found.is_relative_to(checkout.resolve()), f"mvar_lightning is {found}, not of {checkout}"
    torch.set_num_threads(1)
    os.chdir(folder)
    save_numbered_models()
    items: dict[str, Item] = {"shards": shards(), "token cache": token_cache(), "saved folders": saved_folders()}
    items |= {"order, images": image_order(), "order, tokens": token_order()}
    items |= {"tokens of images": tokens_of_images()}
    items |= {f"samples, {kind}": samples(kind) for kind in ("var", "mvar", "markov_var")}
    items |= {name: losses(name, checkout / "recipes" / recipe, more) for name, (recipe, more) in LOSSES.items()}
    content = {"torch": torch.__version__, "items": items}
    Path("probe.json").write_text(json.dumps(content, indent=1) + "\n")


def mvar(*arguments: str) -> None:
    """One command of the command line, which must succeed."""
    status = cli.main(arguments)
    assert status == 0, f"mvar {' '.join(arguments)}: exit status {status}"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_below(folder: Path) -> dict[str, str]:
    """SHA-256 of each file by its path in the folder."""
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in sorted(folder.rglob("*.*"))}


def fill(module: nn.Module) -> None:
    """Give every parameter numbers that follow from the order of the names alone. NumPy's uniform numbers are the same
    on every machine, which torch's normal ones need not be; the sizes are such that many tokens occur."""
    numbers = np.random.default_rng(0)
    for name, parameter in sorted(module.named_parameters()):
        values = torch.from_numpy(numbers.random(tuple(parameter.shape)) * 2 - 1).to(parameter.dtype)
        with torch.no_grad():
            if "codebook" in name:
                parameter.copy_(values * CODE_SIZE)
            elif parameter.ndim < 2:
                parameter.copy_(values * 0.1 + float(name.endswith("weight")))
            else:
                parameter.copy_(values * (3 / parameter[0].numel()) ** 0.5)


def save_numbered_models() -> None:
    """``saved/tokenizer``, and a small model of each family with it."""
    from mvar_lightning import (
        FullAttention,
        MultiScaleTokenizer,
        NextScaleTransformer,
        SlidingWindowHistory,
        SpatialAttention,
        save,
    )

    tokenizer = MultiScaleTokenizer(**TOKENIZER)
    fill(tokenizer)
    save(f"{SAVED}/tokenizer", None, tokenizer)
    designs: dict[str, dict[str, Any]] = {
        "var": {"attention": FullAttention()},
        "mvar": {"attention": SpatialAttention(kernel_size=3, scales=1)},
        "markov_var": {"history": SlidingWindowHistory(size=2)},
    }
    for kind, design in designs.items():
        model = NextScaleTransformer(
            TOKENIZER["scales"],  # type: ignore[arg-type]
            vocab_size=256,
            code_dim=8,
            **MODEL,
            **design,
        )
        fill(model)
        save(f"{SAVED}/{kind}", model, tokenizer)


def shards() -> Item:
    """The digits as `mvar shards make` writes them: every byte. PNG's bytes are those of the pinned Pillow."""
    mvar("shards", "make", "digits", DATA, "--samples-per-shard", "200", "--workers", "1")
    return {"exact": {"files": files_below(Path(DATA)), "index": json.loads(Path(DATA, "index.json").read_text())}}


def token_cache() -> Item:
    """`mvar tokens make` on these shards."""
    mvar(
        *("tokens", "make", "--checkpoint", f"{SAVED}/tokenizer", "--data", DATA, "--out", TOKENS, "--views", "2"),
        *("--flip", "--accelerator", "cpu", "--devices", "1", "--num-workers", "0", "--seed", "3"),
    )
    index = json.loads(Path(TOKENS, "tokens.json").read_text())
    arrays = {str(path.relative_to(TOKENS)): np.load(path) for path in sorted(Path(TOKENS).rglob("*.npy"))}
    first = arrays["train/000000.npy"]
    return {
        "exact": {
            "index": without(index, "sha256"),
            "arrays": {name: [str(array.dtype), *array.shape] for name, array in arrays.items()},
            "labels": {name: array.tolist() for name, array in arrays.items() if "labels" in name},
        },
        "tokens": [row.tolist() for view in first for row in view[:20]],
        "digests": files_below(Path(TOKENS)),
    }


def without(plain: Any, name: str) -> Any:
    """JSON values without the entries of one name, at any depth."""
    if isinstance(plain, dict):
        return {key: without(value, name) for key, value in plain.items() if key != name}
    return [without(value, name) for value in plain] if isinstance(plain, list) else plain


def saved_folders() -> Item:
    """Fingerprint and record of each saved folder, and its files."""
    folders = sorted(Path(SAVED).iterdir())
    configs = {folder.name: json.loads((folder / "config.json").read_text()) for folder in folders}
    return {"exact": configs, "digests": files_below(Path(SAVED))}


def image_order() -> Item:
    """The first samples of the training stream on each of two ranks, with two workers, over several epochs: a label and
    a digest of the cropped, mirrored pixels each; then the validation stream."""
    from mvar_lightning import ShardsDataModule

    def rows(part: str, make: Callable[[Any], Any]) -> list[str]:
        data = ShardsDataModule(
            DATA, 16, batch_size=BATCH, num_workers=2, shuffle_buffer=100, epoch_samples=160, flip=True, seed=3
        )
        data.prepare_data()
        data.setup("fit")
        return [f"{int(label)} {digest(as_bytes(image).numpy().tobytes())[:8]}" for image, label in
                take(make(data), "image")]  # fmt: skip

    return {"exact": on_each_rank(rows)}


def token_order() -> Item:
    """The same of the token cache, where a sample is told by its label and its tokens."""
    from mvar_lightning import TokenShards

    found: dict[str, list[str]] = {}

    def rows(part: str, make: Callable[[Any], Any]) -> list[int]:
        data = TokenShards(TOKENS, batch_size=BATCH, num_workers=2, epoch_samples=160, shuffle_window=400, seed=3)
        data.prepare_data()
        data.setup("fit")
        pairs = [(int(label), row.tolist()) for row, label in take(make(data), "tokens")]
        found[part] = [digest(json.dumps(row).encode())[:8] for _, row in pairs]
        return [label for label, _ in pairs]

    return {"exact": on_each_rank(rows), "digests": found}


def on_each_rank(rows: Callable[[str, Callable[[Any], Any]], Any]) -> dict[str, Any]:
    """``rows`` of the training and the validation loader, where torch says that this is rank r of two."""
    found = {}
    for rank in range(RANKS):
        says = {"is_initialized": True, "get_rank": rank, "get_world_size": RANKS}
        with patch.multiple(torch.distributed, **{name: Mock(return_value=value) for name, value in says.items()}):
            for split in ("train", "val"):
                part = f"{split}, rank {rank}"
                found[part] = rows(part, methodcaller(f"{split}_dataloader"))
    return found


def take(loader: Any, entry: str) -> list[tuple[Tensor, Tensor]]:
    """(entry, label) of the first samples; a training loader is passed over again for the next epoch."""

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(SAMPLES):
            for batch in loader:
                yield from zip(batch[entry].clone(), batch["label"].clone(), strict=True)

    taken = list(islice(pairs(), SAMPLES))
    loader.close()
    return taken


def as_bytes(image: Tensor) -> Tensor:
    """Pixels 0 to 255, of images in [-1, 1] or of such bytes."""
    return image if image.dtype == torch.uint8 else ((image + 1) * 127.5).round().to(torch.uint8)


def first_images(count: int) -> Tensor:
    """The first validation images, in [-1, 1]."""
    from mvar_lightning import ShardsDataModule

    data = ShardsDataModule(DATA, 16, batch_size=count, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    images = torch.stack([image for image, _ in islice(take(data.val_dataloader(), "image"), count)])
    return as_bytes(images).float() / 127.5 - 1


def tokens_of_images() -> Item:
    """Twenty images through a saved tokenizer, and back."""
    from mvar_lightning import load

    _, tokenizer = load(f"{SAVED}/tokenizer")
    tokens = tokenizer.encode(first_images(20))
    return {
        "tokens": tokens.tolist(),
        "digests": {
            "decoded": digest(tokenizer.decode(tokens).numpy().tobytes()),
            "teacher input": digest(tokenizer.teacher_input(tokens).numpy().tobytes()),
        },
    }


def samples(kind: str) -> Item:
    """Twenty seeds through `generate`, and four images through `mvar sample`."""
    from mvar_lightning import generate, load

    model, tokenizer = load(f"{SAVED}/{kind}")
    assert model is not None
    labels = [number % 10 for number in range(20)]
    images, tokens = generate(model, tokenizer, labels, cfg=2.0, top_k=100, top_p=0.9, seeds=list(range(20)))
    out = Path("samples", kind)
    mvar(
        *("sample", "--checkpoint", f"{SAVED}/{kind}", "--classes", "3,7", "--count", "2", "--out", str(out)),
        *("--cfg", "2", "--top-k", "100", "--top-p", "0.9", "--seed", "5", "--device", "cpu", "--precision", "32"),
    )
    drawn = {
        str(path.relative_to(out)): digest(np.asarray(Image.open(path)).tobytes())
        for path in sorted(out.rglob("*.png"))
    }
    return {
        "exact": {"drawn": sorted(drawn)},
        "tokens": tokens.tolist(),
        "digests": {"images": [digest(image.numpy().tobytes()) for image in images], "drawn": drawn},
    }


def losses(name: str, recipe: Path, more: tuple[str, ...]) -> Item:
    """Every column that ten steps of `mvar fit` log, each float exactly."""
    log = name.removeprefix("losses, ").replace(" ", "_")
    logger = (
        f"{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: logs, name: {log}, version: ''}}}}"
    )
    here = f"--data.path={DATA}"
    own = [here] if not any(argument.startswith("--data.path=") for argument in more) else []
    mvar("fit", "--config", str(recipe), "--run-folder", f"runs/{log}", f"--trainer.logger={logger}", *FIT, *own, *more)
    with Path("logs", log, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = [column for column in rows[0] if not column.startswith(BY_THE_CLOCK)]
    logged = {column: [float(row[column]).hex() for row in rows if row[column]] for column in columns}
    assert len(logged["train/loss"]) == 10, f"{name}: {len(logged['train/loss'])} steps"
    return {"losses": logged}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
