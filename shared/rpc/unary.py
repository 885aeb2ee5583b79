"""Unary calls to one target: over our own HTTP/2, with what gRPC promises of a channel.

Connections are kept to every address of the target, and calls go around over those that serve
(gRPC's round robin, with its health checks). A call that no server has looked at is made again,
whatever it does; one that failed with UNAVAILABLE only where the contract says retry_safe, and
under a budget (gRFC A6). Streams go through `shared.rpc.client`.
"""

import asyncio
import contextlib
import ipaddress
import random
import socket
import time
from base64 import b64decode
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from urllib.parse import unquote

import grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse  # type: ignore[import-untyped]

from shared import log
from shared.errors import DeadlineExceeded, Internal, Overloaded, TenfoldError, Unavailable
from shared.rpc.header_block import Headers, call_block, field, metadata_field, timeout_text
from shared.rpc.http2 import (
    CANCEL,
    Call,
    ConnectionLost,
    Http2Connection,
    NotProcessed,
    StreamReset,
)
from shared.rpc.policy import MethodPolicy
from shared.rpc.status import STATUS_DETAILS_KEY, error_of
from shared.rpc.tls import ClientTls

CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S, PING_TIMEOUT_S = 20.0, 5.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.1, 2.0
# A name may get new addresses while the old ones still answer.
RESOLVE_S = 30.0
HEALTH_RETRY_S = 1.0
# Calls that may wait for a connection, or for a place on one.
WAITING_MAX = 1000
# Attempts of a call that no server has looked at; each is on another connection or later.
UNPROCESSED_MAX = 5

RETRY_ATTEMPTS_MAX = 3
RETRY_BACKOFF_S, RETRY_BACKOFF_MAX_S = 0.05, 1.0
# One budget per target: at most a tenth of the calls are retries once things go wrong.
BUDGET_MAX, BUDGET_PER_SUCCESS = 100.0, 0.1

USER_AGENT = "tenfold-grpc/1"
_HEALTH_PATH = "/grpc.health.v1.Health/Watch"
_NO_PROXY_PREFIX = "dns:///"

# PROTOCOL-HTTP2 of gRPC, "HTTP2 Transport Mapping, Errors".
_CODE_OF_RESET = {
    CANCEL: grpc.StatusCode.CANCELLED,
    0xB: grpc.StatusCode.RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    0xC: grpc.StatusCode.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}
# "HTTP to gRPC Status Code Mapping": an answer of something that is no gRPC server.
_CODE_OF_HTTP = {
    b"400": grpc.StatusCode.INTERNAL,
    b"401": grpc.StatusCode.UNAUTHENTICATED,
    b"403": grpc.StatusCode.PERMISSION_DENIED,
    b"404": grpc.StatusCode.UNIMPLEMENTED,
    b"429": grpc.StatusCode.UNAVAILABLE,
    b"502": grpc.StatusCode.UNAVAILABLE,
    b"503": grpc.StatusCode.UNAVAILABLE,
    b"504": grpc.StatusCode.UNAVAILABLE,
}
_CODES = {str(code.value[0]).encode(): code for code in grpc.StatusCode}
_OK = b"0"

_log = log.get_logger("rpc.unary")


class Answer(NamedTuple):
    """What a unary call brought.

    Attributes:
        message: serialized.
        initial, trailing: metadata; values of "-bin" names still in base 64.
    """

    message: bytes
    initial: Headers
    trailing: Headers


