"""The stories of too much, at length, with the figures that must hold."""

import asyncio
from collections.abc import Mapping

from tests.overload import Beside, Change, changes_under_load, greedy_caller, overload, slow_method

RATIO_MAX = 1.5
GOODPUT_MIN = 0.8
REFUSED_S_MAX = 0.05
# Below this a ratio of two slowest hundredths is the noise of the machine.
NOISE_S = 0.005


def run(*, seconds: float) -> list[dict[str, object]]:
    """Tell all of them.

    Args:
        seconds: how long each lasts.
    """
    return [
        _overload(seconds),
        _slow_method(seconds),
        _greedy_caller(seconds),
        *(_change(change, seconds) for change in Change),
    ]


def _overload(seconds: float) -> dict[str, object]:
    seen = asyncio.run(overload(measure_s=10, seconds=seconds, pause_s=10))
    refused = seen.during.with_status(503)
    holds = {
        "goodput": seen.goodput >= GOODPUT_MIN,
        "refused within 50 ms": refused.slowest_s() < REFUSED_S_MAX,
        "only answers and refusals": seen.during.statuses.keys() <= {200, 503},
        "normal after 10 s": seen.after.statuses.keys() == {200}
        and seen.after.slowest_s() <= RATIO_MAX * max(seen.before.slowest_s(), NOISE_S),
    }
    measured = {
        "peak_per_s": seen.peak_per_s,
        "goodput": seen.goodput,
        "refused_p99_s": refused.slowest_s(),
        "served_p99_s": seen.during.with_status(200).slowest_s(),
        "before_p99_s": seen.before.slowest_s(),
        "after_p99_s": seen.after.slowest_s(),
    }
    what = f"five times capacity for {seconds:g} s, from callers who do not wait"
    return _row(what, len(refused), len(seen.during), holds, measured)


def _slow_method(seconds: float) -> dict[str, object]:
    seen = asyncio.run(slow_method(seconds=seconds, takes_s=10))
    what = "a method that answers after 10 s beside others"
    return _beside(what, seen, {200, 503})


def _greedy_caller(seconds: float) -> dict[str, object]:
    seen = asyncio.run(greedy_caller(seconds=seconds))
    return _beside(
        "a credential that asks for ten times its quota beside another", seen, {200, 429}
    )


def _beside(what: str, seen: Beside, statuses: set[int]) -> dict[str, object]:
    holds = {
        "others are answered": seen.beside.statuses.keys() == {200},
        "statuses": seen.disturbing.statuses.keys() <= statuses,
    }
    measured = {}
    for name in seen.names:
        alone_s, beside_s = seen.alone.of(name).slowest_s(), seen.beside.of(name).slowest_s()
        holds[f"p99 of {name}"] = beside_s <= RATIO_MAX * max(alone_s, NOISE_S)
        measured |= {f"{name}_alone_p99_s": alone_s, f"{name}_beside_p99_s": beside_s}
        measured[f"{name}_ratio"] = beside_s / alone_s
    return _row(what, len(seen.disturbing), len(seen.beside), holds, measured)


def _change(change: Change, seconds: float) -> dict[str, object]:
    seen = asyncio.run(changes_under_load(change, seconds=seconds))
    failed = len(seen.shots) - len(seen.shots.with_status(200))
    repeated = sum(shot.is_repeated for shot in seen.shots.shots)
    measured = {"failed": failed, "repeated": repeated, "p99_s": seen.shots.slowest_s()}
    holds = {"no request fails": not failed, "it happens": seen.changes > 1}
    return _row(f"under load, {change}", seen.changes, len(seen.shots), holds, measured)


def _row(
    what: str,
    faults: int,
    operations: int,
    holds: Mapping[str, bool],
    measured: Mapping[str, float],
) -> dict[str, object]:
    broken = [name for name, is_so in holds.items() if not is_so]
    print(f"{what}: {broken or 'holds'}")
    print("  " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
    return {
        "what": what,
        "faults": faults,
        "operations": operations,
        "violations": len(broken),
        "measured": dict(measured),
    }
