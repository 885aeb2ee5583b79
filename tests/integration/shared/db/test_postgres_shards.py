"""What Postgres shards are made of, and when they are refused."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from shared.config import ConfigError
from shared.db import postgres_shards
from shared.db.engines import ShardSettings, open_shards
from shared.db.errors import DatabaseRefused, MigrationRefused
from shared.db.postgres_shards import parse_servers
from tests.databases import SECRET, TABLES, Contents, PostgresPlace
from tests.integration.shared.db.conftest import FAR, MIGRATIONS, NEAR, add_thing, labels

SECOND = "ALTER TABLE thing ADD COLUMN colour text NOT NULL DEFAULT 'red';\n"


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MIGRATIONS, tmp_path / "migrations"))


@pytest.fixture
async def place(postgres_server, migrations: Path):
    """Two new databases, whose schema this test may spoil."""
    dsns = await postgres_server.make_databases(2)
    yield PostgresPlace(",".join(dsns), Contents(migrations, "things", 2))
    await postgres_server.drop_databases(dsns)


async def open_once(place) -> None:
    async with place.open():
        pass


def named(place, *dsns: str):
    return replace(place, name=",".join(dsns))


async def test_a_new_migration_is_applied_once_and_keeps_the_rows(place, migrations):
    async with place.open() as shards, shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    (migrations / "0002_colour.sql").write_text(SECOND)
    for _ in range(2):
        async with place.open() as shards:
            row = await shards.bucket(NEAR).fetch_one(
                "SELECT label, colour FROM thing WHERE tenant = $1", "default"
            )
            assert row == {"label": "a", "colour": "red"}


async def test_a_migration_may_change_rows_and_its_tables_are_guarded_at_once(place, migrations):
    async with place.open() as shards, shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    change = "UPDATE thing SET label = 'b';\nCREATE TABLE more (bucket smallint);\n"
    (migrations / "0002_more.sql").write_text(change)
    async with place.open() as shards:
        assert await labels(shards) == ["b"]
    with pytest.raises(asyncpg.PostgresError, match="bucket_not_admitted"):
        await place.run_raw(0, "INSERT INTO more VALUES (77)")


async def test_a_migration_that_fails_on_one_shard_names_it_and_leaves_each_whole(
    place, migrations
):
    await open_once(place)
    await place.run_raw(1, "CREATE TABLE colour (name text)")  # in the way
    (migrations / "0002_colour.sql").write_text(
        SECOND + "CREATE TABLE colour (name text PRIMARY KEY);\n"
    )
    with pytest.raises(MigrationRefused, match=r"shard 1 of things .*already exists") as caught:
        await open_once(place)
    assert "shard 0" not in str(caught.value)
    await place.run_raw(0, "SELECT colour FROM thing")
    with pytest.raises(asyncpg.UndefinedColumnError):
        await place.run_raw(1, "SELECT colour FROM thing")
    await place.run_raw(1, "DROP TABLE colour")
    await open_once(place)
    await place.run_raw(1, "SELECT colour FROM thing")


async def test_a_migration_changed_after_it_was_applied_is_refused(place, migrations):
    await open_once(place)
    file = migrations / "0001_things.sql"
    file.write_text(file.read_text() + "-- a late thought\n")
    with pytest.raises(MigrationRefused, match="0001_things of things was changed"):
        await open_once(place)


async def test_a_shard_written_by_a_newer_version_is_named_and_refused(place, migrations):
    (migrations / "0002_colour.sql").write_text(SECOND)
    await open_once(place)
    (migrations / "0002_colour.sql").unlink()
    with pytest.raises(MigrationRefused, match=r"shard 0 .* newer version .*0002_colour"):
        await open_once(place)


async def test_a_migration_gives_up_rather_than_stall_the_writers_behind_it(
    place, migrations, monkeypatch
):
    monkeypatch.setattr("shared.db.postgres_migrate.LOCK_S_MAX", 0.2)
    (migrations / "0002_colour.sql").write_text(SECOND)
    first = place.name.split(",")[0]
    await open_once(replace(place, contents=replace(place.contents, migrations=MIGRATIONS)))
    holder = await asyncpg.connect(first)
    try:
        async with holder.transaction():
            await holder.execute("LOCK TABLE thing IN ACCESS SHARE MODE")
            with pytest.raises(MigrationRefused, match=r"shard 0 .*lock timeout.*next start"):
                await open_once(place)
        await open_once(place)
    finally:
        await holder.close()


async def test_many_processes_that_start_at_once_make_the_shards_once(place):
    await asyncio.gather(*(open_once(place) for _ in range(4)))
    async with place.open() as shards:
        owned = "SELECT count(*) AS n FROM tenfold_bucket"
        assert [await shard.fetch_one(owned) for shard in shards.all()] == [{"n": 2048}] * 2


async def test_who_waits_for_the_plan_hears_of_what_was_made_meanwhile(place):
    planner = await asyncpg.connect(place.name.split(",")[0])
    await planner.execute(f"SELECT pg_advisory_lock({postgres_shards.PLANNING})")
    opening = asyncio.create_task(open_once(place))
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    async with asyncio.timeout(30):
        while not await planner.fetchval(waiting):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await planner.execute("CREATE SCHEMA tenfold_control")
    await planner.close()
    await opening


async def test_a_further_shard_starts_empty_and_fewer_are_refused(postgres_server, place):
    async with place.open() as shards, shards.bucket(FAR).transaction() as tx:
        await add_thing(tx, "a")
    first, second = place.name.split(",")
    [third] = await postgres_server.make_databases(1)
    async with named(place, first, second, third).open() as shards:
        assert await labels(shards) == ["a"]
        assert await shards.all()[2].fetch_all("SELECT bucket FROM tenfold_bucket") == []
    with pytest.raises(DatabaseRefused, match="has 3 shards and 2 were named"):
        await open_once(named(place, first, second))


@pytest.mark.parametrize("lost", [0, 1], ids=["with Control", "a further one"])
async def test_an_empty_database_in_the_place_of_one_in_use_is_refused_and_stays_empty(
    postgres_server, place, lost
):
    await open_once(place)
    dsns, [empty] = place.name.split(","), await postgres_server.make_databases(1)
    dsns[lost] = empty
    with pytest.raises(DatabaseRefused, match=f"shard {lost} of .* is empty, .*correct its DSN"):
        await open_once(named(place, *dsns))
    async with postgres_server.admin(empty.rpartition("/")[2]) as admin:
        assert await admin.fetchval(f"SELECT count(*) FROM ({TABLES}) AS made") == 0
    await open_once(place)
    await postgres_server.drop_databases([empty])


async def test_another_services_database_is_refused(place):
    await open_once(place)
    other = replace(place, contents=replace(place.contents, service="others"))
    with pytest.raises(MigrationRefused, match="holds the data of things: it is another service's"):
        await open_once(other)


async def test_shards_named_in_another_order_are_refused(place):
    await open_once(place)
    with pytest.raises(DatabaseRefused, match=r"is shard 1: .*in the order"):
        await open_once(named(place, *reversed(place.name.split(","))))


async def test_a_bucket_that_no_shard_owns_is_named(place):
    await open_once(place)
    await place.run_raw(1, "DELETE FROM tenfold_bucket WHERE bucket = 4000")
    with pytest.raises(DatabaseRefused, match="bucket 4000 is owned by no shard"):
        await open_once(place)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda dsn: dsn.replace("tenfold:", "tenfold:not"), "password authentication failed"),
        (lambda dsn: dsn.rpartition("/")[0] + "/nothing", "does not exist"),
        (lambda dsn: "postgresql://tenfold:secret@127.0.0.1:1/things", "Connect"),
    ],
    ids=["password", "database", "nobody there"],
)
async def test_a_shard_that_cannot_be_used_is_named_without_its_password(place, wrong, told):
    first, second = place.name.split(",")
    with pytest.raises(DatabaseRefused, match=f"shard 1 of things at .*{told}") as caught:
        await open_once(named(place, first, wrong(second)))
    assert "secret" not in str(caught.value)
    assert first not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "mysql://a:b@host/things",
        "postgresql://host",
        "postgresql:///things",
        "host:5432/things",
        "postgresql://a:b@host:none/things",
        "postgresql://a:b@host,/things",
        "postgresql://a:b@host,host/things",
        "postgresql://a:b@host/things,postgresql://a:b@host/things",
        ",".join(f"postgresql://host/t{number}" for number in range(65)),
        ",",
    ],
)
def test_a_setting_that_is_no_list_of_databases_is_refused_by_name(tmp_path: Path, clock, text):
    settings = ShardSettings("payment", text, tmp_path, MIGRATIONS)
    with pytest.raises(ConfigError, match="TENFOLD_PAYMENT_DATABASE is not allowed") as caught:
        open_shards(settings, secret=SECRET, clock=clock)
    assert "a:b" not in str(caught.value)


def test_a_shard_may_have_several_hosts_each_with_the_same_credentials():
    one, two = parse_servers(
        "postgresql://u:p@h1:1,h2:2/a,postgresql://u:p@[::1]:3/b?ssl=require", service="payment"
    )
    assert one.hosts == ("postgresql://u:p@h1:1/a", "postgresql://u:p@h2:2/a")
    assert two.hosts == ("postgresql://u:p@[::1]:3/b?ssl=require",)


def test_a_server_is_told_without_its_user_and_password():
    [server] = parse_servers("postgresql://user:secret@db.example:5433/things", service="payment")
    assert str(server) == "shard 0 of payment at db.example:5433/things"
