"""What a Lightning checkpoint of a tokenizer run says beside its tensors, and what it must agree in to be resumed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint_of

CHECKPOINT_FORMAT = 1


def description(tokenizer: MultiScaleTokenizer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What rebuilds the tokenizer, in plain values.

    The hash is that of the weights in the file: with averaging on they are not the ones in training.
    """
    state = {key.removeprefix("tokenizer."): tensor for key, tensor in checkpoint["state_dict"].items()}
    return {
        "format": CHECKPOINT_FORMAT,
        "kind": "tokenizer",
        "tokenizer": tokenizer.config,
        "tokenizer_hash": fingerprint_of(tokenizer, state),
    }


def check_weights(checkpoint: dict[str, Any]) -> None:
    """Refuse to write weights that a gradient which was not finite has spoiled: the checkpoint before stays.

    Raises:
        UserError: names the first such tensor, of the weights in training, their averages or an optimizer's moments,
            and the step.
    """
    for part in ("state_dict", "current_model_state"):
        for name, tensor in checkpoint.get(part, {}).items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"weight {name} is not finite at step {checkpoint['global_step']}, though the loss was: no "
                    "checkpoint of it is written, the one before stays; lower lr or set model.gradient_clip_val"
                )
    for place, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for number, moments in optimizer["state"].items():
            for name, moment in moments.items():
                if isinstance(moment, Tensor) and not moment.isfinite().all():
                    raise UserError(
                        f"{name} of parameter {number} of optimizer {place} is not finite at step "
                        f"{checkpoint['global_step']}: that parameter would never move again; no checkpoint of it is "
                        "written, the one before stays; lower lr or set model.gradient_clip_val"
                    )


def check_discriminator(checkpoint: dict[str, Any], has_one: bool) -> None:
    """Refuse a checkpoint with another set of optimizers before any weight is touched.

    Raises:
        UserError: one of run and checkpoint has a discriminator.
    """
    theirs = any(key.startswith("adversarial.") for key in checkpoint["state_dict"])
    if theirs != has_one:
        raise UserError(
            f"this checkpoint was written {'with' if theirs else 'without'} a discriminator, this run is "
            f"{'without' if theirs else 'with'} one: keep model.adversarial as it was, or start a new run with "
            "model.init_from"
        )


def count_earlier_steps(checkpoint: dict[str, Any]) -> None:
    """Take over the steps of a checkpoint from before the module took them itself: Lightning counts these elsewhere."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loop.get("epoch_loop.manual_optimization.optim_step_progress")
    if progress is not None and progress["total"]["completed"] == 0:
        steps = checkpoint["global_step"]
        progress["total"] = {"ready": steps, "completed": steps}
