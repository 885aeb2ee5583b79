"""Open, serve, drain, close: the shape of a process that hosts services."""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

Loop = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Registration:
    """One gRPC service and who handles it.

    Attributes:
        add_to_server: the generated add_<Service>Servicer_to_server.
        handler: the object whose methods are the RPCs.
    """

    add_to_server: Callable[[Any, grpc.aio.Server], None]
    handler: object


@dataclass(frozen=True)
class Service:
    """What a service's wiring gives to the process that hosts it.

    Attributes:
        name: the folder's name: "payment".
        registrations: the gRPC services it serves.
        loops: what runs beside the requests until cancelled: relays, workers, sweepers.
    """

    name: str
    registrations: Sequence[Registration]
    loops: Sequence[Loop] = field(default=())
