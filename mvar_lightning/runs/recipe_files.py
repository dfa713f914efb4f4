"""Recipes by name: the current folder's and those that ship, in a clone, an editable install and a wheel alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvar_lightning.errors import UserError

PACKAGE = Path(__file__).parents[1]

MISSING = "recipe {name}: no such file; see the folder recipes/ for those that ship"


def recipes_folder() -> Path:
    """The recipes that ship: in the package where it was built into a wheel, else at the top of its clone."""
    packed = PACKAGE / "recipes"
    return packed if packed.is_dir() else PACKAGE.parent / "recipes"


def recipe_file(name: str | Path, beside: str | Path | None = None, missing: str = MISSING) -> Path:
    """The file of a recipe or a sweep.

    Args:
        name: a path from the current folder; else one from the folder of ``beside``; else the name of one that ships,
            such as ``var/digits``, ``recipes/var/digits.yaml``, or ``d30`` where only one is called so.
        beside: the recipe that names it.
        missing: what is said where there is no such file.

    Raises:
        UserError: no such file, a name that several recipes have, or a file that cannot be looked at.
    """
    try:
        for folder in (Path(), *([] if beside is None else [Path(beside).parent])):
            if (folder / name).is_file():
                return folder / name
    except (OSError, ValueError) as error:  # a folder that may not be entered, a name that no file can have
        raise UserError(f"recipe {name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    plain = str(name).removeprefix("recipes/").removesuffix(".yaml")
    if not re.fullmatch(r"\w+(/\w+)*", plain):
        raise UserError(missing.format(name=name))
    for folder in (Path("recipes"), recipes_folder()):  # first those of the clone that is worked in
        if (file := folder / f"{plain}.yaml").is_file():
            return file
        found = sorted(folder.glob(f"*/{plain}.yaml")) if "/" not in plain else []
        if len(found) > 1:
            names = ", ".join(file.relative_to(folder).with_suffix("").as_posix() for file in found)
            raise UserError(f"recipe {name}: several are called so; name one of {names}")
        if found:
            return found[0]
    if plain != str(name) and recipes_folder().is_dir():  # a path, not a name
        raise UserError(missing.format(name=name))
    every = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.glob("*/*.yaml"))
    raise UserError(f"recipe {name}: no such file, and none that ships is called so ({_shown(every)})")


def tokenizer_recipe(content: Mapping[str, Any], beside: Path) -> Path | None:
    """The file of the recipe that a recipe's content names for its tokenizer; None where it names none, or one that is
    not there: that is told when it is needed."""
    try:
        return recipe_file(name, beside) if isinstance(name := content.get("tokenizer_recipe"), str) else None
    except UserError:
        return None


def _shown(names: list[str]) -> str:
    return ", ".join(names) if names else "the installed package has lost its recipes; install it again"
