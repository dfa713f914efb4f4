"""Which numbers a recipe may have: one table of bounds, held against it before anything is made of it.

Types are the parser's affair, fits of several objects that of the objects; here are ranges, finiteness, and sizes that
no machine holds. Only classes of the suite are judged: what a setting of another class means is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

SEEDS = 2**32 - 1
"""The largest seed that numpy, and so Lightning, takes."""

LONGEST = 120
"""Characters of a value that a line shows."""

LARGEST_MODEL = 100e9
"""Parameters; the largest published next-scale transformer has 2.3e9."""


@dataclass(frozen=True)
class Bound:
    """A range of numbers; of a list, each is held against it.

    Attributes:
        low, high: the ends.
        whole: numbers without a fraction alone.
        open_low, open_high: the end itself is left out.
    """

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    open_low: bool = False
    open_high: bool = False

    def holds(self, number: float) -> bool:
        if (isinstance(number, float) and not math.isfinite(number)) or (self.whole and number != math.floor(number)):
            return False
        above = number > self.low if self.open_low else number >= self.low
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        kind = "whole" if self.whole else "finite"
        if math.isinf(self.low) and math.isinf(self.high):
            return f"a {kind} number"
        if math.isinf(self.high):
            return f"a {kind} number {'above' if self.open_low else 'of at least'} {self.low:.16g}"
        if self.whole:
            return f"a whole number from {self.low:.16g} to {self.high:.16g}"
        return f"in {'(' if self.open_low else '['}{self.low:.16g}, {self.high:.16g}{')' if self.open_high else ']'}"


def whole(low: float, high: float = 10**9) -> Bound:
    return Bound(low, high, whole=True)


FINITE, POSITIVE, NOT_NEGATIVE = Bound(), Bound(0, open_low=True), Bound(0)
SHARE, BELOW_ONE, SOME = Bound(0, 1), Bound(0, 1, open_high=True), Bound(0, 1, open_low=True)

NEXT_SCALE: dict[str, Bound] = {
    "num_classes": whole(1, 10**7),
    "depth": whole(1, 512),
    "width": whole(1, 2**16),
    "heads": whole(1, 2**12),
    "drop_path": BELOW_ONE,
    "base_lr": NOT_NEGATIVE,
    "betas": BELOW_ONE,
    "weight_decay": NOT_NEGATIVE,
    "weight_decay_end": NOT_NEGATIVE,
    "warmup": SHARE,
    "final_lr_ratio": NOT_NEGATIVE,
    "gamma_init": FINITE,
    "label_drop": SHARE,
    "cfg": FINITE,
    "top_k": whole(1),
    "top_p": SOME,
    "scale_cycle": whole(1),
}
TOKENIZER: dict[str, Bound] = {
    "scales": whole(1, 1024),
    "vocab_size": whole(2, 2**20),
    "code_dim": whole(1, 2**14),
    "channels": whole(1, 2**14),
    "channel_multipliers": whole(1, 256),
    "num_res_blocks": whole(1, 64),
    "phi_layers": whole(0, 1024),
    "phi_ratio": SHARE,
    "beta": NOT_NEGATIVE,
    "codebook_std": POSITIVE,
    "norm_groups": whole(1, 2**14),
    "lr": POSITIVE,
    "betas": BELOW_ONE,
    "weight_decay": NOT_NEGATIVE,
    "warmup": BELOW_ONE,
    "final_lr_ratio": NOT_NEGATIVE,
    "scale_dropout": SHARE,
    "scale_dropout_keeps": whole(1, 1024),
    "accumulate_grad_batches": whole(1),
    "gradient_clip_val": POSITIVE,
}
SCORER: dict[str, Bound] = {
    "num_classes": whole(1, 10**7),
    "channels": whole(1, 2**14),
    "embedding": whole(1, 2**14),
    "hidden": whole(1, 2**14),
    "dropout": BELOW_ONE,
    "label_drop": BELOW_ONE,
    "lr": POSITIVE,
    "warmup": BELOW_ONE,
}
DATA: dict[str, Bound] = {
    "channels": whole(1, 4),
    "image_size": whole(1, 2**14),
    "batch_size": whole(1, 2**20),
    "num_workers": whole(0, 1024),
    "shuffle_buffer": whole(0, 10**7),
    "shuffle_window": whole(1),
    "epoch_samples": whole(1, 10**12),
    "seed": whole(-(2**63), 2**63 - 1),
    "num_classes": whole(1, 10**7),
}
STEPS, EPOCHS = whole(-1, 10**12), whole(-1)
TRAINER: dict[str, Bound] = {
    "devices": whole(-1, 2**16),
    "num_nodes": whole(1, 2**16),
    "max_epochs": EPOCHS,
    "min_epochs": EPOCHS,
    "max_steps": STEPS,
    "min_steps": STEPS,
    "accumulate_grad_batches": whole(1),
    "gradient_clip_val": NOT_NEGATIVE,
    "limit_train_batches": NOT_NEGATIVE,
    "limit_val_batches": NOT_NEGATIVE,
    "limit_test_batches": NOT_NEGATIVE,
    "limit_predict_batches": NOT_NEGATIVE,
    "overfit_batches": NOT_NEGATIVE,
    "val_check_interval": POSITIVE,
    "check_val_every_n_epoch": whole(1),
    "num_sanity_val_steps": whole(-1),
    "log_every_n_steps": whole(0),
    "fast_dev_run": whole(0),
    "reload_dataloaders_every_n_epochs": whole(0),
}
CHECKPOINT: dict[str, Bound] = {"every_steps": whole(1), "every_minutes": Bound(0, 10**6)}

TABLES: dict[str, dict[str, Bound]] = {
    "VARModule": NEXT_SCALE,
    "MVARModule": NEXT_SCALE,
    "MarkovVARModule": NEXT_SCALE,
    "TokenizerModule": TOKENIZER,
    "ScorerModule": SCORER,
    "ShardsDataModule": DATA,
    "TokenShardsDataModule": DATA,
    "TokenShards": DATA,
}
"""By the name of the class."""


FROM_DATA = "is told by the data (mvar shards make --channels, or its module's `channels`); leave it out"
"""Of a setting that is linked to the data: one that is written twice could contradict it."""


def out_of_bounds(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and words of each number of a recipe that no run can have.

    Args:
        recipe: its sections as plain values, overrides included.
    """
    seed = recipe.get("seed_everything")
    yield from _outside("", {"seed_everything": seed}, {"seed_everything": whole(0, SEEDS)})
    for section in ("model", "data"):
        path, arguments = object_of(recipe.get(section))
        if path.startswith("mvar_lightning.") or "." not in path:
            table = TABLES.get(path.rpartition(".")[2], {})
            yield from _outside(f"{section}.", arguments, table)
            if table is NEXT_SCALE:
                yield from _too_large(arguments)
    for section, table in (("trainer", TRAINER), ("checkpoint", CHECKPOINT)):
        settings = recipe.get(section, {})
        if not isinstance(settings, Mapping | str):  # text names a file of settings
            words = f"must be settings such as {section}: {{{next(iter(table))}: 1}}; leave it out for the defaults"
            yield section, f"{section} {shown(settings)}: {words}"
        if isinstance(settings, Mapping):
            yield from _outside(f"{section}.", settings, table)


