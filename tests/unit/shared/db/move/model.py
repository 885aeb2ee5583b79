"""The move as a state machine that can be searched: every order of everything, small.

Two keys, two writes, two movers that may stop for ever or for a while at any step, and a
Control that may once lose its last commit, as an asynchronous failover does. Guards, changes and
the resolve table are the ones that the mover runs; only the databases are tuples here.
"""

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from shared.db.move import protocol
from shared.db.move.protocol import (
    CLOSED,
    NOBODY,
    Change,
    Decision,
    Phase,
    Preference,
    State,
    Token,
)

KEYS = (0, 1)
NOWHERE = -1
CLEAN = 0


class Side(NamedTuple):
    """One shard: `move` last changed its state; rows hold a version per key, or NOWHERE."""

    state: State
    token: Token
    move: int
    rows: tuple[int, int]


class Control(NamedTuple):
    phase: Phase
    token: Token
    move: int


class Mover(NamedTuple):
    """One life: where it is, its token, and what it has read and may since have become old."""

    at: str
    token: Token = NOBODY
    move: int = 0
    memory: tuple = ()


class World(NamedTuple):
    control: Control
    before_last: Control | None
    may_forget: bool
    src: Side
    dst: Side
    cursor: int
    dirty: tuple[int, int]
    acknowledged: tuple[int, int]
    movers: tuple[Mover, ...]


@dataclass(frozen=True)
class Bugs:
    """Seeded on purpose, each to be found."""

    has_no_token_check_at_dst: bool = False
    has_no_drain: bool = False
    has_no_copied_phase: bool = False
    trusts_what_another_move_left: bool = False


SOUND = Bugs()
MAY_GIVE_UP = {"copy.read", "catch.read", "fence", "fence2", "drain.read", "commit"}
"""Where a mover may decide to abort by itself: a precheck failed, an operator asked."""


def new_world(
    movers: int, *, may_forget: bool = False, src: State = State.ACTIVE, move: int = 0
) -> World:
    control = Control(Phase.ABORTED, NOBODY, move)
    return World(
        control,
        None,
        may_forget,
        Side(src, NOBODY, move, (0, 0)),
        Side(State.ABSENT, NOBODY, 0, (NOWHERE, NOWHERE)),
        0,
        (CLEAN, CLEAN),
        (0, 0),
        (Mover("idle"),) * movers,
    )


def put(values: tuple, index: int, value: object) -> tuple:
    return (*values[:index], value, *values[index + 1 :])


# What one mover does next -----------------------------------------------------------------

Outcome = tuple[World, Mover]
GONE = "gone"


def decided(world: World, mover: Mover, decision: Decision, then: str) -> Outcome:
    """One commit in Control, if the token there is the mover's own."""
    control = world.control
    if control.token != mover.token or control.phase not in decision.before:
        return world, mover._replace(at=GONE)
    return written(world, control._replace(phase=decision.after)), mover._replace(at=then)


def written(world: World, control: Control) -> World:
    return world._replace(control=control, before_last=world.control)


def changed(world: World, mover: Mover, where: str, change: Change, then: str) -> Outcome:
    """One transaction on a shard, if its guard holds."""
    side: Side = getattr(world, where)
    if not change.is_allowed(side.state, side.token, mover.token):
        return world, mover._replace(at=GONE)
    side = side._replace(state=change.after, token=mover.token, move=mover.move)
    return world._replace(**{where: side}), mover._replace(at=then)


def is_mine(side: Side, mover: Mover, *states: State) -> bool:
    return side.token == mover.token and side.state in states


def seen(side: Side, move: int, bugs: Bugs) -> State:
    mine = side.move == move or bugs.trusts_what_another_move_left
    return protocol.seen(side.state, is_of_this_move=mine)


