"""The same mesh with every service on Postgres: one setting each, and nothing else differs."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.mesh import ROOT

SERVICES = ("auth", "payment", "notification", "media", "reporting")


@pytest.fixture
async def databases(databases_of) -> AsyncIterator[dict[str, str]]:
    """The setting of each service, two shards of its own in each."""
    async with AsyncExitStack() as stack:
        settings = {}
        for service in SERVICES:
            migrations = ROOT / "services" / service / "migrations"
            setting = await stack.enter_async_context(databases_of("postgres", migrations, 2))
            settings[f"TENFOLD_{service.upper()}_DATABASE"] = setting
        yield settings


def test_the_demo_passes_on_postgres(databases, start_mesh):
    with start_mesh(environ={**os.environ, **databases}) as mesh:
        told = subprocess.run(
            [sys.executable, "-P", "-m", "deploy.cli", "demo", "--data", str(mesh.data)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert told.returncode == 0, told.stdout + told.stderr
        assert not list((mesh.data / "services").rglob("*.sqlite"))
