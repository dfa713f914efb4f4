"""Import and export of the published files: exact round trips, and clear errors for everything else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_formula import CASES, load_case
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_files import import_arguments, state_of
from safetensors.torch import save_file
from torch import Tensor

from mvar_lightning.attention import AdjacentAttention, FullAttention, SlidingWindowAttention, SpatialAttention
from mvar_lightning.checkpoints import export_official, import_official, load_initial_weights
from mvar_lightning.checkpoints.official import reference_state
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import LlamaBlocks, NextScaleTransformer, SlidingWindowHistory, VARBlocks

Files = dict[str, tuple[Path, Path]]
SCALES = [1, 2, 3, 4]


def arguments(name: str = "var_tiny") -> dict[str, Any]:
    return import_arguments(load_case(name)[0])


def import_changed(released: Files, folder: Path, change: Any, name: str = "var_tiny", part: str = "model") -> Any:
    """Import after a change to the state dict of one of the two files."""
    paths = dict(zip(("model", "tokenizer"), released[name], strict=True))
    state = torch.load(paths[part], weights_only=True)
    change(state)
    paths[part] = folder / "changed.pth"
    torch.save(state, paths[part])
    return import_official(paths["model"], paths["tokenizer"], **arguments(name))


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_for_bit(name: str, released: Files, tmp_path: Path) -> None:
    pair = import_official(*released[name], **arguments(name))
    targets = tmp_path / "model.pth", tmp_path / "tokenizer.pth"
    export_official(*pair, *targets)
    for source, target in zip(released[name], targets, strict=True):
        before, after = (torch.load(path, weights_only=True) for path in (source, target))
        assert before.keys() == after.keys()
        for key in before:
            assert before[key].dtype == after[key].dtype, key
            assert torch.equal(before[key], after[key]), key
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", CASES)
def test_what_is_built(name: str, pairs: dict[str, Any]) -> None:
    case = load_case(name)[0]
    model, tokenizer = pairs[name]
    assert (model.depth, model.width, model.heads) == (case["depth"], case["width"], case["heads"])
    assert list(model.pyramid.sides) == list(tokenizer.pyramid.sides) == case["patch_nums"]
    assert (model.vocab_size, model.num_classes) == (case["tokenizer"]["vocab_size"], case["num_classes"])
    expected = {
        "var": (FullAttention(), VARBlocks(shared_adaln=case["shared_adaln"])),
        "mvar": (SpatialAttention(3, scales=[4, 5]), VARBlocks()),
        "markov_var": (AdjacentAttention(), LlamaBlocks()),
    }[case["architecture"]]
    assert (model.strategy, model.block_design) == expected
    if case["architecture"] == "markov_var":
        assert model.history_design == SlidingWindowHistory(3, conditional_class_when_guided=True)
    for module in (model, tokenizer):
        assert not module.training
        for tensor in [*module.parameters(), *module.buffers()]:
            assert tensor.device.type == "cpu" and tensor.dtype == torch.float32


def test_first_neighborhood_scale_defaults_to_the_last_two(released: Files) -> None:
    known = {name: value for name, value in arguments("mvar_tiny").items() if name != "first_neighborhood_scale"}
    assert import_official(*released["mvar_tiny"], **known)[0].strategy == SpatialAttention(3, scales=[4, 5])
    with pytest.raises(UserError, match="first_neighborhood_scale 6"):
        import_official(*released["mvar_tiny"], **known, first_neighborhood_scale=6)


@pytest.mark.parametrize("place", [("trainer", "var_wo_ddp"), ("mvar_wo_ddp",)])
def test_nested_files(place: tuple[str, ...], released: Files, tmp_path: Path) -> None:
    flat, _ = import_official(*released["var_tiny"], **arguments())
    content: Any = torch.load(released["var_tiny"][0], weights_only=True)
    for part in reversed(place):
        content = {part: content, "epoch": 3}
    torch.save(content, tmp_path / "nested.pth")
    nested, _ = import_official(tmp_path / "nested.pth", released["var_tiny"][1], **arguments())
    for key, tensor in flat.state_dict().items():
        assert torch.equal(nested.state_dict()[key], tensor), key


def test_safetensors_and_half_precision(released: Files, tmp_path: Path) -> None:
    state = torch.load(released["var_tiny"][0], weights_only=True)
    save_file({key: t.half() if t.is_floating_point() else t for key, t in state.items()}, tmp_path / "m.safetensors")
    model, _ = import_official(tmp_path / "m.safetensors", released["var_tiny"][1], **arguments())
    assert torch.equal(model.head.linear.weight, state["head.weight"].half().float())


def test_old_torch_files(released: Files, tmp_path: Path) -> None:
    """Files from before the zip format cannot be memory-mapped."""
    state = torch.load(released["var_tiny"][0], weights_only=True)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model, _ = import_official(tmp_path / "old.pth", released["var_tiny"][1], **arguments())
    assert torch.equal(model.head.linear.weight, state["head.weight"])


def test_weights_are_copies(released: Files, tmp_path: Path) -> None:
    """A file that is overwritten later does not reach into the model."""
    state = torch.load(released["var_tiny"][0], weights_only=True)
    path = tmp_path / "m.pth"
    torch.save(state, path)
    model, _ = import_official(path, released["var_tiny"][1], **arguments())
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(model.head.linear.weight, state["head.weight"])


@settings(max_examples=8)
@given(data=st.data())
def test_any_missing_weight_is_named(data: st.DataObject, released: Files, tmp_path_factory: Any) -> None:
    case = load_case("var_tiny")[0]
    part = data.draw(st.sampled_from(["model", "tokenizer"]))
    weights = sorted(key for key in case[f"{part}_state"] if key not in case["left_at_init"])
    key = data.draw(st.sampled_from(weights))
    with pytest.raises(UserError) as error:
        import_changed(released, tmp_path_factory.mktemp("missing"), lambda state: state.pop(key), part=part)
    assert "missing" in str(error.value) and key.split(".weight")[0] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("model", "head.weight"),
        ("model", "word_embed.weight"),
        ("model", "blocks.1.attn.proj.weight"),
        ("model", "lvl_embed.weight"),
        ("model", "blocks.0.attn.zero_k_bias"),
        ("tokenizer", "quant_conv.weight"),
        ("tokenizer", "encoder.conv_in.weight"),
        ("tokenizer", "quantize.embedding.weight"),
    ],
)
def test_wrong_shape_is_named(part: str, key: str, released: Files, tmp_path: Path) -> None:
    def cut(state: dict[str, Tensor]) -> None:
        state[key] = state[key][:-1].clone()

    with pytest.raises(UserError, match=rf"wrong shape: .*{key} \("):
        import_changed(released, tmp_path, cut, part=part)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_unexpected_is_named(part: str, released: Files, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unexpected: extra\.weight"):
        import_changed(released, tmp_path, lambda state: state.update({"extra.weight": torch.zeros(2)}), part=part)


@pytest.mark.parametrize("blank", [True, False])
def test_buffers_may_be_absent_or_blank(blank: bool, released: Files, tmp_path: Path) -> None:
    case = load_case("var_tiny")[0]

    def change(state: dict[str, Tensor]) -> None:
        for key in case["left_at_init"]:
            if key in state:
                removed = state.pop(key)
                if blank:
                    state[key] = torch.zeros_like(removed)

    model, _ = import_changed(released, tmp_path, change)
    original = state_of(case, "model")
    exported = reference_state(model)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)


def test_hit_counts_of_other_scales_are_left_out(released: Files, tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["quantize.ema_vocab_hit_SV"] = torch.ones(10, 64)

    _, tokenizer = import_changed(released, tmp_path, change, part="tokenizer")
    assert torch.equal(tokenizer.quantizer.ema_hits_KV, torch.zeros(4, 64))


def as_hmar(state: dict[str, Tensor], base: int) -> dict[str, Tensor]:
    """VAR's state dict in the layout of HMAR's release: the last blocks twice, the second time for masks."""
    found = {
        "word_embed_bias": state["word_embed.bias"],
        "mask_embed.weight": torch.ones(1, state["pos_1LC"].shape[-1]),
    }
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "blocks":
            number, _, inside = rest.partition(".")
            if int(number) < base:
                found[f"base_blocks.{number}.{inside}"] = tensor
            else:
                found[f"ns_blocks.{int(number) - base}.{inside}"] = tensor
                found[f"mask_blocks.{int(number) - base}.{inside}"] = tensor + 1
        elif part in ("head", "head_nm"):
            found |= {f"ns_{name}": tensor, f"mask_{name}": tensor + 1}
        elif name != "word_embed.bias":
            found[name] = tensor
    return found


@pytest.mark.parametrize("base", [0, 1])
def test_hmars_layout(base: int, released: Files, tmp_path: Path) -> None:
    state, scales = torch.load(released["mvar_tiny"][0], weights_only=True), arguments("mvar_tiny")["patch_nums"]
    file = tmp_path / "hmar-d16.pth"
    torch.save(as_hmar(state, base), file)
    model, _ = import_official(file, released["mvar_tiny"][1], "hmar", patch_nums=scales)
    same, _ = import_official(*released["mvar_tiny"], "hmar", patch_nums=scales)  # of its first training
    assert model.strategy == AdjacentAttention() and model.config == same.config
    for name, tensor in same.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with pytest.raises(UserError, match="looks like hmar, not like mvar"):
        import_official(file, released["mvar_tiny"][1], "mvar", patch_nums=scales)
    load_initial_weights(same, file)  # a training starts from it


def test_hmar_is_not_taken_for_what_it_is_not(released: Files, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mask shows earlier scales: the file looks like var, not hmar"):
        import_official(*released["var_tiny"], "hmar", patch_nums=SCALES)
    state, scales = torch.load(released["mvar_tiny"][0], weights_only=True), arguments("mvar_tiny")["patch_nums"]
    whole = as_hmar(state, 1)
    blocks = {name: tensor for name, tensor in whole.items() if not name.startswith("base_blocks.")}
    for number, (wrong, words) in enumerate(
        (
            (whole | {"head.weight": state["head.weight"]}, r"holds head\.weight beside ns_blocks"),
            (whole | {f"base_blocks.{'1' * 5000}.a": torch.ones(1)}, r"a name counts to base_blocks\.1+\.\.\."),
            (blocks, "1 ns_blocks of 2 heads and no base_blocks"),
        )
    ):
        torch.save(wrong, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match=words) as caught:
            import_official(tmp_path / f"{number}.pth", released["mvar_tiny"][1], "hmar", patch_nums=scales)
        assert len(str(caught.value)) < 400


def small(scales: Any, channels: int) -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
    sizes: dict[str, Any] = {"vocab_size": 8, "code_dim": 4}
    tokenizer = MultiScaleTokenizer(
        scales, **sizes, channels=32, channel_multipliers=[1, 1], num_res_blocks=1, image_channels=channels
    )
    model = NextScaleTransformer(scales, **sizes, num_classes=3, depth=1, width=16, heads=2)
    return model.eval(), tokenizer.eval()


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_come_back(channels: int, tmp_path: Path) -> None:
    model, tokenizer = small([1, 2], channels)
    export_official(model, tokenizer, tmp_path / "m.pth", tmp_path / "t.pth")
    _, again = import_official(tmp_path / "m.pth", tmp_path / "t.pth", "var", patch_nums=(1, 2))
    assert again.config == tokenizer.config and again.image_channels == channels
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in tokenizer.state_dict().items())


def test_maps_that_are_no_squares_are_not_exported_nor_imported(tmp_path: Path) -> None:
    wide, (square, tokenizer) = small([1, [1, 2]], 3), small([1, 2], 3)
    for pair in (wide, (square, wide[1])):
        with pytest.raises(UserError, match=r"square maps alone; .* saved folder \(folder of mvar export\)"):
            export_official(*pair, tmp_path / "m.pth", tmp_path / "t.pth")
    assert not list(tmp_path.iterdir())
    export_official(square, tokenizer, tmp_path / "m.pth", tmp_path / "t.pth")
    with pytest.raises(UserError, match="patch_nums 1 1x4: the published models have square maps alone"):
        import_official(tmp_path / "m.pth", tmp_path / "t.pth", "var", patch_nums=(1, (1, 4)))


def test_hmar_without_a_block(released: Files, tmp_path: Path) -> None:
    state = as_hmar(torch.load(released["mvar_tiny"][0], weights_only=True), 1)
    scales = arguments("mvar_tiny")["patch_nums"]
    state = {name.replace("base_blocks.0.", "base_blocks.1."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "hmar.pth")
    with pytest.raises(UserError, match=r"base_blocks are \[1\]"):
        import_official(tmp_path / "hmar.pth", released["mvar_tiny"][1], "hmar", patch_nums=scales)


@pytest.mark.parametrize(
    ("file", "architecture", "told"),
    [
        ("var_tiny", "markov_var", "looks like var or mvar, not like markov_var"),
        ("markov_var_tiny", "var", "looks like markov_var, not like var"),
        ("markov_var_tiny", "mvar", "looks like markov_var, not like mvar"),
        ("mvar_tiny", "var", "looks like mvar, not var"),
    ],
)
def test_wrong_architecture(file: str, architecture: str, told: str, released: Files) -> None:
    scales = load_case(file)[0]["patch_nums"]
    with pytest.raises(UserError, match=told):
        import_official(*released[file], architecture, patch_nums=scales)


def test_swapped_files(released: Files) -> None:
    model, tokenizer = released["var_tiny"]
    with pytest.raises(UserError, match=r"looks like the tokenizer \(vqvae\), not like var"):
        import_official(tokenizer, model, "var", SCALES)
    with pytest.raises(UserError, match=r"looks like var or mvar, not like the tokenizer"):
        import_official(model, model, "var", SCALES)


def test_scales_that_do_not_fit(released: Files) -> None:
    with pytest.raises(UserError, match=r"30 tokens.*patch_nums"):
        import_official(*released["var_tiny"], "var")
    with pytest.raises(UserError, match="14 tokens, the weights have 30"):
        import_official(*released["var_tiny"], "var", patch_nums=[1, 2, 3])
    with pytest.raises(UserError, match="'lstm'"):
        import_official(*released["var_tiny"], "lstm", patch_nums=SCALES)


def test_same_number_of_tokens_but_other_scales(released: Files, tmp_path: Path) -> None:
    """25 tokens are one map of side 5, or two of sides 3 and 4."""
    level_L = torch.tensor([scale for scale, side in enumerate([3, 4]) for _ in range(side * side)])

    def change(state: dict[str, Tensor]) -> None:
        state["pos_1LC"], state["pos_start"] = torch.zeros(1, 25, 128), torch.zeros(1, 25, 128)
        state["lvl_embed.weight"] = torch.zeros(1, 128)
        state["lvl_1L"], state["attn_bias_for_masking"] = level_L[None], torch.zeros(1, 1, 25, 25)

    state = torch.load(released["var_tiny"][0], weights_only=True)
    change(state)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(UserError, match="lvl_1L divides the tokens otherwise"):
        import_official(tmp_path / "m.pth", released["var_tiny"][1], "var", patch_nums=[5])


def test_markov_var_without_buffers_asks_for_the_scales(released: Files, tmp_path: Path) -> None:
    state = torch.load(released["markov_var_tiny"][0], weights_only=True)
    del state["lvl_1L"], state["attn_bias_for_masking"]
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(UserError, match="give patch_nums"):
        import_official(tmp_path / "m.pth", released["markov_var_tiny"][1], "markov_var")


class Bomb:
    """A pickle that writes a file when it is executed."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("kind", ["torch", "pickle", "old pickle"])
