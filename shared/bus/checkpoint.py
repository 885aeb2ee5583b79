"""Raises a cancellation that a library has swallowed.

asyncio.wait_for, which nats-py waits with, drops a cancellation that comes together with
the result (until Python 3.12). A loop that is cancelled at that moment would go on for
ever, so every endless loop of the bus begins its turn here.
"""

import asyncio


def checkpoint() -> None:
    """End this task if it has been told to end.

    Raises:
        asyncio.CancelledError: it has.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
