"""Shards of rows: one interface, SQLite now; ids that carry their bucket; effects that happen once."""
