"""Composes docs/evidence.md of what docs/evidence/ holds of the sweeps in recipes/evidence/: `make evidence-page`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from statistics import mean

import analyses
import yaml
from members import file_of, plan, rows

from mvar_lightning.evaluation.papers.analyses import analyze_scaling
from mvar_lightning.runs.sweep import SweepRequest, read_sweep, run_sweep
from mvar_lightning.runs.told_apart import LEVEL, told_apart
from mvar_lightning.tools.console import table_of

COLUMNS = {"fid": 2, "kid": 2, "precision": 3, "recall": 3, "processor_ms": 1, "peak_memory_gib": 2}
ROOT = Path(__file__).parents[1]
INTRODUCTION = """# Evidence

The papers' questions on Fashion-MNIST (70,000 gray images of 28 x 28, ten classes; `data/fashion`), equal steps,
three seeds where a row does not say how many were run. FID and KID are by the data set's own classifier (500 images
against 10,000): compare them within a table alone. C_T is the data-copying test ([evaluation.md](evaluation.md)); far
below 0 would mean copies.
`make evidence-page` draws this page from `docs/evidence/`; `make evidence` first trains what is missing there.
[analyses.md](analyses.md) says what the tables tell, and where that is not what was published.
"""


def section(sweep: Path) -> str:
    """Question, source and command from the head of a sweep's file, then its table and pictures, if it was measured."""
    head = [line.removeprefix("#").strip() for line in sweep.read_text().splitlines() if line.startswith("#")]
    kept = ROOT / "docs" / "evidence" / sweep.stem
    lines = [f"## {sweep.stem}", ""]
    for line in head:  # a line that says what it is about begins an item, others go on with theirs
        if item := re.match(r"([A-Z]\w+):\s+(.*)", line):
            lines += [*([""] if not lines[-1].startswith(("-", "  ")) else []), f"- {item[1]}: {item[2]}"]
        else:
            lines.append(f"  {line}" if lines[-1].startswith(("-", "  ")) else line)
    if not list(kept.glob("*-seed*.json")):
        planned = read_sweep(sweep)
        return "\n".join(
            [*lines, "", f"Not measured yet: {len(planned.variants)} variants of {len(planned.seeds)} seeds.", ""]
        )
    run_sweep(SweepRequest(sweep, keep=kept, draw=True))
    table = (kept / "sweep.md").read_text().rstrip()
    drawn = [name for name in ("sweep", "curves") if (kept / f"{name}.png").exists()]
    pictures = [f"![{name} of {sweep.stem}](evidence/{sweep.stem}/{name}.png)" for name in drawn]
    more = ADDITIONS.get(sweep.stem, lambda kept: [])
    return "\n".join([*lines, "", table, "", *pictures, "", *more(kept)])


def law(kept: Path) -> list[str]:
    """The fit over the runs of a sweep of sizes, once there are three."""
    if len(list(kept.glob("*-seed*.json"))) < 3:
        return []
    with chdir(ROOT):  # the report names the folder
        found = analyze_scaling(kept.relative_to(ROOT))
    return [found.markdown.rstrip(), "", f"![fit of {kept.name}](evidence/{kept.name}/scaling.png)", ""]


def by_scale(kept: Path) -> list[str]:
    """The loss of each scale, which the sum hides."""
    content = json.loads((kept / "sweep.json").read_text())
    sides = yaml.safe_load((ROOT / "recipes/tokenizer/fashion.yaml").read_text())["model"]["init_args"]["scales"]
    cells: dict[str, list[str]] = {variant: [] for variant in content["variants"]}
    for scale in range(len(sides)):
        values = {
            variant: [run["report"]["metrics"][f"val/loss_scale_{scale}"] for run in content["runs"]
                      if run["variant"] == variant and run["report"] is not None]
            for variant in cells
        }  # fmt: skip
        chances = told_apart(values, content["against"])
        for variant, row in cells.items():
            star = " *" if chances.get(variant, 1.0) < LEVEL else ""
            row.append(f"{mean(values[variant]):.3f}{star}" if values[variant] else "-")
    head = ["loss of each scale", *(f"{side}x{side}" for side in sides)]
    return [table_of(head, [[variant, *row] for variant, row in cells.items()]), ""]


ADDITIONS: dict[str, Callable[[Path], list[str]]] = {
    "scaling": law,
    **dict.fromkeys(("strategies", "history", "blocks"), by_scale),
}
"""What stands below the table of a sweep."""


def members() -> str:
    """The table of docs/members.yaml: means over the seeds, and their range."""
    wanted = plan()
    table = []
    for name, options in rows(wanted).items():
        files = [file_of(name, seed) for seed in wanted["seeds"]]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if any(one["options"] != options for one in found):
            raise SystemExit(f"{files[0]} and its like: are of other options than docs/members.yaml; remove them")
        cells = [_cell([one[column] for one in found if column in one], places) for column, places in COLUMNS.items()]
        table.append([name, f"`{options}`", *cells])
    head = ["member", "options", "FID", "KID", "precision", "recall", "ms an image", "peak memory, GiB"]
    seeds = len(wanted["seeds"])
    about = (
        f"`{wanted['checkpoint']}` where no other is named, {wanted['options']}; {seeds} sets of seeds: mean (lowest "
        "to highest). Time is the processor's, of one thread, sampling and decoding; what else the machine does moves "
        "it, too. The memory is nearly all the process itself: the models have 0.2 million parameters. "
        "[beyond.md](beyond.md) says what the members are, and what the table tells of them."
    )
    return "\n".join(["## members", "", about, "", table_of(head, table), ""])


def _cell(values: list[float], places: int) -> str:
    if not values:
        return "-"
    low, middle, high = (f"{value:.{places}f}" for value in (min(values), mean(values), max(values)))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    sweeps = sorted((ROOT / "recipes" / "evidence").glob("*.yaml"))
    parts = [INTRODUCTION, *map(section, sweeps), members(), analyses.section()]
    (ROOT / "docs" / "evidence.md").write_text("\n".join(parts))
    print(f"docs/evidence.md: {len(sweeps)} tables")
