"""The house: who may import whom, how deep, and how long a file may be (docs/design.md, `make house`)."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from house import COMMANDS, House

ROOT = Path(__file__).parents[1]
ORDER = (
    ("errors", "compat", "moved"),
    ("axis", "tools"),
    ("pyramid",),
    ("attention", "tokenizer", "metrics"),
    ("data",),
    ("transformer",),
    ("checkpoints",),
    ("sampling",),
    ("training",),
    ("evaluation",),
    ("demo",),
    ("callbacks",),
    ("runs",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""Rooms from the ground up; those of a line do not know one another."""

LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
DATA_ORDER = (
    ("index", "images", "transforms", "tar", "check"),
    ("reading",),
    ("making", "tokens"),
    ("image_data", "token_data"),
)
DATA_LEVEL = {part: level for level, parts in enumerate(DATA_ORDER) for part in parts}

DOORS = {
    "axis": "errors",
    "tools": "compat errors",
    "pyramid": "errors",
    "attention": "axis compat errors pyramid tools",
    "tokenizer": "axis compat errors pyramid tools",
    "metrics": "errors pyramid tools",
    "data": "compat errors moved pyramid tokenizer tools",
    "transformer": "attention axis compat errors pyramid tools",
    "checkpoints": "attention errors pyramid tokenizer tools transformer",
    "sampling": "attention axis checkpoints data errors pyramid tokenizer tools transformer",
    "training": "attention axis checkpoints compat data errors metrics pyramid sampling tokenizer tools transformer",
    "evaluation": "attention checkpoints data errors metrics pyramid sampling tokenizer tools transformer",
    "demo": "checkpoints data errors evaluation metrics pyramid sampling tokenizer tools transformer",
    "callbacks": "compat data errors evaluation metrics tokenizer tools training",
    "runs": "attention callbacks checkpoints compat data errors pyramid tokenizer tools training",
    "commands": "attention checkpoints data demo errors evaluation metrics pyramid runs sampling tokenizer tools "
    "training transformer",
    "cli": "commands errors tools",
    "__main__": "cli",
}
"""Which rooms a room has a door to. A new door is a decision: it needs a reason, and a line here."""

DEPTHS = {"data": 9, "tokenizer": 8}
"""The longest chain of imports that a room may have inside; of a room that is not named, `DEPTH`."""
DEPTH, WHOLE_DEPTH = 6, 19

TOOLS = {"files", "tensors", "processes", "ranks", "compute", "console", "drawing", "plots", "remote", "copies"}
FILES, FILE_LINES, FUNCTION_LINES = 192, 400, 60
LINES = 35_100
"""The plan says 20,000; what was reached (22,087), and why not more, is in docs/log.md. What was right for wrong input
(judging files, recipes and shards before work begins) added 3,200, what a first GPU needs (plan, rehearsal, KID,
references, a watchdog, synchronizations) 1,400, recipes by name and classes of one's own, and jobs
that several machines share (400), addresses by ranges and copies of them (500), memorization and sweeps whose results
are kept (400), maps and images that are no squares, or not RGB (550), selectors with a scorer and its training
(1,050), cache policies and refinement in passes (1,150), the page of `mvar demo` (what harms it refused) and moving
pictures (1,220) the rest."""
REACHED = {"sample": 53, "evaluate images": 91, "train": 54}
"""Files that a reader of a command may have to open (the plan's 30 for `sample` is eight away: classes by name, a
checkpoint's record and processes by Fabric are four of them, selectors and their scorer, draws, cache policies,
refinement, moving pictures and what notebooks show eight more; emoji are one more data set by
name)."""


@cache
def house() -> House:
    return House(ROOT)


def room_of(name: str) -> str:
    return name.partition(".")[0]


EVERY_FILE = [name for name in House(ROOT).files if name]
EVERY_ROOM = sorted({room_of(name) for name in EVERY_FILE})


def test_every_room_has_its_place_in_the_order() -> None:
    assert set(EVERY_ROOM) <= set(LEVEL)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_file_imports_only_lower_rooms_or_its_own(name: str) -> None:
    room = room_of(name)
    others = {other for other in house().imports[name] if room_of(other) not in ("", room)}
    upward = {other for other in others if LEVEL[room_of(other)] >= LEVEL[room]}
    assert not upward, f"{name}: imports {sorted(upward)}"


def test_a_room_opens_only_its_own_doors() -> None:
    opened = {
        (room_of(name), room_of(other))
        for name in EVERY_FILE
        for other in house().imports[name]
        if room_of(other) not in ("", room_of(name))
    }
    new = {f"{room} -> {other}" for room, other in opened if other not in DOORS.get(room, "").split()}
    assert not new, f"new doors between rooms: {sorted(new)}"


