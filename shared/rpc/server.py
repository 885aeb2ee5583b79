"""A gRPC server with health, reflection and our chain around every handler."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    reflection,
    reflection_pb2_grpc,
)

from shared import log
from shared.config import RPC_ENGINES
from shared.identity import IdentityVerifier
from shared.lifecycle import Registration
from shared.rpc.engine import EngineLimits, open_engine
from shared.rpc.health import Health
from shared.rpc.interceptors import (
    CALLS_MAX,
    READ_TIMEOUT_S,
    STREAM_IDLE_S,
    STREAMS_MAX,
    Chain,
    Limiter,
    MethodHandler,
)
from shared.rpc.policy import STREAM_DEADLINE_MAX_S, Access, MethodPolicy, contract_policies
from shared.telemetry.metrics import Metrics

HEALTH_SERVICE = "grpc.health.v1.Health"
REFLECTION_SERVICE: str = reflection.SERVICE_NAME

# How long a stop waits for clients to see NOT_SERVING before it takes no more calls.
DRAIN_S = 0.2


def _infrastructure(path: str, *, client_streaming: bool, server_streaming: bool) -> MethodPolicy:
    long_s = STREAM_DEADLINE_MAX_S if server_streaming else 5.0
    return MethodPolicy(
        path,
        access=Access.PUBLIC,
        deadline_default_s=long_s,
        deadline_max_s=long_s,
        client_streaming=client_streaming,
        server_streaming=server_streaming,
    )


# Health and reflection are no contracts of ours; they tell nothing that is not in this tree.
_INFRASTRUCTURE = {
    policy.path: policy
    for policy in (
        _infrastructure(f"/{HEALTH_SERVICE}/Check", client_streaming=False, server_streaming=False),
        _infrastructure(f"/{HEALTH_SERVICE}/List", client_streaming=False, server_streaming=False),
        _infrastructure(f"/{HEALTH_SERVICE}/Watch", client_streaming=False, server_streaming=True),
        _infrastructure(
            f"/{REFLECTION_SERVICE}/ServerReflectionInfo",
            client_streaming=True,
            server_streaming=True,
        ),
    )
}


@dataclass(frozen=True)
class RpcServerConfig:
    """How a server behaves.

    Attributes:
        engine: TENFOLD_RPC_ENGINE.
        limits: what the engine holds its peers to.
        calls_max, streams_max: how many handlers may run at once.
        read_timeout_s, stream_idle_s: how long to wait for a client's messages.
        reflection: whether clients may read the contracts from the server.
        logs_requests: whether each call leaves a line, where the level lets it through.
    """

    engine: str = RPC_ENGINES[0]
    limits: EngineLimits = field(default_factory=EngineLimits)
    calls_max: int = CALLS_MAX
    streams_max: int = STREAMS_MAX
    read_timeout_s: float = READ_TIMEOUT_S
    stream_idle_s: float = STREAM_IDLE_S
    reflection: bool = True
    logs_requests: bool = True


class RpcServer:
    """One listening server; it hosts any number of gRPC services.

    Args:
        address: "127.0.0.1:9090"; port 0 picks a free one.
        verifier: believes or refuses the identity that calls carry.
        config: how it behaves.
        policies: what may be called by whom; by default what our contracts say.
        metrics: where calls are counted and timed.

    Raises:
        ValueError: there is no such engine.
    """

    def __init__(
        self,
        *,
        address: str,
        verifier: IdentityVerifier,
        config: RpcServerConfig | None = None,
        policies: Mapping[str, MethodPolicy] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.config = config or RpcServerConfig()
        self._engine = open_engine(self.config.engine, address, self.config.limits)
        self._health = Health()
        self._services: list[str] = []
        known = contract_policies() if policies is None else policies
        self._chain = Chain(
            verifier=verifier,
            policies={**known, **_INFRASTRUCTURE},
            calls=Limiter(self.config.calls_max),
            streams=Limiter(self.config.streams_max),
            metadata_bytes_max=2 * self.config.limits.metadata_bytes_max,
            read_timeout_s=self.config.read_timeout_s,
            stream_idle_s=self.config.stream_idle_s,
            logs_requests=self.config.logs_requests and log.writes_requests(),
            metrics=metrics or Metrics(),
        )
        # Probes must pass when the server is full, and leave no line every second.
        self._probes = Chain(
            verifier=verifier,
            policies=_INFRASTRUCTURE,
            open_streams=self._chain.open_streams,
            logs_requests=False,
        )

    @property
    def services(self) -> list[str]:
        """The full names of the services added so far."""
        return list(self._services)

    def add(self, registration: Registration) -> None:
        """Host one gRPC service; before start. It is NOT_SERVING until set_serving."""
        names = self._register(registration, self._chain)
        for name in names:
            self._health.set_serving(name, False)
        self._services += names

    def _register(self, registration: Registration, chain: Chain) -> list[str]:
        collector = _Collector()
        registration.add_to_server(registration.handler, collector)  # type: ignore[arg-type]
        for service, handlers in collector.handlers.items():
            wrapped = {
                method: chain.wrap(f"/{service}/{method}", handler)
                for method, handler in handlers.items()
            }
            self._engine.add_methods(service, wrapped)
        return list(collector.handlers)

    async def start(self) -> int:
        """Listen; returns the bound port.

        Raises:
            OSError: the address is taken or cannot be bound.
        """
        add_health = health_pb2_grpc.add_HealthServicer_to_server
        self._register(Registration(add_health, self._health), self._probes)
        if self.config.reflection:
            names = (*self._services, HEALTH_SERVICE, REFLECTION_SERVICE)
            handler = reflection.aio.ReflectionServicer(names)
            add_reflection = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
            self._register(Registration(add_reflection, handler), self._probes)
        return await self._engine.start()

    def set_serving(self, service: str, is_serving: bool) -> None:
        """State whether a service serves, by its full name; "" is the process as a whole."""
        self._health.set_serving(service, is_serving)

    async def stop(self, grace_s: float) -> None:
        """Stop so that no call is lost: health off, streams ended, the rest finished.

        Args:
            grace_s: how long running calls may take; what is left then is cancelled.
        """
        self._health.shut_down()
        await asyncio.sleep(min(DRAIN_S, grace_s))
        self._chain.end_streams()
        await self._engine.stop(grace_s)


class _Collector:
    """Stands where generated code expects a server, and takes the handlers."""

    def __init__(self) -> None:
        self.handlers: dict[str, Mapping[str, MethodHandler]] = {}

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """Not needed: the same handlers come by name."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, MethodHandler]
    ) -> None:
        self.handlers[service] = handlers
