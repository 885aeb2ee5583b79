"""The rules of a move: who may change what from where, and what ends a move that was left.

A move is a row of steps, each one local transaction with a guard; a guard that fails says "I am
not this move's mover any more", and whoever is told so stops. The decision is one commit in
Control; before it the source owns the bucket, after it the destination will.

    PLAN -> CAPTURE -> COPIED -> FENCED -> COMMITTED -> DONE
      any of the first four -> ABORTING -> ABORTED

Pure: the mover runs this table on databases, and a model in the tests runs it over every order
of events that two movers, their deaths, writers and a forgetful Control can bring about.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal


class State(StrEnum):
    """What a shard says of a bucket; see tenfold_bucket."""

    ABSENT = "ABSENT"
    ACTIVE = "ACTIVE"
    MOVING = "MOVING"
    FENCED = "FENCED"
    MOVED = "MOVED"
    IMPORTING = "IMPORTING"
    ABORTED = "ABORTED"


class Phase(StrEnum):
    """What Control says of a move; see bucket_move."""

    PLAN = "PLAN"
    CAPTURE = "CAPTURE"
    COPIED = "COPIED"
    FENCED = "FENCED"
    COMMITTED = "COMMITTED"
    DONE = "DONE"
    ABORTING = "ABORTING"
    ABORTED = "ABORTED"


OWNING: Final = frozenset({State.ACTIVE, State.MOVING, State.FENCED})
UNDECIDED: Final = frozenset({Phase.PLAN, Phase.CAPTURE, Phase.COPIED, Phase.FENCED})
CLOSED: Final = frozenset({Phase.DONE, Phase.ABORTED})
_NO_COUNT: Final = 0


@dataclass(frozen=True, order=False)
class Token:
    """Who may go on with a move.

    Attributes:
        counter: grows with every mover of a bucket, over all its moves; 0 for nobody.
        mover: that process alone. Control may forget a counter that it gave; then two movers
            have the same one, and neither takes the other's for its own.
    """

    counter: int
    mover: str

    def may_replace(self, held: "Token") -> bool:
        """Whether what a shard holds is older, or this one itself."""
        return held.counter < self.counter or held == self


NOBODY: Final = Token(_NO_COUNT, "")


@dataclass(frozen=True)
class Change:
    """One step on a shard.

    Attributes:
        name: as failpoints and messages call it.
        before: the states that it may start from.
        after: the state that it leaves.
        takes_over: whether an older token is replaced; else it must be the mover's own.
        epoch_by: what it adds to the bucket's epoch.
    """

    name: str
    before: frozenset[State]
    after: State
    takes_over: bool = False
    epoch_by: int = 0

    def is_allowed(self, state: State, held: Token, token: Token) -> bool:
        """The guard."""
        is_mine = token.may_replace(held) if self.takes_over else held == token
        return is_mine and state in self.before


def _from(*states: State) -> frozenset[State]:
    return frozenset(states)


# At the destination. Nothing of an older move is of use: what it left is wiped first.
PREPARE: Final = Change(
    "prepare",
    _from(State.ABSENT, State.IMPORTING, State.ABORTED, State.MOVED),
    State.IMPORTING,
    takes_over=True,
)
# At the source. Alone with the bucket for a moment, so every writer after it is captured.
CAPTURE: Final = Change("capture", _from(State.ACTIVE, State.MOVING), State.MOVING, takes_over=True)
FENCE: Final = Change("fence", _from(State.MOVING, State.FENCED), State.FENCED)
# The source first: between the two nobody writes, and no old rows are read beside new ones.
LEAVE: Final = Change("src_moved", _from(State.FENCED), State.MOVED, epoch_by=1)
ARRIVE: Final = Change("dst_active", _from(State.IMPORTING), State.ACTIVE)
DROP: Final = Change("abort.dst", _from(State.IMPORTING, State.ABSENT), State.ABORTED)
RETURN: Final = Change("abort.src", _from(State.MOVING, State.FENCED), State.ACTIVE, epoch_by=2)
# The source again, after a failover that lost its fence: nobody has been admitted since.
LEAVE_AGAIN: Final = Change(
    "src_moved", _from(State.ACTIVE, State.MOVING, State.FENCED), State.MOVED, epoch_by=1
)
# The destination never wrote: the source is still whole.
HAND_BACK: Final = Change("hand_back", _from(State.MOVED), State.ACTIVE, epoch_by=2)


@dataclass(frozen=True)
class Decision:
    """One step in Control; the token must be the mover's own."""

    name: str
    before: frozenset[Phase]
    after: Phase


