"""What the page asks for: values from JSON, checked before anything is computed; the same as commands and as Python."""

from __future__ import annotations

import base64
import binascii
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TypeVar

from PIL import Image

from mvar_lightning.checkpoints.source import NO_CLASS
from mvar_lightning.data.images import ImageError, decode, form_of, open_image
from mvar_lightning.demo.shelf import Shown
from mvar_lightning.errors import UserError, check_types
from mvar_lightning.sampling.class_choice import class_indices
from mvar_lightning.sampling.draws import NUM_SEEDS
from mvar_lightning.sampling.guidance import named_schedule
from mvar_lightning.sampling.jobs import Job, list_jobs
from mvar_lightning.sampling.sampler import SamplingSettings
from mvar_lightning.tools.compute import choose_device

MOST_IMAGES = 16
"""Of one answer: a batch of `mvar sample`."""

UPLOAD_BYTES, UPLOAD_PIXELS = 16 * 2**20, 16_000_000
"""Of a picture: most photographs are below both."""

MOST_VALUES = 2**15
"""In a request: tokens above all, of which 1024 pixels have some ten thousand."""

COMPARED = 4
"""Models side by side, at most."""

A = TypeVar("A")


@dataclass(frozen=True)
class Sampled:
    """Which images of one class of a model: the page's form.

    Args:
        model, precision: as of `Shelf.get`.
        label: index or name of a class, or ``none``.
        count, seed, cfg, guidance, top_k, top_p, temperature, more_smooth: as of `mvar sample`; a top_k of 0 is off.
        guided_scales: first and last scale that are guided; empty means all.
        grow: show the images after each scale while they are made.

    Raises:
        UserError: a value out of range.
    """

    model: str
    precision: str = ""
    label: str = "0"
    count: int = 4
    seed: int = 0
    cfg: float = 1.5
    guidance: str = "linear"
    guided_scales: list[int] = field(default_factory=list)
    top_k: int = 900
    top_p: float = 0.96
    temperature: float = 1.0
    more_smooth: bool = False
    grow: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_IMAGES:
            raise UserError(f"count {self.count}: must be from 1 to {MOST_IMAGES}")
        if not 0 <= self.seed < NUM_SEEDS:
            raise UserError(f"seed {self.seed}: must be a whole number from 0 to {NUM_SEEDS - 1}")
        if len(self.guided_scales) not in (0, 2):
            raise UserError("guided scales: give the first and the last one, or none")
        self.settings()

    def settings(self) -> SamplingSettings:
        """How tokens are chosen."""
        scales = (self.guided_scales[0], self.guided_scales[1]) if self.guided_scales else None
        schedule = named_schedule(self.cfg, self.guidance, scales)
        return SamplingSettings(schedule, self.top_k or None, self.top_p, self.temperature, self.more_smooth)

    def jobs(self, shown: Shown) -> list[Job]:
        """The class and the seed of each image, as `mvar sample` has them. Raises `UserError` for no such class."""
        return list_jobs([class_of(self.label, shown)], self.count, self.seed)

    def flags(self) -> list[str]:
        """The options of `mvar sample` and `mvar edit` that differ from their defaults."""
        default = Sampled(model="")
        names = ("count", "seed", "cfg", "guidance", "guided_scales", "top_k", "top_p", "temperature", "more_smooth")
        flags: list[str] = []
        for name in names:
            value = getattr(self, name)
            if name == "count" or value != getattr(default, name):
                flags.append(f"--{name.replace('_', '-')}")
                flags += [] if value is True else ["-".join(map(str, value)) if isinstance(value, list) else f"{value}"]
        return flags


@dataclass(frozen=True)
class Edited(Sampled):
    """A picture of the model's size, painted anew where the mask is white (or, out-painting, where it is black).

    Args:
        image, mask: PNG, JPEG or WebP in base64.
    """

    image: str = ""
    mask: str = ""
    outpaint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision.startswith("int"):
            raise UserError(f"precision {self.precision[:80]}: edits are made in 32 or bf16")


@dataclass(frozen=True)
class Compared(Sampled):
    """The same images of several models; ``model`` and ``precision`` are the first's.

    Args:
        others: names of the other models.
        precisions: of each of them.
    """

    others: list[str] = field(default_factory=list)
    precisions: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.others) == len(self.precisions) < COMPARED:
            raise UserError(f"compare: give two to {COMPARED} models, each with its precision")

    def each(self) -> list[tuple[str, str]]:
        """Name and precision of every model."""
        return [(self.model, self.precision), *zip(self.others, self.precisions, strict=True)]


@dataclass(frozen=True)
class Masked:
    """Who may see whom under a model's strategy."""

    model: str


@dataclass(frozen=True)
class Tokens:
    """The tokens of a picture, or of tokens that are known already, scale by scale."""

    model: str
    precision: str = ""
    image: str = ""
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Attention:
    """Where token number ``query`` of an image looks."""

    model: str
    precision: str = ""
    tokens: list[int] = field(default_factory=list)
    label: str = "none"
    query: int = 0


