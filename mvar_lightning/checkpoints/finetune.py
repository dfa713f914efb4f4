"""Starting a run from the weights of another model: MVAR (or any attention) from VAR, for example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mvar_lightning.checkpoints.assign import on_meta
from mvar_lightning.checkpoints.classes import InitClasses, class_rows, names_or_imagenets
from mvar_lightning.checkpoints.containers import MODEL, read_state
from mvar_lightning.checkpoints.folder import check_no_key, is_released, located, open_checkpoint, with_key
from mvar_lightning.checkpoints.hmar import as_var, is_hmar
from mvar_lightning.checkpoints.official import import_transformer
from mvar_lightning.checkpoints.official_sizes import attention_of, looks_like, pyramid_of, transformer_arguments
from mvar_lightning.checkpoints.rescale import RULES, for_scales
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.transformer import NextScaleTransformer

SIZES = ("vocab_size", "code_dim", "depth", "width", "heads")
ROWS = "class_embedding.weight"
CODES = "quantizer.codebook.weight"


def load_initial_weights(
    model: NextScaleTransformer,
    path: str | Path,
    init_classes: InitClasses = None,
    class_names: Sequence[str] = (),
    init_scales: str | None = None,
) -> str:
    """Initialize a model from another checkpoint, in place.

    Sizes, blocks and history must be the same; the attention may be another, since it has no weights: MVAR, or any
    strategy, starts from VAR. Markov-VAR does not: its blocks, positions and history are others. The classes may be
    others, too.

    Args:
        model: the model to initialize, on any device.
        path: a folder of `save` or of a run, a Lightning checkpoint, or a released file of the published models (its
            scales are the model's where they have as many tokens, else the published ones that do); ``PATH#KEY`` of one
            that holds several (`containers.read_state`).
        init_classes: what the classes start from: ``fresh``, ``mean``, or a mapping such as ``{corgi: 263, cat:
            tabby}``, by names or indices of classes here and there. Not given: all classes where there are as many,
            else fresh ones. "No class" is always taken.
        class_names: of the model's own classes, by index.
        init_scales: where the scales are others: ``resize`` positions and levels by the nearest side, or ``fresh`` ones
            (`rescale.for_scales`).

    Returns:
        What became of the classes and scales, in words.

    Raises:
        UserError: a checkpoint or a class that does not fit; the message names what differs.
    """
    if init_scales not in (None, *RULES):
        raise UserError(f"init_scales {init_scales!r}: unknown; choose {' or '.join(RULES)}")
    file, key = with_key(path)
    source, names = _source_model(model, Path(located(file)), key)
    if source.quantized is not None:
        raise UserError(
            f"{path}: holds weights in {source.quantized}, for sampling; start from those they were made of"
        )
    _check_same(model, source, path)
    state = source.state_dict()
    names = names_or_imagenets(names, source.num_classes)
    scales = ""
    if source.pyramid != model.pyramid:
        state, scales = for_scales(state, source.pyramid, model.pyramid, model.state_dict(), init_scales)
        scales = f"; {scales}"
    state[ROWS], words = class_rows(model.class_embedding.weight, state[ROWS], init_classes, class_names, names)
    model.load_state_dict(state, strict=True)
    return f"init_from {path}: classes: {words}{scales}"


def other_codes(path: str | Path, tokenizer: MultiScaleTokenizer) -> str:
    """Words for the line that `load_initial_weights` gives where the checkpoint's own tokenizer has other codes than
    this one: a token then does not mean what the weights have learned. Empty where they are the same (to the rounding
    of half precision) or the checkpoint has none."""
    path = Path(located(with_key(path)[0]))
    opened = None if is_released(path) else open_checkpoint(path, whole=False)
    found = None if opened is None or "tokenizer" not in opened.parts else opened.tensors("tokenizer").get(CODES)
    own = tokenizer.quantizer.codebook.weight.detach().cpu()
    near = 1e-3 * float(own.std(correction=0))
    if found is None or (found.shape == own.shape and torch.allclose(found.to(own.dtype), own, rtol=1e-2, atol=near)):
        return ""
    return "; model.tokenizer has other codes than its tokenizer: tokens do not mean what these weights have learned"


def _source_model(
    model: NextScaleTransformer, path: Path, key: str | None
) -> tuple[NextScaleTransformer, Sequence[str]]:
    """The model to start from, and the names of its classes where it tells them."""
    if is_released(path):
        return _released_model(model, path, key), ()
    check_no_key(path, key)
    opened = open_checkpoint(path)
    if opened.record.model is None:
        raise UserError(f"{path}: a checkpoint of a tokenizer alone; it has no transformer to start from")
    return opened.model(), opened.record.class_names


def _released_model(model: NextScaleTransformer, path: Path, key: str | None) -> NextScaleTransformer:
    """The model of a released file, on the scales of the model that it is for, or the published ones that it fits."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    state = read_state(path, MODEL, key)
    if is_hmar(state):
        state = as_var(state, str(path))
    looks = {"markov_var": "markov_var", "var or mvar": "mvar"}.get(looks_like(state) or "")
    if looks is None:
        raise UserError(f"{path}: looks like {looks_like(state) or 'no known model'}; give a transformer's weights")
    try:
        pyramid = pyramid_of(state, model.pyramid.scales, str(path))
    except UserError as error:
        try:  # of other scales: the published ones of its number of tokens
            pyramid = pyramid_of(state, None, str(path))
        except UserError:
            raise error from None
    arguments = transformer_arguments(state, looks, pyramid, model.vocab_size, model.code_dim, str(path))
    attention = attention_of(looks, pyramid, kernel_size=1, first_neighborhood_scale=None)
    source = on_meta(lambda: NextScaleTransformer(**arguments, attention=attention))
    _check_same(model, source, path)  # before its names are, whose message would say less
    return import_transformer(source, state, str(path))


def _check_same(model: NextScaleTransformer, source: NextScaleTransformer, path: str | Path) -> None:
    """Raise `UserError` where two models differ in what has weights."""
    differences = _differences(model.config, source.config)
    if differences:
        raise UserError(f"{path}: cannot start from these weights, the models differ: {'; '.join(differences)}")


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations and has weights, in words."""
    found = []
    if ours["blocks"] != theirs["blocks"]:
        found.append(f"blocks ({_words(ours['blocks'])} here, {_words(theirs['blocks'])} there)")
        if ours["blocks"]["class"] != theirs["blocks"]["class"]:
            found.append("positions (VARBlocks learn them, LlamaBlocks rotate by them and embed the level)")
    if _weighty(ours["history"]) != _weighty(theirs["history"]):
        found.append(f"history ({_words(ours['history'])} here, {_words(theirs['history'])} there)")
    found += [f"{name} ({ours[name]} here, {theirs[name]} there)" for name in SIZES if ours[name] != theirs[name]]
    return found


def _weighty(history: Mapping[str, Any]) -> dict[str, Any]:
    """A history's configuration without what only sampling reads."""
    return {name: value for name, value in history.items() if name != "conditional_class_when_guided"}


def _words(config: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in config.items() if name != "class")
    return f"{config['class']}({arguments})"
