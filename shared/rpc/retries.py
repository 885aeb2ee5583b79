"""When a failed call is made again: how often, how soon, and under which budget.

Source: gRFC A6. In one point we go further: a unary answer that failed after its headers may be
retried, too, since nobody has seen anything of it.
"""

import random

from shared.rpc.header_block import Headers

RETRY_ATTEMPTS_MAX = 3
RETRY_BACKOFF_S, RETRY_BACKOFF_MAX_S = 0.05, 1.0
# Attempts of a call that no server has looked at; each is on another connection or later.
UNPROCESSED_MAX = 5
# One budget per target: at most a tenth of the calls are retries once things go wrong.
BUDGET_MAX, BUDGET_PER_SUCCESS = 100.0, 0.1

_PUSHBACK_KEY = b"grpc-retry-pushback-ms"


class RetryBudget:
    """What the calls of one target may still spend on retries."""

    def __init__(self) -> None:
        self._points = BUDGET_MAX

    @property
    def allows_retries(self) -> bool:
        """Whether enough of the last calls went well."""
        return self._points > BUDGET_MAX / 2

    def note_success(self) -> None:
        """A call was answered."""
        if self._points < BUDGET_MAX:
            self._points = min(BUDGET_MAX, self._points + BUDGET_PER_SUCCESS)

    def note_failure(self) -> None:
        """An attempt found nobody, whether it may be retried or not."""
        self._points = max(0.0, self._points - 1)


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