class UnaryChannel:
    """Calls to one target; made and used inside one running loop.

    Args:
        target: "host:port" or "dns:///host:port".
        policies: by path; says which methods may be retried.
        checks_health: whether an address that says NOT_SERVING gets no calls.
        tls: how the servers are believed; None speaks plaintext.
    """

    def __init__(
        self,
        target: str,
        policies: Mapping[str, MethodPolicy],
        *,
        checks_health: bool = True,
        keepalive_s: float = KEEPALIVE_S,
        ping_timeout_s: float = PING_TIMEOUT_S,
        tls: ClientTls | None = None,
    ) -> None:
        self._host, self._port = _host_and_port(target)
        self._authority = target.removeprefix(_NO_PROXY_PREFIX)
        self._context = tls.context() if tls is not None else None
        self._policies = policies
        self._open = partial(
            Http2Connection,
            is_pinged_when_idle=checks_health,
            keepalive_s=keepalive_s,
            ping_timeout_s=ping_timeout_s,
        )
        self._checks_health = checks_health
        self._endpoints: list[_Endpoint] = []
        self._turn = 0
        self._blocks: dict[str, bytes] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._budget = BUDGET_MAX
        self._owner: asyncio.Task[None] | None = None
        self._resolve_now = asyncio.Event()
        self._name_error: TenfoldError | None = None

    async def call(
        self, path: str, message: bytes, *, metadata: Sequence[tuple[str, str]], timeout_s: float
    ) -> Answer:
        """Make one call.

        Args:
            path: "/package.Service/Method".
            message: the serialized request.
            metadata: visible ASCII; names in lower case.
            timeout_s: more than 0; waiting and retries included.

        Raises:
            TenfoldError: what the server answered, or how the call failed.
        """
        deadline_s = time.monotonic() + timeout_s
        fields = b"".join([metadata_field(name, value) for name, value in metadata])
        attempt = unprocessed = 1
        while True:
            try:
                answer = await self._attempt(path, message, fields, deadline_s)
            except NotProcessed as error:
                unprocessed += 1
                if unprocessed > UNPROCESSED_MAX:
                    raise _unavailable() from error
                continue
            except Unavailable:
                if not self._may_retry(path, attempt):
                    raise
                backoff_s = min(RETRY_BACKOFF_MAX_S, RETRY_BACKOFF_S * 2 ** (attempt - 1))
                backoff_s *= random.uniform(0.8, 1.2)  # noqa: S311 - not a secret
                if time.monotonic() + backoff_s >= deadline_s:
                    raise
                attempt += 1
                await asyncio.sleep(backoff_s)
                continue
            if self._budget < BUDGET_MAX:
                self._budget = min(BUDGET_MAX, self._budget + BUDGET_PER_SUCCESS)
            return answer

    async def close(self) -> None:
        """Close every connection; calls in flight fail."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await owner

    # One attempt
    async def _attempt(self, path: str, message: bytes, fields: bytes, deadline_s: float) -> Answer:
        connection = self._pick() or await self._connected(deadline_s)
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise _too_late()
        block = self._block_of(path) + field(b"grpc-timeout", timeout_text(left_s)) + fields
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future())
        call = connection.start(block, message, waiter)
        timer = loop.call_later(left_s, waiter.expire)
        try:
            return await waiter.answer
        finally:
            timer.cancel()
            if not waiter.has_ended:
                connection.cancel(call)
            if self._waiting:
                self._wake_one()

    def _block_of(self, path: str) -> bytes:
        block = self._blocks.get(path)
        if block is None:
            block = self._blocks[path] = call_block(
                path, self._authority, USER_AGENT, is_encrypted=self._context is not None
            )
        return block

    def _may_retry(self, path: str, attempt: int) -> bool:
        """Whether a failed call may be made again; each failure costs the budget a point."""
        self._budget = max(0.0, self._budget - 1)
        policy = self._policies.get(path)
        is_safe = policy is not None and policy.retry_safe
        return is_safe and attempt < RETRY_ATTEMPTS_MAX and self._budget > BUDGET_MAX / 2

    # Connections
    def _pick(self) -> Http2Connection | None:
        """The next serving connection with room, in turn."""
        endpoints = self._endpoints
        for _ in range(len(endpoints)):
            self._turn = (self._turn + 1) % len(endpoints)
            connection = endpoints[self._turn].connection
            if connection is not None and connection.has_capacity:
                return connection
        return None

    async def _connected(self, deadline_s: float) -> Http2Connection:
        """Wait for a connection with room; not while every address is known to be down."""
        if self._owner is None or self._owner.done():
            self._owner = asyncio.create_task(self._run())
        while (connection := self._pick()) is None:
            if self._name_error is not None:
                raise self._name_error
            if self._endpoints and all(endpoint.is_down for endpoint in self._endpoints):
                raise _unavailable()
            await self._wait(deadline_s)
        return connection

    async def _wait(self, deadline_s: float) -> None:
        if len(self._waiting) >= WAITING_MAX:
            raise Overloaded("Too many calls wait for a service.", retry_after_s=0.5)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(max(0, deadline_s - time.monotonic())):
                await turn
        except TimeoutError as error:
            raise _too_late() from error
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(turn)

    def _wake_one(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _wake_all(self) -> None:
        """A connection has come or gone: everybody who waits looks again."""
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)

    async def _run(self) -> None:
        """Keep a connection to every address of the target, until cancelled."""
        running: dict[tuple[str, int], tuple[_Endpoint, asyncio.Task[None]]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                self._resolve_now.clear()
                for address in set(running) ^ set(await self._resolve(running)):
                    if address in running:
                        running.pop(address)[1].cancel()
                    else:
                        endpoint = _Endpoint(
                            address, self._open, self._connect, self._changed, self._watch_block
                        )
                        running[address] = endpoint, group.create_task(endpoint.run())
                self._endpoints = [endpoint for endpoint, _ in running.values()]
                self._wake_all()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RESOLVE_S if running else RECONNECT_MAX_S):
                        await self._resolve_now.wait()

    async def _resolve(self, known: Mapping[tuple[str, int], object]) -> list[tuple[str, int]]:
        """The target's addresses; those known, if the name cannot be resolved at the moment."""
        if _is_address(self._host):
            return [(self._host, self._port)]
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            if not known:
                self._name_error = _unavailable()
                _log.warning("name not resolved", host=self._host, error=str(error))
            return list(known)
        self._name_error = None
        return [(str(where[0]), self._port) for *_, where in found]

    async def _connect(self, connection: Http2Connection, address: tuple[str, int]) -> None:
        await asyncio.get_running_loop().create_connection(
            lambda: connection,
            *address,
            ssl=self._context,
            server_hostname=self._host if self._context is not None else None,
        )

    def _changed(self, *, is_lost: bool) -> None:
        if is_lost and not _is_address(self._host):
            self._resolve_now.set()
        self._wake_all()

    @property
    def _watch_block(self) -> bytes:
        return self._block_of(_HEALTH_PATH) if self._checks_health else b""


