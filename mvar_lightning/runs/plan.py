"""`plan`: what a recipe will take, before anything of it is there: memory by part, steps, disk, files, and whether it
fits its card. Sizes come from the meta device; no weights and no data are read.

Bytes follow from a table of what was counted (`KEPT`), not from a run: what a card says is the last word.
B batch, L tokens, C width, V vocabulary, P parameters, S image side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError
from mvar_lightning.runs.bounds import object_of
from mvar_lightning.runs.recipe_check import check_quickly
from mvar_lightning.runs.run import run_of

KEPT = {"VARBlocks": (64.7, 42.4), "LlamaBlocks": (79.6, 49.4)}
"""Bytes a token, layer and channel that autograd keeps in bf16-mixed, eager and compiled: counted with hooks on saved
tensors under CUDA's cast policy. In float32 it is twice as much at most."""
ENDS = 24.0
"""The same, outside of the blocks: embeddings, history, the head's norm and the gradient of its output."""
CHECKPOINTED = {False: 2.0, True: 4.0}
"""A block's input in bf16, which is kept where blocks are computed again; a shared AdaLN's is float32."""
WEIGHTS, GRADIENTS, ADAMW, ROUNDED, BUCKETS = 4, 4, 8, 2, 4
"""Bytes a parameter: float32 weights and gradients, two moments, autocast's bf16 copy, DDP's buckets. 22 in all."""
TOKENIZER_KEPT = 166.0
"""Bytes a pixel and channel that a tokenizer's step keeps: 1.74 GB of an image of 256 pixels and 160 channels."""
PERCEPTUAL_KEPT, ENCODED = 3000.0, 16.0
"""Bytes a pixel that LPIPS and a discriminator keep; and, a pixel and channel, an encoder's maps without gradient."""
LOSS_TOKENS, LOGIT_BYTES, DECODING, SAMPLED_TOKENS = 4096, 16, 0.6e9, 2**16
INCEPTION = 0.1e9, 20e6
"""Weights with sums of features, and each image at 299 pixels."""
SHARE = 0.9
"""Of a card's memory: the rest is the context's, and lost between blocks."""
IMAGENET = {"train": 1_281_167, "val": 50_000}
CARD = re.compile(r"(\d+(?:\.\d+)?) ?GB")


@dataclass(frozen=True)
class Shape:
    """What memory follows from: sizes of the models, and the settings that can be changed to make them fit."""

    parameters: int
    tokenizer_parameters: int
    image_size: int
    channels: int
    batch: int
    accumulated: int
    processes: int
    blocks: str = ""
    depth: int = 0
    width: int = 0
    tokens: int = 0
    group_tokens: int = 0
    auto_tokens: int = 0
    vocab_size: int = 0
    shared: bool = False
    compiled: bool = False
    checkpointed: bool = False
    sharded: bool = False
    buckets: bool = False
    ema: bool = False
    half: bool = True
    on_the_fly: bool = False
    reconstructs: bool = False
    inception: bool = False
    sampled: int = 0
    cache_of_image: int = 0
    cache_bytes: float = 0.0

    def state(self) -> dict[str, float]:
        """Bytes that are there for the whole run."""
        own, all_ = self.parameters / (self.processes if self.sharded else 1), self.parameters
        gathered = 3 * WEIGHTS * all_ / max(1, self.depth) if self.sharded else 0  # blocks, on their way
        frozen = self.tokenizer_parameters if self.blocks else 0
        return {
            "weights": WEIGHTS * (own + frozen) + gathered,
            "gradients": GRADIENTS * own + (BUCKETS * own if self.buckets else 0),
            "optimizer state": ADAMW * own,
            "bf16 copies of weights": ROUNDED * all_ if self.half else 0,
            "EMA": WEIGHTS * own if self.ema else 0,
            "Inception": INCEPTION[0] if self.inception else 0,
        }

    def phases(self) -> dict[str, float]:
        """Bytes that come and go: the largest counts."""
        pixels = self.image_size**2 * self.batch
        encoding = ENCODED * pixels * self.channels
        if not self.blocks:
            kept = (TOKENIZER_KEPT * self.channels + PERCEPTUAL_KEPT) * pixels
            return {"training step": kept, "validation": encoding + self._features(self.batch)}
        factor, width = 1 if self.half else 2, self.width * self.batch
        layer = factor * KEPT[self.blocks][self.compiled] * width * self.group_tokens
        layers = self.depth * layer
        if self.checkpointed:
            layers = layer + self.depth * CHECKPOINTED[self.shared] * factor * width * self.group_tokens
        step = layers + ENDS * width * self.tokens + LOGIT_BYTES * LOSS_TOKENS * self.vocab_size
        logits = 2 * 4 * self.batch * self.tokens * self.vocab_size
        validation = max(logits, encoding + self._features(self.batch) if self.reconstructs else 0)
        pieces = min(self.sampled, max(1, int(self.cache_bytes / max(1, self.cache_of_image))))
        blocks = 40 * self.width * SAMPLED_TOKENS + 3 * 2**30
        sampling = pieces * self.cache_of_image + blocks + DECODING + self._features(self.sampled)
        return {
            "training step": step + (encoding if self.on_the_fly else 0),
            "validation": validation,
            "sampling in callbacks": sampling if self.sampled else 0,
        }

    def peak(self) -> float:
        return sum(self.state().values()) + max(self.phases().values())

    def _features(self, images: int) -> float:
        return INCEPTION[1] * images if self.inception else 0


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
        changes: list[tuple[str, dict[str, Any]]] = [("", {})]
        if self.shape.blocks:
            changes.append(("compile_blocks: true", {"compiled": True}))
            if self.shape.auto_tokens < self.shape.group_tokens:
                changes.append(("scale_groups: auto", {"compiled": True, "group_tokens": self.shape.auto_tokens}))
            changes.append(("checkpoint_activations: true", {"compiled": True, "checkpointed": True}))
        for words, change in changes:
            shape = replace(self.shape, **change)
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
            (f"{SHARE:.0%} of the card", gb(SHARE * self.card)),
            ("disk of a checkpoint", gb(self.checkpoint_bytes)),
        ]
        return [*rows, *(("not there yet", name) for name in self.missing)]


