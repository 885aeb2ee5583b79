"""Shards of rows: ids that carry their bucket, effects that happen once; two engines below."""
