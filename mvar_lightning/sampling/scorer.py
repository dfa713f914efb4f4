"""A network that tells how much a half-made latent map looks like a real one: LSRS's scorer (arXiv 2512.03796).

    S(f_hat after a scale, class, scale): convolutions halve the map down to 2 x 2, class and scale are embedded, an MLP
    gives one number. It is trained by `training.scorer`, saved as safetensors and JSON, and belongs to one tokenizer.

N maps, Z code dim, hw latent map.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvar_lightning.checkpoints.assign import check_fit, fill, on_meta, shapes_of
from mvar_lightning.checkpoints.folder import CONFIG, crc32_of, saved_in
from mvar_lightning.checkpoints.record import FORMAT, LIBRARY, SLACK
from mvar_lightning.errors import UserError, check_types
from mvar_lightning.pyramid import ScalePyramid, Scales
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.tools.files import kind_of, read_json, told, write_json, writing_folder
from mvar_lightning.tools.tensors import read_safetensors, safetensors_shapes, write_tensors

KIND, WEIGHTS = "scorer", "scorer.safetensors"
LEAST_SIDE = 2
"""No stage halves a map of this side: the published 16 x 16 end here after three."""

SLOPE = 0.2


class Scorer(nn.Module):
    """S(f_hat, class, scale): of two maps of one class the larger number is to be the more real one's.

    The defaults are the published sizes (about 4M parameters at 256 pixels). Normalization is over channels and places
    of a map together, with a weight for each channel; the paper says LayerNorm and no more.

    Args:
        tokenizer_hash: `fingerprint` of the tokenizer whose maps it has learned.
        scales, code_dim: the tokenizer's.
        num_classes: of the data; one index more is "no class".
        channels: of each stage, two residual blocks that halve the map (not below 2 x 2).
        embedding: length of what stands for a class, and for a scale.
        hidden: widths of the MLP.
        dropout: after each residual block.

    Raises:
        UserError: sizes below 1, or a share outside [0, 1).
    """

    def __init__(
        self,
        tokenizer_hash: str,
        scales: Scales,
        code_dim: int,
        num_classes: int,
        channels: Sequence[int] = (64, 128, 256),
        embedding: int = 128,
        hidden: Sequence[int] = (512, 256, 128),
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        sizes = (code_dim, num_classes, embedding, *channels, *hidden)
        if not channels or not hidden or min(sizes) < 1 or not 0 <= dropout < 1:
            raise UserError(
                f"scorer: channels {list(channels)}, embedding {embedding}, hidden {list(hidden)}, dropout {dropout}; "
                "give sizes of at least 1, one or more of channels and hidden, and a share below 1"
            )
        self.tokenizer_hash, self.pyramid = tokenizer_hash, ScalePyramid(scales)
        self.code_dim, self.num_classes = code_dim, num_classes
        self.config: dict[str, Any] = {
            "scales": self.pyramid.scales,
            "code_dim": code_dim,
            "num_classes": num_classes,
            "channels": list(channels),
            "embedding": embedding,
            "hidden": list(hidden),
            "dropout": dropout,
        }
        (height, width), before, blocks = self.pyramid.shapes[-1], code_dim, []
        for after in channels:
            strides = 2 if height > LEAST_SIDE else 1, 2 if width > LEAST_SIDE else 1
            blocks += [ResidualBlock(before, after, strides, dropout), ResidualBlock(after, after, (1, 1), dropout)]
            height, width, before = -(-height // strides[0]), -(-width // strides[1]), after
        self.stages = nn.Sequential(*blocks)
        self.of_class = nn.Sequential(nn.Embedding(num_classes + 1, embedding), nn.Linear(embedding, embedding))
        self.of_scale = nn.Sequential(nn.Embedding(self.pyramid.num_scales, embedding), nn.Linear(embedding, embedding))
        widths = [before * height * width + 2 * embedding, *hidden]
        layers = [_linear(a, b) for a, b in zip(widths, hidden, strict=False)]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self._known: weakref.ref[MultiScaleTokenizer] | None = None

    def forward(self, f_hat_NZhw: Tensor, label_N: Tensor, scale_N: Tensor) -> Tensor:
        """Scores (N,), float32.

        Args:
            f_hat_NZhw: the quantized latent after the scale.
            label_N: int64; num_classes is "no class".
            scale_N: int64, counted from 0.
        """
        maps = self.stages(f_hat_NZhw).flatten(1)
        return self.head(torch.cat([maps, self.of_class(label_N), self.of_scale(scale_N)], dim=1)).float()[:, 0]

    def check_tokenizer(self, tokenizer: MultiScaleTokenizer) -> None:
        """Raise `UserError` for another tokenizer than its own. One that was looked at is known from then on."""
        if self._known is not None and self._known() is tokenizer:
            return
        if (found := fingerprint(tokenizer)) != self.tokenizer_hash:
            raise UserError(
                f"``selector``: the scorer was trained on maps of tokenizer {self.tokenizer_hash[:12]}, this one is "
                f"{found[:12]}; train one for it (recipes/scorer/)"
            )
        self._known = weakref.ref(tokenizer)

    def digest(self) -> str:
        """Of sizes and weights, 16 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps([self.tokenizer_hash, self.config]).encode())
        for tensor in self.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": None}  # of this process


