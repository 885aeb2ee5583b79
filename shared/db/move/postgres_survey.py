"""What a Postgres shard says of itself, read and never changed."""

from collections import defaultdict
from contextlib import suppress
from typing import Any

from shared.db.errors import DatabaseRefused
from shared.db.limits import CLOSE_S_MAX
from shared.db.move.port import Shape
from shared.db.move.postgres_shapes import read_shapes
from shared.db.move.protocol import State
from shared.db.move.survey import STRAYS, Survey
from shared.db.postgres_connection import ERRORS, Server
from shared.db.postgres_primary import connect_to_primary

# Of each table, about: at random, so that the cost does not grow with the table.
SAMPLE_BYTES = 16 * 2**20
ROW_HEADER_BYTES = 24


async def survey_server(server: Server, index: int) -> Survey:
    """One shard, in one snapshot.

    Raises:
        DatabaseRefused: it cannot be read; named.
    """
    connection = await connect_to_primary(server)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            rows = await connection.fetch("SELECT bucket, state, epoch FROM tenfold_bucket")
            size_bytes = await connection.fetchval("SELECT pg_database_size(current_database())")
            counts = {
                shape.name: await connection.fetchval(STRAYS.format(table=shape.name))
                for shape in await read_shapes(connection)
            }
    except ERRORS as error:
        raise DatabaseRefused(f"{server} cannot be read: {error}") from error
    finally:
        with suppress(*ERRORS):
            await connection.close(timeout=CLOSE_S_MAX)
    states = {row["bucket"]: (State(row["state"]), row["epoch"]) for row in rows}
    strays = {table: count for table, count in counts.items() if count}
    return Survey(index, server.address, size_bytes, states, strays)


async def measure_server(server: Server) -> dict[int, int]:
    """About how many bytes of rows each bucket has on a shard.

    A large table is sampled: some of its pages, at random, all rows on them. What is stored out
    of line counts as it is stored, and is not read.

    Raises:
        DatabaseRefused: it cannot be read; named.
    """
    sizes: dict[int, int] = defaultdict(int)
    connection = await connect_to_primary(server)
    try:
        for shape in await read_shapes(connection):
            for row in await connection.fetch(await _sampling(connection, shape)):
                sizes[row["bucket"]] += int(row["bytes"])
    except ERRORS as error:
        raise DatabaseRefused(f"{server} cannot be read: {error}") from error
    finally:
        with suppress(*ERRORS):
            await connection.close(timeout=CLOSE_S_MAX)
    return sizes


async def _sampling(connection: Any, shape: Shape) -> str:  # noqa: ANN401 - asyncpg is untyped
    table_bytes = await connection.fetchval("SELECT pg_relation_size($1::regclass)", shape.name)
    part = min(1.0, SAMPLE_BYTES / max(table_bytes, 1))
    sample = f"TABLESAMPLE SYSTEM ({100 * part:.6f})" if part < 1 else ""
    row_bytes = " + ".join(f"coalesce(pg_column_size({name}), 0)" for name in shape.columns)
    return (
        f"SELECT bucket, (sum({ROW_HEADER_BYTES} + {row_bytes}) / {part})::bigint "  # noqa: S608
        "AS bytes "
        f"FROM {shape.name} {sample} GROUP BY bucket"
    )
