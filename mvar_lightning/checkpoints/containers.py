"""Where in a file a state dict lies: found by the names in it, whatever a trainer has put around them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mvar_lightning.checkpoints.assign import plain_names
from mvar_lightning.checkpoints.folder import IN_FOLDER, OF_PARTS, RELEASED, located
from mvar_lightning.checkpoints.official_sizes import SIGNS
from mvar_lightning.errors import UserError
from mvar_lightning.tools.files import kind_of, read_json
from mvar_lightning.tools.processes import is_main
from mvar_lightning.tools.tensors import read_safetensors, read_torch

MODEL, TOKENIZER = ("var or mvar", "markov_var"), ("the tokenizer (vqvae)",)
"""What is looked for, by the names of `official_sizes.SIGNS`."""

DEEPEST = 6
"""Dictionaries inside one another that are looked into."""


@dataclass(frozen=True)
class Candidate:
    """A state dict and where it lies: the keys to it and what stands before its names, with dots between."""

    key: str
    state: dict[str, Tensor]


def read_state(path: str | Path, wanted: tuple[str, ...], key: str | None = None) -> Mapping[str, Tensor]:
    """The state dict of a file under the reference's own names.

    Args:
        path: a ``torch.save`` or safetensors file, the table of one that is split (``NAME.index.json``), a folder with
            one of these named as in `IN_FOLDER`, or a folder of ``torch.distributed.checkpoint``; found by `located`.
        wanted: `MODEL` or `TOKENIZER`.
        key: which one, where there are several: the keys to it and what stands before its names, such as ``ema`` or
            ``state_dict.generator``.

    Raises:
        UserError: no such file, none in it, or several and no ``key``.
    """
    path = _file_of(Path(located(path)))
    if kind_of(path) == "folder":
        return _read_distributed(path, wanted, key)
    return _state_in(_read_parts(path) if path.name.endswith(OF_PARTS) else _read_file(path), wanted, key, path)


def _read_file(path: Path) -> Any:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def _read_parts(table: Path) -> dict[str, Tensor]:
    """The state dict that is split over files beside a table: its ``weight_map`` says which tensor is in which file."""
    content = read_json(table)
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(places, Mapping) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(
            f"{table}: is no table of weights in parts (``weight_map``: names of tensors to names of files)"
        )
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or Path(name).suffix not in RELEASED:
            raise UserError(f"{table}: names {name[:80]!r}, which is no file of weights beside it")
        part = _read_file(table.parent / name)
        here = {key for key, file in places.items() if file == name}
        if not isinstance(part, Mapping) or (lacking := here - part.keys()):
            raise UserError(
                f"{table.parent / name}: lacks what {table.name} says is in it, such as {min(lacking or here)}"
            )
        state |= {key: part[key] for key in here}
    return state


def _read_distributed(path: Path, wanted: tuple[str, ...], key: str | None) -> Mapping[str, Tensor]:
    """The state dict of a distributed checkpoint: found by its names, of which only those are read."""
    from mvar_lightning.checkpoints.distributed import outline, read_distributed

    outlined = outline(path)
    chosen = _state_in(outlined, wanted, key, path)
    names = {id(tensor): name for name, tensor in outlined.items()}
    whole = read_distributed(path, {names[id(tensor)]: tensor for tensor in chosen.values()})
    return {name: whole[names[id(tensor)]] for name, tensor in chosen.items()}


def _state_in(content: Any, wanted: tuple[str, ...], key: str | None, path: Path) -> Mapping[str, Tensor]:
    found = list(_candidates(content, wanted, str(path)))
    names = ", ".join(repr(candidate.key) for candidate in found)
    if key is not None:
        chosen = [candidate for candidate in found if candidate.key == key]
        if not chosen:
            there = f"there are {names}" if found else "there is none"
            raise UserError(f"{path}: no weights of {' or '.join(wanted)} under the key {key!r}; {there}")
        return chosen[0].state
    if len(found) > 1:
        raise UserError(
            f"{path}: holds several weights of {' or '.join(wanted)}: {names}; say which with ``key`` "
            "(of init_from: PATH#KEY)"
        )
    if found:
        if found[0].key:
            _say(f"{path}: took the weights under {found[0].key!r}")
        return found[0].state
    if _is_state(content):  # too damaged to be known: what is missing is told by name
        return plain_names(content, str(path))
    raise UserError(f"{path}: holds no weights of {' or '.join(wanted)}, neither flat nor inside of anything")


def _file_of(path: Path) -> Path:
    if kind_of(path) != "folder":
        return path
    if kind_of(path / ".metadata") == "file":
        return path  # of torch.distributed.checkpoint
    found = [path / name for name in IN_FOLDER if kind_of(path / name) == "file"]
    if len(found) != 1:
        raise UserError(f"{path}: is a folder with {len(found)} of {', '.join(IN_FOLDER)}; give the file itself")
    return found[0]


def _candidates(
    content: Any, wanted: tuple[str, ...], source: str, path: tuple[str, ...] = (), seen: tuple[int, ...] = ()
) -> Iterator[Candidate]:
    if not isinstance(content, Mapping) or len(path) > DEEPEST or id(content) in seen:
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        plain, clash = tensors, None
        try:
            plain = plain_names(tensors, source)
        except UserError as error:  # matters only where weights lie in them
            clash = error
        for prefix in _prefixes(plain, wanted):
            if clash is not None:
                raise clash
            state = {name[len(prefix) :]: tensor for name, tensor in plain.items() if name.startswith(prefix)}
            yield Candidate(".".join([*path, *filter(None, [prefix.rstrip(".")])]), state)
    for name, inside in content.items():
        if isinstance(name, str):
            yield from _candidates(inside, wanted, source, (*path, name), (*seen, id(content)))


def _prefixes(names: Mapping[str, Tensor], wanted: tuple[str, ...]) -> list[str]:
    """What stands before names that are known: every prefix under which most signs of one architecture are met."""
    met: dict[tuple[str, str], set[str]] = {}
    for name in names:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        for kind in wanted:
            for start in starts:
                for sign in SIGNS[kind]:
                    if re.fullmatch(sign, name[start:]):
                        met.setdefault((name[:start], kind), set()).add(sign)
    return sorted({prefix for (prefix, kind), signs in met.items() if 2 * len(signs) > len(SIGNS[kind])})


def _is_state(content: Any) -> bool:
    whole = isinstance(content, Mapping) and content
    return bool(whole) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _say(words: str) -> None:
    """Not through Lightning, whose import takes longer than reading a gigabyte of weights."""
    if is_main():
        print(words, file=sys.stderr, flush=True)
