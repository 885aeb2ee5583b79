"""Sizes for people."""


def mebibytes(size_bytes: int) -> str:
    """In mebibytes, with one digit."""
    return f"{size_bytes / 2**20:,.1f} MiB"
