"""`plan`: what a recipe will take, before anything of it is there: memory by part, steps, disk, files, and whether it
fits its card. Sizes come from the meta device; no weights and no data are read.

Bytes follow from a table of what was counted (`KEPT`), not from a run: what a card says is the last word.
B batch, L tokens, C width, V vocabulary, P parameters, S image side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning.attention.backends import choose_backend
from mvar_lightning.attention.strategies import SpatialAttention
from mvar_lightning.errors import UserError
from mvar_lightning.pyramid import PUBLISHED_SIDES, ScalePyramid, as_size
from mvar_lightning.runs.bounds import import_class, made_of, object_of
from mvar_lightning.runs.run import read_recipe
from mvar_lightning.training.memory import ADAMW, CACHE_BYTES, KEPT, WEIGHTS, Shape, cache_of_image

if TYPE_CHECKING:
    from mvar_lightning.runs.recipe import SuiteCLI

SHARE = 0.9
"""Of a card's memory: the rest is the context's, and lost between blocks."""
IMAGENET = {"train": 1_281_167, "val": 50_000}
DRIVER = Path("/dev/nvidiactl")
"""There where a driver for NVIDIA's cards is loaded."""
ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)[a-z]?$")
CARD = re.compile(r"(\d+(?:\.\d+)?) ?GB")


