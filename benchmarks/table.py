"""A run of the models' benchmark as one Markdown table: ours, the reference and the papers side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

PARTS = {
    "sample": "sampling, tokens only",
    "decode": "decoding",
    "generate": "sampling and decoding",
    "train": "train step, forward and backward",
    "groups": "the same in scale groups",
    "step": "whole train step, with optimizer",
}
"""What can be measured, and how the table calls it."""

PUBLISHED_SECONDS = {"generate": "sample_decode_s", "step": "train_s"}
PUBLISHED_MEMORY = {"generate": "peak_mib", "step": "train_mib"}
"""The part that a published figure is of, to the figure's name."""


class Line(NamedTuple):
    """Cells of one row, without the model's name."""

    measure: str
    ours: str = ""
    reference: str = ""
    ratio: str = ""
    of_peak: str = ""
    published: str = ""


COLUMNS = {"of_peak": "of peak"}
"""How a column is called where it is not by its field."""


def markdown(record: dict[str, Any]) -> str:
    """The whole run; the column of the machine's peak only where the peak was given."""
    fields = [name for name in Line._fields if name != "of_peak" or record.get("peak_tflops")]
    head = (
        f"{record['date']}, commit {record['commit']}, {record['machine']}, {record['threads']} threads, "
        f"torch {record['torch']}, {record['precision']}, batch {record['batch']}"
    )
    titles = ["model", *(COLUMNS.get(name, name) for name in fields)]
    lines = [head, "", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in record["rows"]:
        name = f"{row['architecture']} d{row['depth']}, {row['image_size']} px"
        for line in _lines(row):
            lines.append(f"| {' | '.join([name, *(getattr(line, field) for field in fields)])} |")
            name = ""
    for row in record["rows"]:
        if "rows" in row.get("profile", {}):
            lines += ["", *_profile_lines(row)]
    return "\n".join(lines) + "\n"


def _lines(row: dict[str, Any]) -> Iterator[Line]:
    times, counted = row.get("times", {}), row["counted"]
    if "failed" in times:
        yield Line("times", f"failed: {times['failed']}")
    for part in PARTS:
        yield from _times_of(part, row)
    for part in PARTS:
        yield from _memory_of(part, row)
    for check, apart in times.get("agreement", {}).items():
        yield Line(f"{check}: largest difference", f"{apart['largest_difference']:.1e}")
    cache = _known(row, "cache_mib", " at their batch")
    yield Line("key-value cache, MiB", f"{counted['cache_mib']:.0f}", published=cache)
    gflops = f"{counted['attention_gflops']:.2f}"
    yield Line("attention blocks, GFLOPs counted", gflops, published=_known(row, "attention_gflops"))


def _times_of(part: str, row: dict[str, Any]) -> Iterator[Line]:
    measured, known = row.get("times", {}).get(part), _known(row, PUBLISHED_SECONDS.get(part, ""))
    if measured is not None:
        theirs = measured.get("reference")
        yield Line(
            f"{PARTS[part]}, s",
            f"{measured['ours']['seconds']:.3f}",
            f"{theirs['seconds']:.3f}" if theirs else "",
            f"{measured['ratio']:.2f} ({measured['processor_ratio']:.2f} cpu)" if theirs else "",
            f"{row['of_peak'][part]:.1%}" if part in row.get("of_peak", {}) else "",
            known,
        )
        if "whole" in measured:
            whole, ratio = measured["whole"]["seconds"], measured["whole_ratio"]
            yield Line("  our whole step beside it, s", f"{whole:.3f}", ratio=f"{ratio:.2f}")
    elif known:
        yield Line(f"{PARTS[part]}, s", published=known)


def _memory_of(part: str, row: dict[str, Any]) -> Iterator[Line]:
    sides, known = row.get("memory", {}).get(part), _known(row, PUBLISHED_MEMORY.get(part, ""))
    name = f"{PARTS[part]}: peak (above loaded), MiB"
    if sides is not None:
        ours, theirs = (_memory_cell(sides.get(side)) for side in ("ours", "reference"))
        yield Line(name, ours, theirs, _share(sides, "peak_mib"), published=known)
        kept = {side: figures["activations_mib"] for side, figures in sides.items() if "activations_mib" in figures}
        if kept:
            ours, theirs = (f"{kept[side]:.0f}" if side in kept else "" for side in ("ours", "reference"))
            yield Line(f"{PARTS[part]}: kept for backward, MiB", ours, theirs, _share(sides, "activations_mib"))
    elif known:
        yield Line(name, published=known)


def _share(sides: dict[str, Any], name: str) -> str:
    """Memory is told the other way round than time, so the cell says what it is: ours, as a part of the reference's."""
    ours, theirs = (sides.get(side, {}).get(name) for side in ("ours", "reference"))
    return f"{ours / theirs:.2f} of it" if ours and theirs else ""


def _known(row: dict[str, Any], name: str, note: str = "") -> str:
    return "; ".join(f"{known[name]:g}{note} ({known['source']})" for known in row["published"] if name in known)


def _memory_cell(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    if "failed" in figures:
        return f"failed: {figures['failed']}"
    return f"{figures['peak_mib']:.0f} ({figures['above_loaded_mib']:.0f})"


def _profile_lines(row: dict[str, Any]) -> Iterator[str]:
    from benchmarks.phases import table

    first, *rest = table(row["profile"]["rows"])
    yield f"{row['architecture']} d{row['depth']}, {row['image_size']} px: seconds by phase, memory above the model"
    yield ""
    yield f"| {' | '.join(first)} |"
    yield "|" + "---|" * len(first)
    yield from (f"| {' | '.join(line)} |" for line in rest)
