"""The table of `mvar compare`: on screen, as Markdown, and as a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar_lightning.commands.runs import read_json, write_json


@dataclass(frozen=True)
class Row:
    """One run, as its ``metrics.json`` tells it."""

    name: str
    report: dict[str, Any]

    @classmethod
    def read(cls, name: str, folder: Path) -> Row:
        return cls(name, read_json(folder / "metrics.json"))

    def metric(self, name: str) -> float:
        return float(self.report["metrics"].get(name, float("nan")))

    @property
    def fid_name(self) -> str:
        """The logged name says which features the distance is of."""
        names = [name for name in self.report["metrics"] if name.startswith("val/fid_") and name.count("_") == 1]
        return next((name for name in names if name != "val/fid_images"), "val/fid")

    def cells(self) -> dict[str, str]:
        """Formatted values by column."""
        report = self.report
        return {
            "strategy": self.name,
            "loss": f"{self.metric('val/loss'):.3f}",
            "loss, last scale": f"{self.metric('val/loss_last'):.3f}",
            "accuracy": f"{self.metric('val/accuracy'):.1%}",
            "accuracy, last scale": f"{self.metric('val/accuracy_last'):.1%}",
            self.fid_name.removeprefix("val/"): f"{self.metric(self.fid_name):.2f}",
            "class consistency": f"{self.metric('val/class_consistency'):.1%}",
            "parameters": f"{report['parameters']:,}",
            "s/step": f"{report['seconds_per_step']:.4f}",
            "peak memory, MiB": f"{report['peak_memory_bytes'] / 2**20:,.0f}",
            "KV bytes/image": f"{report['kv_cache_bytes_per_image']:,}",
        }


def write_comparison(rows: list[Row], out: Path) -> None:
    """Print the table and write ``comparison.md``, ``comparison.json`` and ``comparison.png`` to ``out``."""
    cells = [row.cells() for row in rows]
    write_json(out / "comparison.json", [{"strategy": row.name, **row.report} for row in rows])
    (out / "comparison.md").write_text(markdown(cells, note(rows[0])))
    plot(rows, out / "comparison.png")
    _print_table(cells)
    print(note(rows[0]))
    for name in ("comparison.md", "comparison.json", "comparison.png"):
        print(f"  {out / name}")


def note(row: Row) -> str:
    """What the numbers beside a FID need: its sample count, floor, and the tokenizer's part in it."""
    fid = row.fid_name
    floor, reconstruction = row.metric(f"{fid}_floor"), row.metric(fid.replace("/fid_", "/rfid_"))
    images, name = row.metric("val/fid_images"), fid.removeprefix("val/")
    return (
        f"{name}: {images:.0f} generated images; real images against real ones {floor:.2f}, "
        f"reconstructions {reconstruction:.2f}. {row.report['steps']} steps each."
    )


def markdown(cells: list[dict[str, str]], footnote: str) -> str:
    columns = list(cells[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{footnote}\n"


def plot(rows: list[Row], path: Path) -> None:
    """Bars of what differs: loss, last-scale accuracy, FID and KV bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {
        "validation loss": [row.metric("val/loss") for row in rows],
        "accuracy, last scale (%)": [100 * row.metric("val/accuracy_last") for row in rows],
        rows[0].fid_name.removeprefix("val/"): [row.metric(row.fid_name) for row in rows],
        "KV cache (kB/image)": [row.report["kv_cache_bytes_per_image"] / 1000 for row in rows],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3), layout="constrained")
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh([row.name for row in rows], values, color="#0072B2")
        axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axis.margins(x=0.2)
        axis.set_title(title, fontsize=9)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[0]:
            axis.set_yticklabels([])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _print_table(cells: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in cells[0]:
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in cells:
        table.add_row(*row.values())
    Console(width=160).print(table)
