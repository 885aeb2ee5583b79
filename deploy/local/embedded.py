"""The embedded mesh: which programs it is made of, where they listen, and its run."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.local import servers
from deploy.local.address import Address, free_addresses, require_free
from deploy.local.data_folder import DataFolder, open_data_folder
from deploy.local.program import Program, accepts, answers_http_ok
from deploy.local.report import Report
from deploy.local.run import Run
from deploy.local.supervisor import Supervisor
from deploy.settings import Setting, value_of

EDGE_SETTING = "TENFOLD_EDGE_LISTEN"
SERVICES_SETTING = "TENFOLD_LISTEN"
METRICS_SETTING = "TENFOLD_METRICS_LISTEN"
# Above the drain times of the children themselves, which end first if all goes well.
EDGE_STOP_TIMEOUT_S = 15.0
SERVICES_STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Addresses:
    """Where each program listens; no port is 0."""

    edge: Address
    services: Address
    nats: Address
    valkey: Address
    mail: Address
    metrics: Mapping[str, Address]  # by the program that tells them


@dataclass(frozen=True)
class Launch:
    """What `tenfold up` was asked to do.

    Attributes:
        data: the data folder.
        edge: where the edge listens; port 0 picks free ports for everything.
        environ: the operator's environment, names already checked.
        settings: every setting, for defaults.
    """

    data: Path
    edge: Address
    environ: Mapping[str, str]
    settings: Mapping[str, Setting]


def choose_addresses(launch: Launch) -> Addresses:
    """Give every program a port that is free now.

    Raises:
        LaunchError: a chosen port is taken; the sentence names the setting.
    """
    text = value_of(SERVICES_SETTING, launch.environ, launch.settings)
    wanted = Address.parse(text, setting=SERVICES_SETTING)
    chosen = {launch.edge.port, wanted.port}
    edge, services, nats, valkey, mail, *others = free_addresses(7, avoid=chosen)
    metrics = dict(zip(("edge", "services"), others, strict=True))
    if given := value_of(METRICS_SETTING, launch.environ, launch.settings):
        metrics["edge"] = Address.parse(given, setting=METRICS_SETTING)
    if launch.edge.port == 0:
        edge = Address(launch.edge.host, edge.port)
        return Addresses(edge, services, nats, valkey, mail, metrics)
    require_free(launch.edge, setting=f"--edge or {EDGE_SETTING}")
    if wanted.port:
        require_free(wanted, setting=SERVICES_SETTING)
        services = wanted
    return Addresses(launch.edge, services, nats, valkey, mail, metrics)


class Mesh(Run):
    """One run of the embedded mesh.

    Args:
        launch: what was asked for.
        folder: the open data folder.
        report: where progress goes.
    """

    def __init__(self, launch: Launch, folder: DataFolder, report: Report) -> None:
        super().__init__(folder, report)
        self._environ = launch.environ
        self._addresses = choose_addresses(launch)
        self._nats_token, self._valkey_token = servers.new_token(), servers.new_token()

    async def _start(self, supervisor: Supervisor) -> None:
        self._report.step("starting nats-server, valkey-server and the mail sink")
        await supervisor.start(*self._server_programs())
        self._report.step("starting the services and the edge")
        await supervisor.start(*self._own_programs())

    def _server_programs(self) -> list[Program]:
        folder, addresses, environ = self._folder, self._addresses, self._environ
        return [
            servers.nats_program(
                folder.nats, addresses.nats, token=self._nats_token, environ=environ
            ),
            servers.valkey_program(
                folder.valkey, addresses.valkey, token=self._valkey_token, environ=environ
            ),
            servers.mail_program(folder.mail, addresses.mail, environ=environ),
        ]

    def _own_programs(self) -> list[Program]:
        addresses = self._addresses
        services = Program(
            name="services",
            argv=servers.python_module("services", "all"),
            environment=self._environment("services"),
            address=addresses.services,
            is_ready=accepts(addresses.services),
            stop_rank=1,
            stop_timeout_s=SERVICES_STOP_TIMEOUT_S,
        )
        edge = Program(
            name="edge",
            argv=servers.python_module("edge"),
            environment=self._environment("edge"),
            address=addresses.edge,
            is_ready=answers_http_ok(addresses.edge, "/readyz"),
            stop_rank=0,
            stop_timeout_s=EDGE_STOP_TIMEOUT_S,
        )
        return [services, edge]

    def _environment(self, program: str) -> dict[str, str]:
        folder, addresses = self._folder, self._addresses
        return {
            **self._environ,
            "PYTHONUNBUFFERED": "1",
            "TENFOLD_DATA": str(folder.path),
            "TENFOLD_LISTEN": str(addresses.services),
            "TENFOLD_EDGE_LISTEN": str(addresses.edge),
            "TENFOLD_UPSTREAMS": f"*={addresses.services}",
            "TENFOLD_NATS_URL": servers.nats_url(addresses.nats, self._nats_token),
            "TENFOLD_VALKEY_URL": servers.valkey_url(addresses.valkey, self._valkey_token),
            "TENFOLD_IDENTITY_FOLDER": str(folder.identity),
            "TENFOLD_IDENTITY_ISSUER": program,
            METRICS_SETTING: str(addresses.metrics[program]),
            "TENFOLD_SECRET_FILE": str(folder.secret),
            "TENFOLD_NOTIFICATION_SMTP_URL": f"smtp://{addresses.mail}",
        }

    @property
    def _edge_url(self) -> str:
        return f"http://{self._addresses.edge}"

    @property
    def _metrics_urls(self) -> dict[str, str]:
        metrics = self._addresses.metrics
        return {name: f"http://{address}/metrics" for name, address in metrics.items()}

    def _state(self) -> Mapping[str, Any]:
        return {"edge": self._edge_url, "metrics": self._metrics_urls}

    def _summary(self) -> list[str]:
        folder, url = self._folder, self._edge_url
        return [
            f"  edge       {url}",
            f"  reference  {url}/docs",
            f"  admin key  {folder.admin_key} (secret: whoever reads it may do everything)",
            f"  data       {folder.path}",
            f"  mail       {folder.mail} (every e-mail that is sent lands here)",
            f"  logs       {folder.logs}",
            f"  metrics    {', '.join(self._metrics_urls.values())}",
        ]


def run_embedded(launch: Launch, report: Report) -> None:
    """Run the embedded mesh in the foreground until a signal ends it.

    Raises:
        LaunchError: one sentence why it cannot start or go on.
    """
    with open_data_folder(launch.data) as folder:
        folder.require_shape("embedded")
        folder.make_keys()
        try:
            asyncio.run(Mesh(launch, folder, report).run())
        finally:
            report.done()
            folder.forget_state()