def class_of(label: str, shown: Shown) -> int:
    """The one class that a text names, by index or name; `NO_CLASS` for ``none``. Raises `UserError` for another."""
    label, names = label.strip()[:200], shown.class_names
    if label in names and not label.isdecimal():  # a name may hold commas, which lists of classes have between them
        return names.index(label)
    if label != "none" and not re.fullmatch(r"\d+(-\d+)?", label):  # in words of the page, which has no options
        named = f", or a name: {', '.join(names[:5])}, ..." if names else ""
        last = shown.model.num_classes - 1
        raise UserError(f"class {label!r}: is not known; give none, an index from 0 to {last}{named}")
    chosen = class_indices(label, shown.model.num_classes)
    if len(chosen) != 1:
        raise UserError(f"class {label!r}: give one class")
    return chosen[0]


def parse(kind: type[A], content: object) -> A:
    """A request from JSON. Raises `UserError` for what is no such request, in one line."""
    if not isinstance(content, dict):
        raise UserError("request: must be a JSON object")
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(str(name)[:40] for name in content.keys() - known):
        raise UserError(f"request: {unknown[0]!r} is no part of it")
    check_types(kind.__init__, content)
    try:
        return kind(**content)
    except TypeError as error:
        raise UserError(f"request: {error}") from error


def decode_picture(data: bytes, channels: int = 3, what: str = "picture", side: int | None = None) -> Image.Image:
    """An uploaded picture, upright, of so many channels; where it is far larger than ``side`` it comes smaller.
    Raises `UserError` for one that is none, or too large."""
    if len(data) > UPLOAD_BYTES:
        raise UserError(f"{what}: {len(data):,} bytes; at most {UPLOAD_BYTES:,} are taken")
    try:
        width, height = open_image(data).size  # of the header alone: a bomb is told before it is opened
        if width * height > UPLOAD_PIXELS:
            raise UserError(f"{what}: {width} x {height} pixels; at most {UPLOAD_PIXELS:,} are taken")
        return decode(data, form_of(data, channels), side, side)
    except ImageError as error:
        raise UserError(f"{what}: {error}") from error


def from_base64(text: str, what: str, channels: int = 3) -> Image.Image:
    """The same of base64. Raises `UserError` as `decode_picture`."""
    if not text:
        raise UserError(f"{what}: is missing; upload one, or take a sample")
    try:
        return decode_picture(base64.b64decode(text, validate=True), channels, what)
    except (binascii.Error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what}: is no base64") from error


# The same images elsewhere: a command line, and lines of Python.


def command_of(asked: Sampled, shown: Shown, jobs: Sequence[Job]) -> str:
    """The command that makes the same files."""
    options = _model_flags(shown)
    if isinstance(asked, Edited):
        options += ["--image", "picture.png", "--mask", "mask.png", *(["--outpaint"] if asked.outpaint else [])]
        return shlex.join(["mvar", "edit", *options, "--class", _class(jobs), *asked.flags()])
    return shlex.join(["mvar", "sample", *options, "--classes", _class(jobs), *asked.flags()])


def python_of(asked: Sampled, shown: Shown, jobs: Sequence[Job]) -> str:
    """Python lines that make the same images."""
    settings = asked.settings()
    given = {"cfg": settings.guidance, **{n: getattr(settings, n) for n in ("top_k", "top_p", "temperature")}}
    default = SamplingSettings().arguments()
    changed = [f"{name}={value!r}" for name, value in given.items() if value != default[name]]
    changed += ["more_smooth=True"] if settings.more_smooth else []
    first, last = jobs[0].seed, jobs[-1].seed
    seeds = f"range({first}, {last + 1})" if last - first == len(jobs) - 1 else str([job.seed for job in jobs])
    words = ", ".join([f"{jobs[0].label}", *changed, f"seeds={seeds}"])
    job, before, more = "generate", "", []
    if isinstance(asked, Edited):
        job, before = "edit", "image_13HW, mask_HW, "
        more = [
            "from mvar_lightning.sampling.editing import as_mask, open_picture, to_window",
            'picture = open_picture("picture.png", tokenizer.image_channels)',
            "image_13HW = to_window(picture, tokenizer.image_size)",
            f'mask_HW = as_mask(open_picture("mask.png"), tokenizer, outpaint={asked.outpaint})',
        ]
    guide = type(settings.guidance).__name__
    extra = [f"from mvar_lightning.sampling import {guide}"] if any(c.startswith("cfg=") for c in changed) else []
    quantized = [f"mvar_lightning.quantize(model, {shown.precision!r})"] if shown.precision.startswith("int") else []
    imports = ["import mvar_lightning"] if quantized else []
    device = ', "cuda"' if shown.device.type == "cuda" else ""
    lines = [*imports, f"from mvar_lightning import {job}, load", *extra, *more[:1]]
    lines += [f"model, tokenizer = load({shown.path!r}{device})", *quantized, *more[1:]]
    call = f"images = {job}(model, tokenizer, {before}{words}).images"
    if shown.autocast == "bf16":
        lines = ["import torch", *lines, f'with torch.autocast("{shown.device.type}", torch.bfloat16):']
        call = f"    {call}"
    return "\n".join([*lines, call])


def _model_flags(shown: Shown) -> list[str]:
    flags = ["--checkpoint", shown.path]
    if shown.device != choose_device("auto"):
        flags += ["--device", shown.device.type]
    if shown.precision.startswith("int"):
        return [*flags, "--quantize", shown.precision]
    default = "bf16" if shown.device.type == "cuda" else "32"
    return flags + ([] if shown.precision == default else ["--precision", shown.precision])


def _class(jobs: Sequence[Job]) -> str:
    return "none" if jobs[0].label == NO_CLASS else str(jobs[0].label)
