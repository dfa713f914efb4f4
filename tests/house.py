"""The house counted afresh: how many files, how long, and how deep one must read. `make house` prints it.

    python tests/house.py [ROOT]      # of another work tree, an older commit's for example

What the words mean:

- A file *imports* another where it names it in an import statement, at the top of the file or inside a function. A name
  that a room's ``__init__`` only passes on leads to the file that has it. A room that is imported whole is its
  ``__init__``.
- A *circle* is a set of files each of which leads to the others; imports for types count.
- A chain's *depth* is its number of files; imports for types do not count, as they are not run.
- The files *reached* by a command are those that a reader may have to open: its own, what they import, for types too,
  and so on. A room imported whole is not looked through, and a class that is named for ``isinstance`` alone is not
  opened.
- *Comment lines* hold a comment and nothing else.

On commit a16be38 these definitions give the figures that the plan of this house was made by: 204 files, 2 circles,
chains of 14 (data) and 21, and 43, 108 and 71 files for `mvar sample`, `mvar evaluate images` and `mvar train`.
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

PACKAGE = "mvar_lightning"
COMMANDS = {
    "sample": ("commands.sample",),
    "evaluate images": ("commands.evaluate_images", "commands.evaluate"),
    "train": ("commands.train",),
}
"""The file of each command; where there are two, the first that is there (the other is an older commit's)."""


class Import(NamedTuple):
    """A name as a file imports it: the room or file it comes from, its name there (none: the file itself), and here."""

    module: str
    name: str | None
    alias: str
    for_types: bool


class House:
    """The package of a work tree: its files by dotted name without the package's, and who imports whom.

    Args:
        root: of the work tree.
    """

    def __init__(self, root: Path) -> None:
        self.package = root / PACKAGE
        self.files = {_dotted(path.relative_to(self.package)): path for path in sorted(self.package.rglob("*.py"))}
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.files.items()}
        self.lines = {name: len(path.read_text().splitlines()) for name, path in self.files.items()}

    def is_room(self, name: str) -> bool:
        return self.files[name].name == "__init__.py"

    @cached_property
    def public(self) -> dict[str, str]:
        """The room of every public name, as the package's ``__init__`` has it."""
        for node in self.trees[""].body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == "_ROOMS"
            ):
                rooms = ast.literal_eval(node.value)
                return {name: room.partition(".")[2] for room, names in rooms.items() for name in names}
        raise ValueError(f"{PACKAGE}/__init__.py has no _ROOMS")

    @cached_property
    def imports(self) -> dict[str, dict[str, bool]]:
        """The files that each file imports, with whether it is for types alone."""
        found: dict[str, dict[str, bool]] = {name: {} for name in self.files if name}
        for name, others in found.items():
            for item in _imports_of(self.trees[name]):
                other = self._file_of(item.module, item.name)
                if other is not None and other != name:
                    others[other] = others.get(other, True) and item.for_types
        return found

    def _file_of(self, module: str, name: str | None) -> str | None:
        """The file that has a name; that of the module itself where it is imported whole."""
        inside = f"{module}.{name}".lstrip(".")
        if name is None or inside in self.files:
            return module if name is None and module in self.files else inside if inside in self.files else None
        if module == "":
            return self._file_of(self.public[name], name) if name in self.public else ""
        if module not in self.files:
            return None
        if self.is_room(module):
            for item in _imports_of(self.trees[module]):
                if item.alias == name:
                    return self._file_of(item.module, item.name)
        return module

    @cached_property
    def graph(self) -> dict[str, set[str]]:
        """Who imports whom when the program runs."""
        return {name: {other for other, types in others.items() if not types} for name, others in self.imports.items()}

    def reached(self, start: str) -> set[str]:
        """The files that a reader of a command may have to open."""
        seen: set[str] = set()
        todo = [start]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            if not self.is_room(name):
                todo += self._opened(name)
        return seen

    def _opened(self, name: str) -> Iterator[str]:
        tree = self.trees[name]
        named = _names_for_isinstance_alone(tree)
        for item in _imports_of(tree):
            other = self._file_of(item.module, item.name)
            if other is not None and item.alias not in named:
                yield other

    def circles(self) -> list[list[str]]:
        """Sets of files that import one another, for types too."""
        beyond = {name: _closure(self.imports, name) for name in self.imports}
        back = {name: [other for other in beyond[name] & beyond.keys() if name in beyond[other]] for name in beyond}
        return [list(circle) for circle in sorted({tuple(sorted(others)) for others in back.values() if others})]

    def depth(self, under: str = "") -> list[str]:
        """The longest chain of imports among the files of a room (of all, without a name), uppermost first."""
        inside = {n for n in self.graph if not under or n == under or n.startswith(f"{under}.")}
        longest: dict[str, list[str]] = {}

        def chain(name: str, above: tuple[str, ...]) -> list[str]:
            if name not in longest:
                others = sorted((self.graph[name] & inside) - {*above, name})
                below = [chain(other, (*above, name)) for other in others]
                longest[name] = [name, *max(below, key=len, default=[])]
            return longest[name]

        return max((chain(name, ()) for name in sorted(inside)), key=len)

    def importers(self) -> dict[str, int]:
        """How many files import each file; rooms' ``__init__`` count on neither side."""
        files = [name for name in self.graph if not self.is_room(name)]
        return {name: sum(name in self.graph[other] for other in files) for name in files}

    def comment_lines(self) -> int:
        """Lines that hold a comment and nothing else."""
        return sum(_comment_lines(path) for path in self.files.values())

    def functions(self) -> dict[str, int]:
        """Lines of every function, by file and name."""
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        return {
            f"{name}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
            for name, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, kinds)
        }

    def table(self) -> dict[str, str]:
        """The measures of the house, each with its figure."""
        total, largest = sum(self.lines.values()), max(self.lines, key=lambda name: self.lines[name])
        alone = sum(count == 1 for count in self.importers().values())
        reached = [len(self.reached(next(name for name in names if name in self.files))) for names in COMMANDS.values()]
        return {
            "files": str(len(self.files)),
            "lines": f"{total:,}",
            "mean, largest file": f"{total / len(self.files):.0f}, {self.lines[largest]} ({largest})",
            "longest function": "{1} ({0})".format(*max(self.functions().items(), key=lambda item: item[1])),
            "files with one importer": str(alone),
            "circles": "; ".join(" <-> ".join(circle) for circle in self.circles()) or "0",
            "import chain of data/; of the whole": f"{len(self.depth('data'))}; {len(self.depth())}",
            f"files reached: {' / '.join(COMMANDS)}": " / ".join(map(str, reached)),
            "comment lines": f"{self.comment_lines() / total:.1%}",
        }


