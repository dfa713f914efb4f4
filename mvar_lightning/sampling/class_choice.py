"""Which classes are asked for: by index, or by the names that a data folder or a checkpoint gives them."""

from __future__ import annotations

from collections.abc import Sequence

from mvar_lightning.checkpoints.source import NO_CLASS, Source
from mvar_lightning.data.index import read_index
from mvar_lightning.errors import UserError


def owner_of(data: str | None) -> str:
    """How messages begin that list the names of `class_names`."""
    return "its names are" if data is None else "``data`` names"


def class_names(data: str | None, num_classes: int, source: Source) -> Sequence[str]:
    """Class names of a shard folder, else those that the model's checkpoint tells: there a number stays an index.

    Raises:
        UserError: the folder's do not fit the model.
    """
    if data is None:
        names = source.class_names()
        plain = [f"class {index}" if name.isdecimal() else name for index, name in enumerate(names)]
        return plain if len(plain) == num_classes else ()
    names = read_index(data).class_names
    if len(names) != num_classes:
        raise UserError(f"``data`` {data}: has {len(names)} classes, the model {num_classes}; give its own data folder")
    return names


def class_indices(
    classes: str | Sequence[int] | None, num_classes: int, names: Sequence[str] = (), whose: str = "``data`` names"
) -> list[int]:
    """Classes, each once, from indices or text such as ``3,7``, ``0-9``, ``cat,dog``, ``none`` or
    ``all``, which None means too. A whole number is an index, whatever classes are called. ``whose`` says in messages
    where the names are from.

    Raises:
        UserError: a class that the model does not have, or a name that is not known.
    """
    if classes is None or classes == "all":
        return list(range(num_classes))
    if not isinstance(classes, str):
        classes, names = ",".join("none" if label == NO_CLASS else str(label) for label in classes), ()
    indices: list[int] = []
    for part in map(str.strip, classes.split(",")):
        if part.isdecimal() and part in names and names.index(part) != int(part):
            raise UserError(
                f"class {part!r}: an index, and the name of class {names.index(part)}; for indices leave ``data`` out"
            )
        if part in names or part == "none":
            indices.append(names.index(part) if part in names else NO_CLASS)
            continue
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            if part == "all":
                raise UserError(f"``classes`` {classes}: all takes every class; leave the others out")
            known = f"{whose} {', '.join(names[:5])}, ..." if names else "to use names give ``data`` FOLDER"
            raise UserError(f"class {part!r}: must be an index from 0 to {num_classes - 1} or a known name; {known}")
        chosen = range(int(first), int(last if dash else first) + 1)
        if not chosen or chosen[-1] >= num_classes:
            raise UserError(f"class {part}: the model knows classes 0 to {num_classes - 1}")
        indices += chosen
    return list(dict.fromkeys(indices))
