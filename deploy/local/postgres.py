"""A Postgres server and its streaming replicas as programs, run by an unprivileged user.

A site is one server's place on this machine: two passwords, and one data folder for each
node. Whether a node is a replica is told by its own folder (standby.signal), so a promoted
replica comes back as the primary that it has become. A primary whose replica is about to be
promoted has its folder renamed first: no start takes it for a server any more.
"""

import os
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg

from deploy.local import binaries
from deploy.local.address import Address
from deploy.local.data_folder import write_private
from deploy.local.errors import LaunchError
from deploy.local.processes import PROC, processes_in
from deploy.local.program import Probe, Program, Successor, answers, speaks
from deploy.local.servers import STOP_RANK
from deploy.local.supervisor import WRAPPER
from deploy.local.unprivileged import (
    User,
    give_to,
    make_private_folder,
    reachable_copy,
    reachable_folder,
    unprivileged_user,
)

PRIMARY = "primary"
"""The node of a site that is asked for no other."""

SIGNAL = "standby.signal"
LOCK_FILE = "postmaster.pid"
ADMIN = "postgres"
"""The superuser: for the launcher and for replication."""

OWNER = "tenfold"
"""Who owns the databases and serves them; no superuser, or triggers could be got round."""

# What a data folder is called after it was fenced, and while one is being made.
FENCED, PARTIAL = "fenced", "partial"
MAKE_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
ADMIN_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0

CONFIG = """\
# Written by the launcher at every start.
listen_addresses = '{host}'
port = {port}
unix_socket_directories = ''
max_connections = 200
password_encryption = scram-sha-256
# No time zone files are needed for this one.
timezone = 'GMT'
log_timezone = 'GMT'
lc_messages = 'C'
shared_buffers = 64MB
max_wal_size = 512MB
jit = off
# Replication: any node may become the primary.
wal_level = replica
max_wal_senders = 10
max_replication_slots = 10
max_slot_wal_keep_size = 2GB
hot_standby = on
# A replica says every second that it lives, and is back soon after it was away.
wal_receiver_status_interval = 1s
wal_retrieve_retry_interval = 500ms
wal_sender_timeout = 10s
# A client lost to a partition cannot hold a bucket.
idle_in_transaction_session_timeout = 10s
tcp_keepalives_idle = 10
tcp_keepalives_interval = 5
tcp_keepalives_count = 3
client_connection_check_interval = 5s
"""
NOT_DURABLE = """\
# For tests: a power cut may leave nothing that can be read.
fsync = off
full_page_writes = off
# In place of checksums: pg_rewind needs one of them.
wal_log_hints = on
"""
REPLICA = """\
primary_conninfo = '{source}'
primary_slot_name = '{slot}'
"""
SYNCHRONOUS = """\
# A commit is acknowledged when one of these has it on its disk, too.
synchronous_standby_names = '{names}'
"""
# A start-up packet: a server that is ready asks for the password ("R").
_HELLO_BODY = struct.pack("!i", 196608) + f"user\0{OWNER}\0database\0postgres\0\0".encode()
HELLO = struct.pack("!i", len(_HELLO_BODY) + 4) + _HELLO_BODY

CLIENTS = """\
# Written by the launcher at every start.
host all all all scram-sha-256
host replication postgres all scram-sha-256
"""


@dataclass(frozen=True)
class Site:
    """One server's place. Make it with open_site.

    Attributes:
        programs: the folder of postgres, initdb, pg_basebackup and pg_rewind.
        folder: holds the nodes' data folders and the passwords.
        user: who runs them; None for us.
        password: OWNER's.
        admin_password: ADMIN's.
        is_durable: whether a power cut loses no commit; only tests may do without.
    """

    programs: Path
    folder: Path
    user: User | None
    password: str
    admin_password: str
    is_durable: bool

    def data_of(self, node: str) -> Path:
        """Where a node keeps its data."""
        return self.folder / node

    def fenced_of(self, node: str) -> Path:
        """Where the data of a node is that may not be started any more."""
        return self.folder / f"{node}.{FENCED}"

    def is_replica(self, node: str) -> bool:
        """Whether the node's data is a replica's."""
        return (self.data_of(node) / SIGNAL).exists()

    def dsn(self, address: Address, database: str) -> str:
        """How a service reaches a database."""
        return _dsn(OWNER, self.password, address, database)

    def admin_dsn(self, address: Address, database: str = "postgres") -> str:
        """How the launcher does."""
        return _dsn(ADMIN, self.admin_password, address, database)