@pytest.mark.parametrize("name", [name for name in EVERY_FILE if name.startswith("data.")])
def test_the_data_path_is_a_path(name: str) -> None:
    """Reading never makes; making and the token cache do not know each other; the modules stand above both."""
    part = name.split(".")[1]
    inside = {other for other in house().imports[name] if other.startswith("data.") and other.split(".")[1] != part}
    upward = {other for other in inside if DATA_LEVEL[other.split(".")[1]] > DATA_LEVEL[part]}
    aside = {other for other in inside if DATA_LEVEL[other.split(".")[1]] == DATA_LEVEL[part] > 0}
    assert not upward, f"{name}: imports {sorted(upward)}"
    assert not aside or part in DATA_ORDER[-1], f"{name}: imports {sorted(aside)}"


def test_the_tools_are_ten() -> None:
    found = {name.removeprefix("tools.") for name in EVERY_FILE if name.startswith("tools.")}
    assert found == TOOLS, "an eleventh tool needs an argument: docs/design.md"
    outside = {other for name in EVERY_FILE if room_of(name) == "tools" for other in house().imports[name]}
    assert {room_of(other) for other in outside} <= {"tools", "errors", "compat"}


def test_no_file_leads_back_to_itself() -> None:
    assert house().circles() == []


@pytest.mark.parametrize("room", EVERY_ROOM)
def test_a_chain_of_imports_inside_a_room_is_short(room: str) -> None:
    chain = house().depth(room)
    assert len(chain) <= DEPTHS.get(room, DEPTH), " -> ".join(chain)


def test_a_chain_of_imports_through_the_whole_is_short() -> None:
    chain = house().depth()
    assert len(chain) <= WHOLE_DEPTH, " -> ".join(chain)


def test_no_file_and_no_function_is_too_long() -> None:
    files = {name: lines for name, lines in house().lines.items() if lines > FILE_LINES}
    assert not files, f"more than {FILE_LINES} lines: {files}"
    functions = {name: lines for name, lines in house().functions().items() if lines > FUNCTION_LINES}
    assert not functions, f"more than {FUNCTION_LINES} lines: {functions}"


def test_the_package_is_not_too_large() -> None:
    assert len(house().files) <= FILES
    assert sum(house().lines.values()) <= LINES


@pytest.mark.parametrize("command", COMMANDS)
def test_few_files_lead_through_a_command(command: str) -> None:
    start = next(name for name in COMMANDS[command] if name in house().files)
    assert len(house().reached(start)) <= REACHED[command]


def test_every_file_says_what_it_is_for() -> None:
    texts = {name: ast.get_docstring(tree) or "" for name, tree in house().trees.items()}
    assert not [name for name, text in texts.items() if not text or "TODO" in text]


# the counting itself, on a package of a few files


@pytest.fixture
def small(tmp_path: Path) -> House:
    files = {
        "__init__.py": '_ROOMS = {"mvar_lightning.room": ("Thing",)}\n',
        "room/__init__.py": "from mvar_lightning.room.thing import Thing\n",
        "room/thing.py": "# why\nclass Thing:\n    pass  # not a comment line\n",
        "one.py": "from mvar_lightning import Thing\ndef f():\n    from mvar_lightning.two import g\n",
        "two.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mvar_lightning.one import f\n",
        "three.py": "from mvar_lightning import room\nfrom mvar_lightning.one import f\nok = isinstance(room, f)\n",
    }
    for name, text in files.items():
        path = tmp_path / "mvar_lightning" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(tmp_path)


def test_imports_are_found_wherever_they_stand(small: House) -> None:
    assert small.imports["one"] == {"room.thing": False, "two": False}, "public names lead to the file that has them"
    assert small.imports["two"] == {"one": True}, "for types alone"
    assert small.graph["two"] == set() and small.circles() == [["one", "two"]]


def test_chains_importers_and_comments_are_counted(small: House) -> None:
    assert len(small.depth()) == 3 and small.depth("room") == ["room", "room.thing"]
    assert small.importers() == {"one": 1, "two": 1, "three": 0, "room.thing": 1}
    assert small.comment_lines() == 1


def test_a_reader_follows_names_and_leaves_out_what_is_asked_for_by_isinstance(small: House) -> None:
    assert small.reached("three") == {"three", "room"}, "a room is not looked through, and `f` is for isinstance alone"
    assert small.reached("one") == {"one", "two", "room.thing"}


def test_make_house_prints_a_table() -> None:
    done = subprocess.run([sys.executable, "tests/house.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    for measure in (
        "files",
        "mean, largest file",
        "circles",
        "import chain of data/",
        "files reached",
        "comment lines",
    ):
        assert measure in done.stdout
