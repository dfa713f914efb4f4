"""Mistakes of a recipe and its overrides, found before anything is trained, and the common ones before torch is loaded.

The settings of a class are read from its source file, which need not be imported for that. What is not understood here
is left to the parser (`runs.recipe`), which finds the rest in the same words, only later.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvar_lightning import _ROOM_OF as ROOM_OF
from mvar_lightning.errors import UserError
from mvar_lightning.runs.recipe_errors import SECTIONS, no_setting, not_a_section, not_a_setting, setting_of, source_of
from mvar_lightning.runs.recipe_file import check_there, read_recipe

if TYPE_CHECKING:
    from mvar_lightning.runs.run import Run

PACKAGE = Path(__file__).parents[1]
AXES = ("mvar_lightning.attention", "mvar_lightning.transformer")
"""Rooms of the objects that are made early: all they need are their arguments."""


def check_recipe(run: Run) -> dict[str, Any]:
    """What a run's recipe says, its mistakes and those of the overrides found; builds no model.

    Raises:
        UserError: the first mistake, in one line.
    """
    content = check_quickly(run.recipe, run.overrides)
    from mvar_lightning.runs.recipe import RecipeCheck

    RecipeCheck(["--config", str(run.recipe), *run.overrides], run.folder)
    return content


def check_quickly(recipe: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe says; loads torch only where an attention strategy, history or block design has to be made.

    Raises:
        UserError: no such file, not YAML, an unknown section or setting, or arguments that such an object refuses.
    """
    check_there(Path(recipe))
    content = read_recipe(Path(recipe))
    merged = _merged(content, overrides)
    for name, mistake in _mistakes(merged, overrides):
        raise UserError(f"{source_of(name, ['--config', str(recipe), *overrides])}: {mistake}")
    _check_axes(merged)
    return content


def _mistakes(merged: dict[str, Any], overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and words of each setting that there is not."""
    for name in map(setting_of, overrides):
        if "." in name and name.partition(".")[0] not in SECTIONS:
            yield name, no_setting(name)
    for name in merged:
        if name not in SECTIONS:
            yield "", not_a_section(str(name))
    for section in ("model", "data"):
        yield from _unknown_settings(section, merged.get(section))
    trainer = merged.get("trainer")
    if isinstance(trainer, dict):
        known = _trainer_settings()
        for name in trainer if known else ():
            if name not in known:
                yield f"trainer.{name}", not_a_setting(f"trainer.{name}", "lightning.Trainer", known)
        callbacks = trainer.get("callbacks")
        for callback in callbacks if isinstance(callbacks, list) else ():
            yield from _unknown_settings("trainer.callbacks", callback)


def _unknown_settings(name: str, node: Any) -> Iterator[tuple[str, str]]:
    """Of an object given by class and arguments, and of the objects among its arguments."""
    path, arguments = _object(node)
    known = _settings(path) if path else None
    for key, value in arguments.items():
        if known is not None and key not in known:
            yield f"{name}.{key}", not_a_setting(f"{name}.{key}", path, known)
        yield from _unknown_settings(f"{name}.{key}", value)


def _object(node: Any) -> tuple[str, dict[str, Any]]:
    """Class path and arguments, both empty where a value is no object."""
    if not isinstance(node, dict) or not isinstance(path := node.get("class_path"), str):
        return "", {}
    arguments = node.get("init_args")
    return path, arguments if isinstance(arguments, dict) else {}


def _merged(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the recipe in which the overrides of the form ``--model.depth=8`` are set."""
    import yaml

    merged: dict[str, Any] = json.loads(json.dumps(content, default=str))
    for override in overrides:
        name, sign, text = override.removeprefix("--").partition("=")
        if not (override.startswith("--") and sign) or name.endswith("+"):
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        _set(merged, name.split("."), value)
    return merged


def _set(node: Any, keys: list[str], value: Any) -> None:
    """Nothing where the path leads through a list, or what the parser will refuse."""
    for index, key in enumerate(keys):
        if isinstance(node, dict) and "class_path" in node and key not in ("class_path", "init_args", "dict_kwargs"):
            node = node.setdefault("init_args", {})
        if not isinstance(node, dict):
            return
        if index + 1 < len(keys):
            node = node.setdefault(key, {})
            continue
        old = node.get(key)
        names_class = isinstance(value, str) and (value in ROOM_OF or (isinstance(old, dict) and "class_path" in old))
        node[key] = {"class_path": value, "init_args": {}} if names_class else value


# Which settings a class has, from its source.


@cache
def _settings(path: str) -> list[str] | None:
    """Names of the arguments of a public class of the suite; None where they are not known."""
    module, _, name = path.rpartition(".")
    if module in ("", "mvar_lightning"):
        module = ROOM_OF.get(name, "mvar_lightning.callbacks" if not module else "")
    return _arguments(module, name) if module.startswith("mvar_lightning.") else None


def _arguments(module: str, name: str) -> list[str] | None:
    """Of a class that a module defines or imports, or of the class that it inherits its constructor from."""
    file = PACKAGE.joinpath(*module.split(".")[1:])
    tree = _parsed(file / "__init__.py" if file.is_dir() else file.with_suffix(".py"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]:
            return _arguments(node.module, name) if node.module.startswith("mvar_lightning.") else None
        if isinstance(node, ast.ClassDef) and node.name == name:
            if node.decorator_list:
                return None
            own = _constructor(node)
            if own is not None:
                return None if own.args.kwarg else [arg.arg for arg in own.args.args[1:] + own.args.kwonlyargs]
            bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != "ABC"]
            return [] if not node.bases else _arguments(module, bases[0]) if bases else None
    return None


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)


@cache
def _trainer_settings() -> list[str]:
    """Of `lightning.Trainer`; none where its source is not where it was."""
    found = find_spec("lightning")  # of the package itself: nothing is imported
    file = Path(str(found.origin)).parent / "pytorch" / "trainer" / "trainer.py" if found else Path()
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.ClassDef) and node.name == "Trainer" and (own := _constructor(node)):
            return [arg.arg for arg in own.args.args[1:] + own.args.kwonlyargs]
    return []


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8") if file.is_file() else "")


# Objects of the axes of variation are made, and strategies held against the scales: their mistakes are told before a
# tokenizer is trained.


def _check_axes(merged: dict[str, Any]) -> None:
    _, arguments = _object(merged.get("model"))
    for value in arguments.values():
        path, settings = _object(value)
        name = path.rpartition(".")[2]
        if ROOM_OF.get(name) not in AXES or path not in (name, f"mvar_lightning.{name}"):
            continue
        try:
            made = getattr(import_module(ROOM_OF[name]), name)(**settings)
            scales = _scales(merged, arguments)
            if scales and hasattr(made, "check"):
                from mvar_lightning.pyramid import ScalePyramid

                made.check(ScalePyramid(scales))
        except UserError:
            raise
        except Exception:  # of another type than is asked for: the parser says which
            continue


def _scales(merged: dict[str, Any], arguments: dict[str, Any]) -> list[int] | None:
    """Scales of the model's tokenizer: of its record, or of the recipe that is to train it."""
    given = Path(str(arguments.get("tokenizer", "")))
    for record in (given / "config.json", given / "model" / "config.json"):
        if record.is_file():
            return json.loads(record.read_text(encoding="utf-8"))["tokenizer"]["scales"]
    if not isinstance(recipe := merged.get("tokenizer_recipe"), str) or not Path(recipe).is_file():
        return None
    return _object(read_recipe(Path(recipe)).get("model"))[1].get("scales")
