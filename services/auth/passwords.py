"""Password hashing: argon2id in a bounded pool, so that log-ins cannot starve the rest.

Source: OWASP Password Storage Cheat Sheet; RFC 9106. 19 MiB, two passes, one lane.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files
from typing import TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import VerifyMismatchError

from services.auth.domain import HashingBusy

T = TypeVar("T")

_HASHER = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1, type=Type.ID)


@cache
def common_passwords() -> frozenset[str]:
    """The most common passwords of at least 8 characters, case folded."""
    text = files("services.auth").joinpath("common_passwords.txt").read_text()
    return frozenset(line.casefold() for line in text.splitlines() if line[:1] not in {"", "#"})


class PasswordPool:
    """Hashes and verifies in threads of its own.

    Args:
        threads: hashes at once; each takes 19 MiB.
        waiting_max: how many more may wait.
    """

    def __init__(self, *, threads: int, waiting_max: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="argon2")
        self._places = threads + waiting_max
        self._taken = 0
        # Verified when there is no such user, so that the answer takes as long.
        self._nobody = _HASHER.hash("nobody has this password")

    async def hash(self, password: str) -> str:
        """A hash to store, with its salt and parameters.

        Raises:
            HashingBusy: too many wait already.
        """
        return await self._run(lambda: _HASHER.hash(password))

    async def verify(self, password_hash: str | None, password: str) -> bool:
        """Whether the password is right; None stands for a user who does not exist.

        Raises:
            HashingBusy: too many wait already.
        """
        is_right = await self._run(lambda: _verify(password_hash or self._nobody, password))
        return is_right and password_hash is not None

    def close(self) -> None:
        """Take no more work; what runs ends by itself within a moment."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._taken >= self._places:
            raise HashingBusy
        self._taken += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        # A caller that gives up leaves its work in the queue: the place is free when it is done.
        future.add_done_callback(self._leave)
        return await asyncio.shield(future)

    def _leave(self, future: "asyncio.Future[T]") -> None:
        self._taken -= 1
        if not future.cancelled():
            future.exception()  # seen, though nobody may be waiting any more


def _verify(password_hash: str, password: str) -> bool:
    try:
        return _HASHER.verify(password_hash, password)
    except VerifyMismatchError:
        return False
