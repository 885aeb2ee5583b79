"""The current request's deadline, in a context variable: moments nest, lengths add up.

The RPC server sets it at the start of a call; every task made for the call inherits it.
Clients pass on what is left, less ANSWER_MARGIN_S.
"""

import time
from contextvars import ContextVar

from shared.errors import DeadlineExceeded

# What a hop keeps for itself, to answer in (STYLE §6).
ANSWER_MARGIN_S = 0.020

# On the monotonic clock, so that a step of the wall clock changes no length.
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def set_deadline(monotonic_s: float | None) -> None:
    """Give this task, and the tasks it makes, a deadline; None takes it away.

    Args:
        monotonic_s: the moment on time.monotonic().
    """
    _deadline.set(monotonic_s)


def remaining_s() -> float | None:
    """Seconds left, negative when over; None where there is no deadline."""
    deadline = _deadline.get()
    return None if deadline is None else deadline - time.monotonic()


def timeout_s(at_most_s: float) -> float:
    """How long one step may take: what is left, but no longer than at_most_s.

    Raises:
        DeadlineExceeded: nothing is left.
    """
    left_s = remaining_s()
    if left_s is None:
        return at_most_s
    if left_s <= 0:
        raise DeadlineExceeded("the time for this call is spent")
    return min(left_s, at_most_s)


def forwarded_s() -> float | None:
    """What a call to another service may take: what is left, less the time to answer in.

    Returns:
        Seconds above 0, or None where there is no deadline.

    Raises:
        DeadlineExceeded: not enough is left to answer after the other has.
    """
    left_s = remaining_s()
    if left_s is None:
        return None
    if left_s <= ANSWER_MARGIN_S:
        raise DeadlineExceeded("the time for this call is spent")
    return left_s - ANSWER_MARGIN_S