@dataclass
class Plan:
    """What a recipe takes. Bytes are of one device; numbers that cannot be known are None."""

    recipe: Path
    shape: Shape
    card: float
    images: int | None
    epochs: int | None
    steps: int | None
    checkpoint_bytes: float
    missing: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.shape.peak() <= SHARE * self.card

    def ways(self) -> Iterator[str]:
        """Changes that would make it fit, the cheapest first; each alone with the batch that it allows."""
        first = "compile_blocks: true" if self.shape.blocks and not self.shape.compiled else ""
        compiled = replace(self.shape, compiled=True) if self.shape.blocks else self.shape
        changes = [("", self.shape), (first, compiled)]
        if compiled.auto_tokens < compiled.group_tokens:
            changes.append(("scale_groups: auto", replace(compiled, group_tokens=compiled.auto_tokens)))
        if compiled.blocks and not compiled.checkpointed:
            changes.append(("checkpoint_activations: true", replace(compiled, checkpointed=True)))
        for n, (words, shape) in enumerate(changes):
            if n == 1 and not first:
                continue
            words = ", ".join(filter(None, (first if n > 1 else "", words)))
            while shape.peak() > SHARE * self.card and shape.batch > 1 and shape.batch % 2 == 0:
                shape = replace(shape, batch=shape.batch // 2, accumulated=shape.accumulated * 2)
            if shape != self.shape and shape.peak() <= SHARE * self.card:
                batch = f"batch_size {shape.batch}, accumulate_grad_batches {shape.accumulated}"
                yield ", ".join(filter(None, (words, "" if shape.batch == self.shape.batch else batch)))

    def check(self) -> None:
        """Raise `UserError` where the card is too small, with what would fit."""
        if not self.fits:
            ways = "; or ".join(self.ways()) or "more processes with mvar_lightning.training.FullySharded"
            raise UserError(
                f"recipe {self.recipe}: needs about {self.shape.peak() / 1e9:.0f} GB on each device, over {SHARE:.0%} "
                f"of {self.card / 1e9:.0f} GB; would fit: {ways}"
            )

    def rows(self) -> list[tuple[str, str]]:
        """The table that `mvar plan` prints."""
        shape, gb = self.shape, lambda number: f"{number / 1e9:,.1f} GB"
        batch = f"{shape.batch} x {shape.processes} x {shape.accumulated}"
        of_epochs = "?" if self.images is None or self.epochs is None else f"{self.images * self.epochs:,}"
        rows = [
            ("parameters", f"{shape.parameters:,}"),
            ("batch, devices, accumulated", f"{batch} = {shape.batch * shape.processes * shape.accumulated}"),
            ("steps", "?" if self.steps is None else f"{self.steps:,}"),
            ("samples", f"{of_epochs} in {self.epochs} epochs" if self.epochs else of_epochs),
            *((name, gb(number)) for name, number in shape.state().items() if number),
            *((f"{name} (the largest counts)", gb(number)) for name, number in shape.phases().items() if number),
            ("peak of a device", gb(shape.peak())),
            *([(f"{SHARE:.0%} of the card", gb(SHARE * self.card))] if self.card < float("inf") else []),
            ("disk of a checkpoint", gb(self.checkpoint_bytes)),
        ]
        return [*rows, *(("not there yet", name) for name in self.missing)]


def plan(check: SuiteCLI, card: str | None = None) -> Plan:
    """What a recipe with its overrides takes.

    Args:
        check: the recipe as it was parsed.
        card: memory of a device such as ``80GB``; what the recipe's header names if not given.

    Raises:
        UserError: a card that is no size, or a recipe that does not tell its images' size.
    """
    config, header = check.config.as_dict(), _header(check.recipe)
    found = CARD.search(card if card is not None else header.partition("Hardware:")[2])
    if found is None and card is not None:
        raise UserError(f"card {card}: give a device's memory such as 80GB")
    trainer, (_, data) = config["trainer"], object_of(config["data"])
    shape = _shape(config, header, check.tokenizer_recipe)
    images, samples = _images(data, header), data.get("epoch_samples")
    images = samples or images
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps") or -1
    if steps < 1 and images is not None and epochs:
        steps = images // (shape.batch * shape.processes) // shape.accumulated * epochs
    disk = (WEIGHTS + ADAMW + (WEIGHTS if shape.ema else 0)) * shape.parameters
    disk += WEIGHTS * shape.tokenizer_parameters if shape.blocks else 0
    size = float(found[1]) * 1e9 if found else float("inf")
    missing = sorted(set(_missing(config, check.tokenizer_recipe)))
    return Plan(check.recipe, shape, size, images, epochs, steps if steps > 0 else None, disk, missing)


def check_machine(check: SuiteCLI) -> None:
    """Before data is touched: whether there is a GPU that this torch runs, whether it holds the recipe at all, and
    whether NATTEN's kernels, features' weights and references are there where the recipe asks for them.

    A trainer whose ``accelerator`` is ``cpu`` asks for no GPU.

    Raises:
        UserError: a recipe for GPUs where torch finds none, a GPU that torch has no kernels for, one with less memory
            than the recipe takes, or what else is missing.
    """
    _check_gpu(check)
    config = check.config.as_dict()
    if object_of(config["model"])[1].get("backend") == "natten":
        choose_backend("natten", SpatialAttention(3), ScalePyramid([1, 5]))
    for callback in config["trainer"].get("callbacks") or []:
        if object_of(callback)[1].get("extractor") is not None:
            made_of(callback)


def _check_gpu(check: SuiteCLI) -> None:
    import torch

    written = re.search(r"GPUs? of \d+ ?GB", _header(check.recipe))
    asked = str(check.config.trainer.accelerator)
    wanted = written[0] if written else "a GPU" if asked in ("gpu", "cuda") else None
    if asked not in ("auto", "gpu", "cuda") or (wanted is None and not torch.cuda.is_available()):
        return
    if not torch.cuda.is_available():
        raise UserError(
            f"recipe {check.recipe}: written for {wanted}; {_no_cuda()}; or insist with --trainer.accelerator=cpu"
        )
    _check_kernels(check.recipe)
    card = torch.cuda.get_device_properties(0).total_memory
    try:
        found = replace(plan(check), card=card)
    except UserError:  # sizes that cannot be planned are no mistake
        return
    if found.shape.peak() > found.card:  # an estimate: what it lacks of the last tenth is no reason to refuse
        found.check()


def _no_cuda() -> str:
    """Why torch finds no GPU."""
    import torch

    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not DRIVER.exists():
        return f"torch is built for CUDA {torch.version.cuda}, and there is no GPU here"
    return (
        f"torch is built for CUDA {torch.version.cuda}, which the driver here does not run: "
        "install a newer driver or torch for the driver's CUDA (nvidia-smi names it)"
    )


def _check_kernels(recipe: Path) -> None:
    """Kernels of one generation run on its later cards; intermediate code (``compute_90``) on all later ones."""
    import torch

    built, here = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(0)
    kernels = [found.groups() for found in map(ARCHITECTURE.match, built) if found]  # AMD's have other names
    for kind, major, minor in kernels:
        least = (int(major), int(minor))
        if least <= here and (kind == "compute" or least[0] == here[0]):
            return
    if kernels:
        raise UserError(
            f"recipe {recipe}: this torch has kernels for {', '.join(built)}, the GPU here is sm_{here[0]}{here[1]}; "
            "install a torch that is built for it (pytorch.org), or insist with --trainer.accelerator=cpu"
        )


def _trained(tokenizer: str) -> Mapping[str, Any]:
    """The sizes of a tokenizer that is there; nothing of one that is not."""
    from mvar_lightning.checkpoints.folder import open_checkpoint

    try:
        return open_checkpoint(tokenizer, whole=False).record.tokenizer
    except UserError:
        return {}


def _shape(config: Mapping[str, Any], header: str, tokenizer_recipe: str | None) -> Shape:
    from mvar_lightning.checkpoints.assign import on_meta
    from mvar_lightning.tokenizer import MultiScaleTokenizer

    trainer, (kind, settings), (_, data) = config["trainer"], object_of(config["model"]), object_of(config["data"])
    named = re.search(r"(\d+) x \1", header)
    side = as_size(data.get("image_size") or (int(named[1]) if named else 0))
    published = PUBLISHED_SIDES.get(side) if isinstance(side, int) else None
    if "scales" in settings:
        given = settings
    elif tokenizer_recipe is not None and published is None:
        given = object_of(read_recipe(Path(tokenizer_recipe)).get("model"))[1]
    elif published is not None:
        given = {"scales": published}
    else:
        given = dict(_trained(str(settings.get("tokenizer"))))
    if "scales" not in given:
        raise UserError(
            "plan: neither model.tokenizer, tokenizer_recipe nor data.image_size of 256, 512 or 1024 tells its sizes"
        )
    names = signature(MultiScaleTokenizer).parameters.keys() & given
    tokenizer = on_meta(lambda: MultiScaleTokenizer(**{name: given[name] for name in names}))
    callbacks = [object_of(each) for each in trainer.get("callbacks") or []]
    of_kind = {path.rpartition(".")[2]: arguments for path, arguments in callbacks}
    strategy = trainer.get("strategy")
    strategy, of_strategy = object_of(strategy) if isinstance(strategy, Mapping) else (str(strategy), {})
    processes = _devices(trainer) * int(trainer.get("num_nodes") or 1)
    metrics = of_kind.get("SampleMetrics", of_kind.get("ReconstructionMetrics", {}))
    sharded = strategy.endswith("FullySharded")
    shape = Shape(
        parameters=_count(tokenizer),
        tokenizer_parameters=_count(tokenizer),
        pixels=math.prod(tokenizer.image_shape[1:]),
        channels=given.get("channels", 160),
        batch=data.get("batch_size") or 64,
        accumulated=settings.get("accumulate_grad_batches") or trainer.get("accumulate_grad_batches") or 1,
        processes=processes,
        sharded=sharded,
        buckets=processes > 1 and not sharded and not of_strategy.get("gradient_as_bucket_view"),
        ema="EMA" in of_kind and of_kind["EMA"].get("device") is None,
        inception="Inception" in str(metrics.get("extractor")),
        half="16" in str(trainer.get("precision")) or "GB" in header,
    )
    module = import_class(kind)
    if hasattr(module, "core_on_meta"):  # a scorer: convolutions as a tokenizer's, over the maps of both sides together
        core = module.core_on_meta(tokenizer, settings, data.get("num_classes") or 1000)
        maps = 2 * tokenizer.pyramid.num_scales * core.config["channels"][0]
        return replace(shape, parameters=_count(core), pixels=math.prod(tokenizer.pyramid.shapes[-1]), channels=maps)
    return (
        _of_transformer(shape, module, tokenizer, settings, data, of_kind)
        if hasattr(module, "check_settings")
        else shape
    )


def _of_transformer(
    shape: Shape,
    module: Any,
    tokenizer: Any,
    settings: dict[str, Any],
    data: Mapping[str, Any],
    of_kind: dict[str, Any],
) -> Shape:
    from mvar_lightning.training.scale_groups import AUTO_SHARE, ScaleGroups, groups_of_share

    settings = {name: made_of(value) for name, value in settings.items()}
    model = module.transformer_on_meta(tokenizer, settings, data.get("num_classes") or 1000)
    pyramid, plan = model.pyramid, model.backend.plan
    groups = ScaleGroups.read(settings.get("scale_groups"), settings.get("scale_cycle"), plan)
    splits = all(plan.reads[scale].first_key_scale == scale for scale in range(pyramid.num_scales))

    def largest(ranges: Sequence[range]) -> int:
        return max(pyramid.span(group).stop - pyramid.span(group).start for group in ranges)

    samples = of_kind.get("SampleMetrics", {})
    design = type(model.block_design).__name__
    return replace(
        shape,
        parameters=_count(model),
        blocks=design if design in KEPT else "LlamaBlocks",
        depth=model.depth,
        width=model.width,
        tokens=pyramid.num_tokens,
        group_tokens=largest(groups.groups),
        auto_tokens=largest(groups_of_share(pyramid, AUTO_SHARE)) if splits else pyramid.num_tokens,
        vocab_size=model.vocab_size,
        shared=getattr(model.block_design, "shared_adaln", False),
        compiled=bool(settings.get("compile_blocks")),
        checkpointed=model.checkpoint_activations,
        on_the_fly="image_size" in data,
        reconstructs="SampleMetrics" in of_kind,
        sampled=samples.get("batch_size", 50) if samples is not None and "SampleMetrics" in of_kind else 0,
        cache_of_image=cache_of_image(model, settings.get("cfg", 1.5), 2 if shape.half else 4),
        cache_bytes=samples.get("cache_bytes", CACHE_BYTES),
    )


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _devices(trainer: Mapping[str, Any]) -> int:
    said: Any = trainer.get("devices")
    return int(said) if str(said).isdecimal() else len(said) if isinstance(said, list) else 1


def _header(recipe: Path) -> str:
    """The comment at the top, as one line."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: next((n for n, s in enumerate(lines) if s[:1] != "#"), 0)])


def _images(data: Mapping[str, Any], header: str) -> int | None:
    """Training images: of the index or the cache if there is one, ImageNet's where the header names it."""
    from mvar_lightning.tools.files import read_json

    for name in ("index.json", "tokens.json"):
        file = Path(str(data.get("path"))) / name
        if file.is_file():
            split = read_json(file, "cannot be read ({error})").get("splits", {}).get("train")
            if isinstance(split, Mapping) and isinstance(split.get("samples"), int):
                return int(split["samples"])
    return IMAGENET["train"] if "ImageNet" in header else None


def _missing(config: Mapping[str, Any], tokenizer_recipe: str | None) -> Iterator[str]:
    """Files and folders that a recipe names and that are not there."""
    (_, settings), (_, data) = (object_of(config[name]) for name in ("model", "data"))
    tokenizer = settings.get("tokenizer")
    if tokenizer_recipe is not None or _trained(str(tokenizer)):  # the second: one that ships, by its name, too
        tokenizer = None
    named = (data.get("path"), data.get("images"), tokenizer, settings.get("drawn"))
    yield from (str(path) for path in named if _lacks(path))
    yield from _weights(config["model"])
    yield from _weights(config["trainer"].get("callbacks"))


def _weights(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        yield from (part for value in node.values() for part in _weights(value))
    elif isinstance(node, list):
        yield from (part for value in node for part in _weights(value))
    elif isinstance(node, str) and node.endswith((".pth", ".npz", ".pt", ".safetensors")) and _lacks(node):
        yield node


def _lacks(path: Any) -> bool:
    return isinstance(path, str) and "://" not in path and not Path(path).exists()