class Steps:
    """The step table of spec/data.md section 4, a method for each row."""

    def __init__(self, bugs: Bugs, preferences: Collection[Preference]) -> None:
        self.bugs = bugs
        self.preferences = preferences

    def of(self, world: World, index: int) -> Iterator[World]:
        """Every world that this mover's next step may lead to."""
        mover = world.movers[index]
        outcomes = list(self._outcomes(world, mover, index))
        if mover.at in MAY_GIVE_UP and "abort" in self.preferences:
            outcomes.append((world, mover._replace(at="abort")))
        for after, moved in outcomes:
            # What a mover knew that has gone is of no interest any more.
            kept = Mover(GONE) if moved.at == GONE else moved
            yield after._replace(movers=put(after.movers, index, kept))

    def _outcomes(self, world: World, mover: Mover, index: int) -> Iterator[Outcome]:
        if mover.at == GONE:
            return
        step = getattr(self, "_" + mover.at.replace(".", "_").replace(" ", "_"))
        result = step(world, mover, index) if mover.at == "begin" else step(world, mover)
        yield from result if isinstance(result, list) else [result]

    def _idle(self, world: World, mover: Mover) -> Outcome:
        return world, mover._replace(at="begin", memory=(world.src.token, world.dst.token))

    def _begin(self, world: World, mover: Mover, index: int) -> Outcome:
        control = world.control
        token = protocol.next_token(f"mover {index}", control.token, *mover.memory)
        if control.phase is Phase.DONE:
            return world, mover._replace(at=GONE)
        if control.phase in CLOSED:
            move = control.move + 1
            control, then = Control(Phase.PLAN, token, move), "prepare"
        else:
            move, control, then = control.move, control._replace(token=token), "take src"
        return written(world, control), Mover(then, token, move)

    # A new move ------------------------------------------------------------------------

    def _prepare(self, world: World, mover: Mover) -> Outcome:
        world, mover = changed(world, mover, "dst", protocol.PREPARE, "capture")
        if mover.at == "capture":
            wiped = world.dst._replace(rows=(NOWHERE, NOWHERE))
            world = world._replace(dst=wiped, cursor=0)
        return world, mover

    def _capture(self, world: World, mover: Mover) -> Outcome:
        world, mover = changed(world, mover, "src", protocol.CAPTURE, "capture2")
        if mover.at == "capture2":
            world = world._replace(dirty=(CLEAN, CLEAN))
        return world, mover

    def _capture2(self, world: World, mover: Mover) -> Outcome:
        return decided(world, mover, protocol.CAPTURED, "copy.read")

    def _copy_read(self, world: World, mover: Mover) -> Outcome:
        if world.cursor == len(KEYS):
            return world, mover._replace(at="copied")
        page = (world.cursor, world.src.rows[world.cursor])
        return world, mover._replace(at="copy.apply", memory=page)

    def _copy_apply(self, world: World, mover: Mover) -> Outcome:
        dst = world.dst
        if not is_mine(dst, mover, State.IMPORTING) and not self.bugs.has_no_token_check_at_dst:
            return world, mover._replace(at=GONE)
        key, version = mover.memory
        world = world._replace(dst=dst._replace(rows=put(dst.rows, key, version)), cursor=key + 1)
        return world, mover._replace(at="copy.read", memory=())

    def _copied(self, world: World, mover: Mover) -> Outcome:
        return decided(world, mover, protocol.COPIED, "catch.read")

    # Catching up, and under the fence --------------------------------------------------

    def _catch_read(self, world: World, mover: Mover) -> list[Outcome]:
        # It may fence with a backlog, and go round as long as there is one.
        fenced = (world, mover._replace(at="fence"))
        if not is_mine(world.src, mover, State.MOVING, State.FENCED):
            return [(world, mover._replace(at=GONE))]
        if world.dirty == (CLEAN, CLEAN):
            return [fenced]
        batch = (world.dirty, world.src.rows)
        return [fenced, (world, mover._replace(at="catch.apply", memory=batch))]

    def _catch_apply(self, world: World, mover: Mover) -> Outcome:
        return self._apply(world, mover, "catch.ack")

    def _catch_ack(self, world: World, mover: Mover) -> Outcome:
        return self._acknowledge(world, mover, "catch.read")

    def _apply(self, world: World, mover: Mover, then: str) -> Outcome:
        dst, (dirty, rows) = world.dst, mover.memory
        if not is_mine(dst, mover, State.IMPORTING):
            return world, mover._replace(at=GONE)
        for key in KEYS:
            if dirty[key] != CLEAN:
                dst = dst._replace(rows=put(dst.rows, key, rows[key]))
        return world._replace(dst=dst), mover._replace(at=then)

    def _acknowledge(self, world: World, mover: Mover, then: str) -> Outcome:
        if not is_mine(world.src, mover, State.MOVING, State.FENCED):
            return world, mover._replace(at=GONE)
        read, now = mover.memory[0], world.dirty
        left = tuple(CLEAN if now[key] == read[key] else now[key] for key in KEYS)
        return world._replace(dirty=left), mover._replace(at=then, memory=())

    def _fence(self, world: World, mover: Mover) -> Outcome:
        return changed(world, mover, "src", protocol.FENCE, "fence2")

    def _fence2(self, world: World, mover: Mover) -> Outcome:
        decision = protocol.FENCED
        if self.bugs.has_no_copied_phase:
            decision = replace(decision, before=decision.before | {Phase.CAPTURE})
        return decided(world, mover, decision, "drain.read")

    def _drain_read(self, world: World, mover: Mover) -> Outcome:
        if not is_mine(world.src, mover, State.FENCED):
            return world, mover._replace(at=GONE)
        if world.dirty == (CLEAN, CLEAN) or self.bugs.has_no_drain:
            return world, mover._replace(at="commit")
        return world, mover._replace(at="drain.apply", memory=(world.dirty, world.src.rows))

    def _drain_apply(self, world: World, mover: Mover) -> Outcome:
        return self._apply(world, mover, "drain.ack")

    def _drain_ack(self, world: World, mover: Mover) -> Outcome:
        return self._acknowledge(world, mover, "drain.read")

    # No verification here: the protocol must be right without it.

    def _commit(self, world: World, mover: Mover) -> Outcome:
        return decided(world, mover, protocol.COMMIT, "src_moved")

    def _src_moved(self, world: World, mover: Mover) -> Outcome:
        if world.src.state not in protocol.LEAVE.before and world.dst.state is State.ACTIVE:
            return world, mover._replace(at="dst_active")
        if is_mine(world.src, mover, State.MOVED):
            return world, mover._replace(at="dst_active")
        return changed(world, mover, "src", protocol.LEAVE, "dst_active")

    def _dst_active(self, world: World, mover: Mover) -> Outcome:
        if is_mine(world.dst, mover, State.ACTIVE):
            return world, mover._replace(at="done")
        return changed(world, mover, "dst", protocol.ARRIVE, "done")

    def _done(self, world: World, mover: Mover) -> Outcome:
        return decided(world, mover, protocol.DONE, GONE)

    # Giving up -------------------------------------------------------------------------

    def _abort(self, world: World, mover: Mover) -> Outcome:
        return decided(world, mover, protocol.ABORT, "abort.dst")

    def _abort_dst(self, world: World, mover: Mover) -> Outcome:
        return self._undo(world, mover, "dst", protocol.DROP, "abort.src")

    def _abort_src(self, world: World, mover: Mover) -> Outcome:
        return self._undo(world, mover, "src", protocol.RETURN, "aborted")

    def _undo(self, world: World, mover: Mover, where: str, change: Change, then: str) -> Outcome:
        side: Side = getattr(world, where)
        if side.state in change.before:
            return changed(world, mover, where, change, then)
        return world, mover._replace(at=then if side.token == mover.token else GONE)

    def _aborted(self, world: World, mover: Mover) -> Outcome:
        return decided(world, mover, protocol.ABORTED, GONE)

    def _hand_back(self, world: World, mover: Mover) -> Outcome:
        return changed(world, mover, "src", protocol.HAND_BACK, "handed_back")

    def _handed_back(self, world: World, mover: Mover) -> Outcome:
        return decided(world, mover, protocol.HANDED_BACK, GONE)

    # Taking over what another left ------------------------------------------------------

    def _take_src(self, world: World, mover: Mover) -> Outcome:
        return self._take(world, mover, "src", "take dst")

    def _take_dst(self, world: World, mover: Mover) -> Outcome:
        return self._take(world, mover, "dst", "look src")

    def _take(self, world: World, mover: Mover, where: str, then: str) -> Outcome:
        side: Side = getattr(world, where)
        if not mover.token.may_replace(side.token):
            return world, mover._replace(at=GONE)
        return world._replace(**{where: side._replace(token=mover.token)}), mover._replace(at=then)

    def _look_src(self, world: World, mover: Mover) -> Outcome:
        state = seen(world.src, mover.move, self.bugs)
        return world, mover._replace(at="look dst", memory=(state,))

    def _look_dst(self, world: World, mover: Mover) -> Outcome:
        state = seen(world.dst, mover.move, self.bugs)
        return world, mover._replace(at="resolve", memory=(*mover.memory, state))

    def _resolve(self, world: World, mover: Mover) -> list[Outcome]:
        control = world.control
        if control.token != mover.token:
            return [(world, mover._replace(at=GONE))]
        actions = {
            protocol.resolve(control.phase, *mover.memory, preference)
            for preference in self.preferences
        }
        return [
            (world, mover._replace(at=self._first(action, control.phase), memory=()))
            for action in sorted(actions)
        ]

    def _first(self, action: protocol.Action, phase: Phase) -> str:
        copying = "catch.read" if self.bugs.has_no_copied_phase else "copy.read"
        aborting = "abort.dst" if phase is Phase.ABORTING else "abort"
        return {
            "forward": "src_moved",
            "hand back": "hand back",
            "abort": aborting,
            "prepare": "prepare",
            "copy": copying,
            "catch up": "catch.read",
            "drain": "drain.read",
        }[action]


