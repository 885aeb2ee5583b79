"""Kill -9 at each named point: what was answered is there, what is there is there once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.db.ids import new_id
from tests.integration.shared.db.conftest import FAR, NEAR, labels

ROOT = Path(__file__).parents[4]
PROGRAM = "tests.integration.shared.db.writer_process"
SIGKILLED = -9


def write(place: str, subject: str, bucket: int, *, crash_point: str = "") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM, place, subject, str(bucket)],
        cwd=ROOT,
        env={**os.environ, "TENFOLD_CRASH_POINT": crash_point},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode in {0, SIGKILLED}, done.stderr
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize("bucket", [NEAR, FAR], ids=["one shard", "across shards"])
@pytest.mark.parametrize(
    ("crash_point", "repeat"),
    [
        ("db.before_commit:1", "first"),
        ("db.after_commit:1", "repeated"),
        ("db.before_commit:2", "first"),
        ("db.after_commit:2", "repeated"),
        ("db.claimed_not_effected:1", "first"),
    ],
)
async def test_a_retry_after_a_kill_has_the_effect_exactly_once(
    engine, bucket, crash_point, repeat
):
    point, _, visit = crash_point.partition(":")
    is_across = bucket == FAR
    if not is_across and (visit == "2" or point == "db.claimed_not_effected"):
        return  # one shard takes one commit, and claims nothing ahead
    if is_across and (point, visit) == ("db.after_commit", "1"):
        repeat = "first"  # that commit was the claim's
    subject = str(new_id(NEAR))
    code, printed = write(engine.name, subject, bucket, crash_point=crash_point)
    assert (code, printed) == (SIGKILLED, "")
    assert write(engine.name, subject, bucket) == (0, repeat)
    assert write(engine.name, subject, bucket) == (0, "repeated")
    async with engine.open() as shards:
        assert await labels(shards) == ["a"]
        rows = await shards.bucket(bucket).fetch_all("SELECT event_no FROM outbox")
        assert [row["event_no"] for row in rows] == [1]
