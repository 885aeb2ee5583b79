"""A Postgres server of a run's own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local import postgres
from deploy.local.address import free_addresses
from tests.databases import PostgresServer
from tests.mesh import running_program


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A real server, from its wheel; nothing of it is left afterwards."""
    # Not below pytest's own folder, which is closed to the user that Postgres runs as.
    folder, [address] = Path(tempfile.mkdtemp(prefix="tenfold-postgres-")), free_addresses(1)
    folder.chmod(0o711)
    try:
        site = postgres.open_site(folder, os.environ, is_durable=False)
        postgres.make_primary(site)
        with running_program(postgres.postgres_program(site, address), folder):
            yield PostgresServer(site, address)
    finally:
        shutil.rmtree(folder)
