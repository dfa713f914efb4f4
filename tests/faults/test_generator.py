"""The generated faults: as many as promised, spread over kinds, the same for the same seed."""

from __future__ import annotations

from collections import Counter

from tests.faults import generator


def test_950_faults_none_of_them_a_tenth() -> None:
    made = generator.faults(0)
    assert len({fault.id for fault in made}) == len(made) == generator.COUNT
    assert max(Counter(fault.kind for fault in made).values()) <= generator.COUNT // 10
    assert 0.2 < sum(fault.want == "right" for fault in made) / len(made) < 0.35


def test_a_seed_fixes_the_faults() -> None:
    def told(seed: int) -> list[tuple[str, ...]]:
        return [(fault.id, *fault.argv) for fault in generator.faults(seed)]

    assert told(1) == told(1) != told(0)