def test_code_in_a_file_is_not_executed(kind: str, released: Files, tmp_path: Path) -> None:
    path, fired = tmp_path / "bomb.pth", tmp_path / "fired"
    content = {"head.weight": torch.zeros(2), "x": Bomb(fired)}
    if kind == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"x": Bomb(fired)}, protocol=2 if kind == "old pickle" else 5))
    for model, tokenizer in ((path, released["var_tiny"][1]), (released["var_tiny"][0], path)):
        with pytest.raises(UserError, match=r"nothing was executed") as error:
            import_official(model, tokenizer, "var", SCALES)
        assert "\n" not in str(error.value)
    assert not fired.exists()


def test_damaged_and_foreign_files(released: Files, tmp_path: Path) -> None:
    model, tokenizer = released["var_tiny"]
    truncated, empty, noise, text = (tmp_path / name for name in ("t.pth", "e.pth", "n.pth", "x.safetensors"))
    truncated.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    empty.touch()
    noise.write_bytes(bytes(range(256)) * 4)
    text.write_text("not tensors")
    for path in (truncated, empty, noise, text):
        with pytest.raises(UserError, match=path.name):
            import_official(path, tokenizer, "var", SCALES)
    foreign = tmp_path / "foreign.pth"
    for content, told in (
        ({"layer.weight": torch.zeros(2)}, "none of its 1 names is known"),
        ({"a": 1}, "holds no weights of"),
        ([1, 2], "holds no weights of"),
    ):
        torch.save(content, foreign)
        with pytest.raises(UserError, match=told):
            import_official(foreign, tokenizer, "var", SCALES)
    with pytest.raises(UserError, match="no such file"):
        import_official(tmp_path / "none.pth", tokenizer, "var", SCALES)
    with pytest.raises(UserError, match="is a folder"):
        import_official(tmp_path, tokenizer, "var", SCALES)


