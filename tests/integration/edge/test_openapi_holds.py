"""What /openapi.json says of contracts with every kind of field is what the edge does."""

import asyncio

import pytest

from tests.asking import Questions, ask_all
from tests.integration.edge.bench import PACKAGE, Bench
from tests.integration.edge.echo import Script

# Of the bindings, one service each; the other hundred differ in their paths alone.
SERVICES = ("KindService", "Bodies", "Answers", "Files", "Calls", "Library", "EditionService")
# `make chaos` asks more.
EXAMPLES = 1


# Edges of other tests live on in this process, and use `random` while a request is made up.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
async def test_every_operation_answers_as_documented_and_never_with_a_5xx(bench: Bench) -> None:
    bench.echo.follow(Script())
    asked = await asyncio.to_thread(ask_all, bench.url, Questions(EXAMPLES, is_asked=is_asked))
    assert not asked.wrong, "\n\n".join(asked.wrong[:20])
    assert asked.statuses[200] > 50


def is_asked(service: str) -> bool:
    return service.removeprefix(f"{PACKAGE}.") in SERVICES
