"""The edge against its peers in one run: CPU per request of Envoy, of FastAPI, and of ours.

Two calls are measured (shop.proto): a GET with a path variable, a few query parameters and an
answer of 300 bytes, and a POST with a nested body and a nested answer. One load generator drives
every side with the same bytes over as many keep-alive connections, and checks status and length of
each answer; one answer of each round is decoded and compared. The figure is CPU, user and system,
of all processes of a side, from the operating system. Rounds alternate between the sides; a ratio
is the median of the ratios of neighbours. What is measured has a core to itself, load generator,
backend, Valkey and auth have the others; Valkey's CPU is counted on neither side.

  bare        `tenfold edge --allow-anonymous`: our edge transcodes, and does nothing else that can
              be switched off (it still counts requests per address, in memory). Peer: Envoy with
              grpc_json_transcoder and one worker, the same contract and the same backend, a
              responder that answers from memory for a few microseconds a call.
  full        our edge as in a mesh: it checks an access token and the contract's scopes, counts a
              quota in Valkey, signs the caller's identity, writes RateLimit headers and a log
              line. Peer: the same Envoy, which does none of that.
  whole path  our edge as in `full` and our service process behind it, both counted, on each gRPC
              engine. Peer: one FastAPI process that checks an HS256 token and takes from a token
              bucket in Valkey, and writes no log lines.

  make bench-edge                    about six minutes; it needs Linux
  make bench-edge ARGS=--quick       half a minute, to see that it works; figures are rough
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from shared.config import RPC_ENGINES
from tests.bench.sides import samples
from tests.bench.sides.children import BESIDE, MEASURED
from tests.bench.sides.load import Result
from tests.bench.sides.looks import (
    CONNECTIONS,
    Call,
    Effort,
    Look,
    Looker,
    Row,
    Side,
    cpu_row,
    median,
    print_rows,
    row,
    tell,
)
from tests.bench.sides.stage import Stage, versions

NATIVE = "native"
ROUTE_COUNTS = (10, 1000)
WORKER_COUNTS = (1, 2, 3, 4)
# Fewer than any limit on calls at once that an edge learns (edge/concurrency.py).
CONNECTIONS_PER_WORKER = 6
HALF = 0.5
# A latency is asked for this often on each side; the median counts.
LATENCY_ROUNDS = 3
THOROUGH, QUICK = Effort(rounds=7, look_s=2.0), Effort(rounds=2, look_s=0.4)
CALLS = tuple(
    Call(method, len(samples.compact(answer)), lambda body, a=answer: json.loads(body) == a)
    for method, answer in samples.ANSWERS.items()
)


@dataclass(frozen=True)
class Sides:
    """All that is compared; `whole` on each engine, the one that rows call "whole path" first."""

    bare: Side
    full: Side
    envoy: Side
    fastapi: Side
    whole: Sequence[Side]

    @classmethod
    def on(cls, stage: Stage) -> "Sides":
        """Start them."""
        whole = [stage.whole_path(engine) for engine in engines()]
        return cls(stage.bare(), stage.full(), stage.envoy(), stage.fastapi(), whole)


@dataclass(frozen=True)
class Pair:
    """Ours and its peer, with the looks at both in the same rounds."""

    what: str
    ours: Side
    peer: Side
    our_looks: Sequence[Look]
    peer_looks: Sequence[Look]


def engines() -> list[str]:
    """What speaks gRPC in our service; the fastest first."""
    return sorted(RPC_ENGINES, key=lambda engine: engine != NATIVE)


def pairs_of(looker: Looker, sides: Sides, call: Call) -> list[Pair]:
    """Everything looked at; each of ours is a neighbour of its peer in each round."""
    first, *others = sides.whole
    edges = looker.rounds([sides.bare, sides.envoy, sides.full], call)
    wholes = looker.rounds([first, sides.fastapi, *others], call)
    looks = {**edges, **wholes}
    named = [
        ("bare", sides.bare, sides.envoy),
        ("full", sides.full, sides.envoy),
        ("whole path", first, sides.fastapi),
        *((side.name, side, sides.fastapi) for side in others),
    ]
    return [
        Pair(what, ours, peer, looks[ours.name], looks[peer.name]) for what, ours, peer in named
    ]


def rows_of(looker: Looker, sides: Sides, call: Call) -> Iterable[Row]:
    """Everything that is told of one of the two calls."""
    pairs = pairs_of(looker, sides, call)
    for pair in pairs:
        yield cpu_row(f"{call.name} {pair.what}", pair.our_looks, pair.peer_looks)
    yield from proof_rows(call, pairs[0])
    for pair in pairs[:3]:
        yield from latency_rows(looker, call, pair)


def proof_rows(call: Call, bare: Pair) -> Iterable[Row]:
    """That neither load generator nor backend was what limited."""
    for what, field, unit, scale in (
        ("load generator", "load_us", "µs", 1),
        ("backend", "backend_us", "µs", 1),
        ("its core in use", "core_share", "%", 100),
    ):
        values = (scale * median(looks, field) for looks in (bare.our_looks, bare.peer_looks))
        better = "higher" if unit == "%" else "lower"
        yield row(f"{call.name} bare: {what}", unit, *values, better=better)


def latency_rows(looker: Looker, call: Call, pair: Pair) -> Iterable[Row]:
    """p50 and p99 of both at half of what the slower one can do."""
    per_s = HALF * min(median(looks, "per_s") for looks in (pair.our_looks, pair.peer_looks))
    tell(f"{call.name} {pair.what}: latencies at {per_s:.0f} requests a second")
    both = list[tuple[Result, Result]]()
    for _ in range(LATENCY_ROUNDS):
        both.append((looker.ask(pair.ours, call, per_s), looker.ask(pair.peer, call, per_s)))
    for percentile in ("p50", "p99"):
        values = (
            statistics.median(getattr(result, f"{percentile}_ms") for result in results)
            for results in zip(*both, strict=True)
        )
        yield row(f"{call.name} {pair.what} {percentile} at half load", "ms", *values)


def growth_row(looker: Looker, stage: Stage) -> Row:
    """CPU of the same GET among few routes and among many."""
    few, many = (stage.bare(f"{count} routes", count) for count in ROUTE_COUNTS)
    looks = looker.rounds([few, many], CALLS[0])
    what = f"GET bare growth, {ROUTE_COUNTS[0]} to {ROUTE_COUNTS[1]} routes"
    return {**cpu_row(what, looks[many.name], looks[few.name]), "peer": None}


def worker_rows(looker: Looker, stage: Stage) -> Iterable[Row]:
    """CPU of the same GET, parent included, at several workers, each with as many connections."""
    sides = [
        replace(
            stage.bare("1 worker" if count == 1 else f"{count} workers", workers=count),
            connections=count * CONNECTIONS_PER_WORKER,
        )
        for count in WORKER_COUNTS
    ]
    looks = looker.rounds(sides, CALLS[0])
    costs = [median(looks[side.name], "cpu_us") for side in sides]
    for side, cost in zip(sides, costs, strict=True):
        yield {**row(f"GET bare, {side.name}", "µs", cost, cost), "peer": None, "ratio": None}
    what = f"GET bare growth, {WORKER_COUNTS[0]} to {WORKER_COUNTS[-1]} workers"
    yield {**row(what, "µs", max(costs), min(costs)), "peer": None}


def memory_rows(sides: Sides) -> Iterable[Row]:
    """Resident memory after the load."""
    for what, ours, peer in (
        ("bare", sides.bare, sides.envoy),
        ("full", sides.full, sides.envoy),
        ("whole path", sides.whole[0], sides.fastapi),
    ):
        yield row(f"resident memory, {what}", "MiB", ours.memory_mib(), peer.memory_mib())


def run(effort: Effort) -> list[Row]:
    """Start everything, look at it, and end it."""
    with ExitStack() as stack:
        stage = Stage(stack, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        looker, sides = Looker(effort, stage.responder), Sides.on(stage)
        rows = [row for call in CALLS for row in rows_of(looker, sides, call)]
        rows += memory_rows(sides)
        return [*rows, growth_row(looker, stage), *worker_rows(looker, stage)]


def main() -> None:
    """Print a table, then the one JSON line that scripts read."""
    parser = argparse.ArgumentParser(
        prog="make bench-edge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a short run with rough figures")
    effort = QUICK if parser.parse_args().quick else THOROUGH
    os.sched_setaffinity(0, BESIDE)
    tell(f"what is measured runs on core {sorted(MEASURED)}, all else on {sorted(BESIDE)}")
    rows = run(effort)
    print(f"\n{versions()}; {CONNECTIONS} connections")
    print("Our edge runs one worker, as Envoy does, where a row does not say otherwise.\n")
    print_rows("edge", engines()[0], rows)


if __name__ == "__main__":
    main()
