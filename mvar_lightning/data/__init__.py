"""Images to WebDataset shards, and shards to batches."""
