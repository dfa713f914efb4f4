"""Damaged data while streaming: skip, count and name it; stop when there is too much."""

from __future__ import annotations

import logging

from mvar_lightning.errors import UserError

log = logging.getLogger(__name__)

MAX_SHARE = 0.01
"""Share of damaged samples, and of damaged shards, above which a run stops."""

MIN_SAMPLES = 10
"""So many damaged samples never stop a run."""

NAMED = 20
"""Damaged samples named one by one; after that every hundredth."""


class Faults:
    """Counts of one pass of one worker. Raises UserError past the threshold."""

    def __init__(self, num_shards: int) -> None:
        self.num_shards = num_shards
        self.seen = 0
        self.samples = 0
        self.shards: set[str] = set()

    def sample(self, shard: str, key: str, reason: str) -> None:
        self.samples += 1
        if self.samples <= NAMED or self.samples % 100 == 0:
            log.warning("skipped sample %s of shard %s: %s (%d skipped so far)", key, shard, reason, self.samples)
        if self.samples > max(MIN_SAMPLES, MAX_SHARE * self.seen):
            raise UserError(
                f"{self.samples} of {self.seen} samples are damaged, last {key} of shard {shard} ({reason}); {CHECK}"
            )

    def shard(self, shard: str, reason: str) -> None:
        if shard in self.shards:
            return
        self.shards.add(shard)
        log.warning("shard %s is damaged: %s; going on with what it still gives", shard, reason)
        if len(self.shards) > MAX_SHARE * self.num_shards:
            raise UserError(
                f"shard {shard} is damaged: {reason} ({len(self.shards)} of {self.num_shards} shards so far); {CHECK}"
            )


CHECK = "run `mvar shards check` on its folder and make the shards anew"
