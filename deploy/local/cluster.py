"""The cluster's shape on one machine: sharded Postgres, a NATS cluster, a process per service.

Payment and the edge run twice. Each shard is one Postgres server with its replicas; it holds
one database for each service. See shard.py for what happens when one dies.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import structlog

from deploy.local import postgres, servers
from deploy.local.address import Address, free_addresses, require_free
from deploy.local.data_folder import ClusterShape, DataFolder, open_data_folder, write_private
from deploy.local.embedded import (
    EDGE_SETTING,
    EDGE_STOP_TIMEOUT_S,
    METRICS_SETTING,
    SERVICES_STOP_TIMEOUT_S,
    Launch,
)
from deploy.local.errors import LaunchError
from deploy.local.program import Program, accepts, answers_http_ok
from deploy.local.report import Report
from deploy.local.run import Run
from deploy.local.shard import Shard
from deploy.local.supervisor import Supervisor
from shared.db.errors import DatabaseRefused
from shared.db.postgres_gate import pass_gate
from shared.db.postgres_shards import parse_servers

SERVICES = ("auth", "media", "notification", "payment", "reporting")
# The package of a service's contracts, where it has another name.
PACKAGES = {"payment": "ledger"}
# Twice each, so that what holds for one process only is found here and not in production.
TWICE = 2
NATS_NODES = 3
SHARDS, REPLICAS = 4, 1


def shape_of(folder: DataFolder, *, shards: int | None, replicas: int | None) -> ClusterShape:
    """The size that was asked for, else what the folder has, else 4 and 1.

    Raises:
        LaunchError: it would leave out a server that holds data.
    """
    known = folder.read_cluster() or ClusterShape(secrets.token_hex(8), 0, -1)
    shape = ClusterShape(
        known.name,
        (known.shards or SHARDS) if shards is None else shards,
        (known.replicas if known.shards else REPLICAS) if replicas is None else replicas,
    )
    for name, asked, least in (
        ("shards", shape.shards, known.shards),
        ("replicas", shape.replicas, known.replicas),
    ):
        if asked < least:
            raise LaunchError(
                f"--{name} is {asked}, and the cluster in {folder.path} has {least}: "
                "start it with at least as many, or choose another folder with --data."
            )
    return shape


class Cluster(Run):
    """One run of the cluster.

    Args:
        launch: what was asked for; the second edge listens one port above the first.
        shape: how large.
        folder: the open data folder.
        report: where progress goes.
        is_synchronous: see Shard.

    Raises:
        LaunchError: a port is taken, or a program is missing.
    """

    def __init__(
        self,
        launch: Launch,
        shape: ClusterShape,
        folder: DataFolder,
        report: Report,
        *,
        is_synchronous: bool,
    ) -> None:
        super().__init__(folder, report)
        self._is_synchronous = is_synchronous
        self._environ = launch.environ
        self._shape = shape
        self._nats_token, self._valkey_token = servers.new_token(), servers.new_token()
        self._edges = _edges_at(launch.edge)
        self._places = _Places(avoid=[edge.port for edge in self._edges])
        self._nats = [
            servers.NatsNode(name, folder.nats / name, self._places.take(), self._places.take())
            for name in _numbered("nats", NATS_NODES)
        ]
        self._valkey, self._mail = self._places.take(), self._places.take()
        self._services = {
            name: self._places.take()
            for service in SERVICES
            for name in (_numbered(service, TWICE) if service == "payment" else [service])
        }
        names = [*self._services, *_numbered("edge", TWICE)]
        self._metrics = {name: self._places.take() for name in names}
        self._shards: Sequence[Shard] = ()

    async def _start(self, supervisor: Supervisor) -> None:
        self._report.step(f"starting {self._shape.shards} Postgres servers, NATS and Valkey")
        self._shards = [await self._open_shard(index) for index in range(self._shape.shards)]
        await _together(
            supervisor.start(*self._server_programs()),
            *(shard.start(supervisor, SERVICES) for shard in self._shards),
        )
        databases = json.dumps(self._databases())
        write_private(self._folder.databases, databases.encode())
        self._report.step("starting the services and the edges")
        await supervisor.start(*self._service_programs(), *self._edge_programs())

    async def _open_shard(self, index: int) -> Shard:
        place = self._folder.postgres / self._shape.name / f"shard_{index}"
        site = await asyncio.to_thread(postgres.open_site, place, self._environ)
        nodes = _numbered("node", 1 + self._shape.replicas, between="_")
        return Shard(
            index,
            site,
            {node: self._places.take() for node in nodes},
            say=self._report.say,
            on_promoted=self._pass_gates,
            is_synchronous=self._is_synchronous,
        )

    async def _pass_gates(self, index: int) -> None:
        """Compare a promoted shard with each service's Control, as services do that meet it."""

        async def pass_one(service: str, dsns: str) -> str:
            try:
                done = await pass_gate(parse_servers(dsns, service=service), index)
            except DatabaseRefused as error:
                return f"not compared with {service}'s Control yet, {str(error).splitlines()[0]}"
            return "; ".join(done.problems)

        databases = zip(SERVICES, self._databases().values(), strict=True)
        told = await asyncio.gather(*(pass_one(service, dsns) for service, dsns in databases))
        if found := [problem for problem in told if problem]:
            others = f" (and {len(found) - 1} more)" if found[1:] else ""
            self._report.say(f"shard {index}: {found[0]}{others}")

    def _server_programs(self) -> list[Program]:
        folder, environ = self._folder, self._environ
        return [
            *servers.nats_cluster_programs(self._nats, token=self._nats_token, environ=environ),
            servers.valkey_program(
                folder.valkey, self._valkey, token=self._valkey_token, environ=environ
            ),
            servers.mail_program(folder.mail, self._mail, environ=environ),
        ]

    def _service_programs(self) -> list[Program]:
        databases = self._databases()
        programs = []
        for name, address in self._services.items():
            service = name.partition("-")[0]
            variable = f"TENFOLD_{service.upper()}_DATABASE"
            own = {variable: databases[variable], "TENFOLD_LISTEN": str(address)}
            programs.append(
                Program(
                    name=name,
                    argv=servers.python_module("services", service),
                    environment={**self._environment(name, issuer="services"), **own},
                    address=address,
                    is_ready=accepts(address),
                    stop_rank=1,
                    stop_timeout_s=SERVICES_STOP_TIMEOUT_S,
                )
            )
        return programs

    def _edge_programs(self) -> list[Program]:
        return [
            Program(
                name=name,
                argv=servers.python_module("edge"),
                environment={
                    **self._environment(name, issuer="edge"),
                    EDGE_SETTING: str(address),
                    "TENFOLD_EDGE_EDGE_COUNT": str(TWICE),
                },
                address=address,
                is_ready=answers_http_ok(address, "/readyz"),
                stop_rank=0,
                stop_timeout_s=EDGE_STOP_TIMEOUT_S,
            )
            for name, address in zip(_numbered("edge", TWICE), self._edges, strict=True)
        ]

    def _environment(self, name: str, *, issuer: str) -> dict[str, str]:
        folder = self._folder
        return {
            **self._environ,
            "PYTHONUNBUFFERED": "1",
            "TENFOLD_DATA": str(folder.path),
            "TENFOLD_UPSTREAMS": self._upstreams(name),
            "TENFOLD_NATS_URL": ",".join(
                servers.nats_url(node.address, self._nats_token) for node in self._nats
            ),
            "TENFOLD_NATS_REPLICAS": str(NATS_NODES),
            "TENFOLD_VALKEY_URL": servers.valkey_url(self._valkey, self._valkey_token),
            "TENFOLD_IDENTITY_FOLDER": str(folder.identity),
            "TENFOLD_IDENTITY_ISSUER": issuer,
            METRICS_SETTING: str(self._metrics[name]),
            "TENFOLD_SECRET_FILE": str(folder.secret),
            "TENFOLD_NOTIFICATION_SMTP_URL": f"smtp://{self._mail}",
        }

    def _upstreams(self, name: str) -> str:
        """Who serves what; a second process of a kind calls the second of the others."""
        place = "2" if name.endswith("-2") else "1"
        targets = {}
        for service in SERVICES:
            address = self._services.get(service) or self._services[f"{service}-{place}"]
            targets[f"tenfold.{PACKAGES.get(service, service)}"] = address
        return ",".join(f"{package}={address}" for package, address in targets.items())

    def _databases(self) -> dict[str, str]:
        return {
            f"TENFOLD_{service.upper()}_DATABASE": ",".join(
                shard.dsn(service) for shard in self._shards
            )
            for service in SERVICES
        }

    def _state(self) -> Mapping[str, Any]:
        edges = [f"http://{edge}" for edge in self._edges]
        metrics = {name: f"http://{address}/metrics" for name, address in self._metrics.items()}
        databases = [str(shard.site.folder) for shard in self._shards]
        return {"edge": edges[0], "edges": edges, "metrics": metrics, "databases": databases}

    def _summary(self) -> list[str]:
        folder, shape = self._folder, self._shape
        return [
            *(f"  edge       http://{edge}" for edge in self._edges),
            f"  reference  http://{self._edges[0]}/docs",
            f"  admin key  {folder.admin_key} (secret: whoever reads it may do everything)",
            f"  shards     {shape.shards}, replicas of each: {shape.replicas};"
            " 'tenfold shards list media' shows one service's",
            f"  data       {folder.path}",
            f"  databases  {', '.join(str(shard.site.folder) for shard in self._shards)}",
            f"  mail       {folder.mail} (every e-mail that is sent lands here)",
            f"  logs       {folder.logs}",
        ]


