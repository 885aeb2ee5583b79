"""Postgres from its wheel, as the launcher starts it."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from deploy.local import postgres, unprivileged
from deploy.local.address import free_addresses
from deploy.local.errors import LaunchError
from deploy.local.processes import PROC
from deploy.local.supervisor import open_supervisor
from tests.databases import PostgresServer

WAL_REPLAYED = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that Postgres's user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="tenfold-postgres-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


async def test_the_server_answers_its_owner_and_refuses_strangers(postgres_server: PostgresServer):
    [dsn] = await postgres_server.make_databases(1)
    owner = await asyncpg.connect(dsn)
    assert (
        await owner.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
    )
    await owner.close()
    for wrong in (
        dsn.replace(postgres_server.site.password, "guess"),
        dsn.replace("tenfold:", "x:"),
    ):
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(wrong)


async def test_the_server_never_runs_as_root(postgres_server: PostgresServer):
    pid = (postgres_server.site.data_of("primary") / "postmaster.pid").read_text().split()[0]
    status = (PROC / pid / "status").read_text()
    uid = next(line.split()[1] for line in status.splitlines() if line.startswith("Uid:"))
    assert uid != "0"


async def test_a_lock_whose_number_is_another_process_by_now_keeps_nobody_out(open_folder: Path):
    [address] = free_addresses(1)
    site = postgres.open_site(open_folder, os.environ, is_durable=False)
    postgres.make_primary(site)
    account = {"user": site.user.uid, "group": site.user.gid} if site.user else {}
    other = await asyncio.create_subprocess_exec("sleep", "60", **account)
    (site.data_of("primary") / "postmaster.pid").write_text(f"{other.pid}\n")
    postgres.drop_stale_lock(site, "primary")
    async with open_supervisor(logs=open_folder, say=print) as supervisor:
        await supervisor.start(postgres.postgres_program(site, address))
        postgres.drop_stale_lock(site, "primary")
        assert (site.data_of("primary") / "postmaster.pid").exists()
    other.kill()
    await other.wait()


async def test_a_replica_follows_and_refuses_writes(open_folder: Path):
    addresses = free_addresses(2)
    site = postgres.open_site(open_folder, os.environ, is_durable=False)
    postgres.make_primary(site)
    async with open_supervisor(logs=open_folder, say=print) as supervisor:
        await supervisor.start(postgres.postgres_program(site, addresses[0]))
        await postgres.ensure_databases(site, addresses[0], ["things"], replicas=["replica_1"])
        postgres.make_replica(site, "replica_1", addresses[0])
        replica = postgres.postgres_program(
            site, addresses[1], node="replica_1", source=addresses[0]
        )
        await supervisor.start(replica)
        writer = await asyncpg.connect(site.dsn(addresses[0], "things"))
        await writer.execute("CREATE TABLE thing (id bigint); INSERT INTO thing VALUES (7)")
        written = await writer.fetchval("SELECT pg_current_wal_lsn()::text")
        await writer.close()
        reader = await asyncpg.connect(site.dsn(addresses[1], "things"))
        while not await reader.fetchval(WAL_REPLAYED, written):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await reader.fetchval("SELECT id FROM thing") == 7
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await reader.execute("INSERT INTO thing VALUES (8)")
        await reader.close()


async def test_a_data_folder_is_found_again(open_folder: Path):
    for run in range(2):
        [address] = free_addresses(1)
        site = postgres.open_site(open_folder, os.environ, is_durable=False)
        postgres.make_primary(site)
        async with open_supervisor(logs=open_folder, say=print) as supervisor:
            await supervisor.start(postgres.postgres_program(site, address))
            await postgres.ensure_databases(site, address, ["things"])
            connection = await asyncpg.connect(site.dsn(address, "things"))
            await connection.execute("CREATE TABLE IF NOT EXISTS run (number bigint)")
            assert await connection.fetchval("SELECT count(*) FROM run") == run
            await connection.execute("INSERT INTO run VALUES ($1)", run)
            await connection.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has folders that Postgres cannot reach")
async def test_what_roots_closed_folders_hold_is_served_from_a_place_that_postgres_reaches(
    tmp_path: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(unprivileged, "REFUGE", open_folder / "refuge")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    programs = postgres.binaries.postgres_folder(os.environ)
    shutil.copytree(programs.parent, closed / "pgsql", symlinks=True)
    environ = {"TENFOLD_POSTGRES_BIN": str(closed / "pgsql" / "bin")}
    for _ in range(2):
        [address] = free_addresses(1)
        site = postgres.open_site(closed / "data", environ, is_durable=False)
        postgres.make_primary(site)
        async with open_supervisor(logs=tmp_path, say=print) as supervisor:
            await supervisor.start(postgres.postgres_program(site, address))
            await postgres.ensure_databases(site, address, ["things"])
    assert not (closed / "data").exists()
    places = sorted(path.name.split("-")[0] for path in (open_folder / "refuge").iterdir())
    assert len(places) == 2
    assert places[-1] == "programs"
    secrets = [path for path in site.folder.iterdir() if "password" in path.name]
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
    assert site.data_of("primary").stat().st_mode & 0o777 == 0o700


def test_programs_that_are_not_there_are_named(tmp_path: Path):
    with pytest.raises(LaunchError, match="TENFOLD_POSTGRES_BIN"):
        postgres.open_site(tmp_path, {"TENFOLD_POSTGRES_BIN": "/nowhere"})
