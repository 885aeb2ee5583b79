"""One side under load, looked at from outside; rounds of looks that alternate between sides."""

import base64
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from tests.bench.sides.children import Child, module
from tests.bench.sides.load import Job, Result

CONNECTIONS = 32

Row = dict[str, object]


@dataclass(frozen=True)
class Effort:
    """How long it takes: rounds that count after one that warms up, and each look in seconds."""

    rounds: int
    look_s: float


@dataclass(frozen=True)
class Call:
    """What is asked of every side, and what each must answer.

    Attributes:
        name: "GET".
        body_bytes: the length of every answer.
        is_right: whether a body is the answer; asked of one in each look.
    """

    name: str
    body_bytes: int
    is_right: Callable[[bytes], bool]


@dataclass(frozen=True)
class Side:
    """Who is asked, and whose CPU that costs.

    Attributes:
        name: as the rows call it.
        children: every process that counts; the first is the one asked.
        request: the bytes of a call, by its name; made anew for each look.
        connections: over which it is asked.
    """

    name: str
    children: tuple[Child, ...]
    request: Callable[[str], bytes]
    connections: int = CONNECTIONS

    def cpu_s(self) -> float:
        """CPU of all that counts, so far."""
        return sum(child.cpu_s() for child in self.children)

    def memory_mib(self) -> float:
        """Resident memory of all that counts."""
        return sum(child.memory_mib() for child in self.children)


@dataclass(frozen=True)
class Look:
    """One side under load once.

    Attributes:
        cpu_us, backend_us, load_us: per request: of the side, its backend, the load generator.
        core_share: of one core that the side used, 1 for all of it.
        per_s: answers per second.
    """

    cpu_us: float
    backend_us: float
    load_us: float
    core_share: float
    per_s: float


class Looker:
    """Puts sides under load.

    Args:
        effort: how long.
        backend: whose CPU is told beside each side's; None if there is none.
    """

    def __init__(self, effort: Effort, backend: Child | None = None) -> None:
        self._effort = effort
        self._backend = backend

    def rounds(self, sides: Sequence[Side], call: Call) -> dict[str, list[Look]]:
        """The looks at each side, by name; those of one round are neighbours in time."""
        looks: dict[str, list[Look]] = {side.name: [] for side in sides}
        for number in range(self._effort.rounds + 1):
            seen = {side.name: self._look(side, call) for side in sides}
            costs = ", ".join(f"{name} {look.cpu_us:.0f} µs" for name, look in seen.items())
            tell(f"{call.name} round {number} of {self._effort.rounds}: {costs}")
            if number:  # the first one warms up
                for name, look in seen.items():
                    looks[name].append(look)
        return looks

    def ask(self, side: Side, call: Call, per_s: float = 0.0) -> Result:
        """One run of the load generator.

        Args:
            per_s: requests started in a second; 0 for as many as are answered.

        Raises:
            AssertionError: a wrong answer; it is shown.
        """
        job = Job(
            port=side.children[0].port,
            request=base64.b64encode(side.request(call.name)).decode(),
            duration_s=self._effort.look_s,
            connections=side.connections,
            body_bytes=call.body_bytes,
            rate_per_s=per_s,
        )
        command, work = module("tests.bench.sides.load"), json.dumps(asdict(job))
        ran = subprocess.run(command, input=work, capture_output=True, text=True, check=False)
        ended = f"the load generator ended with {ran.returncode}"
        assert ran.returncode == 0, f"{side.name}, {call.name}: {ended}: {ran.stderr}"
        result = Result(**json.loads(ran.stdout))
        body = base64.b64decode(result.body)
        assert call.is_right(body), f"{side.name}, {call.name}: {body!r}"
        return result

    def _look(self, side: Side, call: Call) -> Look:
        side_s, backend_s = side.cpu_s(), self._backend_s()
        result = self.ask(side, call)
        side_s, backend_s = side.cpu_s() - side_s, self._backend_s() - backend_s
        per_request_us = 1e6 / result.requests
        return Look(
            side_s * per_request_us,
            backend_s * per_request_us,
            result.cpu_s * per_request_us,
            side_s / result.elapsed_s,
            result.requests / result.elapsed_s,
        )

    def _backend_s(self) -> float:
        return self._backend.cpu_s() if self._backend else 0.0


def median(looks: Sequence[Look], field: str) -> float:
    """Of one figure of many looks."""
    return statistics.median(getattr(look, field) for look in looks)


def cpu_row(what: str, ours: Sequence[Look], peers: Sequence[Look]) -> Row:
    """CPU per request: medians of both, and the median of the neighbours' ratios."""
    pairs = zip(ours, peers, strict=True)
    ratio = statistics.median(our.cpu_us / peer.cpu_us for our, peer in pairs)
    return row(what, "µs", median(ours, "cpu_us"), median(peers, "cpu_us"), ratio=ratio)


def row(
    what: str,
    unit: str,
    ours: float,
    peer: float,
    *,
    ratio: float | None = None,
    better: str = "lower",
) -> Row:
    """One line of the result (DESIGN §10)."""
    return {
        "what": what,
        "unit": unit,
        "ours": round(ours, 2),
        "peer": round(peer, 2),
        "ratio": round(ours / peer if ratio is None else ratio, 3),
        "better": better,
    }


def tell(line: str) -> None:
    """Say to whoever waits how far it is."""
    print(line, file=sys.stderr, flush=True)


def print_rows(bench: str, engine: str, rows: Sequence[Row]) -> None:
    """A table for people, then the one JSON line that scripts read."""
    print(f"{'':44}{'ours':>10}{'peer':>10}{'ratio':>10}")
    for line in rows:
        cells = ("" if line[key] is None else str(line[key]) for key in ("ours", "peer", "ratio"))
        print(f"{line['what']:<44}{''.join(f'{cell:>10}' for cell in cells)}  {line['unit']}")
    print(json.dumps({"bench": bench, "engine": engine, "rows": rows}, ensure_ascii=False))
