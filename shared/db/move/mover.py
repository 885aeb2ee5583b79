"""Moves one bucket while it is written, and settles a move that another mover left.

The order of the steps is below, in `run`; what each may change is in protocol.py, and how a
database does it in the sides. A mover that finds its token replaced raises MoveLost and changes
nothing more; one that cannot go on aborts, as long as nothing has been decided; after the
decision it goes forward until it is done.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast
from uuid import uuid4

from shared.clock import Clock, SystemClock, to_us
from shared.db.ids import moment_ms_of, new_id
from shared.db.move import protocol
from shared.db.move.failpoints import armed
from shared.db.move.port import (
    Batch,
    Control,
    Held,
    Key,
    Move,
    MoveFailed,
    MoveLost,
    MoveRefused,
    Shape,
    Side,
)
from shared.db.move.protocol import (
    Action,
    Change,
    Decision,
    Phase,
    Preference,
    State,
    next_token,
    resolve,
    seen,
    whole,
)

T = TypeVar("T")
ABORT_S_MAX = 5.0
FORWARD_PAUSE_S = 0.2
STANDBY_TRIES_MAX, STANDBY_PAUSE_S = 20, 0.1
# Busy servers are calmer a moment later more often than not.
SLOW_PAUSE_S = 0.1


@dataclass(frozen=True)
class Pace:
    """How large the bites are, and how long anybody waits; the values are the design's.

    Attributes:
        lease_s, renew_s: a mover that dies is replaced after the first.
        page_rows: copied in one transaction at the destination.
        marks_max: written keys that are carried over in one.
        backlog_max, pass_s_max: a shorter pass over a smaller backlog may be fenced.
        passes_max: that do not shrink the backlog before the move gives up.
        slow_passes_max: over a smaller backlog that last longer, before it does so.
        fence_s: how long a fenced bucket may still be read.
        marks_kept_max, marks_kept_s_max: written keys that may wait, and for how long the first
            of them; they take room on the source's disk.
        unsent_max: events of the bucket that may wait when it is fenced.
        grace_s: from the end until the source's rows are deleted.
        rest_share: after each page, pause for so many times what it took: other callers of the
            same servers come first, and the move takes that much longer.
    """

    lease_s: float = 5.0
    renew_s: float = 1.0
    page_rows: int = 500
    marks_max: int = 500
    backlog_max: int = 200
    pass_s_max: float = 0.1
    passes_max: int = 5
    slow_passes_max: int = 100
    fence_s: float = 5.0
    marks_kept_max: int = 1_000_000
    marks_kept_s_max: float = 3600.0
    unsent_max: int = 10_000
    grace_s: float = 2.0
    rest_share: float = 2.0


@dataclass(frozen=True)
class Progress:
    """Where a move is.

    Attributes:
        step: the last one done.
        rows, rows_total: copied, and to copy as counted at the beginning.
        backlog: keys written since, still to carry over.
        left_s: an estimate for the copy, None before there is one.
        pause_s: how long writers were kept out, once they are let in again.
    """

    step: str
    rows: int = 0
    rows_total: int = 0
    backlog: int = 0
    left_s: float | None = None
    pause_s: float | None = None


Report = Callable[[Progress], None]


def _quiet(progress: Progress) -> None:
    del progress


@dataclass(frozen=True)
class Tools:
    """What every mover of a process shares.

    Attributes:
        visit: called with a failpoint's name after its step.
        collects: whether a mover that is done stays to delete the source's rows.
    """

    clock: Clock = field(default_factory=SystemClock)
    pace: Pace = field(default_factory=Pace)
    report: Report = _quiet
    visit: Callable[[str], None] = field(default_factory=lambda: armed(""))
    collects: bool = True

    def now_us(self) -> int:
        """The current moment."""
        return to_us(self.clock.now())

    def after_us(self, seconds: float) -> int:
        """A moment to come."""
        return self.now_us() + int(seconds * 1e6)


async def begin_move(control: Control, src: Side, dst: Side, bucket: int, tools: Tools) -> "Mover":
    """Plan a move (m0).

    Raises:
        MoveRefused: it cannot begin; nothing has been changed.
    """
    held, there = await src.look(), await dst.look()
    if held.state not in protocol.CAPTURE.before:
        raise MoveRefused(
            f"shard {src.index} does not own bucket {bucket}: it is {held.state} there"
        )
    if there.state not in protocol.PREPARE.before:
        raise MoveRefused(f"bucket {bucket} is {there.state} on shard {dst.index} already")
    if src.shapes != dst.shapes:
        raise MoveRefused(
            f"shards {src.index} and {dst.index} differ in their tables: migrate both"
        )
    highest = await control.highest_token(bucket)
    move = Move(
        move_id=new_id(bucket),
        bucket=bucket,
        src=src.index,
        dst=dst.index,
        phase=Phase.PLAN,
        token=next_token(str(uuid4()), highest, held.token, there.token),
        lease_until_us=tools.after_us(tools.pace.lease_s),
        facts=" | ".join([await src.facts(), await dst.facts()]),
    )
    await control.begin(move)
    tools.visit("plan")
    return Mover(
        control, src=src, dst=dst, move=move, tools=tools, action="prepare", epoch=held.epoch
    )


async def take_over(
    control: Control,
    src: Side,
    dst: Side,
    move: Move,
    tools: Tools,
    *,
    preference: Preference,
    is_forced: bool = False,
) -> "Mover":
    """Make another's move ours (t1 to t3), and find out what ends it.

    Args:
        control: of the service.
        src: where the bucket leaves.
        dst: where it goes.
        move: as Control told of it.
        tools: of this process.
        preference: where the move may be aborted or go on.
        is_forced: do not wait for its lease: an operator knows that its mover is dead, or wants
            it to stop.

    Raises:
        MoveRefused: its mover lives, or the move has ended.
        MoveLost: another took it over at the same time.
    """
    held, there = await src.look(), await dst.look()
    highest = await control.highest_token(move.bucket)
    token = next_token(str(uuid4()), highest, held.token, there.token)
    lease_until_us = tools.after_us(tools.pace.lease_s)
    since_us = tools.now_us()
    if is_forced or move.is_left(since_us):
        since_us = max(move.lease_until_us, since_us) + (10**12 if is_forced else 0)
    if not await control.take_over(move, token, lease_until_us, since_us):
        raise MoveRefused(
            f"the move of bucket {move.bucket} has ended, or its mover still works: see "
            "'tenfold shards status'"
        )
    tools.visit("takeover")
    for side in (src, dst):
        if not await side.take(token):
            raise MoveLost(f"bucket {move.bucket} has been taken over by another mover")
    held, there = await src.look(), await dst.look()
    mine = [
        listed
        for listed in await control.list_moves(is_open=True)
        if listed.move_id == move.move_id and listed.token == token
    ]
    if not mine:
        raise MoveLost(f"bucket {move.bucket} has been taken over by another mover")
    [move] = mine
    src_failed_over, dst_failed_over = [
        _timeline(fact) != _timeline(await side.facts())
        for fact, side in zip(_facts_of(move), (src, dst), strict=True)
    ]
    arrived = whole(_seen(there, move), has_failed_over=dst_failed_over)
    action = resolve(move.phase, _seen(held, move), arrived, preference)
    leave = protocol.LEAVE_AGAIN if src_failed_over else protocol.LEAVE
    return Mover(
        control,
        src=src,
        dst=dst,
        move=move,
        tools=tools,
        action=action,
        leave=leave,
        epoch=held.epoch,
    )


def _seen(held: Held, move: Move) -> State:
    return seen(held.state, is_of_this_move=held.move_id == move.move_id)


def _facts_of(move: Move) -> tuple[str, str]:
    """What was true of the source and the destination when the move began."""
    src, _, dst = move.facts.partition(" | ")
    return src, dst


def _timeline(fact: str) -> str:
    """Of "timeline 1, schema 7": a new schema loses no row, a new primary may have."""
    return fact.partition(",")[0]


async def _both(one: Awaitable[T], other: Awaitable[T]) -> tuple[T, T]:
    """What both sides answer; if one fails, the other has ended too: it does one thing at once."""
    answers = await asyncio.gather(one, other, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return cast("tuple[T, T]", tuple(answers))


class Mover:
    """One mover's life with one move.

    Args:
        control: of the service.
        src: where the bucket leaves.
        dst: where it goes.
        move: with our token.
        tools: of this process.
        action: where to begin.
        leave: how the source gives the bucket away.
        epoch: the bucket's at the source.
    """

    def __init__(
        self,
        control: Control,
        *,
        src: Side,
        dst: Side,
        move: Move,
        tools: Tools,
        action: Action,
        leave: Change = protocol.LEAVE,
        epoch: int = 0,
    ) -> None:
        self.move = move
        self.action = action
        self._leaving = leave
        self._epoch = epoch
        self._control = control
        self._src = src
        self._dst = dst
        self._tools = tools
        self._pace = tools.pace
        self._changed: dict[str, set[Key]] = {}
        self._is_compared = False
        self._fenced_at_s = time.monotonic()
        self._unread_at_s = self._fenced_at_s + tools.pace.fence_s
        self._progress = Progress("plan")

    async def run(self) -> Phase:
        """Go on until the move has ended; DONE or ABORTED.

        Raises:
            MoveLost: another mover goes on with it.
            MoveFailed: it is aborted, or will be; the sentence says why.
        """
        async with self._renewing():
            if self.action == "hand back":
                await self._hand_back()
                return Phase.ABORTED
            if self.action == "abort":
                await self._abort("taken over and aborted")
                return Phase.ABORTED
            if self.action != "forward":
                await self._come_to_decision()
            await self._go_forward()
        return Phase.DONE

    async def _come_to_decision(self) -> None:
        try:
            steps = [self._prepare, self._copy, self._catch_up_verified, self._fence, self._drain]
            first = {"prepare": 0, "copy": 1, "catch up": 2, "drain": 4}[self.action]
            for step in steps[first:]:
                await step()
            await self._decide(protocol.COMMIT)
        except MoveFailed as error:
            try:
                await self._abort(str(error))
            except MoveFailed as second:
                raise MoveFailed(f"{error}; it is given back later, since {second}") from error
            raise
        except asyncio.CancelledError:
            # Nobody need wait for the lease. If this is cut short, the next mover does it.
            with suppress(MoveFailed, MoveLost, TimeoutError):
                async with asyncio.timeout(ABORT_S_MAX):
                    await self._abort("interrupted")
            raise

    # Before the decision ---------------------------------------------------------------

    async def _prepare(self) -> None:
        """m1 to m3: nothing old at the destination, every writer captured at the source."""
        await self._change(self._dst, protocol.PREPARE)
        await self._delete_all(self._dst, State.IMPORTING)
        self._visit("prepare")
        await self._change(self._src, protocol.CAPTURE, peer=self._dst.index)
        self._visit("capture")
        await self._decide(protocol.CAPTURED)

    async def _copy(self) -> None:
        """c1 to c3: page after page, from where the destination says it stopped."""
        cursors = await self._dst.read_cursors(self.move)
        counts = {shape.name: await self._src.count_rows(shape) for shape in self._src.shapes}
        already = sum(count for _, count in cursors.values())
        self._progress = replace(self._progress, rows=already, rows_total=sum(counts.values()))
        begun_s = time.monotonic()
        for shape in self._src.shapes:
            after, count = cursors.get(shape.name, ("", 0))
            while True:
                page_begun_s = time.monotonic()
                page = await self._src.read_page(shape, after, self._pace.page_rows)
                self._visit("copy.read")
                if not page.rows:
                    break
                after, count = page.last, count + len(page.rows)
                batch = Batch((), {shape.name: page.rows}, {}, 0)
                self._require(await self._dst.apply(self.move, batch, (shape.name, after, count)))
                self._copied(len(page.rows), already, time.monotonic() - begun_s)
                await self._check_marks()
                await self._rest(page_begun_s)
            if count > self._pace.page_rows:
                await self._dst.analyze(shape)
        await self._decide(protocol.COPIED)

    def _copied(self, row_count: int, already: int, took_s: float) -> None:
        rows = self._progress.rows + row_count
        per_row_s = took_s / (rows - already)
        left_s = max(self._progress.rows_total - rows, 0) * per_row_s
        self._progress = replace(self._progress, rows=rows, left_s=left_s)
        self._visit("copy.apply")

    async def _catch_up_verified(self) -> None:
        """d1 to d3, then both sides compared while writers go on, then d1 to d3 again.

        To compare all takes long; what was written meanwhile is compared as well before the
        fence, which then has only to compare what was written last.
        """
        await self._catch_up()
        for shape in self._src.shapes:
            await self._verify(shape)
        self._visit("verify")
        self._changed, self._is_compared = {}, True
        await self._catch_up()
        written, self._changed = self._changed, {}
        for table, keys in written.items():
            if wrong := await self._differing(self._shape(table), keys):
                self._require(await self._src.mark_dirty(self.move, self._shape(table), wrong))
        await self._catch_up()
        await self._precheck()

    async def _catch_up(self) -> None:
        smallest, idle_passes, slow_passes = float("inf"), 0, 0
        while True:
            begun_s = time.monotonic()
            batch = await self._carry("catch")
            took_s = time.monotonic() - begun_s
            if batch.left < self._pace.backlog_max:
                if took_s < self._pace.pass_s_max:
                    return
                slow_passes += 1
                await self._wait_for_calm(slow_passes, took_s)
                continue
            idle_passes = 0 if batch.left < smallest else idle_passes + 1
            smallest = min(smallest, batch.left)
            if idle_passes >= self._pace.passes_max:
                raise MoveFailed(
                    f"bucket {self.move.bucket} is written faster than it can be carried over: "
                    f"{batch.left} keys are left and a pass took {took_s * 1000:.0f} ms"
                )

    async def _wait_for_calm(self, slow_passes: int, took_s: float) -> None:
        """A pass over few keys was slow: the servers are busy, and a fence now would last."""
        if slow_passes >= self._pace.slow_passes_max:
            raise MoveFailed(
                f"bucket {self.move.bucket} would keep its writers waiting: shards "
                f"{self.move.src} and {self.move.dst} are so busy that a pass over a few keys took "
                f"{took_s * 1000:.0f} ms; try again when they are calmer"
            )
        await asyncio.sleep(SLOW_PAUSE_S)

    async def _carry(self, prefix: str) -> Batch:
        """One pass: read marks and rows in one snapshot, write them, delete those marks."""
        batch = await self._src.read_dirty(self.move, self._pace.marks_max)
        self._visit(f"{prefix}.read")
        if batch is None:
            raise self._lost()
        if prefix == "catch":
            self._check_marks_of(batch.left)
        if not batch.seqs:
            return batch
        self._require(await self._dst.apply(self.move, batch))
        self._visit(f"{prefix}.apply")
        for table, rows in batch.rows.items():
            shape = self._shape(table)
            keys = {shape.key_of(row) for row in rows} | set(batch.gone[table])
            self._changed.setdefault(table, set()).update(keys)
        self._require(await self._src.acknowledge(self.move, batch.seqs))
        self._progress = replace(self._progress, backlog=batch.left)
        self._visit(f"{prefix}.ack")
        return batch

    async def _check_marks(self) -> None:
        self._check_marks_of(await self._src.mark_count())

    def _check_marks_of(self, count: int) -> None:
        """Give up rather than fill the source's disk."""
        began_us = moment_ms_of(self.move.move_id) * 1000
        age_s = (self._tools.now_us() - began_us) / 1e6 if count else 0.0
        if count > self._pace.marks_kept_max or age_s > self._pace.marks_kept_s_max:
            raise MoveFailed(
                f"what is written to bucket {self.move.bucket} meanwhile piles up on shard "
                f"{self._src.index}: {count} keys, and the move is {age_s:.0f} s old; move it when "
                "it is written less"
            )

    async def _verify(self, shape: Shape) -> None:
        """Compare chunk by chunk; what differs is carried over again, since writers go on."""
        after = ""
        while True:
            begun_s = time.monotonic()
            ours, last = await self._src.read_range(shape, after, "", self._pace.page_rows)
            # The last chunk has no upper end: the destination may hold what the source does not.
            is_last = len(ours) < self._pace.page_rows
            end, rows_max = ("", -1) if is_last else (last, -1)
            theirs, _ = await self._dst.read_range(shape, after, end, rows_max)
            wrong = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
            if wrong:
                self._require(await self._src.mark_dirty(self.move, shape, wrong))
            if is_last:
                return
            after = last
            await self._check_marks()
            await self._rest(begun_s)

    async def _differing(self, shape: Shape, keys: Collection[Key]) -> set[Key]:
        """Of these, the keys whose rows are not the same on both sides now."""
        ours, theirs = await _both(
            self._src.read_rows(shape, keys), self._dst.read_rows(shape, keys)
        )
        return {key for key in keys if ours.get(key) != theirs.get(key)}

    async def _precheck(self) -> None:
        """Refuse to fence what could not be unfenced soon."""
        lease_until_us = self._tools.after_us(self._pace.lease_s)
        self._require(await self._control.renew(self.move, lease_until_us))
        unsent = await self._src.unsent_count()
        if unsent > self._pace.unsent_max:
            raise MoveFailed(
                f"{unsent} events of the bucket wait for their relay: is the bus down?"
            )
        for side in (self._src, self._dst):
            if await side.misses_standby():
                raise MoveFailed(
                    f"the synchronous standby of shard {side.index} is missing: its commits would "
                    "wait behind the fence"
                )
        now = " | ".join([await self._src.facts(), await self._dst.facts()])
        if now != self.move.facts:
            raise MoveFailed(
                f"a shard has changed since the move began: {self.move.facts} -> {now}"
            )
        self._visit("precheck")

    async def _fence(self) -> None:
        """x1, x2: from here on writers wait."""
        self._fenced_at_s = time.monotonic()
        await self._change(
            self._src,
            protocol.FENCE,
            peer=self._dst.index,
            fence_until_us=self._tools.after_us(self._pace.fence_s),
            facts=_facts_of(self.move)[0],
        )
        self._unread_at_s = time.monotonic() + self._pace.fence_s
        self._visit("fence")
        await self._decide(protocol.FENCED)

    async def _drain(self) -> None:
        """Under the fence: carry over to the last mark, then compare what was touched."""
        while (await self._carry("drain")).seqs:
            pass
        for table, keys in self._changed.items():
            if await self._differing(self._shape(table), keys):
                raise self._differs(table)
        if not self._is_compared:  # by another mover, which cannot say what was written since
            for shape in self._src.shapes:
                ours, theirs = await _both(self._src.count_rows(shape), self._dst.count_rows(shape))
                if ours != theirs:
                    raise self._differs(shape.name)
        self._visit("verify2")

    # After it --------------------------------------------------------------------------

    async def _go_forward(self) -> None:
        """f1 to f3 and g. A shard that is down is waited for: there is no way back."""
        for step in (self._leave, self._arrive, self._finish):
            while True:
                try:
                    await step()
                    break
                except MoveFailed:
                    if step == self._leave:
                        await self._arrive_first()
                    await asyncio.sleep(FORWARD_PAUSE_S)
        if self._tools.collects:
            await asyncio.sleep(self._pace.grace_s)
            await self.collect()

    async def _leave(self) -> None:
        held, there = await _both(self._src.look(), self._dst.look())
        is_gone = held.state is State.MOVED and held.token == self.move.token
        has_arrived = there.state is State.ACTIVE and held.state not in self._leaving.before
        if not is_gone and not has_arrived:
            await self._change(self._src, self._leaving, peer=self._dst.index)
        self._visit("src_moved")

    async def _arrive_first(self) -> None:
        """Let writers in although the source is away: once its fence is over, nobody reads there.

        Not if it has failed over, and perhaps lost its fence: then it must be told first.
        """
        if self._leaving is not protocol.LEAVE or time.monotonic() < self._unread_at_s:
            return
        with suppress(MoveFailed):
            there = await self._dst.look()
            if there.state is State.IMPORTING:
                epoch = max(self._epoch, there.epoch) + 2  # the source's next is one less
                await self._change(self._dst, protocol.ARRIVE, epoch=epoch)
                self._let_in()

    async def _arrive(self) -> None:
        held, there = await _both(self._src.look(), self._dst.look())
        if there.state is not State.ACTIVE or there.token != self.move.token:
            epoch = max(held.epoch, there.epoch) + 1
            await self._change(self._dst, protocol.ARRIVE, epoch=epoch)
        self._let_in()

    def _let_in(self) -> None:
        if self._progress.pause_s is None:
            pause_s = time.monotonic() - self._fenced_at_s
            self._progress = replace(self._progress, pause_s=pause_s)
        self._visit("dst_active")

    async def _finish(self) -> None:
        held = await self._dst.look()
        self._require(await self._control.finish(self.move, protocol.DONE, held.epoch))
        self._visit("done")

    async def collect(self) -> None:
        """Delete the source's rows; the MOVED row stays as a signpost.

        A mover that is cut short here leaves rows that nobody can read or write; Control
        remembers that they may be there. They stay, too, as long as the destination's primary
        alone knows that it has the bucket: if that dies now, they are all there is.
        """
        if not await self._is_on_standby():
            return
        with suppress(MoveLost):  # the bucket is on its way back: its next move wipes them
            await self._delete_all(self._src, State.MOVED)
        await self._control.mark_collected(self.move)
        self._visit("gc")

    async def _is_on_standby(self) -> bool:
        for _ in range(STANDBY_TRIES_MAX):
            with suppress(MoveFailed):
                if await self._dst.is_on_standby():
                    return True
            await asyncio.sleep(STANDBY_PAUSE_S)
        return False

    # Instead ---------------------------------------------------------------------------

    async def _abort(self, reason: str) -> None:
        """a1 to a4."""
        if self.move.phase is not Phase.ABORTING:
            await self._decide(protocol.ABORT, reason)
        for side in (self._dst, self._src):
            self._require(await side.take(self.move.token))
        await self._undo(self._dst, protocol.DROP)
        self._visit("abort.dst")
        await self._undo(self._src, protocol.RETURN)
        self._visit("abort.src")
        await self._decide(protocol.ABORTED)
        with suppress(MoveLost):
            await self._delete_all(self._dst, State.ABORTED)

    async def _undo(self, side: Side, change: Change) -> None:
        """Leave alone what this move has not changed: the token keeps others from it now."""
        held = await side.look()
        if held.state in change.before:
            await self._change(side, change)
        else:
            self._require(held.token == self.move.token)

    async def _hand_back(self) -> None:
        """The destination first: what it holds may not be all."""
        await self._undo(self._dst, protocol.DROP)
        is_gone = (await self._src.look()).state is State.MOVED
        await self._undo(self._src, protocol.HAND_BACK if is_gone else protocol.RETURN)
        await self._decide(protocol.HANDED_BACK, "the destination had been given up")

    # Helpers ---------------------------------------------------------------------------

    async def _change(
        self,
        side: Side,
        change: Change,
        *,
        peer: int | None = None,
        epoch: int = 0,
        fence_until_us: int = 0,
        facts: str = "",
    ) -> None:
        self._require(
            await side.change(
                change,
                self.move,
                peer=peer,
                epoch=epoch,
                fence_until_us=fence_until_us,
                facts=facts,
            )
        )

    async def _decide(self, decision: Decision, reason: str = "") -> None:
        self._require(await self._control.decide(self.move, decision, reason))
        self.move = replace(self.move, phase=decision.after)
        self._visit(decision.name)

    async def _delete_all(self, side: Side, state: State) -> None:
        while True:
            begun_s = time.monotonic()
            deleted = await side.delete_page(self.move, state, self._pace.page_rows)
            if deleted is None:
                raise self._lost()
            if not deleted:
                return
            await self._rest(begun_s)

    async def _rest(self, begun_s: float) -> None:
        """Leave both servers to others, for a multiple of what a page took them."""
        await asyncio.sleep((time.monotonic() - begun_s) * self._pace.rest_share)

    def _visit(self, name: str) -> None:
        self._progress = replace(self._progress, step=name)
        self._tools.visit(name)
        self._tools.report(self._progress)

    def _require(self, is_mine: bool) -> None:
        if not is_mine:
            raise self._lost()

    def _lost(self) -> MoveLost:
        return MoveLost(f"bucket {self.move.bucket} has been taken over by another mover")

    def _differs(self, table: str) -> MoveFailed:
        return MoveFailed(f"{table} differs between the shards under the fence")

    def _shape(self, table: str) -> Shape:
        return next(shape for shape in self._src.shapes if shape.name == table)

    @asynccontextmanager
    async def _renewing(self) -> AsyncIterator[None]:
        """Hold the lease. If it is lost all the same, the tokens stop us, not the clock."""
        renewing = asyncio.create_task(self._renew(), name=f"lease-of-bucket-{self.move.bucket}")
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.wait([renewing])

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._pace.renew_s)
            with suppress(MoveFailed):  # Control is away: the next second, perhaps
                if not await self._control.renew(
                    self.move, self._tools.after_us(self._pace.lease_s)
                ):
                    return
