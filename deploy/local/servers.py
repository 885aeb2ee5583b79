"""nats-server, valkey-server and the mail sink as programs, with the settings we rely on."""

import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.local import binaries
from deploy.local.address import Address
from deploy.local.data_folder import write_private
from deploy.local.program import Program, answers

# Everything a laptop needs; a cluster sets its own.
NATS_MEMORY = "96MiB"
NATS_CONFIG = """\
# Written by the launcher at every start.
listen: {address}
server_name: tenfold
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
    config = folder / "nats.conf"
    quoted = {"address": json.dumps(str(address)), "store_dir": json.dumps(str(folder))}
    write_private(config, NATS_CONFIG.format(**quoted, token=json.dumps(token)).encode())
    return Program(
        name="nats",
        argv=[str(binaries.nats_server(environ)), "--config", str(config)],
        environment={"GOMEMLIMIT": NATS_MEMORY, **_path(environ)},
        address=address,
        is_ready=answers(address, expect=b"INFO "),
        stop_rank=STOP_RANK,
    )


def nats_url(address: Address, token: str) -> str:
    """How a client reaches nats_program."""
    return f"nats://{token}@{address}"


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