# Everybody else -----------------------------------------------------------------------------


def writes(world: World) -> Iterator[World]:
    """A writer is admitted and answered, wherever a shard takes it; one write per key."""
    for where in ("src", "dst"):
        side: Side = getattr(world, where)
        for key in KEYS:
            if side.state not in protocol.CAPTURE.before or world.acknowledged[key]:
                continue
            version = side.rows[key] + 1
            after = world._replace(
                **{where: side._replace(rows=put(side.rows, key, version))},
                acknowledged=put(world.acknowledged, key, world.acknowledged[key] + 1),
            )
            if side.state is State.MOVING:
                after = after._replace(dirty=put(world.dirty, key, version))
            yield after


def forgetting(world: World) -> Iterator[World]:
    """Control fails over and has lost its last commit, once."""
    if world.may_forget and world.before_last is not None:
        yield world._replace(control=world.before_last, before_last=None, may_forget=False)


# The search ---------------------------------------------------------------------------------


class Broken(AssertionError):
    """An invariant does not hold; the message is the way there."""


def violation(world: World) -> str:
    """Which invariant this world breaks, or nothing."""
    sides = (world.src, world.dst)
    if sum(side.state in protocol.CAPTURE.before for side in sides) > 1:
        return "B1: two shards admit writers"
    for side in sides:
        admits = side.state in protocol.CAPTURE.before
        if admits and any(side.rows[key] < world.acknowledged[key] for key in KEYS):
            return "B2: a shard admits writers without every acknowledged write"
    if world.dst.state is State.ACTIVE and world.src.state is not State.MOVED:
        return "B3: the source serves reads beside a destination that takes writes"
    return ""


