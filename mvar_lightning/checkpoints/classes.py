"""Classes of a model that others start from: their names, and which rows of the embedding the new classes take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from mvar_lightning.errors import UserError

InitClasses = Mapping[str, int | str] | str | None
"""Class name or index here -> class name or index there; or ``fresh`` or ``mean`` for all of them."""

SHOWN = 3
ALL = "all taken"


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 names of ImageNet's classes, which released weights know by number alone."""
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


def names_or_imagenets(names: Sequence[str], num_classes: int) -> Sequence[str]:
    """The names that a checkpoint tells; of one that tells none and has 1,000 classes ImageNet's."""
    return names or (imagenet_classes() if num_classes == len(imagenet_classes()) else ())


def check_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """The names, none or one for each class. Raises `UserError` for another number of them."""
    if len(names) not in (0, num_classes):
        raise UserError(f"class_names: {len(names)} names for {num_classes} classes; give one for each")
    return tuple(names)


def class_rows(
    fresh_NC: Tensor, trained_MC: Tensor, init: InitClasses, names: Sequence[str], source_names: Sequence[str]
) -> tuple[Tensor, str]:
    """Rows of the class embedding of a model that starts from another's.

    Args:
        fresh_NC: the model's own (classes + 1, width), as initialized; the last row is "no class".
        trained_MC: the source's (its classes + 1, width).
        init: which rows to take. None takes all where there are as many classes, else none.
        names, source_names: of the classes here and there, as far as they are known.

    Returns:
        The rows, on the CPU in the source's type, "no class" always the source's; and what was done, in words.

    Raises:
        UserError: a class that is not known here or there.
    """
    here, there = len(fresh_NC) - 1, len(trained_MC) - 1
    if init is None and here == there:
        return trained_MC, ALL
    rows_NC = fresh_NC.detach().to("cpu", trained_MC.dtype, copy=True)
    rows_NC[-1] = trained_MC[-1]
    if init is None or init in ("fresh", {}):
        return rows_NC, f'all {here} fresh, "no class" kept'
    if init == "mean":
        rows_NC[:-1] = trained_MC[:-1].mean(dim=0)
        return rows_NC, f'all {here} the mean of {there}, "no class" kept'
    if not isinstance(init, Mapping):
        raise UserError(f"init_classes {init!r}: must be fresh, mean, or classes such as {{corgi: 263}}")
    taken: dict[int, str] = {}
    for ours, theirs in init.items():
        row, source = _index(ours, names, here, "here"), _index(theirs, source_names, there, "in init_from")
        if row in taken:
            raise UserError(f"init_classes {ours}: class {row} here is given twice")
        taken[row] = f"{ours} <- {source}{f' ({source_names[source]})' if source_names else ''}"
        rows_NC[row] = trained_MC[source]
    shown = ", ".join([*taken.values()][:SHOWN]) + (", ..." if len(taken) > SHOWN else "")
    return rows_NC, f'{len(taken)} of {here} taken ({shown}), {here - len(taken)} fresh, "no class" kept'


def _index(name: int | str, names: Sequence[str], count: int, where: str) -> int:
    """The index of a class: by its name, else the number itself."""
    if isinstance(name, str) and names.count(name) == 1:
        return names.index(name)
    if isinstance(name, str) and names.count(name) > 1:
        raise UserError(f"init_classes {name!r}: {names.count(name)} classes {where} are called so; give an index")
    try:
        index = int(name) if isinstance(name, int) or name.isdecimal() else -1
    except ValueError:  # more digits than Python reads
        index = -1
    if isinstance(name, bool) or not 0 <= index < count:
        known = f"names such as {', '.join(map(repr, names[:SHOWN]))}, or " if names else ""
        raise UserError(f"init_classes {name!r}: no such class {where}; give {known}an index from 0 to {count - 1}")
    return index
