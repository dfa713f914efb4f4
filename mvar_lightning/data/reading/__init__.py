"""Shards to batches: where shards lie, their samples, the order of these, and the loader."""
