"""What a module that takes its optimizer steps itself does in place of its trainer: windows of batches, and checks.

Lightning counts each step of each of its optimizers (issues 17958, 17167): with a discriminator ``global_step``, and
with it checkpoints and schedules, would run at double speed. Here the first optimizer alone is counted.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from mvar_lightning.compat import logs_now, show_in_bar
from mvar_lightning.data.image_data import run_data
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer
from mvar_lightning.tools.compute import runs_behind
from mvar_lightning.tools.processes import sum_over_ranks

log = logging.getLogger(__name__)


def show_loss(trainer: L.Trainer, name: str, loss: Tensor) -> None:
    """Show a step's loss in the progress bar: on a device only where values are logged, as reading it waits."""
    if logs_now(trainer) or not runs_behind(loss.device):
        show_in_bar(trainer, name, loss.item())


def as_list(one_or_many: Any) -> list[Any]:
    """What Lightning gives as a list only where there are several."""
    return one_or_many if isinstance(one_or_many, list) else [one_or_many]


class Window(NamedTuple):
    """The batches whose gradients make one step, as seen from one of them."""

    size: int
    closes: bool


def window_of(trainer: L.Trainer, batch_idx: int, accumulate: int) -> Window:
    """The window of a batch; the last one of an epoch may be smaller."""
    first = batch_idx - batch_idx % accumulate
    # its own size counts, not the usual one: a step is the mean over the batches that it has
    last = min(first + accumulate, trainer.num_training_batches)
    return Window(size=int(last - first), closes=batch_idx + 1 >= last or trainer.is_last_batch)


def check_finite(terms: dict[str, Tensor], trainer: L.Trainer) -> None:
    """Stop the run where a process has a term that is not finite: in training all of them together."""
    values = torch.stack([term.detach().float() for term in terms.values()])
    bad = (~values.isfinite()).float()
    # validation batches may differ in number between processes: no talk there, who stops ends the others
    bad = sum_over_ranks(bad) if trainer.training else bad
    if not bad.any():
        return
    index = int(bad.nonzero()[0])
    known = last_checkpoint(trainer) if trainer.training else SAME_WEIGHTS
    _refuse(list(terms)[index], values[index].item(), trainer.global_step, known)


SAME_WEIGHTS = "a checkpoint of this step holds the same weights"
"""In a validation: the newest checkpoint, written before it, is no good one."""


def _refuse(name: str, value: float, step: int, checkpoint: str) -> NoReturn:
    found = str(value) if not math.isfinite(value) else "not finite on another process"
    raise UserError(
        f"loss term {name!r} is {found} at step {step}; {checkpoint}; "
        "check the images for NaN, lower lr, or give the term a smaller weight"
    )


class FiniteTerms:
    """`check_finite` of a training run that no step waits for: on a device the first bad term is only noted, and read
    where values are logged and before a checkpoint is written."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._first: Tensor | None = None  # step, index and value of the first bad term; no step is -1

    def note(self, terms: dict[str, Tensor], trainer: L.Trainer) -> None:
        """Look at a batch's terms: on a CPU at once. All processes must call this together."""
        if not runs_behind(next(iter(terms.values())).device):
            check_finite(terms, trainer)
            return
        if list(terms) != self._names:
            self.read(trainer)
            self._names = list(terms)
        values = torch.stack([term.detach().float() for term in terms.values()])
        bad = sum_over_ranks((~values.isfinite()).float())
        index = bad.argmax()
        value = values.gather(0, index[None])[0]
        now = torch.stack([torch.full_like(value, trainer.global_step), index.float(), value]).double()
        first = torch.full_like(now, -1) if self._first is None else self._first
        self._first = torch.where((bad.sum() > 0) & (first[0] < 0), now, first)
        if logs_now(trainer):
            self.read(trainer)

    def read(self, trainer: L.Trainer) -> None:
        """Raise `UserError` where a term was not finite."""
        step, index, value = (-1.0, 0.0, 0.0) if self._first is None else self._first.tolist()
        if step >= 0:
            _refuse(self._names[int(index)], value, int(step), last_checkpoint(trainer))


def last_checkpoint(trainer: L.Trainer) -> str:
    """Where the run can be taken up again, in words: the newest file that any of its callbacks wrote."""
    callbacks: Any = trainer.checkpoint_callbacks
    paths = [getattr(each, name, "") for each in callbacks for name in ("last_model_path", "best_model_path")]
    newest = max(filter(None, paths), key=_written_at, default=None)
    return "no checkpoint was written before it" if newest is None else f"the last good checkpoint is {newest}"


def _written_at(path: str) -> int:
    """When a file was written; those that are no local ones are taken to be the oldest."""
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0


def check_weights(checkpoint: dict[str, Any]) -> None:
    """Refuse to write weights, averages or moments that a gradient which was not finite has spoiled."""
    for part in ("state_dict", "current_model_state"):
        for name, tensor in checkpoint.get(part, {}).items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"weight {name} is not finite at step {checkpoint['global_step']}, though the loss was: no "
                    "checkpoint of it is written, the one before stays; lower lr or set model.gradient_clip_val"
                )
    for index, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for number, moments in optimizer["state"].items():
            for name, moment in moments.items():
                if isinstance(moment, Tensor) and not moment.isfinite().all():
                    raise UserError(
                        f"{name} of parameter {number} of optimizer {index} is not finite at step "
                        f"{checkpoint['global_step']}: that parameter would never move again; no checkpoint of it is "
                        "written, the one before stays; lower lr or set model.gradient_clip_val"
                    )


@rank_zero_only
def warn_of_poor_data(trainer: L.Trainer, tokenizer: MultiScaleTokenizer, image_B3HW: Tensor) -> None:
    """Of data that no tokenizer learns much from: constant first images, a single one, fewer tokens than codes."""
    if bool((image_B3HW.amax((2, 3)) == image_B3HW.amin((2, 3))).all()):
        log.warning(
            f"images: all {len(image_B3HW)} of the first batch are of one color each; "
            "a tokenizer learns nothing from them: check the data if this is not meant"
        )
    images, loader = run_data(trainer).train_samples, cast(Any, trainer.train_dataloader)
    if images is None:
        try:
            images = len(loader.dataset)
        except (AttributeError, TypeError):  # the data does not say
            return
    if images == 1:
        log.warning("data: a single training image; the tokenizer will know this one alone, add images")
    tokens = images * tokenizer.pyramid.num_tokens
    if tokens < tokenizer.vocab_size:
        log.warning(
            f"vocab_size {tokenizer.vocab_size}: {images} training images have only {tokens} tokens and cannot use all "
            "codes; take a smaller vocab_size or more images"
        )
