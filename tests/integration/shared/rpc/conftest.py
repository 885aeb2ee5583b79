"""The engine behind the servers that harness.serving starts; harness.only_on_… choose one."""

import pytest

from shared.config import RPC_ENGINES


@pytest.fixture(params=RPC_ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test that uses it runs on every engine; programs that it starts inherit it."""
    monkeypatch.setenv("TENFOLD_RPC_ENGINE", request.param)
    return str(request.param)
