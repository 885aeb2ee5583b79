"""Auth, running once for all tests of this folder."""

from collections.abc import AsyncIterator

import pytest

from services.auth.wiring import MIGRATIONS
from tests.fakes import ManualClock
from tests.integration.services.auth.harness import Auth, running_auth


@pytest.fixture(scope="session")
def auth_clock() -> ManualClock:
    """The clock of the service under test."""
    return ManualClock()


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
async def auth_service(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    nats_url: str,
    auth_clock: ManualClock,
    databases_of,
) -> AsyncIterator[Auth]:
    """Auth behind gRPC, on each database engine."""
    folder = tmp_path_factory.mktemp("auth")
    async with databases_of(request.param, MIGRATIONS) as databases:
        environ = {"TENFOLD_AUTH_DATABASE": databases}
        async with running_auth(folder, nats_url, auth_clock, environ) as running:
            yield running
