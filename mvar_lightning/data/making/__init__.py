"""Images to shards: sources of images, and the writing."""
