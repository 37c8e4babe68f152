"""Sets of WebDataset shards: written, described by a manifest, verified."""