class _Waiter:
    """See http2.Receiver. Completes one future with a unary answer, or with why there is none."""

    __slots__ = ("answer", "has_ended", "message")

    def __init__(self, answer: "asyncio.Future[Answer]") -> None:
        self.answer = answer
        self.message: bytes | None = None
        self.has_ended = False

    def on_message(self, message: bytes) -> None:
        self.message = message

    def on_end(self, initial: Headers, trailing: Headers) -> None:
        self.has_ended = True
        if self.answer.done():
            return
        if trailing.get(b"grpc-status") == _OK and self.message is not None:
            self.answer.set_result(Answer(self.message, initial, trailing))
        else:
            self.answer.set_exception(_error_of_answer(initial, trailing))

    def on_failure(self, error: Exception) -> None:
        self.has_ended = True
        if self.answer.done():
            return
        if isinstance(error, StreamReset):
            code = _CODE_OF_RESET.get(error.code, grpc.StatusCode.INTERNAL)
            error = error_of(code, "", None)
        elif isinstance(error, ConnectionLost):
            error = _unavailable()
        self.answer.set_exception(error)

    def expire(self) -> None:
        """The deadline has come."""
        if not self.answer.done():
            self.answer.set_exception(_too_late())


class _Endpoint:
    """One address: a connection to it is kept while the channel lives.

    Args:
        address: host and port.
        open_connection: makes the protocol of a connection.
        connect: connects it to the address.
        changed: told when calls may find something else here.
        watch_block: the headers of a health watch; b"" does not ask.
    """

    def __init__(
        self,
        address: tuple[str, int],
        open_connection: Callable[[Callable[[], None]], Http2Connection],
        connect: Callable[[Http2Connection, tuple[str, int]], Awaitable[None]],
        changed: Callable[..., None],
        watch_block: bytes,
    ) -> None:
        self.connection: Http2Connection | None = None  # while it serves
        self.is_down = False
        self._address = address
        self._open_connection = open_connection
        self._connect = connect
        self._changed = changed
        self._watch_block = watch_block

    async def run(self) -> None:
        """Connect, and connect again; until cancelled."""
        backoff_s = RECONNECT_MIN_S
        draining: list[Http2Connection] = []
        try:
            while True:
                began_s = time.monotonic()
                draining = [connection for connection in draining if not connection.is_closed]
                await self._hold_one(draining)
                if time.monotonic() - began_s > RECONNECT_MAX_S:
                    backoff_s = RECONNECT_MIN_S
                    continue  # it was good for a while: connect anew at once
                await asyncio.sleep(backoff_s * random.uniform(0.8, 1.2))  # noqa: S311
                backoff_s = min(RECONNECT_MAX_S, 2 * backoff_s)
        finally:
            for connection in draining:
                connection.close()

    async def _hold_one(self, draining: list[Http2Connection]) -> None:
        """Connect once, and return when that connection takes no more calls, or none came."""
        closed = asyncio.Event()
        connection = self._open_connection(closed.set)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._connect(connection, self._address)
                draining.append(connection)
                await connection.has_begun
        except (OSError, TimeoutError, ConnectionLost) as error:
            connection.close()
            self._lose(error)
            return
        watch = _HealthWatch(self, connection, self._watch_block)
        watch.start()
        await closed.wait()
        watch.stop()
        self.connection = None
        self._changed(is_lost=True)

    def serve(self, connection: Http2Connection, *, is_serving: bool) -> None:
        """Take calls on this connection, or none."""
        self.connection = connection if is_serving else None
        self.is_down = not is_serving
        self._changed(is_lost=False)

    def _lose(self, error: Exception) -> None:
        if not self.is_down:
            host, port = self._address
            _log.info("not connected", host=host, port=port, error=str(error))
        self.is_down = True
        self._changed(is_lost=True)


