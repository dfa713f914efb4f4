"""The layer rule: a file imports only lower layers or its own package (docs/design.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mvar_lightning import _ROOM_OF as ROOM_OF

PACKAGE = Path(__file__).parents[1] / "mvar_lightning"
LAYERS = {
    "errors": -1,
    "axis": 0,
    "evaluating": 0,
    "pyramid": 0,
    "attention": 1,
    "tokenizer": 1,
    "data": 1,
    "metrics": 1,
    "transformer": 2,
    "sampling": 3,
    "checkpoints": 3,
    "modules": 4,
    "callbacks": 5,
    "analysis": 6,
    "benchmarks": 6,
    "commands": 7,
    "cli": 8,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def imports_of(path: Path) -> set[str]:
    """Rooms of the package that a file imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module == "mvar_lightning":  # public names load their room
                names = [ROOM_OF.get(alias.name, name) for alias, name in zip(node.names, names, strict=True)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("mvar_lightning.")}
    return rooms & set(LAYERS)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_lower_layers_or_its_own_room(path: Path) -> None:
    room = room_of(path)
    upward = {other for other in imports_of(path) if other != room and LAYERS[other] >= LAYERS[room]}
    assert not upward, f"{path}: imports {sorted(upward)}"


def test_every_room_has_a_layer() -> None:
    assert {room_of(path) for path in FILES} <= set(LAYERS)
