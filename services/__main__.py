"""python -m services auth payment: run these in one process; "all" runs every one.

python -m services migrate all: bring their databases to the newest schema and end.

One gRPC server hosts all of them. The process exits 0 after SIGTERM or SIGINT, and 1 with one
sentence when a setting is wrong.
"""

import asyncio
import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

# Nothing here may load gRPC before the spawner's helper has been forked: see run.
from shared.config import ConfigError, ProcessConfig, load, read_trust
from shared.spawner import Spawner

if TYPE_CHECKING:
    from shared.lifecycle import Service
    from shared.rpc.server import RpcServer
    from shared.runtime import Runtime
    from shared.telemetry.metrics import Metrics

ALL = "all"
MIGRATE = "migrate"
PREFIX = "TENFOLD_"


def known_services() -> list[str]:
    """Every folder beside this file that has a wiring."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/wiring.py"))


def chosen_services(arguments: Sequence[str]) -> list[str]:
    """The services that the command line names.

    Raises:
        ConfigError: none is named, or one does not exist.
    """
    known = known_services()
    if not arguments:
        raise ConfigError(f"Name the services to run: {', '.join(known)}, or {ALL}.")
    for name in arguments:
        if name not in {*known, ALL}:
            raise ConfigError(f"There is no service {name!r}: use {', '.join(known)}, or {ALL}.")
    return known if ALL in arguments else list(dict.fromkeys(arguments))


async def serve(names: Sequence[str], environ: Mapping[str, str], spawner: Spawner) -> None:
    """Run these services until SIGTERM or SIGINT.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
        OSError: the address to listen on is taken.
    """
    from shared import log
    from shared.identity import IdentityVerifier, RevocationList
    from shared.runtime import open_runtime
    from shared.telemetry.metrics import Metrics
    from shared.telemetry.scrapes import open_telemetry

    config = load(ProcessConfig, PREFIX, environ)
    log.configure(config.log_level)
    log.install_loop_handler(asyncio.get_running_loop())
    revocations = RevocationList()
    verifier = IdentityVerifier(read_trust(config.identity_path), revocations=revocations)
    metrics = Metrics(is_served=bool(config.metrics_listen))
    server = _server_of(config, verifier, metrics)
    async with AsyncExitStack() as stack:
        told = open_telemetry(metrics, config.metrics_listen)
        metrics_port = await stack.enter_async_context(told)
        runtime = await stack.enter_async_context(
            open_runtime(
                config,
                environ,
                name="-".join(names),
                spawner=spawner,
                revocations=revocations,
                set_serving=server.set_serving,
                metrics=metrics,
            )
        )
        services = [await _open(name, runtime, stack) for name in names]
        for service in services:
            for registration in service.registrations:
                server.add(registration)
        await _run(server, services, runtime, metrics_port)


async def migrate(names: Sequence[str], environ: Mapping[str, str]) -> None:
    """Migrate every shard of these services, each service even if another fails.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
        DatabaseRefused: a shard was not migrated; the sentences name each.
    """
    from shared.db.engines import migrate_shards
    from shared.db.errors import DatabaseRefused

    data, refused = load(ProcessConfig, PREFIX, environ).data, []
    for name in names:
        wiring, folder = (
            importlib.import_module(f"services.{name}.wiring"),
            data / "services" / name,
        )
        try:
            count = await migrate_shards(wiring.shard_settings(folder, environ))
        except DatabaseRefused as error:
            refused.append(str(error))
        else:
            sys.stdout.write(f"{name}: {count} shards are at the newest schema\n")
    if refused:
        raise DatabaseRefused("\n".join(refused))


def _server_of(config: ProcessConfig, verifier: object, metrics: "Metrics") -> "RpcServer":
    from shared.identity import IdentityVerifier
    from shared.rpc.engine import EngineLimits
    from shared.rpc.server import RpcServer, RpcServerConfig

    assert isinstance(verifier, IdentityVerifier)
    try:
        return RpcServer(
            address=config.listen,
            verifier=verifier,
            config=RpcServerConfig(
                engine=config.rpc_engine,
                limits=EngineLimits(connection_age_s=config.rpc_connection_age_s),
                calls_max=config.rpc_calls_max,
                reflection=config.rpc_reflection,
            ),
            metrics=metrics,
        )
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


async def _open(name: str, runtime: "Runtime", stack: AsyncExitStack) -> "Service":
    # Imported only when named: a process pays for what it runs.
    wiring = importlib.import_module(f"services.{name}.wiring")
    service: Service = await stack.enter_async_context(wiring.open_service(runtime))
    return service


async def _run(
    server: "RpcServer", services: Sequence["Service"], runtime: "Runtime", metrics_port: int
) -> None:
    from shared import log
    from shared.identity_feed import run_revocation_feed
    from shared.rpc.client import Upstreams

    stopping = _stop_signal()
    port = await server.start()
    if not runtime.config.upstreams:
        runtime.channels.upstreams = Upstreams({"*": f"127.0.0.1:{port}"})
    logger = log.get_logger("services")
    try:
        async with asyncio.TaskGroup() as group:
            feed = run_revocation_feed(runtime.channels, runtime.revocations)
            tasks = [group.create_task(feed, name="revocations")]
            for service in services:
                for number, loop in enumerate(service.loops):
                    tasks.append(group.create_task(loop(), name=f"{service.name}.{number}"))
            for name in (*server.services, ""):
                server.set_serving(name, True)
            names = [service.name for service in services]
            logger.info("serving", port=port, services=names, metrics_port=metrics_port)
            await stopping.wait()
            logger.info("stopping")
            await server.stop(runtime.config.stop_grace_s)
            for task in tasks:
                task.cancel()
    finally:
        await server.stop(0)


def _stop_signal() -> asyncio.Event:
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    return stopping


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the program; returns its exit code."""
    try:
        if arguments[:1] == [MIGRATE]:
            asyncio.run(migrate(chosen_services(arguments[1:]), environ))
            return 0
        names = chosen_services(arguments)
        load(ProcessConfig, PREFIX, environ)  # refused before anything is started
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our one sentence says it
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        spawner = Spawner.start()
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve(names, environ, spawner))
        finally:
            spawner.close()
            _flush_log()
    except BaseExceptionGroup as group:
        return _failed(group)
    except Exception as error:
        return _failed(error)
    return 0


def _failed(error: BaseException) -> int:
    """Say why in one sentence if it is a setting or the machine, else with a traceback."""
    from shared.db.errors import DatabaseRefused
    from shared.listening import ListenError

    if isinstance(error, ConfigError | ListenError | OSError | DatabaseRefused):
        sys.stderr.write(f"{error}\n")
        return 1
    raise error


def _flush_log() -> None:
    from shared import log

    log.writer().flush()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], os.environ))
