"""Logged curves of a run, read back from its TensorBoard files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Curve(NamedTuple):
    steps: tuple[int, ...]
    values: tuple[float, ...]


def read_curves(folder: str | Path) -> dict[str, Curve]:
    """Every scalar of a TensorBoard folder by its name, in the order of steps; of a step logged twice the later value.

    A run that broke off and was continued logs the steps in between again. Empty where there are no logs.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not Path(folder).is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        by_step = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        steps = tuple(sorted(by_step))
        curves[tag] = Curve(steps, tuple(by_step[step] for step in steps))
    return curves
