"""Fine-tuning on classes of one's own: which rows a model starts from, and the names of its classes everywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.small_models import small_model, small_tokenizer
from small_run import MODEL_SIZES, data_module, trainer
from torch import Tensor

from mvar_lightning import MVARModule, SpatialAttention, VARModule, save
from mvar_lightning.checkpoints import load, load_tokenizer
from mvar_lightning.checkpoints.classes import class_rows, imagenet_classes
from mvar_lightning.checkpoints.finetune import other_codes
from mvar_lightning.checkpoints.folder import open_checkpoint
from mvar_lightning.cli import main
from mvar_lightning.data.making.embedded import digits
from mvar_lightning.data.making.shards import ShardLimits, ShardsRequest, make_shards
from mvar_lightning.data.making.sources import Source
from mvar_lightning.errors import UserError
from mvar_lightning.training import next_scale

NAMES = ("corgi", "cat", "7")
THERE = ("tench", "tabby", "wolf", "Pembroke")


def rows(init: Any, names: Any = NAMES, there: Any = THERE) -> tuple[Tensor, Tensor, Tensor, str]:
    torch.manual_seed(0)
    fresh, trained = torch.randn(4, 5), torch.randn(5, 5)
    found, words = class_rows(fresh, trained, init, names, there)
    assert torch.equal(found[-1], trained[-1]), '"no class" is kept'
    return found, fresh, trained, words


def test_fresh_rows() -> None:
    for init in (None, "fresh"):
        found, fresh, _, words = rows(init)
        assert torch.equal(found[:3], fresh[:3]) and "all 3 fresh" in words


def test_the_mean_of_all_rows() -> None:
    found, _, trained, _ = rows("mean")
    torch.testing.assert_close(found[:3], trained[:4].mean(0).expand(3, -1))


@pytest.mark.parametrize(
    "init", [{"corgi": 3, "2": "tabby"}, {"0": "Pembroke", "7": "1"}, {"corgi": "Pembroke", "7": 1}]
)
def test_rows_by_name_and_by_index(init: dict[str, int | str]) -> None:
    found, fresh, trained, words = rows(init)
    assert torch.equal(found[:3], torch.stack([trained[3], fresh[1], trained[1]]))
    assert "2 of 3 taken (" in words and "3 (Pembroke)" in words and "1 fresh" in words


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ({"dog": 3}, "'dog': no such class here; give names such as 'corgi', 'cat', '7', or an index from 0 to 2"),
        ({"corgi": 4}, "4: no such class in init_from; .* index from 0 to 3"),
        ({"corgi": "Corgi"}, "'Corgi': no such class in init_from"),
        ({"corgi": True}, "True: no such class in init_from"),
        ({"corgi": -1}, "-1: no such class in init_from"),
        ({"corgi": 1, "0": 2}, "class 0 here is given twice"),
        ({"9" * 5000: 1}, "no such class here"),
        ("median", "'median': must be fresh, mean, or classes such as"),
    ],
)
def test_classes_that_there_are_not(init: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rows(init)


def test_a_name_that_two_classes_have() -> None:
    with pytest.raises(UserError, match="2 classes in init_from are called so"):
        rows({"corgi": "crane"}, there=("crane", "crane", "a", "b"))


def test_imagenets_names() -> None:
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    assert [names[index] for index in (0, 207, 263, 999)] == ["tench", "golden retriever", "Pembroke", "toilet tissue"]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three of the digits under other names."""
    whole, kept = digits(), {1: 0, 4: 1, 7: 2}
    parts = [
        [replace(sample, label=kept[sample.label]) for sample in part if sample.label in kept][:count]
        for part, count in ((whole.train, 48), (whole.val, 16))
    ]
    folder = tmp_path_factory.mktemp("three") / "shards"
    make_shards(ShardsRequest(Source(("one", "four", "seven"), *parts), folder, ShardLimits(samples=40)))
    return folder


