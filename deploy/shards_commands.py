"""tenfold shards list, map, move, verify, status, abort, promote: where buckets live.

How there come to be more shards is in shards_growing.py.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.local.data_folder import DataFolder
from deploy.local.errors import LaunchError
from deploy.settings import load_settings, value_of
from shared.db.errors import DatabaseRefused
from shared.db.ids import BUCKET_COUNT
from shared.db.move.failpoints import FAILPOINT_VARIABLE, armed
from shared.db.move.mover import Pace, Progress, Tools
from shared.db.move.place import Place, move_bucket, settle_move
from shared.db.move.port import Move, MoveFailed, MoveLost, MoveRefused, Recorded
from shared.db.move.sqlite_folder import SqliteFolder
from shared.db.move.survey import Survey, disagreements
from shared.db.shards import BucketMap

if TYPE_CHECKING:
    from shared.db.postgres_promotion import Promoted

DATA_SETTING = "TENFOLD_DATA"
# A line of progress at most so often; the last of a step is always shown.
REPORT_S = 1.0

shards_app = typer.Typer(
    name="shards",
    help="Show where a service's data lives, and move parts of it while it is used.\n\n"
    "A service's data is divided into 4,096 buckets; each lives on one shard. 'move' copies a "
    "bucket while its rows are read and written, and keeps its writers waiting only for the last "
    "moment. It may be stopped, or killed, at any time: the bucket stays whole and writable "
    "where it was, or goes on where it was going, and the next mover ends what was left.\n\n"
    "\b\n"
    "    tenfold shards list media\n"
    "    tenfold shards move media --buckets 0-3,17 --to 1\n"
    "    tenfold shards add media && tenfold shards rebalance media\n"
    "    tenfold shards verify media\n",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ServiceArgument = Annotated[
    str, typer.Argument(help="auth, media, notification, payment or reporting.")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", help=f"The mesh's data folder. Default: {DATA_SETTING}, else .tenfold."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@shards_app.command(name="list")
def list_(service: ServiceArgument, as_json: JsonOption = False, data: DataOption = None) -> None:
    """List a service's shards: how many buckets each owns, and how large it is."""
    with opened_place(service, data) as place:
        surveys = asyncio.run(_surveyed(place))
        recorded = {one.index: one for one in asyncio.run(_recorded(place))}
    rows = [
        {
            "shard": survey.index,
            "buckets": len(survey.owned),
            "bytes": survey.size_bytes,
            "weight": recorded[survey.index].weight,
            "place": survey.place,
        }
        for survey in surveys
    ]
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{'shard':>5}  {'buckets':>7}  {'size':>10}  {'weight':>6}  place")
    for row in rows:
        size = f"{int(str(row['bytes'])) / 2**20:.1f} MiB"
        numbers = f"{row['shard']:>5}  {row['buckets']:>7}  {size:>10}  {row['weight']:>6}"
        print(f"{numbers}  {row['place']}")
    for one in recorded.values():
        if not one.is_active:
            print(f"{one.index:>5}  is being added; if nobody does, repeat 'tenfold shards add'")


