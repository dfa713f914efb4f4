"""Names and shapes of every released checkpoint, without any weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_files import releases

from mvar_lightning.checkpoints.assign import check_fit, on_meta, shapes_of
from mvar_lightning.checkpoints.official import reference_state, tokenizer_reference_state
from mvar_lightning.checkpoints.official_sizes import (
    attention_of,
    pyramid_of,
    tokenizer_arguments,
    transformer_arguments,
)
from mvar_lightning.pyramid import ScalePyramid
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import NextScaleTransformer

RELEASES = releases()
TRANSFORMERS = [name for name in RELEASES if not name.startswith("vae")]


def shapes_only(release: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in release["state"].items()}


def build(release: dict[str, Any], architecture: str) -> NextScaleTransformer:
    """The model whose sizes the importer reads off the shapes, on the meta device."""
    state = shapes_only(release)
    pyramid = pyramid_of(state, None, "release")
    arguments = transformer_arguments(state, architecture, pyramid, vocab_size=4096, code_dim=32, source="release")
    attention = attention_of(architecture, pyramid, kernel_size=7, first_neighborhood_scale=None)
    return on_meta(lambda: NextScaleTransformer(**arguments, attention=attention))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer(name: str) -> None:
    release = RELEASES[name]
    model = build(release, release["architecture"])
    assert list(model.pyramid.sides) == release["patch_nums"]
    assert (model.depth, model.width, model.heads) == (release["depth"], 64 * release["depth"], release["depth"])
    assert sum(parameter.numel() for parameter in model.parameters()) == release["parameters"]
    exported = {key: list(tensor.shape) for key, tensor in reference_state(model).items()}
    assert exported == release["state"]


def test_mvar_has_the_names_of_var() -> None:
    release = RELEASES["var_d16"]
    model = build(release, "mvar")
    assert {key: list(tensor.shape) for key, tensor in reference_state(model).items()} == release["state"]
    assert model.strategy.config() == {"class": "SpatialAttention", "kernel_size": 7, "scales": [8, 9]}


def test_tokenizer() -> None:
    release = RELEASES["vae_ch160v4096z32"]
    arguments = tokenizer_arguments(shapes_only(release), ScalePyramid(release["patch_nums"]), "release")
    tokenizer = on_meta(lambda: MultiScaleTokenizer(**arguments))
    assert tokenizer.config == on_meta(lambda: MultiScaleTokenizer(release["patch_nums"])).config
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == release["parameters"]
    exported = {key: list(tensor.shape) for key, tensor in tokenizer_reference_state(tokenizer).items()}
    assert exported == release["state"]


def test_check_fit_takes_a_module_for_its_own_shapes() -> None:
    model = build(RELEASES["var_d16"], "var")
    check_fit(shapes_of(model.state_dict()), shapes_of(model), "itself")