def open_site(folder: Path, environ: Mapping[str, str], *, is_durable: bool = True) -> Site:
    """Find a server's place, making it and its passwords at the first start. Blocking.

    Args:
        folder: where it should be; root's closed folders have a stand-in that Postgres reaches.
        environ: TENFOLD_POSTGRES_BIN may name other programs.
        is_durable: see Site.

    Raises:
        LaunchError: there are no programs, or nobody to run them.
    """
    user = unprivileged_user()
    programs = binaries.postgres_folder(environ)
    place = reachable_folder(folder.absolute(), user)
    return Site(
        programs=reachable_copy(programs.parent, user) / programs.name,
        folder=place,
        user=user,
        password=_password(place / "password"),
        admin_password=_password(place / "admin_password"),
        is_durable=is_durable,
    )


def make_primary(site: Site, node: str = PRIMARY) -> None:
    """Make the data folder of a new server, unless it is there. Blocking; safe to repeat.

    Args:
        site: where.
        node: what it is called.

    Raises:
        LaunchError: initdb failed; the sentence has its last line.
    """

    def make(data: Path) -> None:
        secret = site.folder / "initdb.password"
        write_private(secret, site.admin_password.encode())
        give_to(secret, site.user)
        try:
            _run(
                site,
                "initdb",
                *("--pgdata", str(data), "--username", ADMIN, "--pwfile", str(secret)),
                *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C"),
                *(["--data-checksums"] if site.is_durable else ["--no-sync"]),
            )
        finally:
            secret.unlink()

    _make_data(site, node, make)


def make_replica(site: Site, node: str, primary: Address) -> None:
    """Copy a running primary into a new replica's folder, unless it is there. Blocking.

    Args:
        site: the primary's.
        node: lower-case letters, digits and underscores; also names its replication slot.
        primary: where the primary answers.

    Raises:
        LaunchError: pg_basebackup failed; the sentence has its last line.
    """

    def make(data: Path) -> None:
        _run(
            site,
            "pg_basebackup",
            *("--pgdata", str(data), "--checkpoint", "fast", "--no-password"),
            *("--host", primary.host, "--port", str(primary.port), "--username", ADMIN),
            *([] if site.is_durable else ["--no-sync"]),
        )
        _make_replica_of(site, data)

    _make_data(site, node, make)


def fence(site: Site, node: str) -> None:
    """End a server for good, as it is: its data is kept, and never started as it was. Blocking.

    Durable when it returns; a replica may be promoted then.

    Raises:
        LaunchError: a process of it cannot be ended.
    """
    end_server(site, node)
    shutil.rmtree(site.fenced_of(node), ignore_errors=True)
    site.data_of(node).rename(site.fenced_of(node))
    _sync(site.folder)


def take_back(site: Site, node: str) -> None:
    """Undo a fence: no replica was promoted after all. Blocking."""
    site.fenced_of(node).rename(site.data_of(node))
    _sync(site.folder)


def forget_fenced(site: Site, node: str) -> None:
    """Remove what a fence has kept: the node has new data. Blocking."""
    shutil.rmtree(site.fenced_of(node), ignore_errors=True)


def end_server(site: Site, node: str) -> None:
    """Kill what is left of a server: backends outlive it if it was killed. Blocking.

    Raises:
        LaunchError: one does not end.
    """
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while left := processes_in(site.data_of(node)):
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if time.monotonic() > deadline_s:
            pids = ", ".join(str(process.pid) for process in left)
            raise LaunchError(f"Processes of {site.data_of(node)} cannot be killed: {pids}.")
        time.sleep(0.01)


