"""What is compiled once for each route, message or field, and forgotten with its contracts.

A cache keeps what it was asked about last, so contracts that are served no longer would stay in
memory until enough others have come. `forget` drops everything; what is still needed is compiled
again at its next use.
"""

from collections.abc import Callable
from functools import _lru_cache_wrapper, lru_cache
from typing import Any, TypeVar

Result = TypeVar("Result")

_caches: list["_lru_cache_wrapper[Any]"] = []


def compiled(
    maxsize: int,
) -> Callable[[Callable[..., Result]], "_lru_cache_wrapper[Result]"]:
    """As functools.lru_cache, and forgotten by `forget`."""

    def decorate(function: Callable[..., Result]) -> "_lru_cache_wrapper[Result]":
        cached = lru_cache(maxsize=maxsize)(function)
        _caches.append(cached)
        return cached

    return decorate


def forget() -> None:
    """Drop all that was compiled; safe at any time, from any thread."""
    for cached in _caches:
        cached.cache_clear()