def run_cluster(
    launch: Launch,
    report: Report,
    *,
    shards: int | None = None,
    replicas: int | None = None,
    is_synchronous: bool = True,
) -> None:
    """Run the cluster in the foreground until a signal ends it.

    Args:
        launch: what was asked for.
        report: where progress goes.
        shards: Postgres servers, 1 to 16; None for what the folder has, else 4.
        replicas: of each, 0 to 3; None for what the folder has, else 1.
        is_synchronous: see Shard.

    Raises:
        LaunchError: one sentence why it cannot start or go on.
    """
    with open_data_folder(launch.data) as folder:
        folder.require_shape("cluster")
        shape = shape_of(folder, shards=shards, replicas=replicas)
        folder.write_cluster(shape)
        folder.make_keys()
        # What the gate has to tell is told by the report.
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        run = Cluster(launch, shape, folder, report, is_synchronous=is_synchronous)
        try:
            asyncio.run(run.run())
        finally:
            report.done()
            folder.databases.unlink(missing_ok=True)
            folder.forget_state()


class _Places:
    """Free loopback addresses, none given twice."""

    def __init__(self, *, avoid: Sequence[int]) -> None:
        self._taken = set(avoid)

    def take(self) -> Address:
        [address] = free_addresses(1, avoid=self._taken)
        self._taken.add(address.port)
        return address


def _edges_at(first: Address) -> list[Address]:
    if first.port == 0:
        return [Address(first.host, one.port) for one in free_addresses(TWICE)]
    edges = [Address(first.host, first.port + number) for number in range(TWICE)]
    if edges[-1].port > 65535:
        raise LaunchError(f"--edge {first} leaves no port above it for the second edge.")
    for edge in edges:
        require_free(edge, setting=f"--edge or {EDGE_SETTING}")
    return edges


def _numbered(name: str, count: int, *, between: str = "-") -> list[str]:
    return [f"{name}{between}{number}" for number in range(1, count + 1)]


async def _together(*work: Coroutine[Any, Any, None]) -> None:
    """Run all of it; the first failure ends the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for one in work:
                tasks.create_task(one)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group
