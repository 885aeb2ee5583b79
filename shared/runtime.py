"""What a process gives to the services that it hosts."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shared.bus.jetstream import Bus, open_bus
from shared.clock import Clock, SystemClock
from shared.config import ConfigError, ProcessConfig, read_identity_key, read_secret
from shared.identity import IdentitySigner, RevocationList
from shared.rpc.client import Channels, Upstreams
from shared.spawner import Spawner
from shared.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Runtime:
    """What a process gives to the services that it hosts.

    Attributes:
        config: the settings of the process.
        environ: where a service reads its own: load(PaymentConfig, "TENFOLD_PAYMENT_", environ).
        clock: where time comes from.
        bus: NATS; it connects by itself, and again.
        channels: the way to other services' contracts.
        secret: 32 or more bytes that never change for this data; keys every MAC.
        spawner: runs programs such as ffmpeg.
        revocations: credentials that are refused; auth feeds it, the verifier reads it.
        set_serving: states whether a gRPC service, by its full name, serves. A service is set
            to serve when the process is up; use it for what happens later.
        metrics: where a service counts what it does.
    """

    config: ProcessConfig
    environ: Mapping[str, str]
    clock: Clock
    bus: Bus
    channels: Channels
    secret: bytes
    spawner: Spawner
    revocations: RevocationList
    set_serving: Callable[[str, bool], None]
    metrics: Metrics = field(default_factory=Metrics)

    def folder_of(self, service: str) -> Path:
        """Where a service keeps its files: <data>/services/<name>, made if missing."""
        folder = self.config.data / "services" / service
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder


@asynccontextmanager
async def open_runtime(
    config: ProcessConfig,
    environ: Mapping[str, str],
    *,
    name: str,
    spawner: Spawner,
    revocations: RevocationList,
    set_serving: Callable[[str, bool], None],
    metrics: Metrics | None = None,
) -> AsyncIterator[Runtime]:
    """Open what all services of a process share.

    Args:
        config: the settings of the process.
        environ: the settings of the services.
        name: what the process calls itself towards NATS.
        spawner: started before gRPC was loaded; the caller closes it.
        revocations: what the server's verifier looks into.
        set_serving: see Runtime.
        metrics: see Runtime.

    Raises:
        ConfigError: a setting is wrong; the sentence names it.
    """
    signer = IdentitySigner(
        config.identity_issuer, read_identity_key(config.identity_path, config.identity_issuer)
    )
    secret = read_secret(config.secret_path)
    metrics = metrics or Metrics()
    channels = Channels(parse_upstreams(config), signer, metrics=metrics)
    try:
        opened = open_bus(config.nats_url, name=name, replicas=config.nats_replicas)
        async with opened as bus:
            yield Runtime(
                config=config,
                environ=environ,
                clock=SystemClock(),
                bus=bus,
                channels=channels,
                secret=secret,
                spawner=spawner,
                revocations=revocations,
                set_serving=set_serving,
                metrics=metrics,
            )
    finally:
        await channels.close()


def parse_upstreams(config: ProcessConfig) -> Upstreams:
    """TENFOLD_UPSTREAMS; without it everything is at TENFOLD_LISTEN.

    Raises:
        ConfigError: the setting is malformed.
    """
    try:
        return Upstreams.parse(config.upstreams or f"*={config.listen}")
    except ValueError as error:
        raise ConfigError(f"TENFOLD_UPSTREAMS={config.upstreams!r}: {error}.") from error