def _outside(prefix: str, settings: Mapping[str, Any], table: Mapping[str, Bound]) -> Iterator[tuple[str, str]]:
    for key, bound in table.items():
        value = settings.get(key)
        for number in _numbers(value):
            if isinstance(number, int | float) and not isinstance(number, bool) and not bound.holds(number):
                yield f"{prefix}{key}", f"{prefix}{key} {shown(value)}: must be {bound}"
                break


def _numbers(value: Any) -> Iterator[Any]:
    """A number, or those of a list, or of lists in it: heights and widths."""
    if isinstance(value, list | tuple):
        yield from (number for each in value for number in _numbers(each))
    else:
        yield value


def _too_large(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    depth = _number(arguments.get("depth"), 16)
    width = _number(arguments.get("width"), 64 * depth)
    size = 18 * depth * width**2  # attention 4, MLP 8, modulation 6
    if size > LARGEST_MODEL:
        words = f"would have some {size / 1e9:,.0f} billion parameters; take at most {LARGEST_MODEL / 1e9:.0f}"
        name = "model.width" if "width" in arguments else "model.depth"
        yield name, f"model of depth {depth}, width {width}: {words}"


def _number(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def object_of(node: Any) -> tuple[str, dict[str, Any]]:
    """Class path and arguments of an object in a recipe (the parser's two groups), both empty where a value is none."""
    if not isinstance(node, Mapping) or not isinstance(path := node.get("class_path"), str):
        return "", {}
    groups = [node.get(group) for group in ("init_args", "dict_kwargs")]
    return path, {name: value for group in groups if isinstance(group, Mapping) for name, value in group.items()}


def made_of(value: Any) -> Any:
    """What an argument of a recipe stands for: an object where it names a class."""
    if isinstance(value, list):
        return [made_of(each) for each in value]
    path, arguments = object_of(value)
    return import_class(path)(**{name: made_of(argument) for name, argument in arguments.items()}) if path else value


def import_class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def shown(value: Any) -> str:
    """A value as a line shows it, however long it is."""
    try:
        text = str(value)
    except ValueError:  # a number of thousands of digits
        return "of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