@pytest.fixture(scope="module")
def trained(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of ten classes, with names."""
    torch.manual_seed(3)
    made = VARModule(str(tokenizer), **MODEL_SIZES)
    folder = tmp_path_factory.mktemp("trained") / "var"
    save(folder, made.model, load_tokenizer(tokenizer), class_names=[f"digit {number}" for number in range(10)])
    return folder


def tuned(tokenizer: Path, trained: Path, **settings: Any) -> MVARModule:
    torch.manual_seed(4)
    sizes = {**MODEL_SIZES, "num_classes": 3, "attention": SpatialAttention(kernel_size=3, scales=1)}
    return MVARModule(str(tokenizer), **sizes, init_from=str(trained), class_names=("one", "four", "seven"), **settings)


def test_a_model_of_other_classes_starts_from_everything_else(tokenizer: Path, trained: Path) -> None:
    source, _ = load(trained)
    assert source is not None
    made = tuned(tokenizer, trained, init_classes={"one": "digit 1", "seven": 7}).model.state_dict()
    for name, tensor in source.state_dict().items():
        if name != "class_embedding.weight":
            assert torch.equal(made[name], tensor), name
    rows, theirs = made["class_embedding.weight"], source.state_dict()["class_embedding.weight"]
    assert torch.equal(rows[[0, 2, 3]], theirs[[1, 7, 10]]) and not torch.equal(rows[1], theirs[4])


def test_the_same_classes_are_all_taken_unless_others_are_asked_for(tokenizer: Path, trained: Path) -> None:
    source, _ = load(trained)
    assert source is not None
    theirs = source.state_dict()["class_embedding.weight"]
    for init, same in ((None, True), ("mean", False)):
        made = VARModule(str(tokenizer), **MODEL_SIZES, init_from=str(trained), init_classes=init)
        assert torch.equal(made.model.state_dict()["class_embedding.weight"], theirs) == same


def test_classes_need_weights_and_as_many_names(tokenizer: Path) -> None:
    with pytest.raises(UserError, match="init_classes 'mean': needs init_from"):
        VARModule(str(tokenizer), **MODEL_SIZES, init_classes="mean")
    with pytest.raises(UserError, match="class_names: 2 names for 10 classes"):
        VARModule(str(tokenizer), **MODEL_SIZES, class_names=("a", "b"))


def test_names_go_into_checkpoints_and_come_back(tokenizer: Path, trained: Path, three: Path, tmp_path: Path) -> None:
    made = tuned(tokenizer, trained, init_classes="mean")
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(made, data_module(three))
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert open_checkpoint(tmp_path / "last.ckpt").record.class_names == ("one", "four", "seven")
    again = MVARModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.class_names == ("one", "four", "seven")


def test_from_a_folder_of_ones_own_to_samples_by_name(
    tokenizer: Path,
    trained: Path,
    three: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(next_scale, "rank_zero_info", told.append)
    recipe = {
        "model": {
            "class_path": "mvar_lightning.MVARModule",
            "init_args": {
                "tokenizer": str(tokenizer),
                **{name: size for name, size in MODEL_SIZES.items() if name != "num_classes"},
                "init_from": str(trained),
                "init_classes": {"one": "digit 1", "four": 4},
                "attention": {
                    "class_path": "mvar_lightning.SpatialAttention",
                    "init_args": {"kernel_size": 3, "scales": 1},
                },
            },
        },
        "data": {
            "class_path": "mvar_lightning.ShardsDataModule",
            "init_args": {"path": str(three), "image_size": 16, "batch_size": 16, "num_workers": 0},
        },
        "trainer": {"max_steps": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, "accelerator": "cpu"},
    }
    (tmp_path / "own.yaml").write_text(json.dumps(recipe))
    assert main(["train", str(tmp_path / "own.yaml"), "--run-folder", str(tmp_path / "run")]) == 0
    assert "classes: 2 of 3 taken (one <- 1 (digit 1), four <- 4 (digit 4)), 1 fresh" in "".join(told)
    capfd.readouterr()
    assert main(["info", str(tmp_path / "run")]) == 0
    assert "3 (one, four, seven)" in capfd.readouterr().out
    command = ["sample", "--checkpoint", str(tmp_path / "run"), "--count", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--classes", "seven,0"]) == 0
    assert len([*(tmp_path / "out").glob("*_*.png")]) == 2
    assert main([*command, "--classes", "eight"]) == 2
    assert "its names are one, four, seven" in capfd.readouterr().err


def test_a_record_whose_names_do_not_fit(trained: Path, tmp_path: Path) -> None:
    model, tokenizer = load(trained)
    assert model is not None
    with pytest.raises(UserError, match="class_names: 2 names for 10 classes"):
        save(tmp_path / "out", model, tokenizer, class_names=["a", "b"])
    save(tmp_path / "out", model, tokenizer, class_names=[str(number) for number in range(10)])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for names, words in (
        (["a"], "1 class names for 10 classes"),
        ([1] * 10, "not a list of names"),
        ("ab", "not a list"),
    ):
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"class_names": names}))
        with pytest.raises(UserError, match=words):
            load(tmp_path / "out")


def test_other_codes_are_told(
    trained: Path, tokenizer: Path, other_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    VARModule(str(tokenizer), **MODEL_SIZES, init_from=str(trained))
    assert "other codes" not in caplog.text
    VARModule(str(other_tokenizer), **MODEL_SIZES, init_from=str(trained))
    assert "model.tokenizer has other codes than its tokenizer" in caplog.text


def test_small_codes_are_told_apart_and_half_ones_are_the_same(tmp_path: Path) -> None:
    """Whatever the codes' size: those of 4,096 codes begin at a few ten-thousandths."""
    model, tokenizer, other = small_model(), small_tokenizer(), small_tokenizer()
    for one in (tokenizer, other):
        one.quantizer.codebook.weight.data.mul_(1e-2)
    other.quantizer.codebook.weight.data.neg_()
    save(tmp_path / "source", model, tokenizer, half=True)
    assert other_codes(tmp_path / "source", tokenizer) == ""
    assert "other codes" in other_codes(tmp_path / "source", other)


def test_no_classes_at_all_are_fresh_ones() -> None:
    rows_NC, words = class_rows(torch.zeros(4, 2), torch.ones(4, 2), {}, (), ())
    assert words == 'all 3 fresh, "no class" kept' and rows_NC[:, 0].tolist() == [0, 0, 0, 1]