def search(first: World, bugs: Bugs = SOUND) -> dict[World, World | None]:
    """Every reachable world, with one that leads to it; breadth first.

    Raises:
        Broken: an invariant does not hold somewhere.
    """
    steps = Steps(bugs, ("abort", "go on"))
    found: dict[World, World | None] = {first: None}
    waiting = deque([first])
    while waiting:
        world = waiting.popleft()
        following = [
            after for index in range(len(world.movers)) for after in steps.of(world, index)
        ]
        for after in (*following, *writes(world), *forgetting(world)):
            if after in found:
                continue
            found[after] = world
            if why := violation(after):
                raise Broken(f"{why}\n{way_to(after, found)}")
            waiting.append(after)
    return found


def way_to(world: World, found: dict[World, World | None]) -> str:
    way: list[str] = []
    at: World | None = world
    while at is not None:
        movers = " ".join(mover.at.replace(" ", "_") for mover in at.movers)
        way.append(
            f"{at.control.phase:<10}{at.control.token.counter} src {at.src.state:<7} {at.src.rows} "
            f"dst {at.dst.state:<9} {at.dst.rows} dirty {at.dirty} acknowledged "
            f"{at.acknowledged} movers {movers}"
        )
        at = found[at]
    return "\n".join(reversed(way))


LONE_STEPS_MAX = 100


def settle(world: World, preference: Preference, bugs: Bugs = SOUND) -> World:
    """What one more mover, alone, makes of a world.

    Raises:
        Broken: it does not come to an end, or on the way breaks what must hold.
    """
    alone = world._replace(movers=(*(Mover(GONE) for _ in world.movers), Mover("idle")))
    steps, index = Steps(bugs, (preference,)), len(world.movers)
    for _ in range(LONE_STEPS_MAX):
        following = list(steps.of(alone, index))
        if not following:
            return alone
        alone = following[-1]  # catching up while there is a backlog
        if why := violation(alone):
            raise Broken(why)
    raise Broken(f"a lone mover that would {preference} does not come to an end")
