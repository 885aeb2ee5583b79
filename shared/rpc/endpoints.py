"""The addresses of one target, and a connection to each.

Names are resolved again every while and after every loss. Calls go around over the connections
that serve (gRPC's round robin, with the health checks of gRFC A17), but for addresses that only
fail (its outlier detection, gRFC A50): those wait, and are tried with one call at a time.
"""

import asyncio
import contextlib
import contextvars
import ipaddress
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from functools import partial

from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckResponse  # type: ignore[import-untyped]

from shared import log
from shared.rpc.breaker import Breaker, BreakerLimits
from shared.rpc.call import Call, ConnectionLost
from shared.rpc.header_block import Headers
from shared.rpc.http2 import Http2Connection

CONNECT_TIMEOUT_S = 5.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.1, 2.0
# A name may get new addresses while the old ones still answer.
RESOLVE_S = 30.0
HEALTH_RETRY_S = 1.0
# When an address is left out. Never more than half of them are: what ails more than half is
# no fault of an address, and the others could not carry it.
OUTLIER_LIMITS = BreakerLimits(in_a_row=5, open_s=1.0, open_max_s=30.0)

HEALTH_WATCH_PATH = "/grpc.health.v1.Health/Watch"
_UNIMPLEMENTED = b"12"

Address = tuple[str, int]

_log = log.get_logger("rpc.endpoints")


