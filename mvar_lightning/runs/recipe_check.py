"""Mistakes of a recipe and its overrides, each told in one line: where it stands, what is wrong, and the way out.

`check_quickly` finds the common ones before torch is loaded: it reads the settings of a class from its source file,
which need not be imported for that. The rest is found by the parser (`runs.recipe`), only later: `explain` says its
report, a tree of every class and type that it tried, in the same words.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from mvar_lightning import _ROOM_OF as ROOM_OF
from mvar_lightning.errors import UserError
from mvar_lightning.runs.bounds import import_class, object_of, out_of_bounds, shown
from mvar_lightning.runs.recipe_files import recipe_file, tokenizer_recipe
from mvar_lightning.runs.run import read_recipe

PACKAGE = Path(__file__).parents[1]
AXES = ("mvar_lightning.attention", "mvar_lightning.transformer")
"""Rooms of the objects that are made early: all they need are their arguments."""
PUBLIC = ("mvar_lightning", "mvar_lightning.callbacks")
SECTIONS = ("seed_everything", "tokenizer_recipe", "model", "data", "trainer", "checkpoint")
TAKEN = (*SECTIONS, "optimizer", "lr_scheduler")
"""The parser takes Lightning's own sections, too: they stand in every ``config.yaml`` that a run wrote."""
PARSERS = frozenset({"config", "print_config", "help", "class_path", "init_args", "dict_kwargs"})
"""Words of the parser's own in overrides."""
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
OPTIONS = "`mvar fit --options` lists all"


def check_quickly(recipe: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe says, judged with its overrides; loads torch only where an object of an axis has to be made.

    Raises:
        UserError: no such file, not YAML, an unknown section or setting, a number out of its bounds, arguments that
            such an object refuses, or recipes of tokenizers that lead back to one another.
    """
    recipe = recipe_file(recipe)
    content = read_recipe(recipe)
    if content.keys() >= {"recipe", "variants"}:
        raise UserError(f"recipe {recipe}: is a sweep, of the recipe {content['recipe']}; give that, or use mvar sweep")
    if not all(map(_is_plain, overrides)):  # another recipe, values after a space, another class: the parser judges
        return content
    merged = _merged(content, overrides)
    check_values(merged, ["--config", str(recipe), *overrides], _mistakes(merged, overrides))
    _check_tokenizers(recipe, merged)
    _check_axes(merged, recipe)
    return content


def check_values(recipe: dict[str, Any], arguments: Sequence[str], mistakes: Iterable[tuple[str, str]] = ()) -> None:
    """Raise `UserError` for the first of some mistakes (name of a setting, words), else for the first number of the
    recipe's sections that is out of its bounds; by the arguments, the line says where it stands."""
    for name, mistake in chain(mistakes, out_of_bounds(recipe)):
        raise UserError(f"{source_of(name, arguments)}: {mistake}")


def _check_tokenizers(recipe: Path, merged: dict[str, Any]) -> None:
    """Recipes that name one another as the tokenizer's would be trained without an end."""
    waiting, content = [recipe], merged
    while file := tokenizer_recipe(content, waiting[-1]):
        if file.resolve() in [before.resolve() for before in waiting]:
            raise UserError(
                f"recipe {recipe}: tokenizer_recipe {content['tokenizer_recipe']} leads back to a recipe that waits "
                "for it; name one that trains a tokenizer, such as recipes/tokenizer/digits.yaml, or null"
            )
        waiting.append(file)
        content = read_recipe(file)


def _is_plain(override: str) -> bool:
    """Whether an override sets one value, as ``--model.depth=8`` does. The parser's language has more, and what is said
    before the parser is asked must be what it would say."""
    keys = setting_of(override).split(".")
    return bool(re.fullmatch(r"--\w+(\.\w+)*=.*", override, re.DOTALL)) and not PARSERS.intersection(keys)


def _mistakes(merged: dict[str, Any], overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and words of each setting that there is not."""
    for name in map(setting_of, overrides):
        if name.partition(".")[0] not in TAKEN:
            yield name, no_setting(name)
    for name in merged:
        if name not in TAKEN:
            yield "", not_a_section(str(name))
    for section in ("model", "data"):
        yield from _unknown_settings(section, merged.get(section))
    trainer = merged.get("trainer")
    if isinstance(trainer, dict):
        known = _trainer_settings()
        for name in [f"trainer.{name}" for name in trainer if known and name not in known]:
            yield name, not_a_setting(name, "lightning.Trainer", known)
        callbacks = trainer.get("callbacks")
        for callback in callbacks if isinstance(callbacks, list) else ():
            yield from _unknown_settings("trainer.callbacks", callback)


def _unknown_settings(name: str, node: Any) -> Iterator[tuple[str, str]]:
    """Of an object given by class and arguments, and of the objects among its arguments."""
    path, arguments = object_of(node)
    if path and node.get("init_args", {}) is None:
        yield name, f"{name}: init_args of {short(path)} is null; leave init_args out, or give settings under it"
    known = _settings(path) if path else None
    for key, value in arguments.items():
        if known is not None and key not in known:
            yield f"{name}.{key}", not_a_setting(f"{name}.{key}", path, known)
        yield from _unknown_settings(f"{name}.{key}", value)


def _merged(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the recipe in which the overrides of the form ``--model.depth=8`` are set."""
    import yaml

    merged: dict[str, Any] = json.loads(json.dumps(content, default=str))
    for override in overrides:
        name, sign, text = override.removeprefix("--").partition("=")
        if override.startswith("--") and sign and not name.endswith("+"):
            try:
                value = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError):  # the latter: a date such as 2026-13-01, thousands of digits
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
            if own := _constructor(node):
                return None if own.kwarg else [arg.arg for arg in own.args[1:] + own.kwonlyargs]
            bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != "ABC"]
            return [] if not node.bases else _arguments(module, bases[0]) if bases else None
    return None


