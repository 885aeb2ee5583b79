"""Movers that are killed, or frozen and replaced, after every step of a move on Postgres."""

import asyncio
import tempfile
from pathlib import Path

from shared.db.move.failpoints import FAILPOINTS
from tests.integration.shared.db.move.arena import ON_POSTGRES, Arena, fought_over, made_databases
from tests.integration.shared.db.move.grounds import Databases
from tests.integration.shared.db.move.journal import read_books
from tests.postgres import running_postgres

WAYS = ("kill", "sleep")


def run(*, rounds: int) -> dict[str, object]:
    """Tell the story of every step so often, while writers go on.

    Args:
        rounds: of all steps; after each a mover is killed, and another sleeps until the next move.
    """
    with running_postgres() as server, tempfile.TemporaryDirectory() as folder:

        async def tell() -> list[str]:
            async with made_databases(server) as databases:
                return await asyncio.to_thread(_tell, databases, Path(folder), rounds)

        wrong = asyncio.run(tell())
        books = read_books(Path(folder))
    times = len(FAILPOINTS) * rounds
    took_ms = sorted(books.took_ms)
    print(f"{times} movers killed and {times} stopped: {wrong or 'nothing wrong'}")
    return {
        "what": "movers killed, or stopped, taken over and continued, after every step on Postgres",
        "faults": len(WAYS) * times,
        "operations": len(books.done),
        "violations": len(wrong),
        "measured": {
            "kills": times,
            "stops": times,
            "write_p50_ms": took_ms[len(took_ms) // 2],
            "write_p99_ms": took_ms[len(took_ms) * 99 // 100],
        },
    }


def _tell(databases: Databases, folder: Path, rounds: int) -> list[str]:
    wrong: list[str] = []
    with fought_over(databases, folder, pace=ON_POSTGRES) as arena:
        for failpoint in FAILPOINTS * rounds:
            for way in WAYS:
                wrong += _told(arena, failpoint, way)
    return wrong + arena.left


def _told(arena: Arena, failpoint: str, way: str) -> list[str]:
    found = arena.tell(failpoint, way)
    print(f"{way} after {failpoint}: {found or 'nothing wrong'}")
    return found
