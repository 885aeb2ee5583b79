"""How long anything on a database may take, and what a caller is told when that is not enough."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared import deadline
from shared.errors import DeadlineExceeded, Unavailable

# A transaction holds locks that others wait for; a longer one is a bug, and is rolled back.
TURN_S_MAX = 10.0
TURN_TOO_LONG = "the transaction took too long and was rolled back"
# No statement of a request may hold its connection longer.
STATEMENT_S_MAX = 5.0
CLOSE_S_MAX = 5.0
RETRY_AFTER_S = 0.5


@asynccontextmanager
async def bounded(at_most_s: float, sentence: str) -> AsyncIterator[None]:
    """Run a block within this time and the caller's deadline.

    Args:
        at_most_s: seconds.
        sentence: what the caller is told.

    Raises:
        DeadlineExceeded: it took longer, even if the block went on regardless.
    """
    limit = asyncio.timeout(deadline.timeout_s(at_most_s))
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise  # the block's own
        raise DeadlineExceeded(sentence) from error
    if limit.expired():
        raise DeadlineExceeded(sentence)


def no_room(name: str) -> Unavailable:
    """A shard's disk is full: its reads go on, its writes wait for its operator."""
    return Unavailable(
        f"{name} has no room left on its disk; nothing has happened", retry_after_s=RETRY_AFTER_S
    )