def _constructor(node: ast.ClassDef) -> ast.arguments | None:
    return next((p.args for p in node.body if isinstance(p, ast.FunctionDef) and p.name == "__init__"), None)


@cache
def _trainer_settings() -> list[str]:
    """Of `lightning.Trainer`; none where its source is not where it was."""
    found = find_spec("lightning")  # of the package itself: nothing is imported
    file = Path(str(found.origin)).parent / "pytorch" / "trainer" / "trainer.py" if found else Path()
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.ClassDef) and node.name == "Trainer" and (own := _constructor(node)):
            return [arg.arg for arg in own.args[1:] + own.kwonlyargs]
    return []


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8") if file.is_file() else "")


# Objects of the axes of variation are made, and strategies held against the scales: their mistakes are told before a
# tokenizer is trained.


def _check_axes(merged: dict[str, Any], recipe: Path) -> None:
    _, arguments = object_of(merged.get("model"))
    for value in arguments.values():
        path, settings = object_of(value)
        name = path.rpartition(".")[2]
        if ROOM_OF.get(name) not in AXES or path not in (name, f"mvar_lightning.{name}"):
            continue
        try:
            made = getattr(import_module(ROOM_OF[name]), name)(**settings)
            scales = _scales(merged, arguments, recipe)
            if scales and hasattr(made, "check"):
                from mvar_lightning.pyramid import ScalePyramid

                made.check(ScalePyramid(scales))
        except UserError:
            raise
        except Exception:  # of another type than is asked for: the parser says which
            continue


def _scales(merged: dict[str, Any], arguments: dict[str, Any], recipe: Path) -> list[Any] | None:
    """Scales of the model's tokenizer: of its record, or of the recipe that is to train it."""
    given = Path(str(arguments.get("tokenizer", "")))
    for record in (given / "config.json", given / "model" / "config.json"):
        if record.is_file():
            return json.loads(record.read_text(encoding="utf-8"))["tokenizer"]["scales"]
    if (file := tokenizer_recipe(merged, recipe)) is None:
        return None
    return object_of(read_recipe(file).get("model"))[1].get("scales")


# The words of a mistake.


def not_a_setting(name: str, owner: str, known: Sequence[str]) -> str:
    """Of a setting ``model.depht`` that the class at a path does not have; ``known`` are those it has."""
    return f"{name} is not a setting of {short(owner)} ({_suggest(short(name), known, OPTIONS)})"


def not_a_section(name: str) -> str:
    return f"{name} is not a section of a recipe ({_suggest(name, SECTIONS, 'they are ' + ', '.join(SECTIONS))})"


def no_setting(name: str) -> str:
    """Of an override that names no section."""
    if name in ("ckpt_path", "ckpt-path"):
        return "a run goes on from its folder by itself; from another checkpoint goes `mvar fit --ckpt-path FILE`"
    return f"{name} is no setting (overrides look like --model.depth=8; {OPTIONS})"


def source_of(name: str, args: Sequence[str]) -> str:
    """Where the mistake stands: an override that sets ``name`` or a part of it, else the recipe."""
    setters = [a for a in args if name and a.startswith("--") and f"{name}.".startswith(f"{setting_of(a)}.")]
    if setters:
        return f"override {shown(max(setters, key=lambda argument: len(setting_of(argument))))}"
    following = dict(pairwise(args))
    return f"recipe {following['--config']}" if "--config" in following else "arguments"


def setting_of(argument: str) -> str:
    """``model.depth`` of ``--model.depth=8``."""
    return argument.removeprefix("--").partition("=")[0]


def _suggest(name: str, known: Sequence[str], otherwise: str) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise


# The parser's report.


