"""One command brings the databases of any services to the newest schema."""

import os
import subprocess
import sys
from pathlib import Path

from services.payment.wiring import MIGRATIONS
from tests.mesh import ROOT


def migrate(data: Path, *names: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services", "migrate", *names],
        cwd=ROOT,
        env={**os.environ, "TENFOLD_DATA": str(data), **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def services_on_sqlite(data: Path) -> set[str]:
    return {path.parts[-3] for path in data.rglob("shard-*.sqlite")}


async def test_every_service_is_migrated_where_its_setting_says(tmp_path: Path, postgres_server):
    databases = await postgres_server.make_databases(2)
    for _ in range(2):
        done = migrate(tmp_path, "all", TENFOLD_PAYMENT_DATABASE=",".join(databases))
        assert done.returncode == 0, done.stderr
        assert "payment: 2 shards are at the newest schema" in done.stdout
        assert "auth: 4 shards are at the newest schema" in done.stdout
    assert services_on_sqlite(tmp_path) == {"auth", "media", "notification", "reporting"}
    name = databases[1].rpartition("/")[2]
    async with postgres_server.admin(name) as admin:
        applied = await admin.fetch("SELECT name FROM tenfold_migration WHERE area = 'payment'")
    wanted = {path.stem for path in MIGRATIONS.glob("*.sql") if ".sqlite" not in path.name}
    assert {row["name"] for row in applied} == wanted
    await postgres_server.drop_databases(databases)


def test_a_service_whose_shard_is_down_is_named_and_the_others_go_on(tmp_path: Path):
    nobody = "postgresql://tenfold:secret@127.0.0.1:1/things"
    done = migrate(tmp_path, "auth", "payment", TENFOLD_AUTH_DATABASE=nobody)
    assert done.returncode == 1
    assert "shard 0 of auth at 127.0.0.1:1/things cannot be used" in done.stderr
    assert "secret" not in done.stderr
    assert done.stdout == "payment: 1 shards are at the newest schema\n"


def test_a_setting_that_names_no_database_is_refused_by_name(tmp_path: Path):
    done = migrate(tmp_path, "payment", TENFOLD_PAYMENT_DATABASE="mysql://a:b@host/x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("TENFOLD_PAYMENT_DATABASE is not allowed: shard 0: it must be ")