class Endpoints:
    """Connections to every address of a target.

    Args:
        host: a name or an address.
        port: of all addresses.
        on_change: called when calls may find something else here.
        watch_block: the headers of a health watch; b"" takes every connection to serve.
        keepalive_s, ping_timeout_s: see Http2Connection.
        tls: how the servers are believed to be the host; None speaks plaintext.

    Attributes:
        served_at_s: when one of them began to take calls for the last time.
    """

    def __init__(
        self,
        host: str,
        port: int,
        on_change: Callable[[], None],
        *,
        watch_block: bytes,
        keepalive_s: float,
        ping_timeout_s: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._host, self._port = host, port
        self.served_at_s = float("-inf")
        self._on_change = on_change
        self._new_endpoint = partial(
            Endpoint,
            host=host,
            tls=tls,
            on_change=self._changed,
            watch_block=watch_block,
            keepalive_s=keepalive_s,
            ping_timeout_s=ping_timeout_s,
            may_eject=self._may_eject,
        )
        self._endpoints: list[Endpoint] = []
        self._leaving: list[Endpoint] = []
        self._turn = 0
        self._has_no_address = False
        self._resolve_now = asyncio.Event()
        self._owner: asyncio.Task[None] | None = None

    @property
    def is_down(self) -> bool:
        """Whether every address is known to take no calls, or there is none."""
        return self._has_no_address or (
            bool(self._endpoints) and all(endpoint.is_down for endpoint in self._endpoints)
        )

    @property
    def places(self) -> int:
        """How many more calls could be started now."""
        connections = [e.connection for e in self._endpoints if e.connection is not None]
        return sum(c.calls_max - c.calls_in_flight for c in connections if c.has_capacity)

    def pick(self) -> Http2Connection | None:
        """The next serving connection with room, in turn.

        Whoever makes a call on it notes with its breaker how that ends.
        """
        endpoints, is_any_left_out = self._endpoints, False
        for _ in endpoints:
            self._turn = (self._turn + 1) % len(endpoints)
            connection = endpoints[self._turn].connection
            if connection is not None and connection.has_capacity:
                breaker = connection.breaker
                if breaker.is_closed or breaker.admits(time.monotonic()):
                    return connection
                is_any_left_out = True
        return self._left_out() if is_any_left_out else None

    def _left_out(self) -> Http2Connection | None:
        """One that is ejected, if all others have gone since."""
        connections = [e.connection for e in self._endpoints if e.connection is not None]
        if any(connection.breaker.is_closed for connection in connections):
            return None  # they are only full
        return next((c for c in connections if c.has_capacity), None)

    def _may_eject(self) -> bool:
        ejected = sum(not endpoint.breaker.is_closed for endpoint in self._endpoints)
        return ejected < len(self._endpoints) // 2

    def start(self) -> None:
        """Begin to connect, if that has not begun."""
        if self._owner is None or self._owner.done():
            # Its own context: what it logs has nothing to do with the call that came first.
            self._owner = asyncio.create_task(self._run(), context=contextvars.Context())
            self._owner.add_done_callback(self._ended)

    def _ended(self, owner: asyncio.Task[None]) -> None:
        """Say at once what broke; whoever makes the next call starts it again."""
        if not owner.cancelled() and (error := owner.exception()) is not None:
            _log.error("addresses are not kept any more", host=self._host, exc_info=error)

    async def close(self) -> None:
        """Close every connection; calls in flight fail."""
        if self._owner is not None:
            self._owner.cancel()
            await asyncio.wait([self._owner])
        endpoints, self._endpoints, self._leaving = [*self._endpoints, *self._leaving], [], []
        await asyncio.gather(*(endpoint.close() for endpoint in endpoints))

    async def _run(self) -> None:
        """Keep an endpoint for every address, until cancelled."""
        running: dict[Address, tuple[Endpoint, asyncio.Task[None]]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                self._resolve_now.clear()
                addresses = await self._resolve(running)
                self._leaving = [endpoint for endpoint in self._leaving if not endpoint.is_idle]
                for address in set(running) - set(addresses):
                    endpoint, task = running.pop(address)
                    task.cancel()  # its calls go on
                    self._leaving.append(endpoint)
                for address in addresses:
                    if address not in running:
                        endpoint = self._new_endpoint(address)
                        running[address] = endpoint, group.create_task(endpoint.run())
                self._endpoints = [endpoint for endpoint, _ in running.values()]
                self._on_change()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RESOLVE_S if running else RECONNECT_MAX_S):
                        await self._resolve_now.wait()

    async def _resolve(self, known: Iterable[Address]) -> list[Address]:
        """The target's addresses; those known, if the name cannot be resolved at the moment."""
        if _is_address(self._host):
            return [(self._host, self._port)]
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # the latter: no name can be written like this
            if not self._has_no_address:
                _log.warning("name not resolved", host=self._host, error=str(error))
            self._has_no_address = not (addresses := list(known))
            return addresses
        self._has_no_address = False
        return list(dict.fromkeys((str(where[0]), self._port) for *_, where in found))

    def _changed(self, *, is_lost: bool, is_serving: bool = False) -> None:
        if is_serving:
            self.served_at_s = time.monotonic()
        if is_lost and not _is_address(self._host):
            self._resolve_now.set()
        self._on_change()


class Endpoint:
    """One address: a connection to it is kept while its task runs.

    Args:
        address: host and port.
        on_change: told when calls may find something else here.
        may_eject: whether there are enough others to leave this one out.
        host, tls, watch_block, keepalive_s, ping_timeout_s: see Endpoints.

    Attributes:
        connection: the one that takes calls, if any does.
        breaker: how the calls to it went; outlives connections.
        is_down: whether it is known to take none.
    """

    def __init__(
        self,
        address: Address,
        *,
        host: str,
        tls: ssl.SSLContext | None,
        on_change: Callable[..., None],
        may_eject: Callable[[], bool],
        watch_block: bytes,
        keepalive_s: float,
        ping_timeout_s: float,
    ) -> None:
        self.connection: Http2Connection | None = None
        self.breaker = Breaker(OUTLIER_LIMITS, may_open=may_eject)
        self.is_down = False
        self._address = address
        self._host = host
        self._tls = tls
        self._on_change = on_change
        self._watch_block = watch_block
        self._keepalive_s = keepalive_s
        self._ping_timeout_s = ping_timeout_s
        self._open: list[Http2Connection] = []  # the last one, and those that are drained

    @property
    def is_idle(self) -> bool:
        """Whether no connection is open."""
        return all(connection.is_closed for connection in self._open)

    async def run(self) -> None:
        """Connect, and connect again; when cancelled, let calls in flight end."""
        backoff_s = RECONNECT_MIN_S
        while True:
            # From one begin to the next, as gRPC counts: what was good for longer is replaced
            # at once.
            next_s = time.monotonic() + backoff_s * random.uniform(0.8, 1.2)  # noqa: S311
            was_good = await self._hold_one()
            backoff_s = RECONNECT_MIN_S if was_good else min(RECONNECT_MAX_S, 2 * backoff_s)
            await asyncio.sleep(max(0, next_s - time.monotonic()))

    async def close(self) -> None:
        """Close what is open; calls in flight fail. Its task has ended before."""
        for connection in self._open:
            connection.close()
        await asyncio.gather(*(connection.wait_closed() for connection in self._open))

    async def _hold_one(self) -> bool:
        """Connect, and return when that connection takes no more calls; whether it ever did."""
        retired = asyncio.Event()
        connection = await self._connect(retired)
        if connection is None:
            return False
        watch = _HealthWatching(self, connection, self._watch_block)
        try:
            watch.start()
            while connection.is_usable:
                await retired.wait()
                retired.clear()
        finally:
            watch.stop()
            self.connection = None
            connection.drain()
        if connection.was_pinged_too_often:
            self._keepalive_s *= 2  # gRFC A8
        if connection.ending:
            self._log("connection ended", connection.ending)
        self._on_change(is_lost=True)
        return True

    async def _connect(self, retired: asyncio.Event) -> Http2Connection | None:
        """A connection on which the server speaks HTTP/2, or None after saying why not."""

        def changed() -> None:
            retired.set()
            self._on_change(is_lost=False)

        connection = Http2Connection(
            changed,
            is_pinged_when_idle=bool(self._watch_block),
            keepalive_s=self._keepalive_s,
            ping_timeout_s=self._ping_timeout_s,
            breaker=self.breaker,
        )
        self._open = [connection for connection in self._open if not connection.is_closed]
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._open_socket(connection)
                self._open.append(connection)
                await connection.has_begun
        except (OSError, TimeoutError, ConnectionLost) as error:
            connection.close()
            self.fail("not connected", str(error) or "no answer in time")
            return None
        except asyncio.CancelledError:
            connection.close()
            raise
        return connection

    async def _open_socket(self, connection: Http2Connection) -> None:
        server_name = None if self._tls is None else self._host
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: connection, *self._address, ssl=self._tls, server_hostname=server_name
        )
        encryption = transport.get_extra_info("ssl_object")
        if encryption is not None and encryption.selected_alpn_protocol() != "h2":
            raise ConnectionLost("over TLS, the server does not choose HTTP/2")

    def serve(self, connection: Http2Connection) -> None:
        """Take calls on this connection."""
        self.connection = connection
        self.is_down = False
        self._on_change(is_lost=False, is_serving=True)

    def fail(self, event: str, why: str) -> None:
        """Take no calls for now."""
        if not self.is_down:
            self._log(event, why)
        self.connection = None
        self.is_down = True
        self._on_change(is_lost=True)

    def _log(self, event: str, why: str) -> None:
        host, port = self._address
        _log.info(event, host=host, port=port, why=why)


