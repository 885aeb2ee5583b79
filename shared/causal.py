"""What a caller has seen, so that no replica answers it with less.

A write leaves a position: how far its shard's log was after the commit. The positions of a call
go back to its caller as metadata, `causal-token`, and on to every service that the call asks; a
caller that sends them along reads its own writes wherever it asks. Only calls whose contract says
`causal_reads` may be answered by a replica at all.

    causal-token: 1.media.3.1.16b3748.19abc012345

An entry is a version, a service, a shard, and in hexadecimal the timeline, the position and unix
milliseconds. Entries are joined by commas, and so are tokens. A token gives no right: all that a
forged one can do is to send its reader's calls to the primary for a minute.
"""

import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from shared.errors import InvalidRequest

KEY = "causal-token"
CHARACTERS_MAX = 1024
ENTRIES_MAX = 8
LIFE_S = 60.0
"""Far above any lag guard: what is older is on every replica that may answer."""

# How far the clocks of two processes may be apart. Only what was written on another shard is
# judged by time; see Needed.
CLOCKS_APART_S = 0.25
NEVER_REPLAYED = 2**63 - 1
"""Of a commit whose position could not be asked: only the primary has it for sure."""

# A service where more than ENTRIES_MAX shards were written: all of them, by time alone.
_ANY = "*.0"
_ENTRY = re.compile(
    r"1\.((?:[a-z][a-z0-9_-]{0,31}|\*)\.[0-9]{1,2})"
    r"\.([0-9a-f]{1,8})\.([0-9a-f]{1,16})\.([0-9a-f]{1,12})"
)
_OF_ANOTHER_RELEASE = re.compile(r"[2-9]\.[!-+.-~]{1,128}")


class Position(NamedTuple):
    """A moment in a shard's log; the larger has more.

    Attributes:
        timeline: of the primary that wrote it.
        lsn: bytes of log.
        at_s: unix seconds after the commit, by the writer's clock.
    """

    timeline: int
    lsn: int
    at_s: float


class Needed(NamedTuple):
    """What a replica of one shard must have to answer a call.

    Attributes:
        timeline: of the position; 0 for any.
        lsn: must have been replayed.
        as_of_s: what the primary had at this unix time must have been replayed as well. A bucket
            may have moved here, or away, since the caller wrote to another shard: a replica that
            is as new as that write knows of the move.
    """

    timeline: int
    lsn: int
    as_of_s: float


@dataclass
class Seen:
    """What the caller of one call has seen, and what the call has written.

    Attributes:
        may_lag: whether replicas may answer: the contract says so.
        is_changed: whether the call has added to it.
        pinned: by place, the replica that has answered in this call; the next read does not go
            to one that has less. None for the primary.
    """

    may_lag: bool = False
    is_changed: bool = False

    def __post_init__(self) -> None:
        """Nothing has been seen."""
        self._positions: dict[str, Position] = {}
        self.pinned: dict[str, object] = {}

    @classmethod
    def of_token(cls, token: str, *, may_lag: bool = False) -> "Seen":
        """What a caller says it has seen.

        Raises:
            InvalidRequest: it is no token.
        """
        seen = cls(may_lag)
        if token:
            seen._learn(token)
        return seen

    @property
    def positions(self) -> Mapping[str, Position]:
        """By place: "media.3"."""
        return self._positions

    def note(self, place: str, position: Position) -> None:
        """The call has written there."""
        self._merge(place, position)
        self.is_changed = True

    def learn(self, token: str) -> None:
        """A call that this one made has written: its answer's token."""
        self._learn(token)
        self.is_changed = True

    def token(self) -> str:
        """All of it, at most ENTRIES_MAX entries; "" for nothing."""
        return ",".join(
            f"1.{place}.{position.timeline:x}.{position.lsn:x}.{int(position.at_s * 1000):x}"
            for place, position in self._positions.items()
        )

    def needed(self, place: str) -> Needed:
        """What a replica of this place must have."""
        own = self._positions.get(place)
        services = (place.partition(".")[0], _ANY[0])
        others = [
            position.at_s + CLOCKS_APART_S
            for other, position in self._positions.items()
            if other != place and other.partition(".")[0] in services
        ]
        as_of_s = max(others, default=0.0)
        return Needed(0, 0, as_of_s) if own is None else Needed(own.timeline, own.lsn, as_of_s)

    def _learn(self, token: str) -> None:
        if len(token) > CHARACTERS_MAX:
            raise _invalid(f"is longer than {CHARACTERS_MAX} characters")
        now_s = time.time()
        for entry in token.split(","):
            found = _ENTRY.fullmatch(entry.strip())
            if found is not None:
                place, timeline, lsn, at_ms = found.groups()
                at_s = min(int(at_ms, 16) / 1000, now_s + CLOCKS_APART_S)
                if at_s > now_s - LIFE_S:
                    self._merge(place, Position(int(timeline, 16), int(lsn, 16), at_s))
            elif not _OF_ANOTHER_RELEASE.fullmatch(entry.strip()):
                raise _invalid("is not one that was given with an answer; leave it away")

    def _merge(self, place: str, position: Position) -> None:
        known = self._positions.get(place, position)
        self._positions[place] = max(known, position)
        if len(self._positions) > ENTRIES_MAX:
            self._fold()

    def _fold(self) -> None:
        """Let the two oldest be known by their time alone."""
        by_age = sorted(self._positions, key=lambda place: (place != _ANY, self._at_s(place)))
        folded = [self._positions.pop(place) for place in by_age[:2]]
        self._positions[_ANY] = Position(0, 0, max(position.at_s for position in folded))

    def _at_s(self, place: str) -> float:
        return self._positions[place].at_s


_seen: ContextVar[Seen | None] = ContextVar("seen", default=None)


def current() -> Seen | None:
    """What the caller of this call has seen; None outside of calls."""
    return _seen.get()


def begin(seen: Seen | None) -> None:
    """Let this task, and the tasks it makes, answer for a caller that has seen this."""
    _seen.set(seen)


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest.of_field(KEY, why)
