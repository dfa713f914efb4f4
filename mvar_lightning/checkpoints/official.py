"""Import of the published checkpoints (VAR, MVAR, Markov-VAR and their tokenizer) and export to their names.

Released files are read as they are: flat, or inside a trainer's checkpoint. Sizes are read off the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mvar_lightning.attention import AdjacentAttention, FullAttention, SpatialAttention
from mvar_lightning.checkpoints.assign import check_fit, fill, on_meta, shapes_of
from mvar_lightning.checkpoints.containers import MODEL, TOKENIZER, read_state
from mvar_lightning.checkpoints.folder import is_part
from mvar_lightning.checkpoints.hmar import as_var, is_hmar
from mvar_lightning.checkpoints.official_names import (
    MARKOV_VAR_KEYS,
    VAR_KEYS,
    Table,
    reference_shape,
    to_ours,
    to_reference,
    tokenizer_keys,
)
from mvar_lightning.checkpoints.official_sizes import (
    ARCHITECTURES,
    HITS,
    attention_of,
    check_architecture,
    check_derived,
    check_squares,
    derived_buffers,
    derived_shapes,
    pyramid_of,
    tokenizer_arguments,
    transformer_arguments,
    vocab_size_of,
)
from mvar_lightning.errors import UserError, check_kind
from mvar_lightning.pyramid import ScalePyramid, Scales
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.files import kind_of, told, writing
from mvar_lightning.tools.tensors import write_tensors
from mvar_lightning.transformer import LlamaBlocks, NextScaleTransformer, NoHistory, SlidingWindowHistory, VARBlocks


def import_official(
    model_path: str | Path,
    tokenizer_path: str | Path,
    architecture: str,
    patch_nums: Scales | None = None,
    kernel_size: int = 7,
    first_neighborhood_scale: int | None = None,
    key: str | None = None,
    tokenizer_key: str | None = None,
) -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
    """The published model and tokenizer in float32, in eval mode.

    Args:
        model_path, tokenizer_path: released ``.pth`` files, or ``.safetensors`` with the same names.
        architecture: ``var``, ``mvar``, ``markov_var``, or ``hmar``: VAR's transformer under adjacent attention, of
            HMAR's release (whose masked half is left out) or its first training.
        patch_nums: side lengths of the scales; None is known for 680, 2240 and 9451 tokens.
        kernel_size: MVAR's neighborhood (no weight tells it).
        first_neighborhood_scale: MVAR's first scale with a neighborhood, counted from 0; None is the last but one.
        key, tokenizer_key: which weights of a file that holds several, such as ``ema`` (`containers.read_state`).

    Raises:
        UserError: a file that cannot be read or holds code, is of another architecture, has names missing, unexpected
            or of a wrong shape, or scales that do not fit the weights.
    """
    check_kind("patch_nums", patch_nums or (), Sequence, "side lengths such as (1, 2, 3)")
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture {architecture!r}: must be one of {', '.join(ARCHITECTURES)}")
    state = read_state(model_path, MODEL, key)
    if is_hmar(state):
        if architecture != "hmar":
            raise UserError(
                f"{model_path}: looks like hmar, not like {architecture}; name the right architecture or file"
            )
        state = as_var(state, str(model_path))
    check_architecture(state, architecture, str(model_path))
    pyramid = pyramid_of(state, patch_nums, str(model_path))
    attention = attention_of(architecture, pyramid, kernel_size, first_neighborhood_scale)
    tokenizer = import_tokenizer(tokenizer_path, pyramid, vocab_size_of(state), tokenizer_key)
    arguments = transformer_arguments(
        state, architecture, pyramid, tokenizer.vocab_size, tokenizer.code_dim, str(model_path)
    )
    model = on_meta(lambda: NextScaleTransformer(**arguments, attention=attention))
    return import_transformer(model, state, str(model_path), architecture), tokenizer


def import_transformer(
    model: NextScaleTransformer, state: Mapping[str, Tensor], source: str, named: str | None = None
) -> NextScaleTransformer:
    """Fill a model on the meta device with a reference's weights; ``named`` is the architecture that was asked for."""
    architecture, table = architecture_of(model), table_of(model)
    derived = derived_shapes(model.pyramid, model.width, model.depth, architecture)
    check_fit(shapes_of(state), {**_reference_shapes(model, table), **derived}, source, optional=derived)
    check_derived(state, model.pyramid, named or architecture, source)
    # positions, levels and masks follow from the sizes here, and are made when they are needed
    weights = {key: tensor for key, tensor in state.items() if key not in derived}
    return fill(model, to_ours(weights, table), source, dtype=torch.float32)