class ResidualBlock(nn.Module):
    """3x3, norm, LeakyReLU, 3x3, norm, LeakyReLU, 1x1, norm, shortcut, LeakyReLU."""

    def __init__(self, channels_in: int, channels: int, stride: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1),
            nn.GroupNorm(1, channels),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(1, channels),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(channels, channels, 1),
            nn.GroupNorm(1, channels),
        )
        same = stride == (1, 1) and channels_in == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.leaky_relu(self.body(x) + self.shortcut(x), SLOPE))


def _linear(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.LeakyReLU(SLOPE))


# In and out: a folder of config.json and safetensors. Nothing is unpickled.


def save_scorer(path: str | Path, scorer: Scorer) -> None:
    """Write a scorer's folder, whole or not at all; an earlier one is replaced.

    Raises:
        UserError: ``path`` holds something else, or cannot be written.
    """
    path = Path(path)
    with told(path):
        if kind_of(path) == "file" or (kind_of(path) == "folder" and any(path.iterdir()) and not is_scorer(path)):
            raise UserError(f"{path}: holds something else than a scorer; give a new or empty folder")
        with writing_folder(path) as folder:
            write_tensors(folder / WEIGHTS, scorer.state_dict())
            plain = {"library": LIBRARY, "format": FORMAT, "kind": KIND, "tokenizer_hash": scorer.tokenizer_hash}
            write_json(
                folder / CONFIG, {**plain, "scorer": scorer.config, "crc32": {WEIGHTS: crc32_of(folder / WEIGHTS)}}
            )


def is_scorer(path: str | Path) -> bool:
    """Whether a folder, or the ``model/`` of a run's folder, holds a scorer."""
    config = saved_in(Path(path)) / CONFIG
    plain = read_json(config) if kind_of(config) == "file" else None
    return isinstance(plain, dict) and plain.get("kind") == KIND


def load_scorer(path: str | Path) -> Scorer:
    """A scorer on the CPU, in evaluation mode, of a folder that `save_scorer` or a run wrote.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = saved_in(Path(path))
    if not is_scorer(path):
        raise UserError(
            f"``selector`` {path}: no scorer is there; train one (recipes/scorer/), or name a selector that needs "
            "none, such as MostLikely"
        )
    plain = read_json(folder / CONFIG)
    if plain.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG}: format {str(plain.get('format'))[:40]}; this version reads {FORMAT}")
    owner, config, sums = (plain.get(name) for name in ("tokenizer_hash", "scorer", "crc32"))
    if not isinstance(owner, str) or not isinstance(config, dict) or not isinstance(sums, dict):
        raise UserError(f"{folder / CONFIG}: damaged; copy it again, or train the scorer anew")
    shapes = safetensors_shapes(folder / WEIGHTS)
    try:
        check_types(Scorer.__init__, config)
        scorer = on_meta(lambda: Scorer(owner, **config), most=len(shapes) + SLACK)
    except (TypeError, UserError) as error:
        raise UserError(f"{folder / CONFIG}: describes no scorer ({' '.join(str(error).split())[:200]})") from error
    check_fit(shapes, shapes_of(scorer), str(folder))
    if sums.get(WEIGHTS) != crc32_of(folder / WEIGHTS):
        raise UserError(f"{folder / WEIGHTS}: damaged, its content is not what {CONFIG} says; copy it again")
    return fill(scorer, read_safetensors(folder / WEIGHTS), str(folder)).requires_grad_(False)


def shared_scorer(path: str) -> Scorer:
    """The same one as long as its file is the same: a job asks for each batch. Raises `UserError` as `load_scorer`."""
    file = saved_in(Path(path)) / WEIGHTS
    return _shared(path, file.stat().st_mtime_ns if kind_of(file) == "file" else 0)


@lru_cache(maxsize=4)
def _shared(path: str, written: int) -> Scorer:
    return load_scorer(path)