def _dotted(path: Path) -> str:
    name = ".".join(path.with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


def _imports_of(tree: ast.AST) -> Iterator[Import]:
    """Everything of the package that a file imports, wherever in the file."""

    def walk(node: ast.AST, types: bool) -> Iterator[Import]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            module = str(node.module).partition(".")[2]
            yield from (Import(module, alias.name, alias.asname or alias.name, types) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield Import(alias.name.partition(".")[2], None, alias.asname or alias.name, types)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            types = True
        for child in ast.iter_child_nodes(node):
            yield from walk(child, types)

    return walk(tree, False)


def _names_for_isinstance_alone(tree: ast.AST) -> set[str]:
    asked = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        for part in ast.walk(node.args[1])
    }
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return {node.id for node in names if id(node) in asked} - {node.id for node in names if id(node) not in asked}


def _closure(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """All that can be reached from a file, itself only where there is a way back."""
    seen: set[str] = set()
    todo = list(graph.get(start, ()))
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph.get(name, ())
    return seen


def _comment_lines(path: Path) -> int:
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    code = {line for t in tokens if t.type not in QUIET for line in range(t.start[0], t.end[0] + 1)}
    return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT} - code)


QUIET = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


if __name__ == "__main__":
    house = House(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
    for measure, figure in house.table().items():
        print(f"{measure:62s} {figure}")