class _HealthWatching:
    """Asks a server about itself as a whole, as long as its connection is used."""

    def __init__(self, endpoint: Endpoint, connection: Http2Connection, block: bytes) -> None:
        self._endpoint = endpoint
        self._connection = connection
        self._block = block
        self._watch: _HealthWatch | None = None
        self._again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch; without a block every connection serves."""
        if not self._block:
            self._endpoint.serve(self._connection)
        elif self._connection.has_capacity:
            self._watch = _HealthWatch(self)
            self._connection.start(self._watch, self._block, b"")
        else:
            self._start_later()

    def stop(self) -> None:
        """Watch no longer."""
        if self._again is not None:
            self._again.cancel()
        if self._watch is not None:
            self._connection.cancel(self._watch)

    def tell(self, *, is_serving: bool) -> None:
        """What the server said."""
        if is_serving:
            self._endpoint.serve(self._connection)
        else:
            self._endpoint.fail("not serving", "its health check says so")

    def end(self, why: str, *, has_told: bool) -> None:
        """The watch is over. What it told holds until the next; one that told nothing failed."""
        self._watch = None
        if self._connection.is_usable:
            if not has_told:
                self._endpoint.fail("no health check", why)
            self._start_later()

    def _start_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._again = loop.call_later(HEALTH_RETRY_S, self.start)


class _HealthWatch(Call):
    """One call of grpc.health.v1.Health/Watch."""

    __slots__ = ("_has_told", "_watching")

    def __init__(self, watching: _HealthWatching) -> None:
        super().__init__()
        self._watching = watching
        self._has_told = False

    def on_message(self, message: bytes) -> bool:
        try:
            status = HealthCheckResponse.FromString(message).status
        except DecodeError:
            return False
        self._has_told = True
        self._watching.tell(is_serving=status == HealthCheckResponse.SERVING)
        return True

    def on_end(self, _initial: Headers, trailing: Headers) -> None:
        status = trailing.get(b"grpc-status", b"none")
        if status == _UNIMPLEMENTED:  # it knows no health: it serves
            self._watching.tell(is_serving=True)
        else:
            self._watching.end(f"status {status.decode('latin-1')}", has_told=self._has_told)

    def on_failure(self, error: Exception) -> None:
        self._watching.end(str(error), has_told=self._has_told)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
