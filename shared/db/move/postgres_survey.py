"""What a Postgres shard says of itself, read and never changed."""

from contextlib import suppress

from shared.db.errors import DatabaseRefused
from shared.db.limits import CLOSE_S_MAX
from shared.db.move.postgres_shapes import read_shapes
from shared.db.move.protocol import State
from shared.db.move.survey import STRAYS, Survey
from shared.db.postgres_connection import ERRORS, Server
from shared.db.postgres_primary import connect_to_primary


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
