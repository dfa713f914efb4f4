"""Shards to token caches, and these to batches."""
