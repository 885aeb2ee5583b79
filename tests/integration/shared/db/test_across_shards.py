"""What is built on single-bucket transactions: unique values, todos, leases, scatter reads."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from shared.db import leases, todo, uniq
from shared.db.errors import MigrationRefused
from shared.db.ids import bucket_of, new_id
from shared.db.scatter import scatter
from shared.errors import Aborted, Unavailable
from tests.integration.shared.db.conftest import FAR, MIGRATIONS, NEAR, add_thing, labels

NOW = 1_700_000_000_000_000
LATER = NOW + uniq.RESERVED_US
EMAIL = uniq.UniqueValue("default", "email", "ada@example.org")
LIST_ALL = """
SELECT id, label FROM thing WHERE tenant = $1 AND tenfold_owned(thing.bucket) ORDER BY label
"""


async def create(shards, user_id, *, value=EMAIL) -> None:
    async with shards.holding(user_id).transaction() as tx:
        await uniq.fill_id_slot(tx, user_id)
    async with shards.bucket(value.bucket).transaction() as tx:
        assert await uniq.confirm_unique(tx, value, user_id)


async def find(shards):
    return await uniq.find_unique(shards.bucket(EMAIL.bucket), EMAIL)


async def test_a_value_goes_to_one_of_many_that_ask_at_once(shards):
    askers = [new_id(number * 100) for number in range(20)]

    async def ask(user_id) -> bool:
        try:
            await uniq.reserve_unique(shards, EMAIL, user_id, now_us=NOW)
        except uniq.UniqueTaken:
            return False
        await create(shards, user_id)
        return True

    won = await asyncio.gather(*(ask(user_id) for user_id in askers))
    assert won.count(True) == 1
    assert await find(shards) == askers[won.index(True)]


async def test_a_confirmed_value_is_never_stolen_and_says_whose_it_is(shards):
    owner = new_id(NEAR)
    await uniq.reserve_unique(shards, EMAIL, owner, now_us=NOW)
    await create(shards, owner)
    with pytest.raises(uniq.UniqueTaken) as caught:
        await uniq.reserve_unique(shards, EMAIL, new_id(FAR), now_us=LATER * 2)
    assert caught.value.owner_id == owner


async def test_a_claim_whose_creator_died_is_taken_over_after_it_expired(shards):
    dead, heir = new_id(NEAR), new_id(FAR)
    await uniq.reserve_unique(shards, EMAIL, dead, now_us=NOW)
    with pytest.raises(uniq.UniqueTaken):
        await uniq.reserve_unique(shards, EMAIL, heir, now_us=LATER - 1)
    await uniq.reserve_unique(shards, EMAIL, heir, now_us=LATER)
    await create(shards, heir)
    assert await find(shards) == heir


async def test_a_creator_that_was_only_slow_cannot_create_after_the_theft(shards):
    slow, thief = new_id(NEAR), new_id(FAR)
    await uniq.reserve_unique(shards, EMAIL, slow, now_us=NOW)
    await uniq.reserve_unique(shards, EMAIL, thief, now_us=LATER)
    with pytest.raises(Aborted):
        async with shards.holding(slow).transaction() as tx:
            await uniq.fill_id_slot(tx, slow)


async def test_a_created_but_unconfirmed_value_is_confirmed_for_its_creator(shards):
    created, late = new_id(NEAR), new_id(FAR)
    await uniq.reserve_unique(shards, EMAIL, created, now_us=NOW)
    async with shards.holding(created).transaction() as tx:
        await uniq.fill_id_slot(tx, created)
    with pytest.raises(uniq.UniqueTaken):
        await uniq.reserve_unique(shards, EMAIL, late, now_us=LATER)
    assert await find(shards) == created


async def test_a_freed_value_may_be_taken_by_another(shards):
    first, second = new_id(NEAR), new_id(FAR)
    await uniq.reserve_unique(shards, EMAIL, first, now_us=NOW)
    await create(shards, first)
    async with shards.bucket(EMAIL.bucket).transaction() as tx:
        assert not await uniq.free_unique(tx, EMAIL, second)
        assert await uniq.free_unique(tx, EMAIL, first)
    assert await find(shards) is None
    await uniq.reserve_unique(shards, EMAIL, second, now_us=NOW)
    await create(shards, second)
    assert await find(shards) == second


async def test_a_todo_is_due_later_each_time_until_it_is_finished(shards):
    step = todo.Todo(NEAR, new_id(NEAR), "confirm", b"payload")
    shard = shards.all()[0]
    async with shards.bucket(NEAR).transaction() as tx:
        await todo.add_todo(tx, step, next_at_us=NOW)
        await todo.add_todo(tx, step, next_at_us=NOW + 5)
    assert await todo.list_due_todos(shard, "confirm", now_us=NOW - 1) == []
    assert await todo.list_due_todos(shard, "confirm", now_us=NOW) == [step]
    async with shards.bucket(NEAR).transaction() as tx:
        await todo.postpone_todo(tx, step, now_us=NOW)
    assert await todo.list_due_todos(shard, "confirm", now_us=NOW + 499_999) == []
    [again] = await todo.list_due_todos(shard, "confirm", now_us=NOW + 500_000)
    assert again.tries == 1
    async with shards.bucket(NEAR).transaction() as tx:
        await todo.finish_todo(tx, again)
    assert await todo.list_due_todos(shard, "confirm", now_us=LATER) == []


async def test_a_lease_has_one_holder_and_its_token_only_grows(shards):
    async with shards.all()[0].transaction() as tx:
        first = await leases.take_lease(tx, "relay", holder="a", now_us=NOW, ttl_us=100)
        assert await leases.take_lease(tx, "relay", holder="b", now_us=NOW + 99, ttl_us=1) is None
        assert await leases.renew_lease(tx, first, now_us=NOW + 99, ttl_us=100)
        second = await leases.take_lease(tx, "relay", holder="b", now_us=NOW + 199, ttl_us=100)
        assert second.token > first.token
        assert not await leases.renew_lease(tx, first, now_us=NOW + 200, ttl_us=100)
        await leases.release_lease(tx, second)
        third = await leases.take_lease(tx, "relay", holder="a", now_us=NOW + 200, ttl_us=100)
        assert third.token > second.token


async def test_old_code_goes_on_under_a_migration_that_only_adds(engine, tmp_path):
    newer = Path(shutil.copytree(MIGRATIONS, tmp_path / "newer"))
    (newer / "0002_more.sql").write_text("CREATE TABLE more (bucket smallint, name text);\n")
    async with engine.open() as old:
        async with old.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "before")
        async with replace(engine, contents=replace(engine.contents, migrations=newer)).open():
            async with old.bucket(NEAR).transaction() as tx:
                await add_thing(tx, "after")
            assert await labels(old) == ["after", "before"]
    with pytest.raises(MigrationRefused, match=r"newer version .*0002_more"):
        async with engine.open():
            pass
    for index in range(4):
        await engine.run_raw(
            index, "DROP TABLE more", "DELETE FROM tenfold_migration WHERE name = '0002_more'"
        )


async def add_everywhere(shards) -> None:
    for bucket in range(0, 4096, 500):
        async with shards.bucket(bucket).transaction() as tx:
            await add_thing(tx, f"{4096 - bucket:04}")


async def test_a_scatter_read_merges_every_shard_in_order(shards):
    await add_everywhere(shards)
    gathered = await scatter(
        shards, LIST_ALL, "default", sort_key=lambda row: (row["label"], row["id"]), limit=5
    )
    found = [row["label"] for row in gathered.rows]
    assert found == sorted(found) == ["0096", "0596", "1096", "1596", "2096"]
    assert bucket_of(gathered.rows[0]["id"]) == 4000


async def test_a_scatter_read_never_hides_that_a_bucket_was_not_asked(engine, shards):
    await engine.run_raw(0, "UPDATE tenfold_bucket SET state = 'MOVED' WHERE bucket = 5")
    with pytest.raises(Unavailable, match="moving"):
        await scatter(shards, LIST_ALL, "default")
    await engine.run_raw(
        3, "INSERT INTO tenfold_bucket (bucket, state, epoch) VALUES (5, 'ACTIVE', 2)"
    )
    await scatter(shards, LIST_ALL, "default")
    await engine.run_raw(0, "UPDATE tenfold_bucket SET state = 'ACTIVE' WHERE bucket = 5")
    with pytest.raises(Unavailable, match="moving"):
        await scatter(shards, LIST_ALL, "default")


async def test_a_scatter_read_without_a_shard_says_so(shards, monkeypatch):
    await add_everywhere(shards)
    await shards.all()[1].close()

    async def down(*_, **__):
        raise Unavailable("down")

    monkeypatch.setattr(shards.all()[1], "fetch_covered", down)
    with pytest.raises(Unavailable, match=r"\[1\]"):
        await scatter(shards, LIST_ALL, "default")
    gathered = await scatter(shards, LIST_ALL, "default", partial_ok=True)
    assert gathered.unreachable == [1]
    assert len(gathered.rows) == 7