CAPTURED: Final = Decision("capture2", frozenset({Phase.PLAN}), Phase.CAPTURE)
COPIED: Final = Decision("copied", frozenset({Phase.CAPTURE}), Phase.COPIED)
FENCED: Final = Decision("fence2", frozenset({Phase.COPIED}), Phase.FENCED)
COMMIT: Final = Decision("commit", frozenset({Phase.FENCED}), Phase.COMMITTED)
# Shards are witnesses too: one that has left or arrived outweighs a Control that forgot.
DONE: Final = Decision("done", frozenset(Phase) - CLOSED, Phase.DONE)
ABORT: Final = Decision("abort", UNDECIDED, Phase.ABORTING)
ABORTED: Final = Decision("aborted", frozenset({Phase.ABORTING}), Phase.ABORTED)

HANDED_BACK: Final = Decision("handed_back", frozenset(Phase) - CLOSED, Phase.ABORTED)

Preference = Literal["abort", "go on"]
Action = Literal["forward", "hand back", "abort", "prepare", "copy", "catch up", "drain"]

_RESUMED: Final[dict[Phase, Action]] = {
    Phase.CAPTURE: "copy",
    Phase.COPIED: "catch up",
    Phase.FENCED: "drain",
}


def seen(state: State, *, is_of_this_move: bool) -> State:
    """A shard's state as this move may read it.

    A bucket may have left the source, or come to the destination, by an earlier move: that
    proves nothing of this one, and is none of its business.
    """
    if is_of_this_move or state in {State.MOVING, State.FENCED}:
        return state
    return State.ABORTED if state is State.IMPORTING else State.ABSENT


def whole(state: State, *, has_failed_over: bool) -> State:
    """A destination's state, if its primary may have died during the move.

    Rows that it had acknowledged may be lost. Where it took writes it has kept all that came
    before them; where it did not, the source is still as complete as anybody.
    """
    return state if state is State.ACTIVE or not has_failed_over else State.ABORTED


def resolve(phase: Phase, src: State, dst: State, preference: Preference) -> Action:
    """What ends a move that somebody left; its token has been raised everywhere before.

    Args:
        phase: of Control, perhaps without its last commit.
        src: what the source says now, as `seen`.
        dst: what the destination says now, as `seen` and `whole`.
        preference: where both are possible. After a crash behind the fence, abort: writers wait.
    """
    if dst is State.ACTIVE or (src is State.MOVED and dst is State.IMPORTING):
        return "forward"
    if src is State.MOVED or (phase is Phase.COMMITTED and dst is State.ABORTED):
        return "hand back"
    if phase is Phase.COMMITTED:
        return "forward"
    if phase is Phase.ABORTING or preference == "abort":
        return "abort"
    return _resumed(phase, src, dst)


def _resumed(phase: Phase, src: State, dst: State) -> Action:
    if phase is Phase.PLAN:
        return "prepare"
    # Without its capture, or half dropped, nothing of the copy can be trusted.
    may_be_fenced = {State.FENCED} if phase is Phase.FENCED else {State.MOVING, State.FENCED}
    is_whole = src in may_be_fenced and dst is State.IMPORTING
    return _RESUMED[phase] if is_whole else "abort"


def next_token(mover: str, *held: Token) -> Token:
    """A token above all that Control, source and destination hold."""
    return Token(max((token.counter for token in held), default=_NO_COUNT) + 1, mover)
