"""Fixtures that every test may use: the clock, and real servers from their wheels."""

import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from pathlib import Path

# Hypothesis's plug-in is first imported for the summary otherwise, too deep in the stack.
import hypothesis
import pytest

from deploy.local import servers
from deploy.local.address import free_addresses
from tests.databases import Places, PostgresPlaces, PostgresServer, SqlitePlaces
from tests.fakes import ManualClock
from tests.mesh import ROOT, Mesh, running_mesh, running_program
from tests.postgres import running_postgres

# How long an example takes says how busy the machine is, and nothing of what is tested.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")

DatabasesOf = Callable[..., AbstractAsyncContextManager[str]]
StartMesh = Callable[..., AbstractContextManager[Mesh]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """See the marker "rare"."""
    parser.addoption("--rare", action="store_true", help="only the cases that make chaos runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rare cases, or all others."""
    sorts: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        sorts[item.get_closest_marker("rare") is not None].append(item)
    is_wanted = bool(config.getoption("--rare"))
    config.hook.pytest_deselected(items=sorts[not is_wanted])
    items[:] = sorts[is_wanted]


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still until it is told to go on."""
    return ManualClock()


@pytest.fixture
def free_port() -> int:
    """A loopback port that nothing listens on."""
    return free_addresses(1)[0].port


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real nats-server with JetStream, shared by the run: name streams after your test."""
    folder, [address] = tmp_path_factory.mktemp("nats"), free_addresses(1)
    token = servers.new_token()
    program = servers.nats_program(folder, address, token=token, environ=os.environ)
    with running_program(program, folder):
        yield servers.nats_url(address, token)


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Valkey, shared by the run: begin your keys with your test's name."""
    folder, [address] = tmp_path_factory.mktemp("valkey"), free_addresses(1)
    token = servers.new_token()
    program = servers.valkey_program(folder, address, token=token, environ=os.environ)
    with running_program(program, folder):
        yield servers.valkey_url(address, token)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real Postgres, shared by the run: each test makes databases of its own in it."""
    with running_postgres() as server:
        yield server


@pytest.fixture
async def postgres_places(postgres_server: PostgresServer) -> AsyncIterator[PostgresPlaces]:
    """Places on the shared Postgres."""
    async with AsyncExitStack() as stack:
        yield PostgresPlaces(postgres_server, stack)


@pytest.fixture
def sqlite_places(tmp_path: Path) -> SqlitePlaces:
    """Places in the test's own folder."""
    return SqlitePlaces(tmp_path)


@pytest.fixture(params=["sqlite", "postgres"])
def places(request: pytest.FixtureRequest) -> Places:
    """Each database engine in turn: every test that asks for it runs on both."""
    return request.getfixturevalue(f"{request.param}_places")


@pytest.fixture(scope="session")
def databases_of(postgres_server: PostgresServer) -> DatabasesOf:
    """Opens what TENFOLD_<SERVICE>_DATABASE names on an engine: "" for SQLite."""

    @asynccontextmanager
    async def open_databases(
        engine: str, migrations: Path, shard_count: int = 4
    ) -> AsyncIterator[str]:
        if engine == "sqlite":
            yield ""
            return
        service = migrations.parent.name
        async with postgres_server.shards(
            shard_count, migrations=migrations, service=service
        ) as databases:
            yield databases

    return open_databases


@pytest.fixture(scope="session")
def mail_sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The local mail sink: "HOST:PORT", and the folder where each message becomes an .eml file."""
    folder, [address] = tmp_path_factory.mktemp("mail"), free_addresses(1)
    with running_program(servers.mail_program(folder, address, environ=os.environ), folder):
        yield str(address), folder


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The whole embedded mesh, shared by the run: kill nothing in it, use `start_mesh` for that."""
    with running_mesh(tmp_path_factory.mktemp("mesh") / "data") as running:
        yield running


@pytest.fixture
def start_mesh(tmp_path: Path) -> StartMesh:
    """Starts a mesh of the test's own: `with start_mesh() as mesh`, perhaps of another tree."""
    numbers = itertools.count(1)

    def start(
        *,
        data: Path | None = None,
        tree: Path = ROOT,
        environ: Mapping[str, str] | None = None,
        edge: str = "127.0.0.1:0",
        environ_of_start: Mapping[str, str] | None = None,
    ) -> AbstractContextManager[Mesh]:
        folder = data or tmp_path / f"mesh-{next(numbers)}"
        return running_mesh(
            folder, tree=tree, environ=environ, edge=edge, environ_of_start=environ_of_start
        )

    return start


@pytest.fixture(scope="session")
def sign_in() -> Callable[[Mesh], str]:
    """Signs a new user up and in, over REST; the access token."""
    return Mesh.sign_up_and_in