@shards_app.command(name="map")
def map_(
    service: ServiceArgument,
    bucket: Annotated[int | None, typer.Option(help="Only this one, 0 to 4095.")] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Print which shard owns which buckets, as the shards themselves say."""
    wanted = range(BUCKET_COUNT) if bucket is None else [_bucket(str(bucket))]
    with opened_place(service, data) as place:
        owned = {survey.index: set(survey.owned) for survey in asyncio.run(_surveyed(place))}
    runs: list[dict[str, int | None]] = []
    for number in wanted:
        index = next((index for index, buckets in owned.items() if number in buckets), None)
        if runs and runs[-1]["shard"] == index:
            runs[-1]["last"] = number
        else:
            runs.append({"first": number, "last": number, "shard": index})
    if as_json:
        print(json.dumps(runs))
        return
    for run in runs:
        numbers = (
            f"{run['first']}" if run["first"] == run["last"] else f"{run['first']}-{run['last']}"
        )
        owner = "on its way" if run["shard"] is None else f"shard {run['shard']}"
        print(f"{numbers:>11}  {owner}")


@shards_app.command()
def move(
    service: ServiceArgument,
    *,
    buckets: Annotated[str, typer.Option(help="Which: 17, or 0-3,17. One after the other.")],
    to: Annotated[int, typer.Option(help="The shard that shall own them.")],
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Move buckets to another shard while they are read and written.

    Ctrl-C gives the bucket that is on its way back; those that have moved stay moved. Exit code
    1: one could not be moved, the sentence says why; those after it were not begun. Progress is
    written to standard error about once a second, each bucket's end to standard output.
    """
    numbers = _buckets(buckets)
    with opened_place(service, data) as place:
        for number in numbers:
            moved = Moved(number, as_json=as_json)
            try:
                asyncio.run(move_bucket(place, number, to, moved.tools()))
            except KeyboardInterrupt:
                raise LaunchError(f"Bucket {number} was not moved: you stopped it.") from None
            moved.print_end(to)


@shards_app.command()
def status(service: ServiceArgument, as_json: JsonOption = False, data: DataOption = None) -> None:
    """Show moves that have not ended: the bucket, how far it is, and whether its mover lives."""
    with opened_place(service, data) as place:
        moves = asyncio.run(place.control.list_moves(is_open=True))
    now_us = time.time_ns() // 1000
    rows = [
        {
            "bucket": one.bucket,
            "from": one.src,
            "to": one.dst,
            "phase": str(one.phase),
            "mover_alive": not one.is_left(now_us),
        }
        for one in moves
    ]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        life = (
            "" if row["mover_alive"] else f"; its mover has gone: 'tenfold shards abort {service}'"
        )
        print(f"bucket {row['bucket']}: shard {row['from']} -> {row['to']}, {row['phase']}{life}")
    if not rows:
        print("No bucket is on its way.")


@shards_app.command()
def abort(service: ServiceArgument, as_json: JsonOption = False, data: DataOption = None) -> None:
    """End every move that has not ended: back to where it was, or forward if that is decided.

    A mover that still works finds itself replaced and stops.
    """
    with opened_place(service, data) as place:
        moves = asyncio.run(place.control.list_moves(is_open=True))
        for one in moves:
            tools = Tools(pace=replace(Pace(), grace_s=0.0))
            settled = settle_move(place, one, tools, preference="abort", is_forced=True)
            end = str(asyncio.run(settled))
            row = {"bucket": one.bucket, "end": end}
            print(json.dumps(row) if as_json else f"bucket {one.bucket}: {end.lower()}", flush=True)
    if not moves and not as_json:
        print("No bucket is on its way.")


@shards_app.command()
def verify(service: ServiceArgument, as_json: JsonOption = False, data: DataOption = None) -> None:
    """Check that every bucket has one owner, that the map knows it, and that no row is astray.

    Exit code 0: all is as it must be; 1: it is not, and the sentences say what to do.
    """
    with opened_place(service, data) as place:
        moves: Sequence[Move] = asyncio.run(place.control.list_moves(is_open=True))
        bucket_map: BucketMap = asyncio.run(place.control.read_map())
        found = list(disagreements(asyncio.run(_surveyed(place)), bucket_map))
    if as_json:
        print(json.dumps({"ok": not found, "open_moves": len(moves), "wrong": found}))
    else:
        print("\n".join(found) or "Every bucket has one owner, and the map knows it.")
    if found:
        raise typer.Exit(1)


@shards_app.command()
def promote(
    shard: Annotated[str, typer.Argument(metavar="SERVICE/SHARD", help="Such as media/1.")],
    *,
    to: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Default: the one that has most."),
    ] = "",
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Make a replica the primary of a shard whose primary has died.

    \b
        tenfold shards promote media/1
        tenfold shards promote media/1 --to db1b:5432

    It is refused as long as any host of the shard takes writes: stop the old primary for good
    first. If that comes back later it is left alone, since its timeline is older; make it anew
    as a replica. The server's databases of other services are promoted with it. What the
    old primary had acknowledged and no replica received is lost; a synchronous standby has all.

    Then the shard's buckets are compared with Control, and moves that it had a part in are
    ended. Services follow by themselves. Exit code 1: nothing was promoted, or it is not in use
    yet; the sentence says which.
    """  # noqa: D301 - \b keeps the lines of the example
    service, _, number = shard.partition("/")
    if not number.isascii() or not number.isdigit():
        raise LaunchError(f"{shard!r} names no shard: write it as media/1.")
    root = data or Path(value_of(DATA_SETTING, os.environ, load_settings()))
    is_named = os.environ.get(f"TENFOLD_{service.upper()}_DATABASE")
    if not is_named and DataFolder(root).read_databases():
        raise LaunchError(
            "The cluster on this machine promotes by itself when a primary dies, and a promotion "
            "by hand would be behind its back: 'promote' is for Postgres that you run."
        )
    with opened_place(service, data) as place:
        _print_promoted(_promoted(place, int(number), to), as_json=as_json)


def _promoted(place: Place, index: int, to: str) -> "Promoted":
    import structlog

    from shared.db.move.postgres_place import PostgresPlace
    from shared.db.postgres_promotion import PromotionRefused, promote

    # Standard output is for the answer.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if not isinstance(place, PostgresPlace):
        raise LaunchError("SQLite has no replicas that could be promoted.")
    if index >= len(place.servers):
        raise LaunchError(f"There is no shard {index}: {len(place.servers)} are named.")
    try:
        return asyncio.run(promote(place.servers, index, to=to))
    except PromotionRefused as error:
        text = str(error)
        raise LaunchError(f"{text[0].upper()}{text[1:]}.") from error


def _print_promoted(done: "Promoted", *, as_json: bool) -> None:
    """Say what became of it."""
    gate = done.reconciled
    if as_json:
        told = {
            "primary": done.address,
            "timeline": gate.timeline,
            "silent": list(done.silent),
            "settled": {bucket: str(end) for bucket, end in gate.settled.items()},
            "corrected": [one.bucket for one in gate.corrected],
            "problems": list(gate.problems),
        }
        print(json.dumps(told))
        return
    print(f"{done.address} is the primary now, on timeline {gate.timeline}.")
    print(f"Moves that were ended: {len(gate.settled)}; buckets put right: {len(gate.corrected)}.")
    if done.silent:
        print(f"Did not answer, and must not come back as a primary: {', '.join(done.silent)}")
    for problem in gate.problems:
        print(f"{problem[0].upper()}{problem[1:]}.")


def failpoints() -> Callable[[str], None]:
    """What is called after each step, as the setting says."""
    try:
        return armed(value_of(FAILPOINT_VARIABLE, os.environ, load_settings()))
    except ValueError as error:
        raise LaunchError(f"{error}.") from error


@dataclass
class Moved:
    """One bucket's way, as the operator sees it."""

    bucket: int
    as_json: bool
    shown_at_s: float = 0.0
    last: Progress | None = None

    def tools(self) -> Tools:
        """For the mover: it reports here."""
        return Tools(report=self.report, visit=failpoints())

    def report(self, progress: Progress) -> None:
        """Print a line now and then."""
        self.last = progress
        now_s = time.monotonic()
        if now_s - self.shown_at_s < REPORT_S:
            return
        self.shown_at_s = now_s
        left = f", about {progress.left_s:.0f} s left" if progress.left_s else ""
        line = (
            f"bucket {self.bucket}: {progress.step}, {progress.rows} of {progress.rows_total} "
            f"rows, {progress.backlog} written meanwhile{left}"
        )
        row = {"bucket": self.bucket, **asdict(progress)}
        print(json.dumps(row) if self.as_json else line, file=sys.stderr, flush=True)

    def print_end(self, to: int) -> None:
        """Say what came of it."""
        rows = self.last.rows if self.last else 0
        pause_ms = round((self.last.pause_s or 0.0) * 1000) if self.last else 0
        if self.as_json:
            row = {"bucket": self.bucket, "to": to, "rows": rows, "pause_ms": pause_ms}
            print(json.dumps(row), flush=True)
            return
        print(f"bucket {self.bucket}: on shard {to}, {rows} rows; its writers waited {pause_ms} ms")


async def _recorded(place: Place) -> Sequence[Recorded]:
    return await place.control.list_shards()


async def _surveyed(place: Place) -> Sequence[Survey]:
    return await place.survey()


@contextmanager
def opened_place(service: str, data: Path | None) -> Iterator[Place]:
    """The service's shards; what goes wrong with them is said in one sentence."""
    variable, settings = f"TENFOLD_{service.upper()}_DATABASE", load_settings()
    if variable not in settings:
        raise LaunchError(f"There is no service '{service}' with shards.")
    root = data or Path(value_of(DATA_SETTING, os.environ, settings))
    database = value_of(variable, os.environ, settings) or DataFolder(root).read_databases().get(
        variable
    )
    if not database:
        with _folder(service, data) as folder:
            yield folder
        return
    # Not needed, and so not loaded, by the other commands.
    from shared.db.move.postgres_place import PostgresPlace
    from shared.db.postgres_recorded import all_servers
    from shared.db.postgres_shards import parse_servers

    try:
        servers = parse_servers(database, service=service)
    except ValueError as error:
        raise LaunchError(f"{variable} is not allowed: {error}.") from error
    with suppress(DatabaseRefused):  # without the first, those that it names can be used
        servers = asyncio.run(all_servers(servers))
    with told_in_a_sentence():
        yield PostgresPlace(servers)


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """What goes wrong with shards in the block is said to the operator, without a traceback."""
    try:
        yield
    except (MoveRefused, MoveFailed, MoveLost, DatabaseRefused) as error:
        text = str(error)
        raise LaunchError(f"{text[0].upper()}{text[1:]}.") from error


@contextmanager
def _folder(service: str, data: Path | None) -> Iterator[SqliteFolder]:
    settings = load_settings()
    root = data or Path(value_of(DATA_SETTING, os.environ, settings))
    path = (root / "services" / service / "shards").absolute()
    with told_in_a_sentence():
        if not (path / "control.sqlite").is_file():
            raise DatabaseRefused(f"{path} holds no shards of {service}: has it ever been started?")
        yield SqliteFolder(path)


def _buckets(text: str) -> list[int]:
    """As numbers, each once, in that order: "0-3,17"."""
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = (_bucket(first), _bucket(last if dash else first))
        found.update(dict.fromkeys(range(ends[0], ends[1] + 1)))
    if not found:
        raise LaunchError(f"--buckets {text!r} names none.")
    return list(found)


def _bucket(text: str) -> int:
    if not text.strip().isascii() or not text.strip().isdigit() or int(text) >= BUCKET_COUNT:
        raise LaunchError(f"{text!r} is no bucket: it must be 0 to {BUCKET_COUNT - 1}.")
    return int(text)
