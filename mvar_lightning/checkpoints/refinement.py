"""Refinements in and out: ``refinement.json`` and ``refinement.safetensors`` in a folder. Nothing is unpickled.

A refinement belongs to the weights of one model, which are not in it: their hash is, and others are refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from weakref import ref

import torch

from mvar_lightning.checkpoints.assign import fill, on_meta
from mvar_lightning.checkpoints.folder import crc32_of
from mvar_lightning.checkpoints.record import LIBRARY
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.tools.files import kind_of, read_json, told, write_json, writing_folder
from mvar_lightning.tools.tensors import read_safetensors, write_tensors
from mvar_lightning.transformer import NextScaleTransformer
from mvar_lightning.transformer.refinement import Refinement

CONFIG, WEIGHTS, IN_RUN, FORMAT = "refinement.json", "refinement.safetensors", "refinement", 1


def save_refinement(
    path: str | Path, refinement: Refinement, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer
) -> None:
    """Write a folder, whole or not at all.

    Args:
        path: a new folder, or an earlier one, which is replaced.
        model, tokenizer: those that it was trained beside.

    Raises:
        UserError: ``path`` holds something else, or cannot be written.
    """
    path = Path(path)
    with told(path):
        if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / CONFIG).is_file())):
            raise UserError(f"{path}: holds something else than a refinement; choose another folder")
        with writing_folder(path) as folder:
            write_tensors(folder / WEIGHTS, refinement.state_dict())
            record = {"library": LIBRARY, "format": FORMAT, "blocks": len(refinement.blocks)}
            write_json(
                folder / CONFIG,
                {**record, "beside": _hash(model, fingerprint(tokenizer)), "crc32": crc32_of(folder / WEIGHTS)},
            )


def load_refinement(path: str | Path, model: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> Refinement:
    """A refinement in evaluation mode, on the model's device.

    Args:
        path: a folder that `save_refinement` wrote, or a run's.
        model, tokenizer: those that it was trained beside, in float32.

    Raises:
        UserError: no refinement, a damaged one, or one of other weights.
    """
    folder = Path(path)
    if kind_of(folder / IN_RUN / CONFIG) == "file":
        folder = folder / IN_RUN
    if kind_of(folder / CONFIG) != "file":
        raise UserError(f"``refinement`` {path}: has no {CONFIG}; give the folder of a RefinementModule's run")
    record = read_json(folder / CONFIG)
    kinds = {"library": str, "format": int, "blocks": int, "beside": str, "crc32": str}
    if not isinstance(record, dict) or any(type(record.get(name)) is not kind for name, kind in kinds.items()):
        raise UserError(f"{folder / CONFIG}: is no record of a refinement; train it anew")
    if (record["library"], record["format"]) != (LIBRARY, FORMAT):
        raise UserError(f"{folder / CONFIG}: format {record['format']}; this version reads {FORMAT}")
    if (found := crc32_of(folder / WEIGHTS)) != record["crc32"]:
        raise UserError(f"{folder / WEIGHTS}: damaged, its CRC-32 is {found}; copy it again")
    if record["beside"] != _hash(model, its_tokenizer := fingerprint(tokenizer)):
        raise UserError(f"``refinement`` {path}: was trained beside other weights; name the checkpoint it started from")
    empty = on_meta(lambda: Refinement(_on_meta(model), record["blocks"]))
    made = fill(empty, read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    made.beside, made.known = (record["beside"], its_tokenizer), [ref(model)]
    return made.to(next(model.parameters()).device).eval()


def belongs(refinement: Refinement, model: NextScaleTransformer) -> bool:
    """Whether it was loaded or made beside these weights. A model is asked once: quantized or rounded later, it is
    known. A copy of a refinement that was never saved knows nothing of where it comes from, and fits all."""
    known = [each for each in (reference() for reference in refinement.known) if each is not None]
    if any(each is model for each in known):
        return True
    if refinement.beside is not None:
        beside, tokenizer = refinement.beside
        fits = _hash(model, tokenizer) == beside
    else:
        fits = not known or _hash(model, "") == _hash(known[0], "")
    if fits:
        refinement.known.append(ref(model))
    return fits


def _hash(model: NextScaleTransformer, tokenizer: str) -> str:
    """SHA-256 of what a refinement was trained beside: the tokenizer's, the strategy and the weights as float32."""
    digest = hashlib.sha256(f"{tokenizer}{model.strategy!r}".encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _on_meta(model: NextScaleTransformer) -> NextScaleTransformer:
    return NextScaleTransformer.from_config(model.config)
