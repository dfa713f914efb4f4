"""What Lightning's users bring: checkpoints that are folders, bare loaders, batches of one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from mvar_lightning.checkpoints.folder import Opened, check_no_key, is_released, load_tokenizer, located, with_key
from mvar_lightning.checkpoints.official import import_tokenizer
from mvar_lightning.data.image_data import named, run_data
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer.tokenizer import TRAINING_ONLY, UNCHANGED, MultiScaleTokenizer
from mvar_lightning.tools.drawing import normalize

M = TypeVar("M", bound=L.LightningModule)
LIGHTNINGS = ("map_location", "hparams_file", "strict", "weights_only")
"""Arguments of `load_from_checkpoint` that are no settings of a module."""


def module_of_folder(
    make: Callable[..., M], opened: Opened, part: str, recorded: Mapping[str, Any], given: Mapping[str, Any]
) -> M:
    """A module with the weights of one ``part`` (``model``, ``tokenizer``) of a folder, where ``map_location`` says.

    Args:
        recorded: what the record tells of the module; what its constructor does not take is left out (as by Lightning).
        given: by the caller, who is told of what it does not take.
    """
    own = {name: recorded[name] for name in signature(make).parameters.keys() & recorded}
    module = make(**own | {name: value for name, value in given.items() if name not in LIGHTNINGS})
    getattr(module, part).load_state_dict(opened.tensors(part))
    device = given.get("map_location")
    return module if device is None else module.to(device)


def alone(batch: Any, needed: str) -> Tensor:
    """What a prediction needs of a batch: it may come alone, as a tensor or a list of one, or as `named` takes it."""
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        (batch,) = batch
    if isinstance(batch, dict) and isinstance(batch.get(needed), Tensor):
        batch = batch[needed]
    return batch if isinstance(batch, Tensor) else cast(Tensor, named(batch, needed)[needed])


PIXELS = 1.01
"""Largest number of a float image on either side of 0: white is 1, and a resize with overshoot may round past it."""


def normalized(image_B3HW: Tensor) -> Tensor:
    """`normalize`, which passes floats as they are; those that cannot be in [-1, 1] are refused.

    On a device this waits for floats, as `MultiScaleTokenizer.encode` does; pixels of whole numbers are in range.

    Raises:
        UserError: such an image, or whole numbers of another type than `normalize` knows.
    """
    if image_B3HW.is_floating_point() and image_B3HW.numel():
        least, most = (float(end) for end in image_B3HW.detach().aminmax())
        if least < -PIXELS or most > PIXELS:  # NaN is told elsewhere
            raise UserError(
                f"image: floats from {least:.4g} to {most:.4g}; give them in [-1, 1] (black to white), or uint8 pixels"
            )
    return normalize(image_B3HW)


def batch_size_of_run(trainer: L.Trainer) -> int:
    """Images of one batch on one process. Raises `UserError` where the data do not tell."""
    per_process = run_data(trainer).batch_size
    if per_process is None and trainer.state.fn == "fit":
        trainer.fit_loop.setup_data()  # opens a bare loader, which has one
        per_process = run_data(trainer).batch_size
    if per_process is None:
        raise UserError("the learning rate is scaled by the batch size: give a datamodule or a loader that has one")
    return int(per_process)


HITS = "quantizer.ema_hits_KV"


def start_from(tokenizer: MultiScaleTokenizer, path: str) -> None:
    """Take over the weights of another tokenizer, in place; a released file's scales are taken to be the tokenizer's,
    and ``PATH#KEY`` says which of several weights in it.

    Other scales are taken over as they are: phi's convolutions belong to places between the coarsest scale and the
    finest (`phi_of_scales`), not to scales, unless each scale has its own (``phi_layers`` 0).

    Raises:
        UserError: no such file, or a tokenizer of other sizes.
    """
    named_file, key = with_key(path)
    file = Path(located(named_file))
    if is_released(file):
        source = import_tokenizer(file, tokenizer.pyramid, key=key)
    else:
        check_no_key(file, key)
        source = load_tokenizer(file)
    ours, theirs = tokenizer.config, source.config
    ours, theirs = ({**config, **UNCHANGED, **config} for config in (ours, theirs))
    differing = [key for key in ours if key not in TRAINING_ONLY and ours[key] != theirs.get(key)]
    if ours["scales"] != theirs["scales"] and ours["phi_layers"]:
        differing.remove("scales")
    if differing:
        sizes = ", ".join(f"{key} ({ours[key]} here, {theirs.get(key)} there)" for key in differing)
        raise UserError(f"init_from {path}: a tokenizer of another kind: {sizes}; set the recipe to what the file has")
    state = source.state_dict()
    if ours["scales"] != theirs["scales"]:
        state[HITS] = tokenizer.state_dict()[HITS]  # counts of each scale, of the released training alone
        rank_zero_info(
            f"init_from {path}: scales {source.pyramid} to {tokenizer.pyramid}: phi by its place between them"
        )
    tokenizer.load_state_dict(state)
