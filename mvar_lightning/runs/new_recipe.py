"""`mvar recipe new`: a tokenizer's and a model's recipe that fit a data set, and say why they are as they are."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mvar_lightning.data.index import read_index
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import PUBLISHED_SIDES, Size, as_written, height_width, short, size_of, times
from mvar_lightning.tools.files import write

MODELS = {"var": "VARModule", "mvar": "MVARModule", "markov_var": "MarkovVARModule"}


@dataclass(frozen=True)
class Fit:
    """What is chosen for a data set, and why.

    Args:
        shape: of the images in pixels: the side, or (height, width).
        images: of the training part.
        gpu: whether the machine has one.
    """

    shape: Size
    images: int
    gpu: bool

    @property
    def size(self) -> int:
        """The shorter side, by which all is chosen."""
        return min(height_width(self.shape))

    @property
    def downsampling(self) -> int:
        """Pixels of a side for one token: 16 as published, less where the map would have less than 7 tokens a side."""
        own = 4 if self._divides(4) and self.size >= 16 else 2
        return next((d for d in (16, 8, 4) if self._divides(d) and self.size // d >= 7), own)

    def _divides(self, pixels: int) -> bool:
        return all(side % pixels == 0 for side in height_width(self.shape))

    @property
    def scales(self) -> list[Size]:
        """Of squares `sides`; of others a single token, then maps with the last one's proportions and those shorter
        sides."""
        if isinstance(self.shape, int):
            return list(self.sides)
        factors = [side / self.size for side in self.shape]
        return list(
            dict.fromkeys([1, *(size_of(*(round(side * factor) for factor in factors)) for side in self.sides)])
        )

    @property
    def sides(self) -> list[int]:
        """The published ones where there are any, else 1 to 6 and then some 1.27 times as many each."""
        last = self.size // self.downsampling
        published = next((sides for sides in PUBLISHED_SIDES.values() if sides[-1] == last), None)
        if published:
            return list(published)
        sides = [side for side in (1, 2, 3, 4, 5, 6) if side < last]
        while round(sides[-1] * 1.27) < last and sides[-1] >= 6:
            sides.append(round(sides[-1] * 1.27))
        if len(sides) > 2 and last - sides[-1] == 1 and sides[-1] >= 6:
            sides.pop()  # a map almost as large as the last adds tokens and nothing to see
        return [*sides, last]

    @property
    def tokens(self) -> int:
        return sum(math.prod(height_width(scale)) for scale in self.scales)

    @property
    def batch(self) -> int:
        """Images of a step: as many as some 6,500 tokens (CPU) or 45,000 (GPU), a power of two from 8 to 256; at most a
        quarter of a small set."""
        wanted = max(8.0, (45_000 if self.gpu else 6_500) / self.tokens)
        return next(b for b in (256, 128, 64, 32, 16, 8, 4, 2, 1) if b <= min(wanted, max(1.0, self.images / 4)))

    @property
    def depth(self) -> int:
        """By the number of images: a deeper model would learn a small set by heart."""
        return next(depth for most, depth in ((20_000, 4), (200_000, 8), (float("inf"), 16)) if self.images < most)

    @property
    def width(self) -> int:
        return {4: 128, 8: 512, 16: 1024}[self.depth]

    @property
    def vocab(self) -> int:
        return 512 if self.size < 64 else 1024 if self.size < 256 else 4096

    def epochs(self, seen: int) -> int:
        """Enough to see so many images, from 1 to 400."""
        return min(400, max(1, round(seen / self.images)))


def write_recipes(data: str, size: Size, model: str = "mvar", out: str | Path | None = None) -> list[Path]:
    """Write ``tokenizer.yaml`` and the model's recipe into a folder named after the data set.

    Args:
        data: a shard folder.
        size: of the images in pixels: the side, or (height, width).
        model: ``var``, ``mvar`` or ``markov_var``.
        out: ``recipes/`` and the data set's name if not given.

    Raises:
        UserError: no shards there, a size that no scales fit, or recipes that are there already.
    """
    import torch

    if model not in MODELS:
        raise UserError(f"``model`` {model}: unknown; choose one of {', '.join(MODELS)}")
    sides = height_width(size)
    if min(sides) < 8 or any(side % 2 for side in sides) or max(sides) > 1024:
        raise UserError(
            f"``size`` {short(size)}: give an even number of pixels from 8 to 1024 (a multiple of 16 from 112 on), or "
            "height and width such as 16x32"
        )
    if min(sides) >= 112 and any(side % 16 for side in sides):
        near = short(size_of(*(round(side / 16) * 16 for side in sides)))
        raise UserError(f"``size`` {short(size)}: give a multiple of 16, such as {near}")
    index = read_index(data)
    images = index.split("train").samples
    name = re.sub(r"\W+", "_", Path(data.rstrip("/")).name) or "own"
    folder = Path("recipes") / name if out is None else Path(out)
    files = {folder / "tokenizer.yaml": _tokenizer, folder / f"{model}.yaml": _model}
    for file in files:
        if file.exists():
            raise UserError(f"{file}: is there already; remove it, or name another folder with ``out``")
    fit = Fit(size, images, torch.cuda.is_available())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            write(file, text(fit, data, index.num_classes, folder, model))
    except OSError as error:
        raise UserError(f"``out`` {folder}: cannot be written ({error.strerror}); choose another") from error
    return list(files)


def _head(fit: Fit, what: str, file: Path, classes: int) -> str:
    machine = "one GPU" if fit.gpu else f"{os.cpu_count()} CPU cores"
    return f"""# {what} on {fit.images:,} training images of {classes} classes, {times(fit.shape)} pixels.
