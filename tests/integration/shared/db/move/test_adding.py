"""A shard that is added while the others are used: every process finds it, nothing is lost."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import pytest

from shared.db import sqlite_files
from shared.db.errors import DatabaseRefused
from shared.db.growing import run_on_each
from shared.db.move.failpoints import ADDING_FAILPOINTS
from shared.db.move.place import move_bucket
from shared.db.move.postgres_place import PostgresPlace
from shared.db.move.protocol import Phase
from shared.db.port import Shard
from shared.db.postgres_adding import Addition, add_shard
from shared.db.postgres_recorded import all_servers
from shared.db.postgres_shards import parse_servers
from shared.db.scatter import scatter
from tests.integration.shared.db.move.arena import made_databases
from tests.integration.shared.db.move.grounds import (
    ADD_ONE,
    BUCKET,
    MIGRATIONS,
    SERVICE,
    Databases,
    Ground,
    Place,
    add_counters,
    tools,
)
from tests.integration.shared.db.move.test_moves import Killed

COUNT = "SELECT id FROM counter WHERE tenfold_owned(counter.bucket) /* any tenant: a test */"
NEW = 2


def quiet(step: str) -> None:
    del step


@dataclass
class Growing:
    """A ground that can be given a shard.

    Attributes:
        add: gives it one, as an operator does; each step is told.
        moves: a place that knows the new one.
    """

    ground: Ground
    add: Callable[[Callable[[str], None]], Awaitable[tuple[int, bool]]]
    moves: Callable[[], Awaitable[object]]


@pytest.fixture
async def empty(postgres_server) -> AsyncIterator[str]:
    """A new database, as its DSN without user and password."""
    [dsn] = await postgres_server.make_databases(1)
    yield public(dsn)
    await postgres_server.drop_databases([dsn])


def public(dsn: str) -> str:
    parts = urlsplit(dsn)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def addition(place: str, visit: Callable[[str], None] = quiet) -> Addition:
    return Addition(SERVICE, MIGRATIONS, place, 1, visit)


@pytest.fixture(params=["sqlite", "postgres"])
def growing(request, place: Place) -> Growing:
    if request.param == "sqlite":

        async def add(visit):
            index = await asyncio.to_thread(
                sqlite_files.add_shard, place.path, SERVICE, MIGRATIONS, 1, visit
            )
            return index, True

        async def moves():
            return place.moves

        return Growing(place, add, moves)
    databases: Databases = request.getfixturevalue("databases")
    empty: str = request.getfixturevalue("empty")

    async def add_database(visit):
        return await add_shard(databases.servers, addition(empty, visit))

    async def all_of_them():
        return PostgresPlace(await all_servers(databases.servers))

    return Growing(databases, add_database, all_of_them)


async def test_a_bucket_is_written_on_a_new_shard_by_a_process_that_has_not_heard_of_it(growing):
    ground = growing.ground
    async with ground.open() as shards, ground.open() as others, ground.open() as reader:
        counters = await add_counters(shards, 3)
        assert await growing.add(quiet) == (NEW, True)
        moving = move_bucket(await growing.moves(), BUCKET, NEW, tools())
        assert await moving is Phase.DONE
        for one in (shards, others):
            async with one.bucket(BUCKET).transaction() as tx:
                assert await tx.execute(ADD_ONE, BUCKET, counters[0]) == 1
            assert one.shard_index(BUCKET) == NEW
        assert len((await scatter(reader, COUNT)).rows) == 3
    async with growing.ground.open() as restarted:
        assert len(restarted.all()) == 3
        gathered = await scatter(restarted, COUNT)
        assert sorted(row["id"] for row in gathered.rows) == sorted(counters)


@pytest.mark.parametrize("step", ADDING_FAILPOINTS)
async def test_a_shard_whose_adding_was_killed_is_finished_by_the_next(growing, step):
    def die(visited: str) -> None:
        if visited == step:
            raise Killed

    async with growing.ground.open() as shards:
        with pytest.raises(Killed):
            await growing.add(die)
        is_in_use = step == "add.active"
        assert await shards.learn() is is_in_use
        if not is_in_use:
            assert await growing.add(quiet) == (NEW, True)
            assert await shards.learn()
        assert len(shards.all()) == 3
        assert await shards.all()[NEW].fetch_covered(COUNT)


async def test_what_runs_on_each_shard_runs_on_a_new_one(growing):
    begun: list[int] = []

    async def run(shard: Shard) -> None:
        begun.append(shard.index)
        await asyncio.Event().wait()

    async with growing.ground.open() as shards:
        running = asyncio.create_task(run_on_each(shards, run))
        await growing.add(quiet)
        await shards.learn()
        while len(begun) < 3:  # noqa: ASYNC110 - it is told to nobody else
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running])
    assert begun == [0, 1, 2]


async def test_a_database_that_is_a_shard_already_is_left_alone(databases, shards_there, empty):
    assert await add_shard(databases.servers, addition(empty)) == (NEW, True)
    for known, index in ((empty, NEW), (public(databases.operator[1]), 1)):
        assert await add_shard(databases.servers, addition(known)) == (index, False)


@pytest.fixture
async def shards_there(databases) -> AsyncIterator[None]:
    async with databases.open():
        yield


async def test_control_holds_no_user_and_no_password(databases, shards_there, empty):
    await add_shard(databases.servers, addition(empty))
    [(dsn,)] = await databases.rows(0, "SELECT dsn FROM tenfold_control.shard WHERE dsn <> ''")
    assert dsn == empty
    assert "@" not in dsn


BAD_PLACES = {
    "nobody answers": ("postgresql://127.0.0.1:1/none", "cannot be reached"),
    "no such database": ("{server}/none", "cannot be reached"),
    "a password": ("postgresql://someone:hidden@127.0.0.1:5432/x", "leave user, password"),
    "parameters": ("postgresql://127.0.0.1:5432/x?password=hidden", "leave user, password"),
    "no database": ("postgresql://127.0.0.1:5432", "write it as postgresql://host:port/database"),
    "no DSN": ("/tmp/x", "write it as postgresql://host:port/database"),
}


@pytest.fixture(scope="module")
async def served(postgres_server) -> AsyncIterator[Databases]:
    async with made_databases(postgres_server) as made:
        async with made.open():
            pass
        yield made


@pytest.mark.parametrize(("place", "said"), BAD_PLACES.values(), ids=BAD_PLACES)
async def test_a_place_that_cannot_be_a_shard_is_refused_and_changes_nothing(served, place, said):
    server = public(served.operator[0]).rpartition("/")[0]
    with pytest.raises(DatabaseRefused, match=said) as refused:
        await add_shard(served.servers, addition(place.format(server=server)))
    assert "hidden" not in str(refused.value)
    assert await served.rows(0, "SELECT count(*) FROM tenfold_control.shard") == [(2,)]


OTHERS = {
    "a table of somebody": "CREATE TABLE theirs (x int)",
    "what looks like a shard": "CREATE TABLE tenfold_shard (shard_id bigint)",
}


@pytest.mark.parametrize("sql", OTHERS.values(), ids=OTHERS)
async def test_a_database_with_something_in_it_is_refused(databases, shards_there, empty, sql):
    [new] = parse_servers(empty, service=SERVICE)
    first = urlsplit(databases.servers[0].dsn)
    dsn = first._replace(path=urlsplit(new.dsn).path).geturl()
    theirs = replace(databases, operator=[dsn])
    await theirs.rows(0, "SELECT 1", prefix=sql)
    with pytest.raises(DatabaseRefused, match="is not empty: name a new, empty database"):
        await add_shard(databases.servers, addition(empty))
    assert await databases.rows(0, "SELECT count(*) FROM tenfold_control.shard") == [(2,)]


async def test_a_shard_is_not_added_by_a_release_with_other_tables(databases, shards_there, empty):
    await databases.rows(0, "SELECT 1", prefix="UPDATE tenfold_shard SET schema_version = 1")
    with pytest.raises(DatabaseRefused, match="python -m services migrate"):
        await add_shard(databases.servers, addition(empty))


async def test_a_file_that_is_there_already_is_not_taken_for_a_shard(place):
    async with place.open():
        with closing(sqlite3.connect(place.path / "shard-2.sqlite")) as theirs:
            theirs.execute("CREATE TABLE theirs (x)")
        with pytest.raises(DatabaseRefused, match="is there already"):
            sqlite_files.add_shard(place.path, SERVICE, MIGRATIONS, 1, quiet)