def plan(recipe: str | Path, overrides: Sequence[str] = (), card: str | None = None) -> Plan:
    """What a recipe with its overrides takes.

    Args:
        recipe: a YAML file.
        overrides: settings that replace the recipe's.
        card: memory of a device such as ``80GB``; what the recipe's header names if not given.

    Raises:
        UserError: a wrong recipe or override, or a card that is no size.
    """
    check_quickly(recipe, overrides)
    from mvar_lightning.runs.recipe import RecipeCheck

    run = run_of(recipe, overrides, None)
    check = RecipeCheck(run.arguments, run.folder)
    config, header = check.config.as_dict(), _header(Path(recipe))
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
    return Plan(Path(recipe), shape, size, images, epochs, steps if steps > 0 else None, disk, missing)


def check_card(recipe: Path, overrides: Sequence[str], accelerator: str) -> None:
    """Before data is touched: whether there is a card, and whether it holds the recipe at all.

    Args:
        accelerator: the trainer's; ``cpu`` asks for no card.

    Raises:
        UserError: a recipe for GPUs where torch finds none, or a card that is smaller than what the recipe takes.
    """
    import torch

    written = re.search(r"GPUs? of \d+ ?GB", _header(recipe))
    if accelerator == "cpu" or (written is None and not torch.cuda.is_available()):
        return
    if not torch.cuda.is_available():
        why = "torch is built without CUDA"
        if torch.version.cuda is not None:
            driver = "the driver here does not run it" if Path("/dev/nvidiactl").exists() else "there is no GPU here"
            why = f"torch is built for CUDA {torch.version.cuda}, and {driver}"
        insists = "or insist with --trainer.accelerator=cpu"
        raise UserError(f"recipe {recipe}: written for {written[0] if written else 'a GPU'}; {why}; {insists}")
    card = torch.cuda.get_device_properties(0).total_memory
    try:
        found = replace(plan(recipe, overrides), card=card)
    except UserError:  # sizes that cannot be planned are no mistake
        return
    if found.shape.peak() > card:  # an estimate: what it lacks of the last tenth is no reason to refuse
        found.check()


def _shape(config: Mapping[str, Any], header: str, tokenizer_recipe: str | None) -> Shape:
    from mvar_lightning.checkpoints.assign import on_meta
    from mvar_lightning.pyramid import PUBLISHED_SIDES
    from mvar_lightning.runs.recipe import import_class
    from mvar_lightning.training.next_scale import MultiScaleTokenizer

    trainer, (kind, settings), (_, data) = config["trainer"], object_of(config["model"]), object_of(config["data"])
    named = re.search(r"(\d+) x \1", header)
    side = data.get("image_size") or (int(named[1]) if named else 0)
    if "scales" in settings:
        given = settings
    elif tokenizer_recipe is not None and side not in PUBLISHED_SIDES:
        given = object_of(check_quickly(tokenizer_recipe)["model"])[1]
    elif side in PUBLISHED_SIDES:
        given = {"scales": PUBLISHED_SIDES[side]}
    else:
        raise UserError("plan: neither tokenizer_recipe nor data.image_size of 256, 512 or 1024 tells its sizes")
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
        image_size=tokenizer.image_size,
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
    from mvar_lightning.callbacks.base import CACHE_BYTES, cache_of_image
    from mvar_lightning.runs.recipe import made_of
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
    tokenizer = None if tokenizer_recipe is not None else settings.get("tokenizer")
    yield from (str(path) for path in (data.get("path"), data.get("images"), tokenizer) if _lacks(path))
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
