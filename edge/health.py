"""Is this edge alive, and are all services behind it serving?"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import MappingProxyType

from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_health.v1.health_pb2 import HealthCheckRequest  # type: ignore[import-untyped]

from edge.upstream import ChannelSource
from shared.errors import DeadlineExceeded, TenfoldError, Unavailable

CHECK_TIMEOUT_S = 1.0
_CHECK = "/grpc.health.v1.Health/Check"
# Anyone may ask, and each answer costs one call per service.
ANSWER_CACHE_S = 0.25


class Readiness:
    """Asks every upstream service for its health.

    Args:
        channels: where the services are.
        services: full names of the gRPC services that must serve.
        own: further conditions of this process: name -> whether it holds.
        asks_servers: for servers that are not ours: asked for the health of the whole server,
            and ready, too, if it answers that it knows nothing of health.
    """

    def __init__(
        self,
        channels: ChannelSource,
        services: Iterable[str],
        own: Mapping[str, Callable[[], bool]] = MappingProxyType({}),
        *,
        asks_servers: bool = False,
    ) -> None:
        self._channels = channels
        self._services = sorted(services)
        self._own = own
        self._asks_servers = asks_servers
        self._lock = asyncio.Lock()
        self._asked_at_s = float("-inf")
        self._missing: list[str] = []

    async def missing(self) -> list[str]:
        """The names of what is not ready; empty when everything is."""
        async with self._lock:
            if time.monotonic() >= self._asked_at_s + ANSWER_CACHE_S:
                answers = await asyncio.gather(*map(self._is_serving, self._services))
                pairs = zip(self._services, answers, strict=True)
                self._missing = [name for name, is_serving in pairs if not is_serving]
                self._asked_at_s = time.monotonic()
        return self._missing + [name for name, holds in self._own.items() if not holds()]

    async def _is_serving(self, service: str) -> bool:
        """Asked on both ways that requests take: what answers here answers them, too."""
        name = "" if self._asks_servers else service
        request = health_pb2.HealthCheckRequest(service=name)
        asks = self._ask_for_unary(service, request), self._ask_for_streams(service, request)
        return all(await asyncio.gather(*map(self._says_serving, asks)))

    async def _says_serving(self, ask: Awaitable[int]) -> bool:
        try:
            return bool(await ask == health_pb2.HealthCheckResponse.SERVING)
        except (Unavailable, DeadlineExceeded):
            return False
        except TenfoldError:
            return self._asks_servers

    async def _ask_for_unary(self, service: str, request: HealthCheckRequest) -> int:
        answer = await self._channels.unary_channel(service).call(
            _CHECK, request.SerializeToString(), metadata=(), timeout_s=CHECK_TIMEOUT_S
        )
        return int(health_pb2.HealthCheckResponse.FromString(answer.message).status)

    async def _ask_for_streams(self, service: str, request: HealthCheckRequest) -> int:
        stub = health_pb2_grpc.HealthStub(self._channels.channel(service))
        return int((await stub.Check(request, timeout=CHECK_TIMEOUT_S)).status)
