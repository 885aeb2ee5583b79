"""grpc.health.v1: what serves, for probes, load balancers and clients.

The status of "" is that of the process. Our own handler, since the one that comes with
grpcio-health-checking writes to the engine's context and would stand outside the chain: its
open watches held up every stop (spec d.1).
"""

import asyncio
from collections.abc import AsyncIterator

from grpc_health.v1.health_pb2 import (  # type: ignore[import-untyped]
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)

from shared.errors import NotFound
from shared.rpc.context import Context


class Health:
    """The status of each service, and those who watch it."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {"": HealthCheckResponse.NOT_SERVING}
        self._changed = asyncio.Event()
        self._is_shutting_down = False

    def set_serving(self, service: str, is_serving: bool) -> None:
        """State whether a service ("" for the process) serves; ignored once shutting down."""
        if not self._is_shutting_down:
            self._set(service, is_serving)

    def shut_down(self) -> None:
        """Nothing serves from now on, for ever."""
        self._is_shutting_down = True
        for service in self._statuses:
            self._set(service, False)

    def _set(self, service: str, is_serving: bool) -> None:
        served = HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
        self._statuses[service] = served
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: HealthCheckRequest, _context: Context) -> HealthCheckResponse:
        """The status now; NOT_FOUND for a service that is not here."""
        status = self._statuses.get(request.service)
        if status is None:
            raise NotFound("there is no such service here")
        return HealthCheckResponse(status=status)

    async def List(self, _request: HealthListRequest, _context: Context) -> HealthListResponse:
        """The status of every service."""
        statuses = {
            service: HealthCheckResponse(status=status)
            for service, status in self._statuses.items()
        }
        return HealthListResponse(statuses=statuses)

    async def Watch(
        self, request: HealthCheckRequest, _context: Context
    ) -> AsyncIterator[HealthCheckResponse]:
        """The status now and whenever it changes."""
        sent: int | None = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, HealthCheckResponse.SERVICE_UNKNOWN)
            if status != sent:
                yield HealthCheckResponse(status=status)
                sent = status
            await changed.wait()
