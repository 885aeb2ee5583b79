"""A backup may fall between any two steps of a move: its bucket is whole on the restored shards."""

from pathlib import Path

import pytest

from shared.bus.resume import resume
from shared.db.move.place import move_bucket, settle_move
from shared.db.port import OutboxRow
from shared.db.sqlite_cut import open_cut
from tests.integration.shared.db.move.grounds import BUCKET, Place, add_counter, tools


def event(number: int) -> OutboxRow:
    return OutboxRow("t.Made", "counters/1", f"{number}".encode(), "default")


def copied(place: Place, to: Path) -> Place:
    to.mkdir()
    with open_cut(sorted(place.path.glob("*.sqlite")), inside=lambda: None) as cut:
        for file in cut.files:
            file.copy_to(to / file.path.name, lambda _: None)
    return Place(to)


@pytest.fixture
async def copies(place: Place, tmp_path: Path) -> dict[str, Place]:
    """One for each step of a move of a bucket with counters and sent events, by step."""
    made: dict[str, Place] = {}
    async with place.open() as shards:
        async with shards.bucket(BUCKET).transaction() as tx:
            for number in range(5):
                await add_counter(tx, number)
                await tx.append_outbox(event(number))
        place.rows(0, "UPDATE outbox SET sent = 1, ack_stream = 'EVT_counters@then', ack_seq = seq")

        def visit(step: str) -> None:
            if step not in made:
                made[step] = copied(place, tmp_path / step)

        await move_bucket(place.folder, BUCKET, 1, tools(visit=visit))
    return made


async def test_a_bucket_copied_at_any_step_of_its_move_is_whole_and_sends_its_events_again(
    copies: dict[str, Place],
):
    assert {"fence", "commit", "src_moved", "dst_active"} <= set(copies)
    for step, place in copies.items():
        resume(sorted(place.path.glob("shard-*.sqlite")), [], stood_us=0)
        # As the first caller does when the mover's time is over.
        for left in await place.folder.control.list_moves(is_open=True):
            await settle_move(place.folder, left, tools(), preference="abort", is_forced=True)
        async with place.open() as shards:
            async with shards.bucket(BUCKET).transaction() as tx:
                await add_counter(tx, 5)
                await tx.append_outbox(event(5))
            [owner] = [index for index, state in enumerate(place.states()) if state == "ACTIVE"]
            held = place.contents(owner)
            assert len(held["counter"]) == 6, step
            rows = place.rows(
                owner, "SELECT event_no, sent FROM outbox WHERE bucket = ? ORDER BY seq", BUCKET
            )
            assert rows == [(number, 0) for number in range(1, 7)], step
