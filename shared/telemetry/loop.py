"""How late the event loop is: what blocks it delays every request at once."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from shared.telemetry.metrics import Metrics

SAMPLE_S = 0.25


@contextmanager
def measuring_loop_lag(metrics: Metrics) -> Iterator[None]:
    """Measure, until left, how much later than asked a timer fires."""
    lag = metrics.histogram(
        "tenfold_event_loop_lag_seconds", "How late a timer of the event loop fires."
    ).of()
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def fire(asked_s: float) -> None:
        nonlocal timer
        lag.observe(max(0.0, loop.time() - asked_s))
        timer = start()

    def start() -> asyncio.TimerHandle:
        asked_s = loop.time() + SAMPLE_S
        return loop.call_at(asked_s, fire, asked_s)

    timer = start()
    try:
        yield
    finally:
        timer.cancel()