def test_export_refuses_what_the_references_do_not_have(tmp_path: Path) -> None:
    tokenizer = MultiScaleTokenizer([1, 2], channels=32, vocab_size=8, code_dim=4, channel_multipliers=[1, 1])
    sizes: dict[str, Any] = {"vocab_size": 8, "code_dim": 4, "num_classes": 2, "depth": 1}
    windowed = NextScaleTransformer([1, 2], **sizes, attention=SlidingWindowAttention(2))
    with pytest.raises(UserError, match="none of the published models"):
        export_official(windowed, tokenizer, tmp_path / "m.pth", tmp_path / "t.pth")
    model = NextScaleTransformer([1, 2], **sizes)
    with pytest.raises(UserError, match="does not exist"):
        export_official(model, tokenizer, tmp_path / "none" / "m.pth", tmp_path / "t.pth")
    grouped = MultiScaleTokenizer(
        [1, 2], channels=8, vocab_size=8, code_dim=4, channel_multipliers=[1, 1], norm_groups=4
    )
    with pytest.raises(UserError, match="norm_groups 4"):
        export_official(model, grouped, tmp_path / "m.pth", tmp_path / "t.pth")
    assert not list(tmp_path.iterdir())


def test_tokenizers_of_other_sizes_round_trip(released: Files, tmp_path: Path) -> None:
    """Levels, blocks and phi are read off the names, for one phi a scale and one for all too."""
    sizes: dict[str, Any] = {"vocab_size": 64, "code_dim": 32, "channels": 32}
    for options in (
        {"phi_layers": 0, "channel_multipliers": [1, 3]},
        {"phi_layers": 1, "num_res_blocks": 1},
        {"phi_layers": 2, "channel_multipliers": [2, 1, 4]},
    ):
        tokenizer = MultiScaleTokenizer(SCALES, **sizes, **options)
        model = NextScaleTransformer(SCALES, vocab_size=64, code_dim=32, num_classes=3, depth=1)
        export_official(model, tokenizer, tmp_path / "m.pth", tmp_path / "t.safetensors")
        _, back = import_official(tmp_path / "m.pth", tmp_path / "t.safetensors", "var", SCALES)
        assert back.config == tokenizer.config
        assert all(torch.equal(back.state_dict()[key], value) for key, value in tokenizer.state_dict().items())
