"""Any value for any number of a recipe, any JSON in a run's notes: judged in bounded time, right or one line."""

from __future__ import annotations

import inspect
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning import Trainer

from mvar_lightning import ShardsDataModule, TokenizerModule, VARModule
from mvar_lightning.errors import UserError
from mvar_lightning.runs.bounds import TABLES, out_of_bounds
from mvar_lightning.runs.recipe import RecipeCheck
from mvar_lightning.runs.recipe_check import check_quickly
from mvar_lightning.runs.run import Run

ROOT = Path(__file__).parents[2]
SECONDS = 5


def bounded(examples: int) -> settings:
    return settings(derandomize=True, deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck))


def names(section: str, of: Any) -> list[str]:
    return [f"{section}.{name}" for name in inspect.signature(of).parameters if name not in ("self", "callbacks")]


KEYS = [*names("model", VARModule), *names("data", ShardsDataModule), *names("trainer", Trainer), "seed_everything"]
KEYS += ["tokenizer_recipe", "checkpoint.every_steps", "checkpoint.every_minutes"]
TOKENIZER_KEYS = [*names("model", TokenizerModule), *names("data", ShardsDataModule)]
SCALARS = st.one_of(
    st.integers(-(10**30), 10**30),
    st.integers(-3, 40),
    st.floats(),
    st.floats(-2, 2),
    st.booleans(),
    st.none(),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3))
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner), max_leaves=6
)


def judged(judge: Any) -> str | None:
    """The line of a refusal, or None; anything else that is raised is a broken promise."""
    start = time.monotonic()
    line = None
    try:
        judge()
    except UserError as error:
        line = error.with_flags()
        assert "\n" not in line and 10 < len(line) < 3000, line
    assert time.monotonic() - start < SECONDS
    return line


def override(name: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
    return f"--{name}={text}"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name one another from there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@cache
def parser(recipe: str) -> RecipeCheck:
    """Made once: making it takes as long as many recipes."""
    return RecipeCheck(["--config", recipe], Path("runs"))


def parse(recipe: str, *overrides: str) -> None:
    check = parser(recipe)
    check.arguments = ["--config", recipe, *overrides]
    check.parse_arguments(check.parser, check.arguments)
    check.instantiate_classes()


@pytest.mark.parametrize(
    ("recipe", "keys"), [("recipes/var/digits.yaml", KEYS), ("recipes/tokenizer/digits.yaml", TOKENIZER_KEYS)]
)
@bounded(80)
@given(data=st.data())
def test_any_value_of_any_setting_is_judged_quickly(recipe: str, keys: list[str], data: st.DataObject) -> None:
    name, value = data.draw(st.sampled_from(keys)), data.draw(VALUES)
    judged(lambda: check_quickly(recipe, [override(name, value)]))


@bounded(25)
@example("model.depth", 10**30)
@example("model.depth", "9" * 5000)
@example("data.path", "\0")
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_of_any_setting_is_judged_by_the_parser(name: str, value: Any) -> None:
    judged(lambda: parse("recipes/var/digits.yaml", override(name, value)))


@pytest.mark.parametrize("name", sorted(TABLES))
@bounded(60)
@given(st.floats() | st.integers())
def test_a_number_that_is_let_through_is_within_its_bound(name: str, number: float) -> None:
    """Of every setting of every class; the table names no setting that the class has not."""
    section = "data" if "Data" in name or name == "TokenShards" else "model"
    for setting, bound in TABLES[name].items():
        node = {"class_path": f"mvar_lightning.{name}", "init_args": {setting: number}}
        found = [told for told, _ in out_of_bounds({section: node}) if told == f"{section}.{setting}"]
        if setting not in ("depth", "width", "heads"):  # together they have to fit, too
            assert bool(found) == (not bound.holds(number))


@pytest.mark.parametrize("note", ["run.json", "metrics.json"])
@bounded(80)
@given(content=JSON | st.binary(max_size=20))
def test_any_content_of_a_runs_notes_is_read_or_refused(note: str, content: Any, tmp_path: Path) -> None:
    run = Run(ROOT / "recipes/var/digits.yaml", (), tmp_path)
    (tmp_path / note).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    line = judged(run.is_known if note == "run.json" else run.report)
    assert line is not None and str(tmp_path) in line
