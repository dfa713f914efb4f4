"""The public Python API as the README shows it, on tiny models in the published architectures."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mvar_lightning
from mvar_lightning import (
    AdjacentAttention,
    FullAttention,
    LlamaBlocks,
    MultiScaleTokenizer,
    NextScaleTransformer,
    SlidingWindowHistory,
    SpatialAttention,
    UserError,
    edit,
    export_official,
    generate,
    import_official,
    load,
    save,
)
from mvar_lightning.pyramid import PUBLISHED_SIDES

SIDES = PUBLISHED_SIDES[256]
TOKENS, CLASSES, VOCAB, CODE_DIM, SIZE = 680, 3, 48, 16, 32
ARCHITECTURES = ("var", "mvar", "markov_var")
AXES = {
    "var": {"attention": FullAttention()},
    "mvar": {"attention": SpatialAttention(7, scales=2)},
    "markov_var": {
        "attention": AdjacentAttention(),
        "history": SlidingWindowHistory(3),
        "blocks": LlamaBlocks(),
    },
}
Pair = tuple[NextScaleTransformer, MultiScaleTokenizer]
Files = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Files with the references' names and shapes, of small models with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("released")
    tokenizer = MultiScaleTokenizer(
        SIDES, vocab_size=VOCAB, code_dim=CODE_DIM, channels=32, channel_multipliers=(1, 2), num_res_blocks=1
    )
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
    files = {}
    for name, axes in AXES.items():
        sizes = {"vocab_size": VOCAB, "code_dim": CODE_DIM, "num_classes": CLASSES, "depth": 2, "gamma_init": 0.5}
        files[name] = folder / f"{name}.pth", folder / f"{name}_tokenizer.pth"
        export_official(NextScaleTransformer(SIDES, **sizes, **axes), tokenizer, *files[name])
    return files


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, released: Files) -> Pair:
    """The import of the README, its arguments as written."""
    model_path, tokenizer_path = released[request.param]
    return import_official(
        model_path,
        tokenizer_path,
        architecture=request.param,
        patch_nums=None,
        kernel_size=7,
        first_neighborhood_scale=None,
    )


@pytest.fixture(scope="module")
def image_B3HW() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_public_name_is_there_and_comes_from_where_it_says() -> None:
    assert len(set(mvar_lightning.__all__)) == len(mvar_lightning.__all__)
    for name in mvar_lightning.__all__:
        assert getattr(mvar_lightning, name) is not None
        assert name in dir(mvar_lightning)
    with pytest.raises(AttributeError, match="nonsense"):
        importlib.import_module("mvar_lightning").__getattr__("nonsense")


def test_importing_the_package_loads_no_torch() -> None:
    code = "import mvar_lightning, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_signatures_are_the_documented_ones() -> None:
    def parameters(function: object) -> list[str]:
        return list(inspect.signature(function).parameters)  # type: ignore[arg-type]

    assert parameters(import_official) == [
        "model_path",
        "tokenizer_path",
        "architecture",
        "patch_nums",
        "kernel_size",
        "first_neighborhood_scale",
        "key",
        "tokenizer_key",
    ]
    assert parameters(generate)[:8] == [
        "model",
        "tokenizer",
        "label_B",
        "cfg",
        "top_k",
        "top_p",
        "seeds",
        "return_tokens",
    ]
    defaults = inspect.signature(generate).parameters
    expected = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "seeds": None, "return_tokens": True}
    assert {name: defaults[name].default for name in expected} == expected


def test_images_to_tokens_to_logits_and_back(pair: Pair, image_B3HW: Tensor) -> None:
    model, tokenizer = pair
    assert not model.training and not tokenizer.training
    idx_BL = tokenizer.encode(image_B3HW)
    assert idx_BL.shape == (2, TOKENS) and idx_BL.dtype == torch.int64 and len(idx_BL.unique()) > 5
    decoded_B3HW = tokenizer.decode(idx_BL)
    assert decoded_B3HW.shape == image_B3HW.shape and decoded_B3HW.abs().max() <= 1
    x_BLZ = tokenizer.teacher_input(idx_BL)
    assert x_BLZ.shape == (2, TOKENS - 1, CODE_DIM) and x_BLZ.dtype == torch.float32
    label_B = torch.tensor([0, 2])
    logits_BLV = model(x_BLZ, label_B)
    assert logits_BLV.shape == (2, TOKENS, VOCAB) and torch.isfinite(logits_BLV).all()
    assert torch.equal(logits_BLV, model(x_BLZ, label_B)), "eval mode drops no label"
    assert not torch.equal(logits_BLV, model(x_BLZ, torch.tensor([1, 1])))


def test_generate_and_edit(pair: Pair, image_B3HW: Tensor) -> None:
    model, tokenizer = pair
    label_B = torch.tensor([1, 2])
    images, idx_BL = generate(
        model, tokenizer, label_B, cfg=1.5, top_k=900, top_p=0.96, seeds=[3, 4], return_tokens=True
    )
    assert images.shape == (2, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(images, (tokenizer.decode(idx_BL) + 1) / 2, atol=1e-4, rtol=1e-4)
    alone = generate(model, tokenizer, label_B[1:], seeds=[4], return_tokens=False)
    torch.testing.assert_close(alone[0], images[1], atol=1e-4, rtol=1e-4)

    mask_BHW = torch.zeros(2, SIZE, SIZE)
    mask_BHW[:, :, SIZE // 2 :] = 1
    edited, edited_BL = edit(model, tokenizer, image_B3HW, mask_BHW, label_B=-1, seeds=[3, 4])
    assert edited.shape == images.shape and edited.min() >= 0 and edited.max() <= 1
    ours, given = (idx[:, -(16**2) :].view(2, 16, 16) for idx in (edited_BL, tokenizer.encode(image_B3HW)))
    assert torch.equal(ours[:, :, :8], given[:, :, :8]) and not torch.equal(ours[:, :, 8:], given[:, :, 8:])


def test_save_load_and_export_give_back_the_weights(
    pair: Pair, released: Files, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, tokenizer = pair
    save(tmp_path / "folder", model, tokenizer)
    assert {path.suffix for path in (tmp_path / "folder").iterdir()} == {".json", ".safetensors"}
    again, same = load(tmp_path / "folder")
    assert again is not None and again.config == model.config and same.config == tokenizer.config
    for ours, theirs in ((again, model), (same, tokenizer)):
        state = theirs.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    export_official(again, same, tmp_path / "m.pth", tmp_path / "t.pth")
    files = released[request.node.callspec.params["pair"]]
    for path, original in zip((tmp_path / "m.pth", tmp_path / "t.pth"), files, strict=True):
        before, after = (torch.load(file, weights_only=True) for file in (original, path))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_the_import_reads_the_axes_off_the_architecture(pair: Pair, request: pytest.FixtureRequest) -> None:
    model, tokenizer = pair
    axes = AXES[request.node.callspec.params["pair"]]
    assert torch.equal(model.mask(), axes["attention"].mask(model.pyramid))
    assert (model.depth, model.width, model.heads, model.num_classes) == (2, 128, 2, CLASSES)
    assert model.pyramid.sides == tokenizer.pyramid.sides == SIDES


def test_unknown_scales_are_asked_for(tmp_path: Path) -> None:
    tokenizer = MultiScaleTokenizer(
        (1, 2, 4), vocab_size=VOCAB, code_dim=CODE_DIM, channels=32, channel_multipliers=(1, 2), num_res_blocks=1
    )
    model = NextScaleTransformer((1, 2, 4), vocab_size=VOCAB, code_dim=CODE_DIM, num_classes=CLASSES, depth=1)
    files = tmp_path / "m.pth", tmp_path / "t.pth"
    export_official(model, tokenizer, *files)
    with pytest.raises(UserError, match=r"21 tokens.*patch_nums"):
        import_official(*files, architecture="var")
    assert import_official(*files, architecture="var", patch_nums=(1, 2, 4))[0].pyramid.sides == (1, 2, 4)


def test_wrong_calls_are_told(pair: Pair, image_B3HW: Tensor) -> None:
    model, tokenizer = pair
    for wrong, said in (
        (lambda: generate(model, tokenizer, [CLASSES + 1]), f"{CLASSES + 1}"),
        (lambda: generate(model, tokenizer, [0], top_p=1.5), "top_p 1.5"),
        (lambda: generate(model, tokenizer, [0], top_k=-1), "top_k -1"),
        (lambda: tokenizer.encode(image_B3HW[:, :, :16]), "takes"),
        (lambda: tokenizer.decode(torch.zeros(1, 7, dtype=torch.int64)), "680"),
        (lambda: model(torch.zeros(1, 3, CODE_DIM), torch.tensor([0])), "teacher input of shape"),
        (lambda: edit(model, tokenizer, image_B3HW, torch.ones(5, 7)), "mask"),
        (lambda: load("nowhere"), "no such checkpoint"),
    ):
        with pytest.raises(UserError, match=said) as error:
            wrong()
        assert "\n" not in str(error.value)
