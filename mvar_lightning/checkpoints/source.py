"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

    from mvar_lightning.tokenizer import MultiScaleTokenizer
    from mvar_lightning.transformer import NextScaleTransformer


NO_CLASS = -1


@dataclass(frozen=True)
class Source:
    """Where a model is read from: a checkpoint of ours, or a released pair of files."""

    checkpoint: str | None
    official: str | None
    model: str | None
    tokenizer: str | None
    untold: dict[str, Any] = field(default_factory=dict)

    def load(self, device: torch.device) -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
        """The pair on ``device``. Raises `UserError` for a missing, damaged or unsuitable file."""
        from mvar_lightning import checkpoints

        if self.checkpoint is not None:
            model, tokenizer = checkpoints.load(self.checkpoint, device)
            if model is None:
                raise UserError(f"checkpoint {self.checkpoint}: holds a tokenizer alone; give one of a trained model")
            return model, tokenizer
        assert self.model is not None and self.tokenizer is not None and self.official is not None
        model, tokenizer = checkpoints.import_official(self.model, self.tokenizer, self.official, **self.untold)
        return model.to(device), tokenizer.to(device)


def open_tokenizer(
    path: str | Path, patch_nums: Sequence[int] | None = None, image_size: int | None = None
) -> MultiScaleTokenizer:
    """A tokenizer from a run's folder, any checkpoint of the suite, or a released file.

    Args:
        path: of the folder or file. Of a next-scale model's checkpoint the tokenizer in it is taken.
        patch_nums: scales of a released file, which does not tell them.
        image_size: where they are not given either, the published ones for this size (256 if not given).

    Raises:
        UserError: no such file, or one that holds no tokenizer.
    """
    from mvar_lightning.checkpoints.folder import is_released, load_tokenizer

    path = Path(path)
    if is_released(path):
        return _released(path, patch_nums, image_size)
    if patch_nums is not None:
        raise UserError("--patch-nums: only released files (.pth) need it; this checkpoint tells its own")
    return load_tokenizer(path)


def _released(path: Path, patch_nums: Sequence[int] | None, image_size: int | None) -> MultiScaleTokenizer:
    from mvar_lightning.checkpoints.official import import_tokenizer
    from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid

    size = 256 if image_size is None else image_size
    if patch_nums is None and size not in PUBLISHED_SIDES:
        raise UserError(
            f"--image-size {size}: published scales are known for {', '.join(map(str, PUBLISHED_SIDES))}; "
            "give --patch-nums"
        )
    return import_tokenizer(path, ScalePyramid(patch_nums or PUBLISHED_SIDES[size]))
