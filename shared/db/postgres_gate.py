"""The gate between a promotion and the first write after it (spec/data.md §4).

A shard remembers in tenfold_shard the timeline on which it was last compared with Control. A
primary on another one has been promoted since, perhaps without the end of the log: nobody is
let in until the moves it had a part in are settled, its buckets are what Control and the other
shards say they are, and the new timeline is written. Any process that meets the gate may do
this; an advisory lock in Control lets one do it, and the others find it done.

It needs Control and, where Control itself was lost in part, every shard. As long as one of them
is away the shard stays closed: callers are told when to come back.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from shared.db.errors import DatabaseRefused
from shared.db.limits import CLOSE_S_MAX
from shared.db.move.mover import Pace, Tools
from shared.db.move.place import settle_move
from shared.db.move.port import Move, MoveFailed, MoveLost, MoveRefused
from shared.db.move.postgres_place import PostgresPlace
from shared.db.move.postgres_side import GRANULE_CLASS, GRANULE_MASK
from shared.db.move.protocol import OWNING, Phase, State, Token
from shared.db.move.reconcile import Correction, Owner, Said, verdict
from shared.db.postgres_connection import ERRORS, TIMELINE, Server, behind_gate
from shared.db.postgres_primary import connect_to_primary
from shared.db.postgres_recorded import all_servers

GATE_S_MAX = 30.0
# One process reconciles a service at a time; the bytes spell "TFGT".
_RECONCILING = 0x54464754
_CONTROL = 0

_STAMPS = f"SELECT {TIMELINE} AS now, timeline AS known FROM tenfold_shard"  # noqa: S608
_ROWS = """
SELECT bucket, state, epoch, move_id, mtoken, mholder, peer FROM tenfold_bucket
"""
_MAP = "SELECT bucket, shard_id, epoch FROM tenfold_control.bucket_map"
_MOVE_IDS = "SELECT move_id FROM tenfold_control.bucket_move"
# The last move of each bucket, if it ended here and its source keeps the rows.
_GIVERS = """
SELECT bucket, src FROM (
    SELECT DISTINCT ON (bucket) bucket, src, dst, is_collected
    FROM tenfold_control.bucket_move WHERE phase = 'DONE' ORDER BY bucket, counter DESC
) AS last WHERE dst = $1 AND is_collected = 0
"""
_POINT = """
UPDATE tenfold_control.bucket_map SET shard_id = $2, epoch = $3 WHERE bucket = $1 AND epoch < $3
"""
_STAMP_CONTROL = """
UPDATE tenfold_control.shard SET timeline = greatest(timeline, $2) WHERE shard_id = $1
"""
# Only what was judged is changed: another may have been there meanwhile.
_CORRECT = """
INSERT INTO tenfold_bucket (bucket, state, epoch, peer) VALUES ($1, $2, $3, $4)
ON CONFLICT (bucket) DO UPDATE SET state = $2, epoch = $3, peer = $4, fence_until_us = NULL
WHERE tenfold_bucket.state = $5 AND tenfold_bucket.epoch = $6
"""
_ALONE = "; ".join(
    f"SELECT pg_advisory_xact_lock({GRANULE_CLASS}, {granule})"
    for granule in range(GRANULE_MASK + 1)
)
_FAILURES = (DatabaseRefused, MoveFailed, MoveLost, MoveRefused, *ERRORS)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Reconciled:
    """What the gate has done.

    Attributes:
        shard: its index.
        timeline: on which it may be written now.
        was: the one before; the same if nothing was to be done.
        settled: by bucket, how each move ended that it had a part in.
        corrected: what was written into shards.
        problems: a sentence for each bucket that nobody can have now.
    """

    shard: int
    timeline: int
    was: int
    settled: Mapping[int, Phase] = field(default_factory=dict)
    corrected: Sequence[Correction] = ()
    problems: Sequence[str] = ()


async def pass_gate(servers: Sequence[Server], index: int) -> Reconciled:
    """Let writers into a shard again, if it has been promoted since; nothing if it has not.

    Args:
        servers: all of the service's, in the order in which they were made.
        index: the shard's.

    Raises:
        DatabaseRefused: it cannot be done now; the sentence says why. Safe to repeat.
    """
    try:
        async with asyncio.timeout(GATE_S_MAX), _connected(servers[index]) as raw:
            stamps = await _stamps(raw)
            if stamps is None or stamps["now"] == stamps["known"]:
                timeline = stamps["now"] if stamps else 0
                return Reconciled(index, timeline, timeline)
            if index != _CONTROL:
                await pass_gate(servers, _CONTROL)  # or its word may not be the last
            servers = await all_servers(servers)  # more may have been added meanwhile
            async with _connected(servers[_CONTROL]) as control:
                await control.execute(f"SELECT pg_advisory_lock({_RECONCILING})")
                return await _Gate(servers, index, raw, control).pass_()
    except _FAILURES as error:
        raise DatabaseRefused(
            f"{servers[index].name} was promoted and cannot be compared with Control yet: "
            f"{error or type(error).__name__}"
        ) from error


@dataclass
class Gate:
    """One process at the gate of one shard: whoever comes meanwhile waits for the first.

    Attributes:
        servers, index: as pass_gate has them.
    """

    servers: Sequence[Server]
    index: int
    _passing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def enter(self) -> None:
        """Return when the shard may be used.

        Raises:
            BehindGate: not now.
        """
        async with self._passing:
            try:
                await pass_gate(self.servers, self.index)
            except DatabaseRefused as error:
                _log.warning("shard.behind_gate", error=str(error))
                raise behind_gate(self.servers[self.index]) from error


@dataclass
class _Row:
    """A row of tenfold_bucket."""

    said: Said
    move_id: UUID | None
    token: Token
    peer: int | None


Rows = dict[int, dict[int, _Row]]
"""By shard, by bucket."""


class _Gate:
    """One passage, alone with the service's Control."""

    def __init__(
        self,
        servers: Sequence[Server],
        index: int,
        raw: Any,  # noqa: ANN401 - asyncpg is untyped
        control: Any,  # noqa: ANN401
    ) -> None:
        self._servers = servers
        self._index = index
        self._raw = raw
        self._control = control
        self._place = PostgresPlace(servers, imports=False, is_gatekeeper=True)
        self._settled: dict[int, Phase] = {}

    async def pass_(self) -> Reconciled:
        stamps = await _stamps(self._raw)
        if stamps["now"] == stamps["known"]:  # another was faster
            return Reconciled(self._index, stamps["now"], stamps["now"])
        await self._settle()
        rows = await self._ask_all()
        if self._index == _CONTROL and await self._remember_moves(rows):
            await self._settle()
            rows = await self._ask_all()
        corrections, owners, problems = await self._judge(rows)
        for one in corrections:
            if one.shard != self._index:
                async with _connected(self._servers[one.shard]) as other:
                    await self._write(other, [one], rows)
        own = [one for one in corrections if one.shard == self._index]
        await self._write(self._raw, own, rows, timeline=stamps["now"])
        await self._tell_control(owners, stamps["now"])
        done = Reconciled(
            self._index, stamps["now"], stamps["known"], self._settled, corrections, problems
        )
        _tell(self._servers[self._index], done)
        return done

    # Moves -----------------------------------------------------------------------------

    async def _settle(self) -> None:
        """End every move that the shard has a part in; what it began on is not there any more."""
        tools = Tools(pace=replace(Pace(), grace_s=0.0), collects=False)
        for move in await self._open_moves():
            with suppress(MoveRefused, MoveLost, MoveFailed, DatabaseRefused):
                self._settled[move.bucket] = await settle_move(
                    self._place, move, tools, preference="abort", is_forced=True
                )

    async def _open_moves(self) -> list[Move]:
        moves = await self._place.control.list_moves(is_open=True)
        return [move for move in moves if self._index in (move.src, move.dst)]

    async def _remember_moves(self, rows: Rows) -> bool:
        """Write again what Control has forgotten of moves that shards tell of; whether any."""
        known = {UUID(bytes=row["move_id"].bytes) for row in await self._control.fetch(_MOVE_IDS)}
        forgotten = list(_forgotten(rows, known))
        for move in forgotten:
            await self._place.control.begin(move)
            if self._index not in (move.src, move.dst):
                tools = Tools(pace=replace(Pace(), grace_s=0.0), collects=False)
                self._settled[move.bucket] = await settle_move(
                    self._place, move, tools, preference="abort", is_forced=True
                )
        return bool(forgotten)

    # Rows ------------------------------------------------------------------------------

    async def _ask_all(self) -> Rows:
        """What every shard says; only Control's own gate needs all of them."""
        told = await asyncio.gather(
            *(self._ask(index) for index in range(len(self._servers))), return_exceptions=True
        )
        rows: Rows = {}
        for index, answer in enumerate(told):
            if isinstance(answer, BaseException):
                if self._index in (_CONTROL, index) or not isinstance(answer, _FAILURES):
                    raise answer
            else:
                rows[index] = answer
        return rows

    async def _ask(self, index: int) -> dict[int, _Row]:
        async with _connected(self._servers[index]) as raw:
            return {row["bucket"]: _row(row) for row in await raw.fetch(_ROWS)}

    async def _judge(self, rows: Rows) -> tuple[list[Correction], dict[int, Owner], list[str]]:
        open_moves = {move.bucket: move for move in await self._open_moves()}
        every = await self._place.control.list_moves(is_open=True)
        moving = {move.bucket for move in every}
        givers = {
            row["bucket"]: row["src"] for row in await self._control.fetch(_GIVERS, self._index)
        }
        corrections = [
            closed for move in open_moves.values() for closed in self._closed(move, rows)
        ]
        owners, problems = {}, []
        for row in await self._control.fetch(_MAP):
            bucket = row["bucket"]
            if bucket in moving:
                continue
            told = Owner(row["epoch"], row["shard_id"])
            said = {index: known[bucket].said for index, known in rows.items() if bucket in known}
            giver = givers.get(bucket)
            judged = verdict(bucket, self._index, said, told, giver=giver)
            if judged.problem and giver is not None and giver not in rows:
                raise DatabaseRefused(f"{self._servers[giver].name} cannot be asked")
            corrections += judged.corrections
            problems += [judged.problem] if judged.problem else []
            if judged.owner > told:
                owners[bucket] = judged.owner
        return corrections, owners, problems

    def _closed(self, move: Move, rows: Rows) -> list[Correction]:
        """What to do about a move that cannot be settled yet: nobody writes its bucket here."""
        row = rows[self._index].get(move.bucket)
        if move.src != self._index or row is None or row.said.state not in OWNING:
            return []
        epoch = row.said.epoch
        return [Correction(self._index, move.bucket, State.FENCED, epoch, move.dst)]

    async def _write(
        self,
        raw: Any,  # noqa: ANN401 - asyncpg is untyped
        corrections: Collection[Correction],
        rows: Rows,
        *,
        timeline: int = 0,
    ) -> None:
        """All of it in one commit, alone with the shard; the timeline opens the gate."""
        async with raw.transaction():
            await raw.execute(_ALONE)
            for one in corrections:
                row = rows[one.shard].get(one.bucket)
                said = row.said if row else Said(State.ABSENT)
                peer = None if one.peer is None else str(one.peer)
                new = (one.bucket, str(one.state), one.epoch, peer)
                tag = await raw.execute(_CORRECT, *new, str(said.state), said.epoch)
                if not tag.endswith(" 1"):
                    raise MoveLost(f"bucket {one.bucket} has just been changed by another")
            buckets = [one.bucket for one in corrections if one.state is not State.FENCED]
            await raw.execute("DELETE FROM tenfold_dirty WHERE bucket = ANY ($1)", buckets)
            if timeline:
                await raw.execute("UPDATE tenfold_shard SET timeline = $1", timeline)

    async def _tell_control(self, owners: Mapping[int, Owner], timeline: int) -> None:
        async with self._control.transaction():
            for bucket, owner in owners.items():
                await self._control.execute(_POINT, bucket, owner.shard, owner.epoch)
            await self._control.execute(_STAMP_CONTROL, self._index, timeline)


