"""The long fault runs: stories told to a mesh whose processes are killed, hostile input, requests
made from the OpenAPI document that nobody thought of, more load than can be served, replicas that
lag, and movers of buckets, and commands that add shards, that die on the way.

    python tests/chaos/run.py --kills 30 --seed 7

The seed is printed and replays the schedule. The last line is one JSON object; the exit
code is 1 if anything was lost, doubled or out of balance.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deploy.local.address import free_addresses
from tests.chaos import (
    documented,
    failing_over,
    growing,
    lagging,
    moving,
    overloaded,
    rare,
    restoring,
    storming,
)
from tests.fuzz.run import TARGETS, fuzz, is_installed
from tests.kills import kill_at_random, told_to, violations
from tests.mesh import running_mesh

KILLS_PER_STORY = 5


def run(*, kills: int, seed: int) -> dict[str, object]:
    """Tell stories until so many kills were made; what the last line says of it."""
    made, operations, found = 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        edge = str(free_addresses(1)[0])
        with running_mesh(Path(folder) / "data", edge=edge) as mesh:
            while made < kills:
                told = told_to(mesh)
                told.begin()
                wanted = min(KILLS_PER_STORY, kills - made)
                victims = kill_at_random(told, seed=seed + made, kills=wanted, pause_s=(0.3, 2.0))
                told.finish()
                made += len(victims)
                operations += told.story.rest.calls
                found += violations(told)
                print(f"{made} kills ({', '.join(victims)}): {found or 'nothing wrong'}")
    what = "kill -9 of random processes during the story"
    return {"what": what, "faults": made, "operations": operations, "violations": len(found)}


def run_fuzzers(seconds: int) -> dict[str, object]:
    """Fuzz what strangers send, one target after the other."""
    inputs, crashes = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS if is_installed() else ():
            outcome = fuzz(target, seconds=seconds, folder=Path(folder))
            inputs, crashes = inputs + outcome.inputs, crashes + bool(outcome.crash)
            print(f"fuzzing {target}: {outcome.inputs} inputs {outcome.crash}")
    what = f"hostile input, {seconds} s for each of {len(TARGETS)} fuzz targets"
    return {"what": what, "faults": inputs, "operations": inputs, "violations": crashes}


def main() -> int:
    """Run and report; 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="how many processes to kill")
    parser.add_argument("--fuzz-s", type=int, default=120, help="seconds for each fuzz target")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="the schedule")
    parser.add_argument("--examples", type=int, default=50, help="for each operation, and wrong")
    parser.add_argument("--overload-s", type=int, default=60, help="seconds of each story")
    parser.add_argument("--reads", type=int, default=10**6, help="of own writes, from replicas")
    parser.add_argument("--move-rounds", type=int, default=1, help="of a move's every step")
    parser.add_argument("--storm-rounds", type=int, default=1, help="of all faults at once")
    parser.add_argument("--failovers", type=int, default=10, help="of a cluster's primaries")
    parser.add_argument("--rare", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--backups", type=int, default=10, help="taken in use, and restored")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    rows = [run(kills=arguments.kills, seed=arguments.seed)] if arguments.kills else []
    rows += [run_fuzzers(arguments.fuzz_s)] if arguments.fuzz_s else []
    rows += documented.run(examples=arguments.examples) if arguments.examples else []
    rows += overloaded.run(seconds=arguments.overload_s) if arguments.overload_s else []
    rows += lagging.run(reads=arguments.reads) if arguments.reads else []
    rows += [moving.run(rounds=arguments.move_rounds)] if arguments.move_rounds else []
    rows += [growing.run()] if arguments.move_rounds else []
    rows += (
        [storming.run(rounds=arguments.storm_rounds, seed=arguments.seed)]
        if arguments.storm_rounds
        else []
    )
    rows += (
        [failing_over.run(faults=arguments.failovers, seed=arguments.seed)]
        if arguments.failovers
        else []
    )
    rows += (
        [restoring.run(rounds=arguments.backups, seed=arguments.seed)] if arguments.backups else []
    )
    rows += [rare.run()] if arguments.rare else []
    print(json.dumps({"chaos": rows}))
    return 1 if any(row["violations"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
