"""A recipe's mistake in one line: what the parser reports over many, with every class and type it tried.

The parser's report is a tree, indented and in words; its first branch that says something is the mistake. Where it
has none of the known forms, its first lines are passed on as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from itertools import pairwise
from typing import Any

SECTIONS = ("seed_everything", "tokenizer_recipe", "model", "data", "trainer", "checkpoint")
PUBLIC = ("mvar_lightning", "mvar_lightning.callbacks")
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
OPTIONS = "`mvar fit --options` lists all"


def explain(report: str, args: Sequence[str]) -> str:
    """One line that names the setting, its value and the way out.

    Args:
        report: the text of the parser's error.
        args: what was parsed: ``--config FILE`` and overrides; the line says where the mistake stands.
    """
    reader = _Reader()
    for line in report.splitlines():
        if message := reader.read(line.strip(" -")):
            return f"{source_of(reader.name, args)}: {message}"
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    return f"{source_of('', args)}: {' '.join(lines[:3])} ({OPTIONS})"


def not_a_setting(name: str, owner: str, known: Sequence[str]) -> str:
    """Of a setting ``model.depht`` that the class at a path does not have; ``known`` are those it has."""
    return f"{name} is not a setting of {short(owner)} ({_suggest(short(name), known, OPTIONS)})"


def not_a_section(name: str) -> str:
    return f"{name} is not a section of a recipe ({_suggest(name, SECTIONS, 'they are ' + ', '.join(SECTIONS))})"


def no_setting(name: str) -> str:
    """Of an override that names no section."""
    return f"{name} is no setting (overrides look like --model.depth=8; {OPTIONS})"


@dataclass
class _Reader:
    """How far the reader has come: the setting, whose it is, which class was wanted, which types were tried."""

    keys: list[str] = field(default_factory=list)
    owner: str = "lightning.Trainer"
    base: str = ""
    tried: list[str] = field(default_factory=list)
    name: str = ""

    def read(self, line: str) -> str:
        """Take one line in; the mistake in words once it is known, else nothing."""
        for pattern, reader in READERS:
            if found := re.fullmatch(pattern, line):
                return reader(self, *found.groups()) or ""
        return ""

    def key(self, name: str) -> None:
        self.keys.append(name)
        self.tried, self.name = [], ".".join(self.keys)

    def of_class(self, path: str) -> None:
        self.owner = path

    def subtypes(self, path: str) -> None:
        self.base, self.tried = path, []

    def expected(self, kind: str) -> None:
        self.tried.append(kind)

    def value(self, text: str) -> str:
        return f"{self.name} {text}: must be {_kinds(self.tried)}" if self.tried else ""

    def wrong_value(self, kind: str, text: str) -> str:
        self.tried.append(kind)
        return self.value(text)

    def unknown(self, option: str) -> str:
        if not self.keys:
            return not_a_section(option.split(".")[0])
        self.name = f"{'.'.join(self.keys)}.{option}"
        return not_a_setting(self.name, self.owner, list(signature(_imported(self.owner)).parameters))

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
        wanted, public = short(self.base) if self.base else "class", _public_names()
        known = [name for name in public if _is_a(name, self.base)] or [name for name in public if name == wanted]
        hint = _suggest(short(path), known, f"known: {', '.join(known)}" if known else "give its full import path")
        return f"{self.name}: {path} is no {wanted} ({hint})"

    def not_a_subclass(self) -> str:
        self.tried = ["class_path with init_args"]
        return ""


READERS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (r'Parser key "(.+)":', _Reader.key),
    (r"Subtypes: \[(?:list\[)?(?:<class ')?([\w.]+).*", _Reader.subtypes),
    (r"Problem with given class_path '(.+)':", _Reader.of_class),
    (r"Group '(.+)' does not accept option '(.+)'", _Reader.unknown_in_group),
    (r"Option '(.+)' is not accepted", _Reader.unknown),
    (r"unrecognized arguments: (.+)", _Reader.unrecognized),
    (r"the following arguments are required: (.+)", _Reader.missing),
    (r"module '.+' has no attribute '(.+)'", _Reader.unknown_class),
    (r"No module named '.+'", lambda reader: reader.unknown_class(reader.owner)),
    (r"Expected a dot import path string: (.+)", _Reader.unknown_class),
    (
        r"Import path (.+) does not correspond to a subclass of .+",
        lambda reader, path: reader.unknown_class(short(path)),
    ),
    (r"Not a valid subclass of .+", _Reader.not_a_subclass),
    (r"Expected a path but .+", lambda reader: None),
    (r"Expected an? (.+?)\. Got value: (.+)", _Reader.wrong_value),
    (r"Expected an? (.+)", _Reader.expected),
    (r"Given value: (.+)", _Reader.value),
)
"""Forms of the parser's lines, and what each tells."""


def source_of(name: str, args: Sequence[str]) -> str:
    """Where the mistake stands: an override that sets ``name`` or a part of it, else the recipe."""
    setters = [a for a in args if name and a.startswith("--") and f"{name}.".startswith(f"{setting_of(a)}.")]
    if setters:
        return f"override {max(setters, key=lambda argument: len(setting_of(argument)))}"
    following = dict(pairwise(args))
    return f"recipe {following['--config']}" if "--config" in following else "arguments"


def setting_of(argument: str) -> str:
    """``model.depth`` of ``--model.depth=8``."""
    return argument.removeprefix("--").partition("=")[0]


def _suggest(name: str, known: Sequence[str], otherwise: str) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def _kinds(tried: Sequence[str]) -> str:
    """Types in words, each once, values of literals flat."""
    words: list[str] = []
    for kind in tried:
        literal = re.fullmatch(r"typing\.Literal\[(.+)\]", kind)
        name = short(kind.removeprefix("<class '").removesuffix("'>"))
        words += [v.strip("' ") for v in literal[1].split(",")] if literal else [WORDS.get(name, _with_article(name))]
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOUaeiou" else f"a {noun}"


def short(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _public_names() -> list[str]:
    return sorted({name for module in PUBLIC for name in import_module(module).__all__})


def _is_a(name: str, base: str) -> bool:
    found = next(getattr(module, name) for module in map(import_module, PUBLIC) if hasattr(module, name))
    try:
        wanted = _imported(base)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(found, type) and issubclass(found, wanted) and found is not wanted
