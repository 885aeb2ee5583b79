"""What every table of every service has, so that its rows can be found, guarded and moved."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from shared.db.migrate import (
    FRAMEWORK_MIGRATIONS,
    load_migrations,
    migrate_sqlite,
    tables_made_by,
)
from shared.db.sql import to_sqlite
from tests.mesh import ROOT

SERVICES = sorted(path.parent.name for path in ROOT.glob("services/*/migrations"))
# An id carries its row's bucket, or its owner's id does.
CHECKS = [to_sqlite(f"CHECK (bucket = tenfold_bucket_of({column}))") for column in ("id", "owner")]
GUARDS = {"insert", "update", "delete"}


@pytest.mark.parametrize("service", SERVICES)
def test_a_row_begins_with_its_bucket_and_belongs_to_a_tenant(tmp_path: Path, service: str):
    framework = load_migrations(FRAMEWORK_MIGRATIONS, area="framework")
    own = load_migrations(ROOT / "services" / service / "migrations", area=service)
    migrate_sqlite(tmp_path / "shard.sqlite", [*framework, *own])
    with closing(sqlite3.connect(tmp_path / "shard.sqlite")) as shard:
        made = dict(shard.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
        tables = set(made) - tables_made_by(framework) - {"sqlite_sequence"}
        assert tables
        for table in tables:
            columns = shard.execute(f"PRAGMA table_info({table})").fetchall()
            key = sorted((column for column in columns if column[5]), key=lambda column: column[5])
            names = [column[1] for column in key]
            assert names[0] == "bucket", table
            assert "tenant" in {column[1] for column in columns}, table
            if names == ["bucket", "id"]:
                assert any(check in made[table] for check in CHECKS), table
            sql = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?"
            triggers = {name for (name,) in shard.execute(sql, (table,))}
            assert triggers >= {f"tenfold_guard_{table}_{what}" for what in GUARDS}