# Written by `mvar recipe new` for {machine}; nothing here was measured: `mvar plan {file}` and
# `mvar train {file} --rehearse` say what it takes.
seed_everything: 0
"""


def _tokenizer(fit: Fit, data: str, classes: int, folder: Path, model: str) -> str:
    halvings = fit.downsampling.bit_length() - 1
    multipliers = [1, 1, 2, 2, 4][: halvings + 1] if fit.size >= 256 else [1, *[2] * halvings]
    large = fit.size >= 256
    pixels, last = short(fit.shape), short(fit.scales[-1])
    return f"""{_head(fit, "Tokenizer", folder / "tokenizer.yaml", classes)}
model:
  class_path: mvar_lightning.TokenizerModule
  init_args:
    scales: {[*map(as_written, fit.scales)]}    # {fit.tokens} tokens; {pixels} pixels by {fit.downsampling} are {last}
    vocab_size: {fit.vocab}                 # grows with the pixels: 512 below 64, 4096 from 256 on (published)
    code_dim: {32 if large else 8 if fit.size < 64 else 16}
    channels: {160 if large else 16 if fit.size < 64 else 64}
    channel_multipliers: {multipliers}     # halved {halvings} times
    num_res_blocks: {2 if large else 1}
    norm_groups: {32 if large else 8}
    lr: {"1.0e-4" if large else "4.0e-3" if fit.size < 64 else "1.0e-3"}
    losses:
      - class_path: mvar_lightning.L1Loss
      - class_path: mvar_lightning.L2Loss
      - class_path: mvar_lightning.QuantizerLoss
      - class_path: mvar_lightning.EntropyLoss        # every scale uses all codes
        init_args: {{weight: 0.1}}
    remedies:
      - class_path: mvar_lightning.DataDependentInit  # codes start where the residuals are
      - class_path: mvar_lightning.DeadCodeRestart    # and come back there once nobody takes them

data:
  class_path: mvar_lightning.ShardsDataModule
  init_args:
    path: {data}
    image_size: {as_written(fit.shape)}
    batch_size: {fit.batch}             # some {fit.batch * fit.tokens:,} tokens a step
    num_workers: {4 if fit.gpu else 0}

trainer:
  max_epochs: {fit.epochs(180_000)}              # some 180,000 images seen
  num_sanity_val_steps: 0
  log_every_n_steps: 20
  callbacks:
    - class_path: mvar_lightning.callbacks.EMA
      init_args: {{decay: 0.999}}
    - class_path: mvar_lightning.callbacks.ReconstructionMetrics
      init_args: {{every_n_epochs: {fit.epochs(180_000)}}}
    - class_path: mvar_lightning.callbacks.ReconstructionGrid
    - class_path: mvar_lightning.callbacks.ReconstructionStrips
"""


def _model(fit: Fit, data: str, classes: int, folder: Path, model: str) -> str:
    kernel, last = next(((k, 2) for k in (7, 5) if fit.sides[-2] >= k), (3, 1))
    neighborhood = f"""    attention:
      class_path: mvar_lightning.SpatialAttention
      init_args: {{kernel_size: {kernel}, scales: {last}}}       # neighborhoods at the last scales, as published
"""
    lr, gamma = {4: ("8.0e-3", "1.0e-1"), 8: ("1.0e-3", "1.0e-2"), 16: ("1.0e-4", "1.0e-3")}[fit.depth]
    head = _head(fit, MODELS[model].removesuffix("Module"), folder / f"{model}.yaml", classes)
    epochs = fit.epochs(240_000)
    return f"""{head}tokenizer_recipe: tokenizer.yaml     # beside this one; trained first where it is missing

model:
  class_path: mvar_lightning.{MODELS[model]}
  init_args:
    tokenizer: runs/{folder.name}/tokenizer/model
    depth: {fit.depth}                      # by {fit.images:,} images: 4 below 20,000, 8 below 200,000, else 16
    width: {fit.width}
    heads: {max(4, fit.width // 64)}
{neighborhood if model == "mvar" else ""}    drop_path: 0.0
    base_lr: {lr}               # at a batch of 256; {fit.batch} here
    gamma_init: {gamma}
    top_k: null
    top_p: null

data:
  class_path: mvar_lightning.ShardsDataModule
  init_args:
    path: {data}
    image_size: {as_written(fit.shape)}
    batch_size: {fit.batch}             # some {fit.batch * fit.tokens:,} tokens a step
    num_workers: {4 if fit.gpu else 0}

trainer:
  max_epochs: {epochs}              # some {epochs * fit.images:,} images seen
  check_val_every_n_epoch: {max(1, epochs // 8)}
  num_sanity_val_steps: 0
  gradient_clip_val: 2.0
  log_every_n_steps: 20
  callbacks:
    - class_path: mvar_lightning.callbacks.EMA
      init_args: {{decay: 0.998}}
    - class_path: mvar_lightning.callbacks.SampleMetrics
      init_args: {{every_n_epochs: {epochs}}}
    - class_path: mvar_lightning.callbacks.SampleGrid
    - class_path: mvar_lightning.callbacks.CoarseToFine
"""
