"""What a tokenizer starts from, and which of its parts are trained."""

from __future__ import annotations

from collections.abc import Sequence

from mvar_lightning.checkpoints import load_tokenizer
from mvar_lightning.checkpoints.folder import is_released
from mvar_lightning.checkpoints.official import import_tokenizer
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tokenizer.fingerprint import TRAINING_ONLY

PARTS = ("encoder", "quant_conv", "quantizer", "post_quant_conv", "decoder")


def start_from(tokenizer: MultiScaleTokenizer, path: str) -> None:
    """Take over the weights of another tokenizer, in place.

    Args:
        tokenizer: the one to start.
        path: a saved folder, a run's folder or Lightning checkpoint of this suite, or a released file
            (``vae_ch160v4096z32.pth``), whose scales are taken to be the tokenizer's.

    Raises:
        UserError: no such file, or a tokenizer of other sizes.
    """
    source = import_tokenizer(path, tokenizer.pyramid) if is_released(path) else load_tokenizer(path)
    ours, theirs = tokenizer.config, source.config
    differing = [key for key in ours if key not in TRAINING_ONLY and ours[key] != theirs.get(key)]
    if differing:
        told = ", ".join(f"{key} ({ours[key]} here, {theirs.get(key)} there)" for key in differing)
        raise UserError(f"init_from {path}: a tokenizer of another kind: {told}; set the recipe to what the file has")
    tokenizer.load_state_dict(source.state_dict())


def hold_still(tokenizer: MultiScaleTokenizer, frozen: Sequence[str]) -> None:
    """Take parts out of training: those named, and each phi that no scale uses (DDP would wait for its gradient).

    Raises:
        UserError: an unknown part, or nothing left to train.
    """
    if unknown := [name for name in frozen if name not in PARTS]:
        raise UserError(f"frozen {unknown[0]!r}: no part of a tokenizer; they are {', '.join(PARTS)}")
    for place, phi in enumerate(tokenizer.quantizer.phi):
        phi.requires_grad_(place in tokenizer.quantizer.phi_index)
    for name in frozen:
        tokenizer.get_submodule(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in tokenizer.parameters()):
        raise UserError(f"frozen {', '.join(frozen)}: nothing is left to train")
