"""The seam behind which an RPC engine sits; grpcio is the default and the reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio

ENGINES = ("grpcio",)


@dataclass(frozen=True)
class EngineLimits:
    """What an engine holds its peers to.

    Attributes:
        receive_bytes_max: one message.
        metadata_bytes_max: the metadata of one call; twice that is refused outright.
        concurrent_max: calls at once, a backstop above the chain's own limits.
        pending_max: calls that wait for the loop; far above our own limits, since the core
            answers what is beyond it with a bare CANCELLED.
        connection_age_s: after which a client is asked to connect anew, so that load finds
            new processes; 0 for never.
        connection_grace_s: how long calls on an aged connection may still take.
        keepalive_s, ping_timeout_s: after how much silence to ping, and how long to wait.
        ping_min_s: clients that ping more often are turned away.
    """

    receive_bytes_max: int = 4 * 1024 * 1024
    metadata_bytes_max: int = 8 * 1024
    concurrent_max: int = 6000
    pending_max: int = 20_000
    connection_age_s: float = 300
    connection_grace_s: float = 30
    keepalive_s: float = 30
    ping_timeout_s: float = 10
    ping_min_s: float = 10


class RpcEngine(Protocol):
    """Speaks HTTP/2 and calls handlers."""

    def add_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Register the handlers of one service, by method name; before start."""
        ...

    async def start(self, address: str) -> int:
        """Listen; returns the bound port.

        Raises:
            OSError: the address is taken or cannot be bound.
        """
        ...

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; cancel what still runs after grace_s."""
        ...


def open_engine(name: str, limits: EngineLimits) -> RpcEngine:
    """The engine of that name (TENFOLD_RPC_ENGINE).

    Raises:
        ValueError: there is none of that name here.
    """
    if name not in ENGINES:
        allowed = " or ".join(ENGINES)
        raise ValueError(f"TENFOLD_RPC_ENGINE={name!r} is not available here; use {allowed}")
    return GrpcioEngine(limits)


class GrpcioEngine:
    """See RpcEngine. grpc.aio with the options that its defaults lack (spec d.1)."""

    def __init__(self, limits: EngineLimits) -> None:
        self._server = grpc.aio.server(
            options=_options(limits), maximum_concurrent_rpcs=limits.concurrent_max
        )

    def add_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """See RpcEngine.add_handlers."""
        self._server.add_registered_method_handlers(service, dict(handlers))

    async def start(self, address: str) -> int:
        """See RpcEngine.start."""
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: the port is taken") from error
        await self._server.start()
        return port

    async def stop(self, grace_s: float) -> None:
        """See RpcEngine.stop."""
        await self._server.stop(grace_s)


def _options(limits: EngineLimits) -> list[tuple[str, int]]:
    options = [
        # Two processes on one port would share its calls silently.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.receive_bytes_max),
        ("grpc.max_metadata_size", limits.metadata_bytes_max),
        ("grpc.absolute_max_metadata_size", 2 * limits.metadata_bytes_max),
        ("grpc.server.max_pending_requests", limits.pending_max),
        ("grpc.server.max_pending_requests_hard_limit", 2 * limits.pending_max),
        ("grpc.keepalive_time_ms", _ms(limits.keepalive_s)),
        ("grpc.keepalive_timeout_ms", _ms(limits.ping_timeout_s)),
        # Without this one a 60 s timeout rules, whatever keepalive_timeout_ms says.
        ("grpc.http2.ping_timeout_ms", _ms(limits.ping_timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _ms(limits.ping_min_s)),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if limits.connection_age_s:
        options.append(("grpc.max_connection_age_ms", _ms(limits.connection_age_s)))
        options.append(("grpc.max_connection_age_grace_ms", _ms(limits.connection_grace_s)))
    return options


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
