"""Where a model or a tokenizer comes from: a checkpoint of ours, or released files. Light until it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import kind_of
from mvar_lightning.tools.remote import is_url

if TYPE_CHECKING:
    import torch

    from mvar_lightning.pyramid import Scales, Size
    from mvar_lightning.tokenizer import MultiScaleTokenizer
    from mvar_lightning.transformer import NextScaleTransformer


NO_CLASS = -1


@dataclass(frozen=True)
class Source:
    """Where a model is read from: a checkpoint of ours, or a released pair of files.

    Args:
        checkpoint: a run's folder, a saved folder, or a Lightning checkpoint; a path, or an address of one.
        official: else the architecture of released files: ``var``, ``mvar`` or ``markov_var``.
        model, tokenizer: those files.
        untold: what their weights do not tell, keyword arguments of `import_official`.
        refiner, from_scale: a second checkpoint, which draws the scales from this one on, counted from 0 (CoDe).

    Raises:
        UserError: neither of the two, both, a released file missing, or one of the last two alone.
    """

    checkpoint: str | None = None
    official: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    untold: dict[str, Any] = field(default_factory=dict)
    refiner: str | None = None
    from_scale: int | None = None

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.official is None):
            raise UserError("model: give either ``checkpoint`` PATH or ``official`` var|mvar|markov_var with its files")
        if self.official is not None and (self.model is None or self.tokenizer is None):
            raise UserError(f"``official`` {self.official}: give both files, ``model`` FILE and ``tokenizer`` FILE")
        if (self.refiner is None) != (self.from_scale is None):
            raise UserError("``refiner`` CHECKPOINT and ``from_scale`` N: go together; give both or none")

    @property
    def path(self) -> str:
        """The checkpoint, or the released transformer: what reports name."""
        return str(self.checkpoint or self.model)

    def inside_run(self) -> Source:
        """The same; of a run's folder the model in it."""
        if (
            self.checkpoint is None
            or is_url(self.checkpoint)
            or kind_of(Path(self.checkpoint) / "model" / "config.json") != "file"
        ):
            return self
        return replace(self, checkpoint=str(Path(self.checkpoint) / "model"))

    def class_names(self) -> Sequence[str]:
        """Names of the model's classes by index, as far as its checkpoint tells them; ImageNet's of released files."""
        from mvar_lightning.checkpoints.classes import imagenet_classes
        from mvar_lightning.checkpoints.folder import open_checkpoint

        if self.checkpoint is None:
            return imagenet_classes()
        return open_checkpoint(self.checkpoint, whole=False).record.class_names

    def load(self, device: torch.device) -> tuple[NextScaleTransformer, MultiScaleTokenizer]:
        """The pair on ``device``. Raises `UserError` for a missing, damaged or unsuitable file."""
        from mvar_lightning import checkpoints

        if self.checkpoint is not None:
            model, tokenizer = checkpoints.load(self.checkpoint, device)
            if model is None:
                raise UserError(f"checkpoint {self.checkpoint}: holds a tokenizer alone; give one of a trained model")
            return model, tokenizer
        files = str(self.model), str(self.tokenizer)  # neither is None: it was looked at above
        model, tokenizer = checkpoints.import_official(*files, str(self.official), **self.untold)
        return model.to(device), tokenizer.to(device)


def beside(checkpoint: str | Path, name: str = "evaluation") -> Path:
    """Where what is made of a checkpoint goes: in a run's folder, beside anything else."""
    if is_url(checkpoint):  # nothing is written there
        return Path(name) / str(checkpoint).rstrip("/").rpartition("/")[2]
    checkpoint = Path(checkpoint)
    return (checkpoint if kind_of(checkpoint / "model") == "folder" else checkpoint.parent) / name


def open_tokenizer(
    path: str | Path, patch_nums: Scales | None = None, image_size: Size | Sequence[int] | None = None
) -> MultiScaleTokenizer:
    """A tokenizer from a run's folder, any checkpoint of the suite, or a released file.

    Args:
        path: of the folder or file. Of a next-scale model's checkpoint the tokenizer in it is taken.
        patch_nums: scales of a released file, which does not tell them.
        image_size: where they are not given either, the published ones for this size (256 if not given).

    Raises:
        UserError: no such file, one that holds no tokenizer, or one for images of another size than ``image_size``.
    """
    from mvar_lightning import checkpoints
    from mvar_lightning.checkpoints.folder import located
    from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid, as_size, short, times

    wanted = as_size(256 if image_size is None else image_size)
    if wanted is None:
        raise UserError(f"``image_size`` {image_size!r}: give the side of square images in pixels, or [height, width]")
    path = Path(located(path))
    if checkpoints.is_released(path):
        published = PUBLISHED_SIDES.get(wanted) if isinstance(wanted, int) else None
        if patch_nums is None and published is None:
            raise UserError(
                f"``image_size`` {short(wanted)}: published scales are known for "
                f"{', '.join(map(str, PUBLISHED_SIDES))}; give ``patch_nums``"
            )
        tokenizer = checkpoints.import_tokenizer(path, ScalePyramid(patch_nums or published or ()))
    elif patch_nums is not None:
        raise UserError("``patch_nums``: only released files (.pth) need it; this checkpoint tells its own")
    else:
        tokenizer = checkpoints.load_tokenizer(path)
    size = tokenizer.image_size
    if image_size is not None and wanted != size:
        raise UserError(
            f"``image_size`` {short(wanted)}: this tokenizer takes images of {times(size)}; leave the option out"
        )
    return tokenizer
