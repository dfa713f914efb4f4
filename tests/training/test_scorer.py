"""Training of a scorer: its loss, what it learns, exact resumption, and caches that do not belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import copy_of, data_module, trainer
from token_files import token_job

from mvar_lightning import MultiScaleTokenizer, ScorerModule, TokenShards, UserError, VARModule
from mvar_lightning.checkpoints import load_tokenizer
from mvar_lightning.cli import main
from mvar_lightning.data.tokens.cache import DRAWN
from mvar_lightning.runs.plan import plan
from mvar_lightning.runs.recipe import RecipeCheck
from mvar_lightning.sampling import load_scorer
from mvar_lightning.tokenizer import fingerprint

SIZES: dict[str, Any] = {"channels": [16], "embedding": 4, "hidden": [16], "lr": 3e-3}
CLASSES = 3


def write_cache(
    folder: Path, tokenizer: MultiScaleTokenizer, few: int, train: int = 64, classes: int = CLASSES, crop: str = DRAWN
) -> Path:
    """Tokens of the first ``few`` codes: caches of other numbers can be told from one another."""
    settings = {name: getattr(tokenizer, name) for name in ("vocab_size", "code_dim", "image_size")}
    settings |= {"scales": tokenizer.pyramid.sides, "tokenizer_hash": fingerprint(tokenizer), "crop": crop}
    job = token_job(folder, (train // 2, train // 2), (24,), **settings)
    job.class_names = tuple(map(str, range(CLASSES)))
    job.begin()
    for task in job.todo():
        rng = np.random.default_rng([few, len(task.part), int(task.part[-6:])])
        tokens_1nL = rng.integers(0, few, (1, task.shard.samples, tokenizer.pyramid.num_tokens))
        job.write(task, tokens_1nL, np.arange(task.shard.samples) % classes, ())
    job.finish()
    return folder


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> tuple[Path, Path]:
    folder, own = tmp_path_factory.mktemp("caches"), load_tokenizer(tokenizer)
    return write_cache(folder / "real", own, few=3, crop="center"), write_cache(folder / "drawn", own, few=32, train=90)


def module(tokenizer: Path, drawn: Path, **changes: Any) -> ScorerModule:
    torch.manual_seed(0)
    return ScorerModule(str(tokenizer), CLASSES, str(drawn), **{**SIZES, **changes})


def test_it_learns_to_tell_real_maps_from_drawn_ones(
    tokenizer: Path, caches: tuple[Path, Path], tmp_path: Path
) -> None:
    made, data = module(tokenizer, caches[1]), TokenShards(str(caches[0]), 16, 0)
    frozen = copy_of(made.tokenizer)
    run = trainer(tmp_path, max_epochs=12)
    run.fit(made, datamodule=data)
    found = run.callback_metrics
    assert found["val/accuracy"] > 0.85 and found["val/loss"] < 0.45 and found["val/accuracy_scale_2"] > 0.9
    assert all(torch.equal(value, frozen[name]) for name, value in made.tokenizer.state_dict().items())


def test_the_loss_is_the_papers(tokenizer: Path, caches: tuple[Path, Path], tmp_path: Path) -> None:
    made = module(tokenizer, caches[1])
    data = TokenShards(str(caches[0]), 8, 0)
    trainer(tmp_path, limit_train_batches=0, limit_val_batches=1).validate(made, datamodule=data, verbose=False)
    made.eval()  # the trainer gave the mode back
    batch = next(iter(data.val_dataloader()))
    pool, label_B = made._pools["val"], batch["label"]
    drawn_BL = pool.of_classes(label_B, torch.Generator().manual_seed(0))
    rows, classes = pool.reader.read(np.arange(24), 0)
    for row_L, label in zip(drawn_BL.numpy(), label_B.tolist(), strict=True):
        assert label in classes[(rows == row_L).all(axis=1)], "of its own class"
    expected = []
    for image, label in enumerate(label_B):
        for scale in range(3):
            real, other = (
                made.scorer(
                    made.tokenizer.quantizer.f_hats(idx[image : image + 1])[scale], label[None], torch.tensor([scale])
                )
                for idx in (batch["tokens"], drawn_BL)
            )
            expected.append(-torch.nn.functional.logsigmoid(real - other))
    logged = made.trainer.callback_metrics["val/loss"]
    torch.testing.assert_close(logged, torch.cat(expected).mean().detach(), atol=1e-5, rtol=1e-4)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    tokenizer: Path, caches: tuple[Path, Path], tmp_path: Path
) -> None:
    def fit(*callbacks: L.Callback, resume: Path | None = None) -> ScorerModule:
        made = module(tokenizer, caches[1])
        torch.manual_seed(0 if resume is None else 12345)
        run = trainer(tmp_path, *callbacks, max_epochs=2, enable_checkpointing=bool(callbacks))
        run.fit(made, datamodule=TokenShards(str(caches[0]), 16, 0), ckpt_path=resume, weights_only=True)
        return made

    kept = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=3, save_top_k=-1)
    whole, again = fit(kept), fit(resume=tmp_path / "kept" / "step=3.ckpt")
    start = module(tokenizer, caches[1])
    for name, value in copy_of(whole.scorer).items():
        assert torch.equal(value, again.scorer.state_dict()[name])
    assert start.scorer.digest() != whole.scorer.digest()
    other = module(tokenizer, caches[1], hidden=[8])
    with pytest.raises(UserError, match="another scorer"):
        trainer(tmp_path).fit(
            other, datamodule=TokenShards(str(caches[0]), 16, 0), ckpt_path=tmp_path / "kept" / "step=3.ckpt"
        )


def test_what_does_not_belong_together_is_told(
    tokenizer: Path, other_tokenizer: Path, shards: Path, caches: tuple[Path, Path], tmp_path: Path
) -> None:
    foreign = write_cache(tmp_path / "foreign", load_tokenizer(other_tokenizer), few=8)
    strange = write_cache(tmp_path / "strange", load_tokenizer(other_tokenizer), few=8, crop="center")
    two = write_cache(tmp_path / "two", load_tokenizer(tokenizer), few=8, classes=2)
    tokens = TokenShards(str(caches[0]), 16, 0)
    for drawn, data, said in (
        (foreign, tokens, "tokens of tokenizer"),
        (two, tokens, "samples of 2 classes, the data 3"),
        (tmp_path / "nowhere", tokens, "does not exist"),
        (caches[1], TokenShards(str(strange), 16, 0), "made by a tokenizer of hash"),
        (caches[0], tokens, "holds tokens of images, the real side"),
        (caches[1], TokenShards(str(caches[1]), 16, 0), "holds tokens that a model drew"),
        (caches[1], data_module(shards), "learns from tokens"),
    ):
        with pytest.raises(UserError, match=said):
            trainer(tmp_path).fit(module(tokenizer, drawn), datamodule=data)
    with pytest.raises(UserError, match="holds tokens that a model drew"):
        var = VARModule(str(tokenizer), CLASSES, depth=1, width=16, heads=2)
        trainer(tmp_path).fit(var, datamodule=TokenShards(str(caches[1]), 16, 0))
    for changes, said in (({"lr": 0.0}, "lr 0"), ({"channels": []}, "channels"), ({"label_drop": 1.0}, "label_drop 1")):
        with pytest.raises(UserError, match=said):
            module(tokenizer, caches[1], **changes)


def test_mvar_train_leaves_a_scorer(tokenizer: Path, caches: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "scorer.yaml"
    of_model = {"tokenizer": str(tokenizer), "drawn": str(caches[1]), **SIZES}
    of_data = {"path": str(caches[0]), "batch_size": 16, "num_workers": 0}
    content = {
        "model": {"class_path": "mvar_lightning.ScorerModule", "init_args": of_model},
        "data": {"class_path": "mvar_lightning.TokenShards", "init_args": of_data},
        "trainer": {"max_epochs": 1, "num_sanity_val_steps": 0, "accelerator": "cpu"},
    }
    recipe.write_text(yaml.safe_dump(content))
    assert main(["train", str(recipe), "--run-folder", str(tmp_path / "run")]) == 0
    assert load_scorer(tmp_path / "run").tokenizer_hash == fingerprint(load_tokenizer(tokenizer))
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["parameters"] == sum(p.numel() for p in load_scorer(tmp_path / "run").parameters())
    planned = plan(RecipeCheck.of(recipe)).shape.parameters
    assert planned - report["parameters"] == (1000 - CLASSES) * SIZES["embedding"], "a cache's classes are not read"
    assert main(["train", str(recipe), "--run-folder", str(tmp_path / "run"), "--model.hidden=[0]"]) == 2
