"""Which variants of a sweep can be told apart from one of them: Dunnett's test, of all against a control."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LEVEL = 0.05
"""A difference is told apart where chance would give one as large, for any variant of a column, less often."""


def told_apart(values: Mapping[str, Sequence[float]], control: str) -> dict[str, float]:
    """The two-sided p of each other variant's mean against the control's, adjusted for their number.

    Dunnett (1955), as SciPy computes it: equal variances are assumed, so that a few seeds of each variant serve
    together. Variants with fewer than two finite values have none; nor has anything where nothing varies.

    Args:
        values: of each variant, one for each seed.
        control: the variant that others are held against.
    """
    from scipy import stats

    finite = {name: [value for value in row if math.isfinite(value)] for name, row in values.items()}
    enough = {name: row for name, row in finite.items() if len(row) > 1}
    others = [name for name in enough if name != control]
    if control not in enough or not others or all(len(set(row)) == 1 for row in enough.values()):
        return {}
    # its integral is drawn by random numbers: the same ones each time
    found = stats.dunnett(*(enough[name] for name in others), control=enough[control], random_state=0)
    return dict(zip(others, map(float, found.pvalue), strict=True))