def _forgotten(rows: Rows, known: Collection[UUID]) -> Sequence[Move]:
    """Moves of which only shards tell."""
    claimed = {
        bucket
        for of_shard in rows.values()
        for bucket, row in of_shard.items()
        if row.said.state is State.ACTIVE
    }
    return [
        Move(
            move_id=row.move_id,
            bucket=bucket,
            src=index,
            dst=row.peer,
            phase=Phase.FENCED,  # undecided: what the shards say settles it
            token=row.token,
            lease_until_us=0,
            facts="",  # nobody knows: a destination that took no write is not trusted
        )
        for index, of_shard in rows.items()
        for bucket, row in of_shard.items()
        if row.move_id is not None
        and row.move_id not in known
        and row.peer is not None
        and (
            row.said.state in (State.MOVING, State.FENCED)
            or (row.said.state is State.MOVED and bucket not in claimed)
        )
    ]


def _row(row: Any) -> _Row:  # noqa: ANN401 - asyncpg is untyped
    move_id, peer = row["move_id"], row["peer"]
    return _Row(
        said=Said(State(row["state"]), row["epoch"]),
        move_id=None if move_id is None else UUID(bytes=move_id.bytes),
        token=Token(row["mtoken"], row["mholder"]),
        peer=None if peer is None else int(peer),
    )


async def _stamps(raw: Any) -> Any:  # noqa: ANN401 - asyncpg is untyped
    """The shard's timeline, now and when it was last compared; None for a new database."""
    try:
        return await raw.fetchrow(_STAMPS)
    except asyncpg.UndefinedTableError:
        return None


@asynccontextmanager
async def _connected(server: Server) -> AsyncIterator[Any]:
    raw = await connect_to_primary(server)
    try:
        # What is decided here can be decided again; a standby may not be there yet.
        await raw.execute("SET synchronous_commit = local")
        yield raw
    finally:
        with suppress(*ERRORS):
            await asyncio.shield(raw.close(timeout=CLOSE_S_MAX))


def _tell(server: Server, done: Reconciled) -> None:
    _log.info(
        "shard.reconciled",
        shard=server.name,
        timeline=done.timeline,
        was=done.was,
        settled={bucket: str(phase) for bucket, phase in done.settled.items()},
        corrected=len(done.corrected),
    )
    for problem in done.problems:
        _log.error("shard.bucket_lost", shard=server.name, problem=problem)
