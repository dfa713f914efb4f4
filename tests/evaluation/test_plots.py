"""What the plots have in common: told apart in gray print, readable numbers, one axis for one kind of curve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mvar_lightning.runs.sweep_results import Column, Curve, Sweep, SweepResults, SweepRun
from mvar_lightning.tools import plots as style


def test_twenty_lines_differ_without_their_colors() -> None:
    looks = [style.line_style(number) for number in range(20)]
    assert len({(look["linestyle"], look["marker"]) for look in looks}) == 20


def test_text_has_contrast_on_dark_and_on_middle_colors() -> None:
    assert style.text_color("#0072B2") == "white" and style.text_color("#08306b") == "white"
    assert style.text_color("#6baed6") == "black", "5.5 to 1 in black, 2.4 to 1 in white"
    assert style.text_color((1, 1, 1, 1)) == "black"


@pytest.mark.parametrize(
    ("form", "limits", "written"),
    [
        (".1%", (0.21, 0.9), ["40%", "60%", "80%"]),
        (",.0f", (-1, 250_000), ["0", "100,000", "200,000"]),
        (".2f", (3.9, 4.6), ["4.0", "4.5"]),
        (".1f", (4.009, 4.041), ["4.02", "4.04"]),  # 4.0 twice would say nothing
        (".1%", (0.08009, 0.08041), ["8.02%", "8.04%"]),
        (".3g", (-1, 5), ["0", "2", "4"]),
    ],
)
def test_ticks_have_as_many_digits_as_tell_them_apart(
    form: str, limits: tuple[float, float], written: list[str]
) -> None:
    axis = Figure().subplots()
    axis.set_xlim(limits)
    style.format_ticks(axis.xaxis, form)
    places = axis.get_xticks()
    labels = axis.xaxis.get_major_formatter().format_ticks(places)
    inside = [limits[0] < place < limits[1] for place in places]
    assert [label for label, shown in zip(labels, inside, strict=True) if shown] == written


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of what is drawn, as they are at the end."""
    drawn: list[Any] = []

    @contextmanager
    def kept(path: Path, rows: int = 1, columns: int = 1, width: float = 1, height: float = 1) -> Iterator[Any]:
        drawn.extend(Figure(figsize=(width, height), layout="constrained").subplots(rows, columns, squeeze=False).flat)
        yield drawn

    monkeypatch.setattr(style, "figure_of", kept)
    return drawn


TAGS = ("use/usage_scale_1", "use/usage_scale_2", "val/loss", "train/loss_last", "val/bytes")


def results() -> SweepResults:
    columns = (
        Column("use/usage_scale_1", title="usage, 2x2", format=".1%"),
        Column("use/usage_scale_2", title="3x3", format=".1%"),
        Column("val/loss", title="loss", format=".3f"),
        Column("val/bytes", title="MiB", divide=1024.0),
    )
    sweep = Sweep("r.yaml", {"a": {}, "b": {}}, columns, {}, seeds=(0, 1), curves=TAGS)
    ends = {"use/usage_scale_1": 0.3, "use/usage_scale_2": 0.9, "val/loss": 4.0, "val/bytes": 2048.0}
    starts = [0.1, 0.8, 5.0, 7.0, 2048.0]
    curves = {tag: Curve((0, 1, 2), (start, start, start)) for tag, start in zip(TAGS, starts, strict=True)}
    return SweepResults(sweep, [
        SweepRun(variant, seed, {"metrics": {k: v * (1 + seed / 50) for k, v in ends.items()}, "steps": 2}, curves)
        for variant in ("a", "b") for seed in (0, 1)
    ])  # fmt: skip


def test_curves_of_a_kind_share_an_axis_and_the_names_of_the_columns(panels: list[Any], tmp_path: Path) -> None:
    results().plot_curves(tmp_path / "curves.png")
    coarse, fine, loss, last, size, unused = panels
    assert [axis.get_title() for axis in panels[:5]] == ["usage, 2x2", "3x3", "loss", "train/loss_last", "MiB"]
    assert coarse.get_ylim() == fine.get_ylim() == (0, 1)
    assert coarse.yaxis.get_major_formatter().format_ticks([0, 0.5, 1]) == ["0%", "50%", "100%"]
    assert (coarse.get_ylabel(), fine.get_ylabel()) == ("", "usage"), "said where the title does not"
    assert loss.get_ylim() == last.get_ylim() and loss.get_ylim()[0] < 5 and loss.get_ylim()[1] > 7
    assert list(size.lines[0].get_ydata()) == [2, 2, 2], "in the unit of the title"
    assert not unused.get_visible()


def test_the_ring_of_a_seed_is_wider_than_the_dot_of_the_mean(panels: list[Any], tmp_path: Path) -> None:
    results().plot(tmp_path / "bars.png")
    rings, dot = (line for line in panels[0].lines if line.get_marker() == "o" and line.get_ydata()[0] == 0)
    assert len(rings.get_xdata()) == 2 and rings.get_markerfacecolor() == "none"
    assert len(dot.get_xdata()) == 1 and dot.get_markersize() + 2 < rings.get_markersize()
