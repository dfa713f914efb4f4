"""What a run's folder says of its overrides, and which files they lay over the recipe."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

WORDS = 60
"""Longest name that overrides are given in full."""


def in_words(overrides: Sequence[str]) -> str:
    """What a run's folder says of its overrides: ``+depth=6,trainer.max_epochs=3``; nothing where there are none.

    The model's settings go by their own names, others with their section. Where the words cannot say all (long, or
    signs that a folder's name should not have) a few letters of a hash tell such runs apart.
    """
    if not overrides:
        return ""
    said = [re.fullmatch(r"--(\w+(?:\.\w+)+)=([\w.+-]+)", override) for override in overrides]
    words = ",".join(f"{_short_name(found[1])}={found[2]}" for found in said if found is not None)
    if (
        None not in said
        and len(words) <= WORDS
        and len({_short_name(found[1]) for found in said if found}) == len(said)
    ):
        return f"+{words}"
    kept = words[:WORDS].rpartition(",")[0] if len(words) > WORDS else words
    return f"+{kept}{'~' if kept else ''}{short_hash(overrides)}"


def _short_name(setting: str) -> str:
    return setting.replace(".init_args.", ".").removeprefix("model.")


def short_hash(overrides: Sequence[str]) -> str:
    """A few letters that tell overrides apart."""
    return hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:6]


def other_recipes(overrides: Sequence[str]) -> list[Path]:
    """Files that overrides lay over a recipe: ``--config FILE`` or ``--config=FILE``."""
    after = [value for name, value in pairwise(overrides) if name == "--config"]
    return [Path(name) for name in (*after, *(o[len("--config=") :] for o in overrides if o.startswith("--config=")))]
