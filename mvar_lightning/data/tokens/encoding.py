"""Image shards through a tokenizer into a token cache, on any number of devices and machines.

Each process encodes every n-th part and writes it as soon as it is whole, so nothing is sent between processes.

Legend: N rows of a batch, S side of the images, n samples of a part, v views, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvar_lightning.data.images import check_channels
from mvar_lightning.data.index import ShardIndex, read_index
from mvar_lightning.data.reading.loader import StreamLoader, loading
from mvar_lightning.data.reading.place import ShardPlace
from mvar_lightning.data.reading.samples import ImageReader
from mvar_lightning.data.tokens.cache import CacheSettings, TokenCache
from mvar_lightning.data.tokens.making import Rows, Task, TokenJob, Views, ViewStream, content_hash
from mvar_lightning.errors import UserError
from mvar_lightning.tokenizer import MultiScaleTokenizer, fingerprint
from mvar_lightning.tools.compute import evaluating, exact_float32
from mvar_lightning.tools.drawing import normalize
from mvar_lightning.tools.ranks import Ranks

PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class EncodeRequest:
    """What to encode, into which cache, and where to compute it. Only the last four leave the cache as it is.

    Args:
        tokenizer: a loaded one; it is moved to the device, and its mode left as it was.
        data: folder that `mvar shards make` wrote.
        out: new or empty folder, or one to go on with.
        views: of each training image; validation images have one.
        crop: of training images: `random`, `center` or `adm`; validation takes `adm` with `adm`, else `center`.
        flip: mirror every second view.
        resize_ratio: the shorter side becomes round(resize_ratio * image size) before the crop.
        seed: of the crops.
        batch_size: views encoded together.
        precision: of the encoder, `32-true` or `bf16-mixed`.
        accelerator: Lightning's.
        devices, num_nodes: processes of each machine, and machines; those of torchrun or SLURM, else all devices of
            this machine, if not given.
        num_workers: decoding processes of each device; 0 decodes in the process that encodes.

    Raises:
        UserError: a number or a word that cannot be.
    """

    tokenizer: MultiScaleTokenizer
    data: str | Path
    out: str | Path
    views: int = 1
    crop: str = "random"
    flip: bool = False
    resize_ratio: float = 1.125
    seed: int = 0
    batch_size: int = 64
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int | None = None
    num_nodes: int | None = None
    num_workers: int = 2

    def __post_init__(self) -> None:
        for name in ("views", "batch_size", "devices", "num_nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: must be 1 or more")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.num_workers < 0:
            raise UserError(f"num_workers {self.num_workers}: must be 0 (decode in the main process) or more")

    def settings(self, index: ShardIndex) -> CacheSettings:
        """Of the cache that is asked for."""
        ours = ("resize_ratio", "crop", "flip", "views", "seed", "batch_size", "precision")
        return CacheSettings(
            tokenizer_hash=fingerprint(self.tokenizer),
            scales=self.tokenizer.pyramid.sides,
            **{name: getattr(self.tokenizer, name) for name in ("vocab_size", "code_dim", "image_size")},
            data_sha256=content_hash(index),
            val_crop="adm" if self.crop == "adm" else "center",
            **{name: getattr(self, name) for name in ours},
        )

    def ranks(self) -> Ranks:
        """Raises UserError where there are no such devices."""
        name = {"gpu": "cuda"}.get(self.accelerator, self.accelerator)
        gpus = torch.cuda.device_count() if name in ("auto", "cuda") else 0
        if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not gpus):
            there = "auto, cpu or cuda" if gpus else "cpu: there is no usable GPU here"
            raise UserError(f"accelerator {self.accelerator}: choose {there}")
        return Ranks.of("cuda" if gpus else "cpu", self.devices, self.num_nodes, on_its_own=max(1, gpus))


def encode_data(request: EncodeRequest) -> TokenCache | None:
    """Make or complete a token cache, with a progress bar; None on all processes but the first.

    A call that was interrupted, made again, encodes the parts that are missing or damaged. The bytes do not depend on
    the number of devices, processes or workers.

    Raises:
        UserError: no such data, a folder of other tokens, a disk that is full, too many damaged images.
    """
    ranks = request.ranks()
    with ranks.agreed():  # whatever is wrong with settings, data or folder shows before processes start
        stream_of, job = _open(request)
        for task in job.tasks:
            if problem := stream_of([]).reader.place.problem(task.shard):
                raise UserError(f"data {request.data}: shard {problem}; copy it again or make the shards anew")
    ranks.check_same(out=job.folder, **asdict(job.settings))
    ranks.from_first(job.begin)
    ranks.run(_encode_share, request)
    return job.finish() if ranks.is_first else None


def _open(request: EncodeRequest) -> tuple[Callable[[Sequence[Task]], ViewStream], TokenJob]:
    """The rows of some tasks, and the cache in the making."""
    index = read_index(request.data)
    settings = request.settings(index)
    views, job = Views(settings), TokenJob(request.out, settings, index)
    check_channels(index.form.channels, request.tokenizer.image_channels, f"data {request.data}")
    reader = ImageReader(ShardPlace(str(request.data)), 0, views.val, index.num_classes, form=index.form)
    return lambda tasks: ViewStream(reader, views, tasks, len(job.tasks)), job


def _encode_share(ranks: Ranks, request: EncodeRequest) -> None:
    """The parts of this process that are missing."""
    ranks.check_shared(Path(request.out))
    stream_of, job = _open(request)
    device = torch.device(ranks.device)
    request.tokenizer.to(device)
    with ExitStack() as stack:
        stack.enter_context(evaluating(request.tokenizer))
        if device.type == "cpu":  # with more threads, sums could depend on how many there are
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        with ranks.agreed():
            if ranks.is_first:
                stack.enter_context(job.locked())
        stream = stream_of(ranks.share(ranks.from_first(job.todo)))
        with ranks.agreed(), ranks.progress("views", stream.num_views) as advance:
            _encode(job, stream, request, advance)


def _encode(job: TokenJob, stream: ViewStream, request: EncodeRequest, advance: Callable[[int], None]) -> None:
    """Every part of the stream, written when its last rows are encoded. Parts of several workers come interleaved."""
    rows: dict[str, list[np.ndarray]] = {}
    with loading(StreamLoader(stream, min(request.num_workers, len(stream.tasks)))) as items:
        for item in items:
            if isinstance(item, Rows):
                tokens_NL = encode(request.tokenizer, request.precision, item.pixels_N3SS)
                rows.setdefault(item.part, []).append(tokens_NL)
                advance(len(tokens_NL))
            else:
                task, length = item.task, job.settings.num_tokens
                nothing = np.empty((0, length), job.settings.dtype)  # where all images are damaged
                tokens_NL = np.concatenate(rows.pop(task.part, [nothing]))
                tokens_vnL = tokens_NL.reshape(-1, job.settings.views_of(task.split), length).transpose(1, 0, 2)
                job.write(task, tokens_vnL, np.asarray(item.labels, np.int32), tuple(item.damaged))


@torch.no_grad()
def encode(tokenizer: MultiScaleTokenizer, precision: str, pixels_N3SS: Tensor) -> np.ndarray:
    """Tokens (N, L) of uint8 or uint16 pixels. The quantizer computes in float32 in any precision."""
    device = next(tokenizer.parameters()).device
    image_B3HW = normalize(pixels_N3SS.to(device))
    if precision == "32-true":
        with exact_float32(device):  # the encoder's convolutions too: a cache is what every machine would make
            idx_BL = tokenizer.encode(image_B3HW)
    else:
        with torch.autocast(device.type, torch.bfloat16):
            latent_BZhw = tokenizer.latent(image_B3HW)
        idx_BL = tokenizer.quantizer.encode(latent_BZhw.float())
    return idx_BL.cpu().numpy().astype(np.uint32)