def import_tokenizer(
    path: str | Path, pyramid: ScalePyramid, vocab_size: int | None = None, key: str | None = None
) -> MultiScaleTokenizer:
    """The published tokenizer in float32, in eval mode, on a pyramid of scales.

    The file's running hit counts are of the scales it was trained on. As in the reference they are left out where
    their number differs (the released tokenizer has 10, the 1024-pixel pyramid 14).

    Args:
        path: a released file.
        pyramid: the model's scales.
        vocab_size: what the transformer's weights tell; helps to say which tensor is damaged.
        key: which weights of a file that holds several.

    Raises:
        UserError: as `import_official`.
    """
    state = dict(read_state(path, TOKENIZER, key))
    arguments = tokenizer_arguments(state, pyramid, str(path), vocab_size)
    tokenizer = on_meta(lambda: MultiScaleTokenizer(**arguments))
    if HITS in state and len(state[HITS]) != pyramid.num_scales:
        del state[HITS]
    table = tokenizer_keys(arguments["phi_layers"])
    check_fit(shapes_of(state), _reference_shapes(tokenizer, table), str(path), optional=(HITS,))
    return fill(tokenizer, to_ours(state, table), str(path), dtype=torch.float32)


def export_official(
    model: NextScaleTransformer, tokenizer: MultiScaleTokenizer, model_path: str | Path, tokenizer_path: str | Path
) -> None:
    """Write model and tokenizer under the reference's names (flat, ``torch.save`` or ``.safetensors``).

    Raises:
        UserError: a model or tokenizer that the references do not have, a folder that does not exist, one file for
            both, a file of a saved folder, or a place that cannot be written.
    """
    states = reference_state(model), tokenizer_reference_state(tokenizer)
    targets = [Path(model_path), Path(tokenizer_path)]
    for target in targets:
        if kind_of(target.parent) != "folder":
            raise UserError(f"{target}: the folder {target.parent} does not exist")
        if kind_of(target) not in (None, "file"):
            raise UserError(f"{target}: is a {kind_of(target)}; name a file")
        if is_part(target.resolve()):
            raise UserError(f"{target}: is one file of a saved folder, which would be lost; name another file")
    if targets[0].resolve() == targets[1].resolve() or (
        all(target.exists() for target in targets) and targets[0].samefile(targets[1])
    ):
        raise UserError(f"``model`` {targets[0]}, ``tokenizer`` {targets[1]}: one file for both; name two")
    with told(*targets), writing(*targets) as asides:
        for aside, state in zip(asides, states, strict=True):
            write_tensors(aside, state)


def reference_state(model: NextScaleTransformer) -> dict[str, Tensor]:
    """The reference's state dict of a model, derived buffers included.

    Raises:
        UserError: the references have no such model, or none with weights of few bits.
    """
    if model.quantized is not None:
        raise UserError(f"a model in {model.quantized}: the references have none; export the one it was made of")
    check_squares(model.pyramid, "export: scales")
    weights = to_reference(model.state_dict(), table_of(model))
    renamed = {key: tensor.reshape(reference_shape(key, tensor.shape)) for key, tensor in weights.items()}
    return renamed | derived_buffers(model.pyramid, model.width, model.depth, architecture_of(model))


def tokenizer_reference_state(tokenizer: MultiScaleTokenizer) -> dict[str, Tensor]:
    """The reference's state dict of a tokenizer. Raises `UserError` where the reference cannot express it."""
    fixed = {"norm_groups": 32, "phi_ratio": 0.5, "codes": "euclidean"}
    for name, value in fixed.items():
        if tokenizer.config[name] != value:
            raise UserError(f"export: {name} {tokenizer.config[name]}: the published tokenizer has {value}")
    check_squares(tokenizer.pyramid, "export: scales")
    return to_reference(tokenizer.state_dict(), tokenizer_keys(tokenizer.config["phi_layers"]))


def architecture_of(model: NextScaleTransformer) -> str:
    """Which published architecture a model is. Raises `UserError` where it is none of them."""
    attention, history, blocks = model.strategy, model.history_design, model.block_design
    if isinstance(blocks, VARBlocks) and isinstance(history, NoHistory):
        if isinstance(attention, FullAttention):
            return "var"
        if isinstance(attention, (AdjacentAttention, SpatialAttention)):
            return "mvar"
    published = SlidingWindowHistory(3), SlidingWindowHistory(3, conditional_class_when_guided=True)
    if isinstance(attention, AdjacentAttention) and history in published and _is_published_llama(blocks):
        return "markov_var"
    raise UserError(f"export: {attention!r} with {history!r} and {blocks!r} is none of the published models")


def table_of(model: NextScaleTransformer) -> Table:
    """The table of names for a model of a published architecture."""
    return MARKOV_VAR_KEYS if architecture_of(model) == "markov_var" else VAR_KEYS


def _is_published_llama(blocks: object) -> bool:
    return isinstance(blocks, LlamaBlocks) and blocks == LlamaBlocks(qk_norm=blocks.qk_norm)


def _reference_shapes(module: nn.Module, table: Table) -> dict[str, tuple[int, ...]]:
    shapes = to_reference(shapes_of(module), table)
    return {key: reference_shape(key, shape) for key, shape in shapes.items()}