class _HealthWatch:
    """See http2.Receiver. What a server says of itself as a whole (grpc.health.v1)."""

    def __init__(self, endpoint: _Endpoint, connection: Http2Connection, block: bytes) -> None:
        self._endpoint = endpoint
        self._connection = connection
        self._block = block
        self._call: Call | None = None
        self._again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch; without a block every connection serves."""
        if not self._block:
            self._endpoint.serve(self._connection, is_serving=True)
        elif self._connection.has_capacity:
            self._call = self._connection.start(self._block, b"", self)

    def stop(self) -> None:
        """Watch no longer."""
        if self._again is not None:
            self._again.cancel()
        if self._call is not None:
            self._connection.cancel(self._call)

    def on_message(self, message: bytes) -> None:
        status = HealthCheckResponse.FromString(message).status
        self._endpoint.serve(self._connection, is_serving=status == HealthCheckResponse.SERVING)

    def on_end(self, _initial: Headers, trailing: Headers) -> None:
        if trailing.get(b"grpc-status") == b"12":  # it knows no health: it serves
            self._endpoint.serve(self._connection, is_serving=True)
        else:
            self._start_again()

    def on_failure(self, _error: Exception) -> None:
        self._start_again()

    def _start_again(self) -> None:
        self._call = None
        if not self._connection.is_closed:
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(HEALTH_RETRY_S, self.start)


def _error_of_answer(initial: Headers, trailing: Headers) -> TenfoldError:
    """The error that a call's last headers tell."""
    status = trailing.get(b"grpc-status")
    if status is None:
        code = _CODE_OF_HTTP.get(initial.get(b":status", b""), grpc.StatusCode.UNKNOWN)
        return error_of(code, "", None)
    if status == _OK:
        return Internal("the service answered without a message")
    code = _CODES.get(status, grpc.StatusCode.UNKNOWN)
    message = unquote(trailing.get(b"grpc-message", b"").decode("latin-1"), errors="replace")
    return error_of(code, message, _binary(trailing.get(STATUS_DETAILS_KEY.encode())))


def _binary(text: bytes | None) -> bytes | None:
    """The value of a "-bin" entry; None where it is no base 64."""
    if text is None:
        return None
    try:
        return b64decode(text + b"=" * (-len(text) % 4))
    except ValueError:
        return None


def _host_and_port(target: str) -> tuple[str, int]:
    host, _, port = target.removeprefix(_NO_PROXY_PREFIX).rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{target!r} is not host:port")
    return host.strip("[]"), int(port)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _unavailable() -> Unavailable:
    return Unavailable("a service that is needed does not answer")


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the time for this call is spent")