def drop_stale_lock(site: Site, node: str) -> None:
    """Remove the lock file of a server that was killed, if nobody works in its data. Blocking.

    Postgres believes the file for as long as its user has any process of that number: one that
    nobody has buried yet, or, after the machine's restart, a server of another shard. Ask only
    where nobody else starts this node.
    """
    if PROC.is_dir() and not processes_in(site.data_of(node)):
        (site.data_of(node) / LOCK_FILE).unlink(missing_ok=True)


def rewind(site: Site, node: str, primary: Address) -> bool:
    """Make a fenced server a replica by taking back what the new primary does not have. Blocking.

    Args:
        site: theirs.
        node: the fenced one.
        primary: where the one answers that was promoted, after a checkpoint.

    Returns:
        Whether that was possible; if not, nothing is left of the fenced data.
    """
    partial = site.folder / f"{node}.{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    site.fenced_of(node).rename(partial)  # half done it is of no use to anybody
    try:
        _run(
            site,
            "pg_rewind",
            *("--target-pgdata", str(partial), "--source-server", _source(primary)),
            *([] if site.is_durable else ["--no-sync"]),
        )
    except LaunchError:
        return False
    _make_replica_of(site, partial)
    partial.rename(site.data_of(node))
    return True


def postgres_program(
    site: Site,
    address: Address,
    *,
    node: str = PRIMARY,
    name: str = "",
    source: Address | None = None,
    synchronous: Collection[str] = (),
    successor: Successor | None = None,
) -> Program:
    """A node as a program; writes its settings.

    Args:
        site: where its data is.
        address: where it listens.
        node: which of the site's.
        name: what the supervisor calls it; the node's own name by default.
        source: where the primary answers that a replica follows.
        synchronous: see write_settings.
        successor: see Program.
    """
    data = site.data_of(node)
    write_settings(site, address, node=node, source=source, synchronous=synchronous)
    return Program(
        name=name or node,
        argv=[str(site.programs / "postgres"), "-D", str(data)],
        environment={"PATH": os.defpath, "LC_ALL": "C"},
        address=address,
        is_ready=answers(address, send=HELLO, expect=b"R\0\0\0"),
        stop_rank=STOP_RANK,
        stop_timeout_s=STOP_TIMEOUT_S,
        # SIGTERM would wait for every client to leave; this ends them, and writes a checkpoint.
        stop_signal=signal.SIGINT,
        user=str(site.user or "-"),
        successor=successor,
    )


def write_settings(
    site: Site,
    address: Address,
    *,
    node: str,
    source: Address | None = None,
    synchronous: Collection[str] = (),
) -> None:
    """Write a node's settings; a server that runs takes them at pg_reload_conf().

    Args:
        site: where its data is.
        address: where it listens.
        node: which of the site's.
        source: where the primary answers that a replica follows.
        synchronous: one of these must have a commit before it is acknowledged; () for none.
    """
    settings = CONFIG.format(host=address.host, port=address.port)
    if not site.is_durable:
        settings += NOT_DURABLE
    if source is not None:
        settings += REPLICA.format(source=_conninfo(site, source, node), slot=node)
    if synchronous:
        settings += SYNCHRONOUS.format(names=synchronous_names(synchronous))
    for file, text in (("postgresql.conf", settings), ("pg_hba.conf", CLIENTS)):
        path = site.data_of(node) / file
        write_private(path, text.encode())
        give_to(path, site.user)


def synchronous_names(nodes: Collection[str]) -> str:
    """As the setting synchronous_standby_names has it: any one of them."""
    return f"ANY 1 ({', '.join(sorted(nodes))})"


def is_alive(address: Address) -> Probe:
    """A probe: a server is there and says anything, if only that it is busy."""
    return speaks(address, send=HELLO)


