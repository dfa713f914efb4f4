"""docs/members.yaml and what measures it: every row is a command that `mvar` takes, and what it names can be made."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mvar_lightning.cli import build_parser
from mvar_lightning.commands.options import settings_of, source_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """docs/members.py, in a checkout where nothing has been trained or measured."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import members

    monkeypatch.setattr(members, "ROOT", tmp_path)
    monkeypatch.setattr(members, "KEPT", tmp_path / "kept")
    return members


def test_every_member_is_a_command_and_its_folders_are_made(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, parser = script.plan(), build_parser()
    monkeypatch.setattr("mvar_lightning.sampling.selectors.named_selector", lambda name, **others: None)
    made = {str(Path(file).parent) for file in plan["made"]}
    assert plan["checkpoint"] in made
    for options in plan["members"].values():
        words = ["--checkpoint", plan["checkpoint"], *shlex.split(plan["options"]), *shlex.split(options)]
        args = parser.parse_args(["evaluate", "images", "--reference", plan["reference"], *words])
        assert source_of(args) and settings_of(args)
        named = [name for name in (args.checkpoint, args.refiner, args.refinement, args.selector) if name]
        assert {name for name in named if name.startswith("runs/")} <= made, options
    for command in plan["made"].values():
        recipe = next((word for word in shlex.split(command) if word.startswith("recipes/")), None)
        assert recipe is None or (ROOT / recipe).is_file(), command
        assert {name for name in script.named(command) if name.startswith("runs/members/")} <= made


def test_what_is_missing_is_made_in_order_and_once(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def run(words: list[str]) -> str:
        done.append(words[0])
        folder = script.ROOT / words[words.index("--out" if "--out" in words else "--run-folder") + 1]
        folder.mkdir(parents=True)
        (folder / "done.json").touch()
        return ""

    monkeypatch.setattr(script, "mvar", run)
    plan: dict[str, Any] = {
        "made": {
            "runs/scorer/done.json": "train --run-folder runs/scorer --drawn=runs/drawn",
            "runs/drawn/done.json": 'draw --out runs/drawn --checkpoint "runs/a base"',
            "runs/a base/done.json": 'base --run-folder "runs/a base"',
            "runs/other/done.json": "other --run-folder runs/other",
        }
    }
    for _ in range(2):
        script.make(plan, script.named("--cfg 0 --selector runs/scorer"))
    assert done == ["base", "draw", "train"]


def test_a_measurement_is_kept_with_its_figures(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {**script.plan(), "made": {}}
    told = "500 made now at 35.4 images/s (28.3 ms of processor time each), peak memory 0.47 GiB"
    asked: list[list[str]] = []

    def run(words: list[str]) -> str:
        asked.append(words)
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        report = {"fid": 1.0, "kid": 2.0, "precision": 0.5, "recall": 0.25, "images": 500}
        (out / "images.json").write_text(json.dumps(report))
        return told

    monkeypatch.setattr(script, "mvar", run)
    found = script.measure(plan, "int8", 1)
    assert (found["options"], found["fid"], found["processor_ms"]) == ("--cfg 0 --quantize int8", 1.0, 28.3)
    assert (found["images_per_second"], found["peak_memory_gib"]) == (35.4, 0.47)
    assert asked[0][asked[0].index("--seed") + 1] == "1000" and "--save-moments" in asked[0]
    (script.ROOT / "runs/members/reference.npz").touch()
    told = "all of them there already"
    with pytest.raises(SystemExit, match="whose speed is not known"):
        script.measure(plan, "plain", 0)
    assert "--save-moments" not in asked[1] and asked[1][-4:-2] == [
        "--reference",
        str(script.ROOT / "runs/members/reference.npz"),
    ]
