"""Images to shards (`making`), shards to batches (`reading`, `image_data`) or to tokens (`tokens`, `token_data`)."""
