"""950 faults, the same for the same seed: each theme offers more than are taken, none more than a tenth."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from . import generator_around as around
from . import generator_files as files
from . import generator_formats as formats
from . import generator_images as images
from . import generator_links as links
from . import generator_missing as missing
from . import generator_places as places
from . import generator_python as python
from . import generator_recipes as recipes
from . import generator_runs as runs
from .fault import Fault

COUNT = 950
THEMES: tuple[tuple[Callable[[random.Random], list[Fault]], int], ...] = (
    (files.damaged, 45),
    (files.json_values, 60),
    (images.images, 75),
    (places.permissions, 50),
    (places.full, 30),
    (places.resumed_after_full, 12),
    (places.streams, 35),
    (links.links, 60),
    (missing.missing, 18),
    (missing.swapped, 42),
    (formats.tars, 45),
    (formats.arrays, 45),
    (python.states, 58),
    (python.interface, 85),
    (recipes.recipes, 60),
    (recipes.flags, 40),
    (recipes.overrides, 30),
    (runs.kills, 20),
    (runs.pairs, 12),
    (runs.goes_on, 33),
    (around.environment, 45),
    (around.names, 50),
)


def faults(seed: int = 0) -> list[Fault]:
    """All faults of a seed, in a fixed order."""
    chosen = []
    for theme, count in THEMES:
        rng = random.Random(f"{theme.__name__} {seed}")
        offered = theme(rng)
        kept = sorted(rng.sample(range(len(offered)), min(count, len(offered))))
        chosen += [offered[number] for number in kept]
    twice = [name for name, count in Counter(fault.id for fault in chosen).items() if count > 1]
    assert not twice, f"two faults have one id: {twice[:5]}"
    return chosen
