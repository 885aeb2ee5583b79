"""tenfold shards, as an operator types it."""

import asyncio
import json
import sys
from contextlib import suppress
from dataclasses import replace

import pytest

from deploy.cli import main
from shared.db.move.place import move_bucket
from tests.integration.shared.db.move.grounds import BUCKET, Place, add_counters, tools


@pytest.fixture
def place(tmp_path) -> Place:
    place = Place(tmp_path / "services" / "media" / "shards")

    async def fill() -> None:
        async with place.open() as shards:
            await add_counters(shards, 20)

    asyncio.run(fill())
    return place


@pytest.fixture
def tenfold(tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        data = [] if "--help" in arguments else ["--data", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["tenfold", "shards", *arguments, *data])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code or 0, printed.out, printed.err

    return run


def leave(place: Place, step: str) -> None:
    """A move that has come to a step, and whose mover has gone."""

    class Killed(BaseException):
        pass

    def visit(name: str) -> None:
        if name == step:
            raise Killed

    with suppress(Killed):
        asyncio.run(move_bucket(place.folder, BUCKET, 1, replace(tools(), visit=visit)))


def test_a_bucket_moves_and_every_command_knows_it(place, tenfold):
    assert tenfold("verify", "media")[:2] == (
        0,
        "Every bucket has one owner, and the map knows it.\n",
    )
    code, out, _ = tenfold("move", "media", "--buckets", "5,7-8", "--to", "1", "--json")
    moved = [json.loads(line) for line in out.splitlines()]
    assert (code, [(row["bucket"], row["to"], row["rows"]) for row in moved]) == (
        0,
        [(5, 1, 20), (7, 1, 0), (8, 1, 0)],
    )
    listed = json.loads(tenfold("list", "media", "--json")[1])
    assert [row["buckets"] for row in listed] == [2045, 2051]
    assert json.loads(tenfold("map", "media", "--json")[1])[:4] == [
        {"first": 0, "last": 4, "shard": 0},
        {"first": 5, "last": 5, "shard": 1},
        {"first": 6, "last": 6, "shard": 0},
        {"first": 7, "last": 8, "shard": 1},
    ]
    assert tenfold("map", "media", "--bucket", "5")[1].split() == ["5", "shard", "1"]
    assert json.loads(tenfold("verify", "media", "--json")[1])["ok"]


def test_a_move_that_was_left_is_shown_and_ended(place, tenfold):
    leave(place, "fence2")
    code, out, _ = tenfold("status", "media")
    assert (code, out.partition(";")[0]) == (0, "bucket 5: shard 0 -> 1, FENCED\n")
    [row] = json.loads(tenfold("status", "media", "--json")[1])
    assert (row["bucket"], row["phase"]) == (5, "FENCED")
    assert tenfold("abort", "media")[1] == "bucket 5: aborted\n"
    assert tenfold("status", "media")[1] == "No bucket is on its way.\n"
    assert place.states() == ["ACTIVE", "ABORTED"]


def test_a_bucket_between_its_shards_is_told_of_and_goes_forward(place, tenfold):
    leave(place, "src_moved")
    code, out, _ = tenfold("verify", "media")
    assert (code, out) == (1, "bucket 5 is owned by no shard: settle its move\n")
    assert tenfold("abort", "media")[1] == "bucket 5: done\n"
    assert tenfold("verify", "media")[0] == 0


def test_a_second_owner_and_a_row_astray_are_found(place, tenfold):
    place.rows(1, "INSERT INTO tenfold_bucket (bucket, state, epoch) VALUES (5, 'ACTIVE', 1)")
    assert "owned by shards [0, 1]" in tenfold("verify", "media")[1]
    place.rows(1, "DELETE FROM tenfold_bucket WHERE bucket = 5")
    place.rows(0, "UPDATE tenfold_bucket SET state = 'ABORTED' WHERE bucket = 5")
    assert "shard 0 holds 20 rows of counter" in tenfold("verify", "media")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["list", "nobody"], "There is no service 'nobody'"),
        (["list", "auth"], "holds no shards of auth: has it ever been started?"),
        (["move", "media", "--buckets", "4096", "--to", "1"], "it must be 0 to 4095"),
        (["move", "media", "--buckets", "x", "--to", "1"], "'x' is no bucket"),
        (["move", "media", "--buckets", "9-3", "--to", "1"], "names none"),
        (["move", "media", "--buckets", "5", "--to", "9"], "has no shard 9"),
        (["move", "media", "--buckets", "5", "--to", "0"], "bucket 5 is on shard 0 already"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_in_a_sentence(place, tenfold, arguments, sentence):
    code, _, err = tenfold(*arguments)
    assert code == 1
    assert sentence.lower() in err.lower()
    assert place.states() == ["ACTIVE", "ABSENT"]


def test_the_shards_of_payment_stay_together(place, tenfold):
    """Its entries refer to transactions of other buckets."""
    place.rows(
        0,
        "CREATE TABLE entry (bucket smallint, id uuid, of_bucket smallint, of_id uuid, "
        "PRIMARY KEY (bucket, id), FOREIGN KEY (of_bucket, of_id) REFERENCES counter (bucket, id))",
    )
    code, _, err = tenfold("move", "media", "--buckets", "5", "--to", "1")
    assert code == 1
    assert "they must stay on one shard" in err


def test_its_help_teaches(tenfold):
    code, out, _ = tenfold("--help")
    assert code == 0
    assert "tenfold shards move media --buckets 0-3,17 --to 1" in out
