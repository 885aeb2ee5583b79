"""tenfold shards add, weight, rebalance, drain: more shards, and what each of them carries."""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from deploy.local.errors import LaunchError
from deploy.shards_commands import (
    DataOption,
    JsonOption,
    Moved,
    ServiceArgument,
    failpoints,
    opened_place,
    shards_app,
)
from shared.db import sqlite_files
from shared.db.ids import BUCKET_COUNT
from shared.db.move.balance import Step
from shared.db.move.mover import Tools
from shared.db.move.place import Place, move_bucket
from shared.db.move.port import MoveFailed, MoveLost, MoveRefused, Recorded
from shared.db.move.rebalancing import Picture, settle_dead, take_picture
from shared.db.move.sqlite_folder import SqliteFolder

__all__ = ["shards_app"]
"""With these commands, too."""

# One after the other: what is wrong then is not a bucket.
FAILURES_MAX = 3
# What calls of these need together must be on one shard as yet.
WHOLE = {"payment": "it refuses transfers between accounts on two shards"}
ForceOption = Annotated[
    bool, typer.Option("--force", help="Also a service that works best on one shard.")
]
SERVICES = Path(__file__).parents[1] / "services"


@shards_app.command()
def add(
    service: ServiceArgument,
    dsn: Annotated[
        str,
        typer.Argument(
            metavar="[DSN]",
            help="An empty database: postgresql://host:port/database. None for SQLite.",
        ),
    ] = "",
    *,
    weight: Annotated[
        int, typer.Option(min=0, max=1000, help="Its part of the load; the others have 1.")
    ] = 1,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Add an empty shard while the service runs.

    \b
        tenfold shards add media postgresql://db5:5432/media
        tenfold shards rebalance media

    Its tables are made, Control records it, and every process of the service uses it within five
    seconds, at once where it needs it. Restarts find it; the setting need not name it. It is
    reached with the user, password and parameters of the first shard; several hosts are separated
    by commas. It owns nothing yet: 'rebalance' or 'move' gives it buckets.

    Killed at any point, the same command finishes it; a database that is a shard already is left
    alone. On SQLite, where a shard has no name, see first whether 'list' shows it.
    """  # noqa: D301 - \b keeps the lines of the example
    with opened_place(service, data) as place:
        adding = _added(place, service, dsn, weight)
        index, is_new = asyncio.run(adding)
    if as_json:
        print(json.dumps({"shard": index, "added": is_new}))
    elif is_new:
        print(f"Shard {index} is in use. It is empty: see 'tenfold shards rebalance {service}'.")
    else:
        print(f"That is shard {index} already: nothing was changed.")


async def _added(place: Place, service: str, dsn: str, weight: int) -> tuple[int, bool]:
    migrations, visit = SERVICES / service / "migrations", failpoints()
    if isinstance(place, SqliteFolder):
        if dsn:
            raise LaunchError(f"{service} is on SQLite: leave the DSN out, its shards are files.")
        making = partial(sqlite_files.add_shard, place.path, service, migrations, weight, visit)
        return await asyncio.to_thread(making), True
    # Not needed, and so not loaded, by the other commands.
    from shared.db.move.postgres_place import PostgresPlace
    from shared.db.postgres_adding import Addition, add_shard

    assert isinstance(place, PostgresPlace)
    if not dsn:
        raise LaunchError(f"{service} is on Postgres: name an empty database for the new shard.")
    return await add_shard(place.servers, Addition(service, migrations, dsn, weight, visit))


@shards_app.command()
def weight(
    service: ServiceArgument,
    shard: Annotated[int, typer.Argument(help="Its number, as 'list' shows it.")],
    weight: Annotated[int, typer.Argument(min=0, max=1000, help="0 to carry nothing.")],
    data: DataOption = None,
) -> None:
    """Set how much of the load a shard shall carry, relative to the others.

    Nothing moves before 'rebalance' is told to.
    """
    with opened_place(service, data) as place:
        _weigh(place, shard, weight)
    print(f"Shard {shard} has weight {weight}: 'tenfold shards rebalance {service}' acts on it.")


@shards_app.command()
def rebalance(
    service: ServiceArgument,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    moves_max: Annotated[
        int, typer.Option("--max-moves", min=0, max=BUCKET_COUNT, help="No more than so many.")
    ] = BUCKET_COUNT,
    force: ForceOption = False,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Move buckets until every shard carries its part, while the service runs.

    \b
        tenfold shards rebalance media --dry-run
        tenfold shards rebalance media --max-moves 50

    A bucket's load is half its part of all bytes, half its part of all statement time: bytes are
    estimated from samples, and processes count statement time as they go (what they counted an
    hour ago counts half). A shard may be a tenth above its part. The plan comes first, then one
    move after the other, the largest first; what moves that others left need is done before.

    Ctrl-C gives the bucket that is on its way back; those that have moved stay moved. Stopped or
    killed at any point, the same command measures anew and goes on. Exit code 1: three moves
    failed one after the other, or it was stopped; the sentence says which.
    """  # noqa: D301 - \b keeps the lines of the example
    if not dry_run:
        _refuse_to_split(service, is_forced=force)
    with opened_place(service, data) as place:
        _rebalance(place, dry_run=dry_run, moves_max=moves_max, as_json=as_json)


@shards_app.command()
def drain(
    service: ServiceArgument,
    shard: Annotated[int, typer.Argument(help="Its number, as 'list' shows it.")],
    *,
    force: ForceOption = False,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Move everything off a shard, and keep it empty: weight 0, then 'rebalance'.

    The shard stays one, since Control and signposts name it: its server must go on running.
    """
    _refuse_to_split(service, is_forced=force)
    with opened_place(service, data) as place:
        recorded = asyncio.run(_recorded(place))
        if not any(one.weight for one in recorded if one.index != shard):
            raise LaunchError(f"No other shard than {shard} has a weight: who shall carry it?")
        _weigh(place, shard, 0)
        _rebalance(place, dry_run=False, moves_max=BUCKET_COUNT, as_json=as_json)


def _refuse_to_split(service: str, *, is_forced: bool) -> None:
    if service in WHOLE and not is_forced:
        raise LaunchError(
            f"{service.capitalize()} is best left on one shard: {WHOLE[service]}. If those that "
            "deal with each other share a shard, add --force."
        )


def _weigh(place: Place, index: int, weight: int) -> None:
    async def weigh() -> bool:
        return await place.control.weigh(index, weight)

    if not asyncio.run(weigh()):
        raise LaunchError(f"There is no shard {index}.")


async def _recorded(place: Place) -> Sequence[Recorded]:
    return await place.control.list_shards()


def _rebalance(place: Place, *, dry_run: bool, moves_max: int, as_json: bool) -> None:
    """Measure, say what is planned, and do it."""
    if not dry_run:
        for bucket, end in asyncio.run(settle_dead(place, Tools())):
            print(f"bucket {bucket}: a move that was left is {end.lower()}", file=sys.stderr)
    picture = asyncio.run(take_picture(place, Tools()))
    try:
        steps = picture.steps(moves_max)
    except ValueError as error:
        raise LaunchError(f"{error}.") from error
    _print_plan(picture, steps, as_json=as_json)
    if dry_run:
        return
    done = _Done(len(steps), sum(picture.sizes.get(step.bucket, 0) for step in steps), as_json)
    for step in steps:
        done.move(place, step, picture.sizes.get(step.bucket, 0))
    if not as_json:
        print(f"{done.moved_count} buckets have moved." if steps else "Nothing is to be moved.")


def _print_plan(picture: Picture, steps: list[Step], *, as_json: bool) -> None:
    before, after = picture.loads(), picture.loads(steps)
    if as_json:
        rows = [
            {"shard": shard, "weight": picture.weights[shard], "load": load, "then": after[shard]}
            for shard, load in before.items()
        ]
        plan = {"shards": rows, "moves": [asdict(step) for step in steps]}
        print(json.dumps(plan), flush=True)
        return
    print(f"{'shard':>5}  {'weight':>6}  {'load':>6}  {'then':>6}   (1.00 is its part)")
    for shard, load in before.items():
        print(f"{shard:>5}  {picture.weights[shard]:>6}  {load:>6.2f}  {after[shard]:>6.2f}")
    size = sum(picture.sizes.get(step.bucket, 0) for step in steps)
    print(f"{len(steps)} moves, about {size / 2**20:.1f} MiB", flush=True)


@dataclass
class _Done:
    """How far a plan is.

    Attributes:
        steps_total, bytes_total: of the plan.
        failed_count: moves that failed one after the other.
    """

    steps_total: int
    bytes_total: int
    as_json: bool
    moved_count: int = 0
    passed_count: int = 0
    passed_bytes: int = 0
    failed_count: int = 0
    begun_s: float = field(default_factory=time.monotonic)

    def move(self, place: Place, step: Step, size_bytes: int) -> None:
        """Move one bucket; one that cannot be moved now is left where it is."""
        moved = Moved(step.bucket, as_json=self.as_json)
        tools = moved.tools()
        if not size_bytes:  # nobody reads what is not there any more
            tools = replace(tools, pace=replace(tools.pace, grace_s=0.0))
        try:
            asyncio.run(move_bucket(place, step.bucket, step.dst, tools))
        except KeyboardInterrupt:
            raise LaunchError(
                f"You stopped it: {self.moved_count} of {self.steps_total} buckets have moved."
            ) from None
        except (MoveRefused, MoveFailed, MoveLost) as error:
            self.failed_count += 1
            print(f"bucket {step.bucket}: not moved: {error}", file=sys.stderr, flush=True)
            if self.failed_count == FAILURES_MAX:
                raise
        else:
            self.failed_count = 0
            self.moved_count += 1
            moved.print_end(step.dst)
        self._pass(size_bytes)

    def _pass(self, size_bytes: int) -> None:
        self.passed_count += 1
        self.passed_bytes += size_bytes
        # A move costs something even if it is empty: half by count, half by bytes.
        part = self.passed_count / self.steps_total / 2
        part += (self.passed_bytes / self.bytes_total if self.bytes_total else 2 * part) / 2
        left_s = (time.monotonic() - self.begun_s) * (1 - part) / part
        if not self.as_json:
            told = f"{self.passed_count} of {self.steps_total}, about {left_s:.0f} s left"
            print(told, file=sys.stderr, flush=True)
