"""Auth, running once for all tests of this folder."""

from collections.abc import AsyncIterator

import pytest

from tests.fakes import ManualClock
from tests.integration.services.auth.harness import Auth, running_auth


@pytest.fixture(scope="session")
def auth_clock() -> ManualClock:
    """The clock of the service under test."""
    return ManualClock()


@pytest.fixture(scope="session")
async def auth_service(
    tmp_path_factory: pytest.TempPathFactory, nats_url: str, auth_clock: ManualClock
) -> AsyncIterator[Auth]:
    """Auth behind gRPC."""
    async with running_auth(tmp_path_factory.mktemp("auth"), nats_url, auth_clock) as running:
        yield running
