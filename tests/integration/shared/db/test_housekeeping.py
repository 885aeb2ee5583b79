from shared.db.housekeeping import REQUEST_IDS_KEPT_S, forget_request_ids
from shared.db.sqlite import open_sqlite_shards
from tests.databases import SECRET
from tests.integration.shared.db.conftest import MIGRATIONS, NEAR, once, user


async def test_a_request_id_is_remembered_for_72_hours_and_then_forgotten(tmp_path, clock):
    asker = user(NEAR)

    async def is_known(number: int) -> bool:
        async with shards.bucket(NEAR).transaction(once(asker, f"{number}")) as tx:
            return tx.answered

    async with open_sqlite_shards(
        tmp_path, migrations=MIGRATIONS, shard_count=1, secret=SECRET, clock=clock, service="things"
    ) as shards:
        for number in range(600):
            await is_known(number)
        clock.advance(REQUEST_IDS_KEPT_S)
        assert await forget_request_ids(shards.all()[0], clock=clock) == 0
        assert await is_known(7)
        clock.advance(1)
        await is_known(1000)
        assert await forget_request_ids(shards.all()[0], clock=clock) == 600
        assert not await is_known(7)
        assert await is_known(1000)
