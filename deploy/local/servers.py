"""nats-server, valkey-server and the mail sink as programs, with the settings we rely on."""

import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.local import binaries
from deploy.local.address import Address
from deploy.local.data_folder import write_private
from deploy.local.errors import LaunchError
from deploy.local.program import Program, answers

# Everything a laptop needs; a cluster sets its own.
NATS_MEMORY = "96MiB"
NATS_CONFIG = """\
# Written by the launcher at every start.
listen: {address}
server_name: {name}
max_payload: 1MB
authorization {{ token: {token} }}
jetstream {{
  store_dir: {store_dir}
  max_memory_store: 64MB
  max_file_store: 16GB
  # The default syncs every two minutes: a power cut would lose acknowledged events.
  sync_interval: always
}}
"""
NATS_CLUSTER_CONFIG = """\
cluster {{
  name: tenfold
  listen: {address}
  authorization {{ user: route, password: {token} }}
  routes: {routes}
}}
"""
VALKEY_CONFIG = """\
# Written by the launcher at every start.
bind {host}
port {port}
dir {folder}
requirepass {token}
# Quota points and cached entries: they may be lost at any time, so nothing is saved.
save ""
appendonly no
# When full, drop what would end soonest: the quotas that are nearly full again.
maxmemory 64mb
maxmemory-policy volatile-ttl
"""
STOP_RANK = 2  # After the edge and the services, which need them until the end.


def new_token() -> str:
    """A password for one run: other users of this machine reach loopback ports, too."""
    return secrets.token_hex(16)


def nats_program(
    folder: Path, address: Address, *, token: str, environ: Mapping[str, str]
) -> Program:
    """A JetStream server that keeps its streams in the folder."""
    text = _nats_config("tenfold", folder, address, token)
    return _nats("nats", text, folder, address, environ)


@dataclass(frozen=True)
class NatsNode:
    """One server of a NATS cluster.

    Attributes:
        name: never changes: the others know its copies of the streams by it.
        folder: its own.
        address: where clients reach it.
        route: where the other nodes do.
    """

    name: str
    folder: Path
    address: Address
    route: Address


def nats_cluster_programs(
    nodes: Sequence[NatsNode], *, token: str, environ: Mapping[str, str]
) -> list[Program]:
    """JetStream servers that hold copies of each other's streams."""
    routes = json.dumps([f"nats-route://route:{token}@{node.route}" for node in nodes])
    programs = []
    for node in nodes:
        node.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = _nats_config(node.name, node.folder, node.address, token)
        text += NATS_CLUSTER_CONFIG.format(
            address=json.dumps(str(node.route)), token=json.dumps(token), routes=routes
        )
        programs.append(_nats(node.name, text, node.folder, node.address, environ))
    return programs


def _nats_config(name: str, folder: Path, address: Address, token: str) -> str:
    quoted = {"address": json.dumps(str(address)), "store_dir": json.dumps(str(folder))}
    return NATS_CONFIG.format(**quoted, name=json.dumps(name), token=json.dumps(token))


def _nats(
    name: str, text: str, folder: Path, address: Address, environ: Mapping[str, str]
) -> Program:
    config = folder / "nats.conf"
    write_private(config, text.encode())
    return Program(
        name=name,
        argv=[str(binaries.nats_server(environ)), "--config", str(config)],
        environment={"GOMEMLIMIT": NATS_MEMORY, **_path(environ)},
        address=address,
        is_ready=answers(address, expect=b"INFO "),
        stop_rank=STOP_RANK,
    )


def nats_url(address: Address, token: str) -> str:
    """How a client reaches nats_program."""
    return f"nats://{token}@{address}"


def nats_url_of(folder: Path) -> str:
    """How a client reaches the server that was started last on this folder, from its config.

    Raises:
        LaunchError: none ever was.
    """
    try:
        text = (folder / "nats.conf").read_text()
        listen = json.loads(text.partition("\nlisten: ")[2].partition("\n")[0])
        token = json.loads(text.partition("{ token: ")[2].partition(" }")[0])
    except (OSError, ValueError) as error:
        raise LaunchError(f"No NATS server was ever started in {folder}.") from error
    return nats_url(Address.parse(listen, setting="nats.conf"), token)


def valkey_program(
    folder: Path, address: Address, *, token: str, environ: Mapping[str, str]
) -> Program:
    """A Valkey server that keeps nothing."""
    config = folder / "valkey.conf"
    text = VALKEY_CONFIG.format(
        host=address.host, port=address.port, folder=json.dumps(str(folder)), token=token
    )
    write_private(config, text.encode())
    return Program(
        name="valkey",
        argv=[str(binaries.valkey_server(environ)), str(config)],
        environment=_path(environ),
        address=address,
        is_ready=answers(
            address, send=f"AUTH {token}\r\nPING\r\n".encode(), expect=b"+OK\r\n+PONG"
        ),
        stop_rank=STOP_RANK,
    )


def valkey_url(address: Address, token: str) -> str:
    """How a client reaches valkey_program."""
    return f"redis://:{token}@{address}/0"


def mail_program(folder: Path, address: Address, *, environ: Mapping[str, str]) -> Program:
    """The mail sink: SMTP in, one file per message in the folder."""
    return Program(
        name="mail",
        argv=python_module("deploy.local.mail_sink", str(address), str(folder)),
        environment=environ,
        address=address,
        is_ready=answers(address, expect=b"220 "),
        stop_rank=STOP_RANK,
    )


def python_module(module: str, *arguments: str) -> list[str]:
    """The command for one of our modules; -P keeps the current folder from shadowing any."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _path(environ: Mapping[str, str]) -> dict[str, str]:
    # A server gets nothing that it does not need: our variables hold secrets.
    return {"PATH": environ.get("PATH", os.defpath)}