async def ensure_databases(
    site: Site, primary: Address, databases: Sequence[str], *, replicas: Sequence[str] = ()
) -> None:
    """Make the owner, these databases and the replicas' slots, where they are missing.

    Args:
        site: the server's.
        primary: where it answers.
        databases: plain names.
        replicas: the nodes that will follow it.
    """
    async with open_admin(site, primary) as admin:
        # Replicas may not be there yet.
        await admin.execute("SET synchronous_commit = local")
        if not await admin.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", OWNER):
            await admin.execute(f"CREATE ROLE {OWNER} LOGIN")
        # SCRAM keeps no password that could be read back: set again, it is surely ours.
        await admin.execute(f"ALTER ROLE {OWNER} PASSWORD '{site.password}'")
        for database in databases:
            known = "SELECT 1 FROM pg_database WHERE datname = $1"
            if not await admin.fetchval(known, database):
                await admin.execute(f'CREATE DATABASE "{database}" OWNER {OWNER}')
                await admin.execute(f'REVOKE ALL ON DATABASE "{database}" FROM PUBLIC')
        # What has been kept for a replica that was away for too long is of no use to it.
        await admin.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots "
            "WHERE NOT active AND wal_status = 'lost'"
        )
        for slot in replicas:
            known = "SELECT 1 FROM pg_replication_slots WHERE slot_name = $1"
            if not await admin.fetchval(known, slot):
                await admin.fetchval("SELECT pg_create_physical_replication_slot($1, true)", slot)


@asynccontextmanager
async def open_admin(site: Site, address: Address) -> AsyncIterator[Any]:
    """A connection of ADMIN's; no statement on it takes longer than ADMIN_TIMEOUT_S."""
    admin = await asyncpg.connect(
        site.admin_dsn(address), timeout=CONNECT_TIMEOUT_S, command_timeout=ADMIN_TIMEOUT_S
    )
    try:
        yield admin
        await admin.close(timeout=CONNECT_TIMEOUT_S)
    finally:
        admin.terminate()


async def promote(site: Site, replica: Address) -> None:
    """Make a replica the primary; the old one must not run any more."""
    async with open_admin(site, replica) as admin:
        if not await admin.fetchval("SELECT pg_promote(wait_seconds => 30)", timeout=35):
            raise LaunchError(f"The replica at {replica} was not promoted in 30 s: see its log.")


def _make_data(site: Site, node: str, make: Callable[[Path], None]) -> None:
    data, partial = site.data_of(node), site.folder / f"{node}.{PARTIAL}"
    if data.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    make_private_folder(partial, site.user)
    make(partial)
    partial.rename(data)  # whole or not at all, however we end


def _make_replica_of(site: Site, data: Path) -> None:
    (data / SIGNAL).touch(mode=0o600)
    give_to(data / SIGNAL, site.user)


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _run(site: Site, program: str, *arguments: str) -> None:
    command = [sys.executable, "-I", "-S", str(WRAPPER), str(os.getpid()), str(site.user or "-")]
    command += [str(site.programs / program), *arguments]
    done = subprocess.run(
        command,
        env={"PATH": os.defpath, "LC_ALL": "C", "PGPASSWORD": site.admin_password},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MAKE_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LaunchError(f"{program} failed: {lines[-1]}")


def _password(path: Path) -> str:
    if not path.exists():
        write_private(path, secrets.token_hex(16).encode())
    return path.read_text()


def _dsn(user: str, password: str, address: Address, database: str) -> str:
    return f"postgresql://{user}:{password}@{address}/{quote(database)}"


def _conninfo(site: Site, address: Address, name: str) -> str:
    return f"{_source(address)} password={site.admin_password} application_name={name}"


def _source(address: Address) -> str:
    """As libpq reads it; no secret, since a command line is seen by all."""
    place = f"host={address.host} port={address.port}"
    return f"{place} user={ADMIN} dbname=postgres connect_timeout=5"
