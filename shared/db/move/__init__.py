"""Moves buckets between shards while they are written."""