def explain(report: str, args: Sequence[str]) -> str:
    """One line that names the setting, its value and the way out.

    Args:
        report: the text of the parser's error.
        args: what was parsed: ``--config FILE`` and overrides; the line says where the mistake stands.
    """
    if "MAX_YAML_EXPANDED_NODES" in report:
        return (
            f"{source_of('', args)}: has more than 10000 entries; give many shards as a brace range "
            "(train/{000000..012345}.tar) or as a list file (shards.txt, a name a line)"
        )
    reader = _Reader()
    for line in report.splitlines():
        for pattern, read in READERS:
            if found := re.fullmatch(pattern, line.strip(" -")):
                if message := read(reader, *found.groups()):
                    return f"{source_of(reader.name, args)}: {message}"
                break  # the first form that fits is the line's
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return f"{source_of('', args)}: {' '.join(' '.join(lines[:3]).split())[:1000]} ({OPTIONS})"


@dataclass
class _Reader:
    """How far the reader has come: the setting, whose it is, which class was wanted, which types were tried.

    A method takes in a line of one form; it returns the mistake in words once it is known.
    """

    keys: list[str] = field(default_factory=list)
    owner: str = "lightning.Trainer"
    base: str = ""
    tried: list[str] = field(default_factory=list)
    name: str = ""

    def key(self, name: str) -> None:
        self.keys.append(name)
        self.tried, self.name = [], ".".join(self.keys)

    def subtypes(self, path: str) -> None:
        self.base, self.tried = path, []

    def value(self, text: str) -> str:
        return f"{self.name} {shown(text)}: must be {_kinds(self.tried)}" if self.tried else ""

    def wrong_value(self, kind: str, text: str) -> str:
        self.tried.append(kind)
        return self.value(text)

    def unknown(self, option: str) -> str:
        if not self.keys:
            return not_a_section(option.split(".")[0])
        self.name = f"{'.'.join(self.keys)}.{option}"
        return not_a_setting(self.name, self.owner, list(signature(import_class(self.owner)).parameters))

    def unknown_in_group(self, group: str, option: str) -> str:
        self.keys = [group]
        return self.unknown(option)

    def unrecognized(self, arguments: str) -> str:
        self.name = setting_of(arguments.split()[0])
        return no_setting(self.name)

    def missing(self, names: str) -> str:
        where = ".".join([*self.keys, names])
        return f"{where} is missing ({short(self.owner) if self.keys else 'a recipe'} needs it)"

    def unknown_class(self, path: str) -> str:
        wanted = short(self.base) if self.base else "class"
        public = sorted({name for module in PUBLIC for name in import_module(module).__all__})
        known = [name for name in public if _is_a(name, self.base)] or [name for name in public if name == wanted]
        hint = _suggest(short(path), known, f"known: {', '.join(known)}" if known else "give its full import path")
        return f"{self.name}: {path} is no {wanted} ({hint})"


READERS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (r'Parser key "(.+)":', _Reader.key),
    (r"Subtypes: \[(?:list\[)?(?:<class ')?([\w.]+).*", _Reader.subtypes),
    (r"Problem with given class_path '(.+)':", lambda reader, path: setattr(reader, "owner", path)),
    (r"Group '(.+)' does not accept option '(.+)'", _Reader.unknown_in_group),
    (r"Option '(.+)' is not accepted", _Reader.unknown),
    (r"unrecognized arguments: (.+)", _Reader.unrecognized),
    (r"the following arguments are required: (.+)", _Reader.missing),
    (r"module '.+' has no attribute '(.+)'", _Reader.unknown_class),
    (r"No module named '.+'", lambda reader: reader.unknown_class(reader.owner)),
    (r"Expected a dot import path string: (.+)", _Reader.unknown_class),
    (r"Import path (.+) does not correspond to a subclass of .+", lambda reader, p: reader.unknown_class(short(p))),
    (r"Not a valid subclass of .+", lambda reader: setattr(reader, "tried", ["class_path with init_args"])),
    (r"Expected a path but .+", lambda reader: None),
    (r"Expected an? (.+?)\. Got value: (.+)", _Reader.wrong_value),
    (r"Expected an? (.+)", lambda reader, kind: reader.tried.append(kind)),
    (r"Given value: (.+)", _Reader.value),
)
"""Forms of the parser's lines, and what each tells."""


def _kinds(tried: Sequence[str]) -> str:
    """Types in words, each once, values of literals flat."""
    words: list[str] = []
    for kind in tried:
        literal = re.fullmatch(r"typing\.Literal\[(.+)\]", kind)
        name = short(kind.removeprefix("<class '").removesuffix("'>"))
        article = "an" if name[0] in "AEIOUaeiou" else "a"
        words += [v.strip("' ") for v in literal[1].split(",")] if literal else [WORDS.get(name, f"{article} {name}")]
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last


def short(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _is_a(name: str, base: str) -> bool:
    found = next(getattr(module, name) for module in map(import_module, PUBLIC) if hasattr(module, name))
    try:
        wanted = import_class(base)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(found, type) and issubclass(found, wanted) and found is not wanted
