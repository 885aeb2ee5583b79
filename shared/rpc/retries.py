"""When a failed call is made again: how often, how soon, and under which budget.

Source: gRFC A6, but for the budget. In one point we go further: a unary answer that failed after
its headers may be retried, too, since nobody has seen anything of it.
"""

import random

from shared.rpc.header_block import Headers

RETRY_ATTEMPTS_MAX = 3
RETRY_BACKOFF_S, RETRY_BACKOFF_MAX_S = 0.05, 1.0
# Attempts of a call that no server has looked at; each is on another connection or later.
UNPROCESSED_MAX = 5
# One budget per target: retries are at most a fifth of the calls of the last ten seconds, and
# two a second beside them, so that a target with few calls is not left without any.
BUDGET_SHARE, BUDGET_PER_S = 0.2, 2.0
BUDGET_SLICES, BUDGET_SLICE_S = 10, 1.0

_PUSHBACK_KEY = b"grpc-retry-pushback-ms"


class RetryBudget:
    """What the calls of one target may spend on retries.

    Every call pays in a fifth of a retry, every retry takes out one, and both are forgotten
    after ten seconds: a long quiet time saves up nothing that an outage could spend at once.

    Source: RetryBudget of Finagle, which Linkerd uses, too; their shares and windows.
    """

    def __init__(self) -> None:
        self._slices = [0.0] * BUDGET_SLICES  # of the last seconds: paid in, less taken out
        self._balance = BUDGET_PER_S * BUDGET_SLICES * BUDGET_SLICE_S
        self._slice = 0  # number of the current one since the clock's beginning

    def note_call(self, now_s: float) -> None:
        """A call begins; its retries do not count.

        Args:
            now_s: on time.monotonic().
        """
        if now_s // BUDGET_SLICE_S != self._slice:
            self._forget(int(now_s // BUDGET_SLICE_S))
        self._slices[self._slice % BUDGET_SLICES] += BUDGET_SHARE
        self._balance += BUDGET_SHARE

    def spend(self, now_s: float) -> bool:
        """Take one retry out, if there is one."""
        if now_s // BUDGET_SLICE_S != self._slice:
            self._forget(int(now_s // BUDGET_SLICE_S))
        if self._balance < 1:
            return False
        self._slices[self._slice % BUDGET_SLICES] -= 1
        self._balance -= 1
        return True

    def _forget(self, current: int) -> None:
        """Go on to another slice: what is older than all of them counts no longer."""
        for number in range(self._slice + 1, min(current, self._slice + BUDGET_SLICES) + 1):
            self._slices[number % BUDGET_SLICES] = 0.0
        self._slice = current
        reserve = BUDGET_PER_S * BUDGET_SLICES * BUDGET_SLICE_S
        self._balance = reserve + sum(self._slices)  # anew: no error of rounding adds up


def backoff_s(attempt: int) -> float:
    """How long to wait after this attempt, 1 being the first."""
    wait_s = min(RETRY_BACKOFF_MAX_S, RETRY_BACKOFF_S * 2.0 ** (attempt - 1))
    return wait_s * random.uniform(0.8, 1.2)  # noqa: S311 - not a secret


def pushback_s(trailing: Headers) -> float | None:
    """How long the server asks to wait before a retry; negative forbids it, None says nothing."""
    text = trailing.get(_PUSHBACK_KEY)
    if text is None:
        return None
    return int(text) / 1000 if text.isdigit() and len(text) <= 10 else -1.0
