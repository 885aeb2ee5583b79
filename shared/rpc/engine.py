"""The seam behind which an RPC engine sits; grpcio is the default and the reference.

An engine speaks HTTP/2, frames messages and runs one coroutine per call. It knows nothing of
what a message says, who calls and what is allowed: the chain does (shared/rpc/interceptors.py).
"""

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias

import grpc.aio

from shared.config import RPC_ENGINES

# What grpcio does where nothing is asked: clients find new processes in minutes.
CONNECTION_AGE_S = 300.0

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class EngineLimits:
    """What an engine holds its peers to, and how it speaks to them.

    Attributes:
        receive_bytes_max: one message; a hostile one of that size takes 40 ms to parse (S84).
        metadata_bytes_max: the metadata of one call; twice that is refused outright.
        concurrent_max: calls at once, a backstop above the chain's own limits.
        connection_calls_max: calls at once of one connection. Well above the 3000 that one of
            our channels makes, since those just ended count for a while; it is what keeps a
            flood of calls that are reset at once from filling the memory (S75).
        pending_max: calls that wait for the loop; far above our own limits, since the core
            answers what is beyond it with a bare CANCELLED.
        connection_age_s: after which a client is asked to connect anew, so that load finds
            new processes; 0 for never, None for what the engine does by itself.
        connection_grace_s: how long calls on an aged connection may still take.
        keepalive_s, ping_timeout_s: after how much silence to ping, and how long to wait.
        ping_min_s: clients that ping more often are turned away.
        compresses: whether answers are compressed (gzip) for clients that can read that.
        tls: what proves who this server is; None for plaintext.
    """

    receive_bytes_max: int = 2 * 1024 * 1024
    metadata_bytes_max: int = 8 * 1024
    concurrent_max: int = 6000
    connection_calls_max: int = 5000
    pending_max: int = 20_000
    connection_age_s: float | None = None
    connection_grace_s: float = 30
    keepalive_s: float = 30
    ping_timeout_s: float = 10
    ping_min_s: float = 10
    compresses: bool = False
    tls: grpc.ServerCredentials | None = None


class RpcCall(Protocol):
    """One call as its engine tells it; grpc.aio.ServicerContext has this shape."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """What the caller sent along; bytes under names that end in "-bin"."""
        ...

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline, 0 or less when it has passed; None without one."""
        ...

    async def read(self) -> Any:  # noqa: ANN401  bytes, or the one value EOF
        """The next request message, serialized; grpc.aio.EOF after the last."""
        ...

    async def write(self, message: bytes) -> None:
        """Send one message of a stream; waits while the caller is behind."""
        ...

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """Send the headers of the answer; at most once, before the first message."""
        ...

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """What to send along with the status of the call."""
        ...

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata
    ) -> NoReturn:
        """End the call with this status; raises grpc.aio.AbortError, which belongs to the engine.

        Trailing metadata given here replaces what was set before.
        """
        ...


@dataclass(frozen=True)
class RpcMethod:
    """One method, served from raw bytes to raw bytes.

    Attributes:
        serve: called for each call, in a task of its own, with something to be ignored and the
            call; it reads what it needs. It returns the answer, serialized, or writes a stream
            and returns None. It raises nothing but AbortError and CancelledError; the latter
            after the caller has left, when the engine cancels the task.
        client_streaming, server_streaming: the method's shape.
    """

    serve: Callable[[Any, Any], Coroutine[Any, Any, Any]]
    client_streaming: bool
    server_streaming: bool


class RpcEngine(Protocol):
    """Speaks HTTP/2 and runs methods."""

    def add_methods(self, service: str, methods: Mapping[str, RpcMethod]) -> None:
        """Register the methods of one service, by name; before start."""
        ...

    async def start(self) -> int:
        """Listen; returns the bound port.

        Raises:
            OSError: the address is taken or cannot be bound.
        """
        ...

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; cancel what still runs after grace_s."""
        ...


def open_engine(name: str, address: str, limits: EngineLimits) -> RpcEngine:
    """The engine of that name (TENFOLD_RPC_ENGINE), to listen on "127.0.0.1:9090".

    Raises:
        ValueError: there is none of that name here, or it cannot do what is asked; one sentence.
    """
    if name == "grpcio":
        return GrpcioEngine(address, limits)
    if name == "native":
        # Only here: its package has no wheel for some platforms.
        from shared.rpc.native import NativeEngine

        return NativeEngine(address, limits)
    raise ValueError(f"TENFOLD_RPC_ENGINE={name!r} is not known; use {' or '.join(RPC_ENGINES)}")


class GrpcioEngine:
    """See RpcEngine. grpc.aio with the options that its defaults lack (spec d.1)."""

    def __init__(self, address: str, limits: EngineLimits) -> None:
        self._address = address
        self._tls = limits.tls
        self._server = grpc.aio.server(
            options=_options(limits),
            maximum_concurrent_rpcs=limits.concurrent_max,
            compression=grpc.Compression.Gzip if limits.compresses else None,
        )

    def add_methods(self, service: str, methods: Mapping[str, RpcMethod]) -> None:
        """See RpcEngine.add_methods."""
        handlers = {name: _handler_of(method) for name, method in methods.items()}
        self._server.add_registered_method_handlers(service, handlers)

    async def start(self) -> int:
        """See RpcEngine.start."""
        try:
            port = self._bind()
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}: the port is taken") from error
        await self._server.start()
        return port

    def _bind(self) -> int:
        if self._tls is None:
            return self._server.add_insecure_port(self._address)
        return self._server.add_secure_port(self._address, self._tls)

    async def stop(self, grace_s: float) -> None:
        """See RpcEngine.stop."""
        await self._server.stop(grace_s)


def _handler_of(method: RpcMethod) -> Any:  # noqa: ANN401
    # The reader-writer shapes give control over when, and how long, a message is read.
    if method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(method.serve)
    return grpc.stream_unary_rpc_method_handler(method.serve)


def _options(limits: EngineLimits) -> list[tuple[str, int]]:
    options = [
        # Two processes on one port would share its calls silently.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.receive_bytes_max),
        ("grpc.max_metadata_size", limits.metadata_bytes_max),
        ("grpc.absolute_max_metadata_size", 2 * limits.metadata_bytes_max),
        ("grpc.max_concurrent_streams", limits.connection_calls_max),
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
    age_s = CONNECTION_AGE_S if limits.connection_age_s is None else limits.connection_age_s
    if age_s:
        options.append(("grpc.max_connection_age_ms", _ms(age_s)))
        options.append(("grpc.max_connection_age_grace_ms", _ms(limits.connection_grace_s)))
    return options


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
