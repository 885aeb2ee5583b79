"""What a shard must say of its buckets after its primary died and a replica took over.

A replica that did not have all of the log takes over a shard as it was a moment ago. It may
claim a bucket that it has given away, or not know of one that it was given. Control and the
other shards know better: every hand-over raises the bucket's epoch, so the newest epoch that
anybody tells of names the owner.

A log is lost from its end, never from its middle. So a shard that does not know that it was
given a bucket has also lost all that was written there since; and the shard that gave it away
is as complete as anybody, for as long as it keeps the rows.

Pure: shared/db/postgres_gate.py asks the databases, and writes what is decided here. Moves that
have not ended are settled before.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from shared.db.move.protocol import OWNING, State


@dataclass(frozen=True)
class Said:
    """What one shard says of one bucket."""

    state: State
    epoch: int = 0


@dataclass(frozen=True, order=True)
class Owner:
    """Who has a bucket, since which epoch; the newer is the larger."""

    epoch: int
    shard: int


@dataclass(frozen=True)
class Correction:
    """What a shard must say of a bucket from now on; `peer`: where its writers are sent."""

    shard: int
    bucket: int
    state: State
    epoch: int
    peer: int | None = None


@dataclass(frozen=True)
class Verdict:
    """Whose a bucket is.

    Attributes:
        owner: for Control's map.
        corrections: none is in anybody's way, in whatever order they are made.
        problem: a sentence for the operator: nobody can own it without losing rows; or "".
    """

    owner: Owner
    corrections: tuple[Correction, ...] = ()
    problem: str = ""


NOTHING = Said(State.ABSENT)


def verdict(
    bucket: int,
    promoted: int,
    said: Mapping[int, Said],
    control: Owner,
    *,
    giver: int | None,
) -> Verdict:
    """Decide whose a bucket is that is on no move.

    Args:
        bucket: which.
        promoted: the shard whose primary is new; no other's claim is taken from it.
        said: what the shards say, by index; who is not asked says nothing.
        control: what Control's map says.
        giver: the shard that gave it to `promoted` by the last move and still keeps its rows.
    """
    claims = [Owner(one.epoch, index) for index, one in said.items() if one.state in OWNING]
    owner = max([*claims, control])
    own = said.get(promoted, NOTHING)
    if owner.shard != promoted:
        if own.state not in OWNING:
            return Verdict(owner)
        gone = Correction(promoted, bucket, State.MOVED, own.epoch + 1, owner.shard)
        return Verdict(owner, (gone,))
    if own.state is State.ACTIVE:
        return Verdict(owner)
    if own.state in OWNING or own.state is State.MOVED:
        # Its move was aborted, and the last step of that is lost.
        return _given(Owner(max(owner.epoch, own.epoch) + 2, promoted), bucket)
    return _arrival_lost(bucket, owner, own, said, giver)


def _given(owner: Owner, bucket: int, *also: Correction) -> Verdict:
    taken = Correction(owner.shard, bucket, State.ACTIVE, owner.epoch)
    return Verdict(owner, (taken, *also))


def _arrival_lost(
    bucket: int, owner: Owner, own: Said, said: Mapping[int, Said], giver: int | None
) -> Verdict:
    """It was given to the promoted shard, which lost that, and with it all that came after."""
    if giver is None or said.get(giver, NOTHING).state is not State.MOVED:
        return Verdict(
            owner,
            problem=f"bucket {bucket} is shard {owner.shard}'s, which has lost it: restore it "
            "from a backup, or from the server that died",
        )
    dropped = Correction(owner.shard, bucket, State.ABORTED, own.epoch)
    return _given(Owner(owner.epoch + 1, giver), bucket, dropped)
