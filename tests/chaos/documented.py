"""Thousands of requests made from OpenAPI documents, each run others than before."""

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.asking import Asked, Questions, ask_all
from tests.asking_mesh import known_values
from tests.integration.edge.bench import open_bench
from tests.mesh import Mesh, running_mesh

# An access token lives for five minutes; a new one after so many requests is early enough.
CALLS_PER_TOKEN = 1000


def run(*, examples: int) -> list[dict[str, object]]:
    """Ask the mesh as a user and as the operator, then an edge of every kind of field."""
    with tempfile.TemporaryDirectory() as folder, running_mesh(Path(folder) / "data") as mesh:
        operator = {"Authorization": f"Bearer {mesh.admin_key}"}
        rows = [
            _asked("the mesh, as a user", _ask_mesh(mesh, _as_users(mesh), examples)),
            _asked("the mesh, as its operator", _ask_mesh(mesh, lambda: operator, examples)),
        ]
    return [*rows, _asked("contracts with every kind of field", asyncio.run(_ask_bench(examples)))]


def _as_users(mesh: Mesh) -> Callable[[], Mapping[str, str]]:
    calls, headers = itertools.count(), dict[str, str]()

    def current() -> Mapping[str, str]:
        if next(calls) % CALLS_PER_TOKEN == 0:
            headers["Authorization"] = f"Bearer {mesh.sign_up_and_in()}"
        return headers

    return current


def _ask_mesh(mesh: Mesh, headers: Callable[[], Mapping[str, str]], examples: int) -> Asked:
    known = known_values(mesh, headers())
    questions = Questions(examples, is_repeatable=False, headers=headers, known=known)
    return ask_all(mesh.edge_url, questions)


async def _ask_bench(examples: int) -> Asked:
    with tempfile.TemporaryDirectory() as folder:
        async with open_bench(Path(folder)) as bench:
            ask = partial(ask_all, bench.url, Questions(examples, is_repeatable=False))
            return await asyncio.to_thread(ask)


def _asked(whom: str, asked: Asked) -> dict[str, object]:
    print(f"{whom}: {dict(asked.statuses)}")
    print(*asked.wrong[:20], sep="\n\n")
    return {
        "what": f"requests made from the OpenAPI document, to {whom}",
        "faults": asked.faults,
        "operations": asked.calls,
        "violations": len(asked.wrong),
    }
