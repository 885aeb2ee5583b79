"""The engine "native": HTTP/2 in Rust threads outside the GIL, handlers in Python.

It uses the lower of pygrpc-native's two interfaces. Calls come from a queue in batches, each
with its whole request message; methods whose requests are streams, and unknown paths, go through
it to a grpcio engine on a Unix socket that this process alone can reach.

What differs from grpcio, each shown by a test (test_hostile.py, test_traps.py, test_engine.py):

- It keeps a whole message in memory before it can refuse it for its size: a plain one as it
  grows, a compressed one inflated. So it listens on loopback or a Unix socket only.
- A call whose message never comes, or has a prefix that promises 4 GiB, is ended by its own
  deadline and by nothing else. It holds a few kilobytes and none of our places, since Python
  does not know of it yet.
- A malformed grpc-timeout counts as none and a malformed binary header as absent, where grpcio
  refuses the call. A query after the path is cut off.
- Some refusals have other names: INTERNAL for a message that is missing or cut short,
  UNIMPLEMENTED for an unknown encoding, HTTP 431 (to gRPC clients UNKNOWN) for too much metadata,
  a reset for a path without its slash or an authority that is a list of addresses.
- Clients that ping too often are answered, not turned away; `ping_min_s` and `pending_max` have
  no effect.
- A stop sends no GOAWAY before its end: clients that watch health leave by themselves, and who
  still calls is served for the first half of the grace, then refused.
"""

import asyncio
import ipaddress
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import grpc.aio

from shared.rpc.engine import EngineLimits, GrpcioEngine, Metadata, RpcMethod

try:
    from pygrpc_native import EVENT_CANCEL, STREAM_CLOSED, STREAM_FULL, NativeGrpcFront
except ImportError as error:
    raise ValueError(
        "TENFOLD_RPC_ENGINE=native needs the package pygrpc-native, which is not installed or has"
        " no wheel for this platform: use grpcio"
    ) from error

# Measured on one loop: a second thread adds a quarter to the CPU of a call and serves no more.
IO_THREADS = 1
EVENTS_AT_ONCE_MAX = 64
# How long a stream waits for a caller that is behind before it looks again; at first not at all.
LOOKS_AT_ONCE = 10
BEHIND_MIN_S, BEHIND_MAX_S = 0.001, 0.020
# How long a stop waits for its last answers to leave. Calls whose messages never came look the
# same, so it cannot be for ever.
FLUSH_MAX_S, FLUSH_LOOK_S = 1.0, 0.005

Event = tuple[Any, ...]


class NativeEngine:
    """See RpcEngine.

    Raises:
        ValueError: TLS, connection age, compression or another address than one of this machine
            is asked for; one sentence that says what to do.
    """

    def __init__(self, address: str, limits: EngineLimits) -> None:
        _require_possible(address, limits)
        self._address = address
        self._limits = limits
        self._paths: list[tuple[str, bool]] = []
        self._methods: list[RpcMethod] = []
        self._fallback: _Fallback | None = None
        self._front: NativeGrpcFront | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._refuses = False
        self._ends_streams = False

    def add_methods(self, service: str, methods: Mapping[str, RpcMethod]) -> None:
        """See RpcEngine.add_methods."""
        streamed = {name: method for name, method in methods.items() if method.client_streaming}
        for name in methods.keys() - streamed.keys():
            self._paths.append((f"/{service}/{name}", methods[name].server_streaming))
            self._methods.append(methods[name])
        if streamed:
            self._fallback = self._fallback or _Fallback(self._limits)
            self._fallback.add_methods(service, streamed)

    async def start(self) -> int:
        """See RpcEngine.start."""
        front = self._bind()
        if self._fallback is not None:
            front.set_fallback(await self._fallback.start())
        front.start()
        self._front = front
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=self._forward, args=(front, loop), name="rpc-events", daemon=True
        ).start()
        return front.bound_port

    def _bind(self) -> NativeGrpcFront:
        limits = self._limits
        try:
            return NativeGrpcFront(
                self._address,
                self._paths,
                io_threads=IO_THREADS,
                call_details=True,
                delay_stream_headers=True,
                metrics=True,
                keepalive_time_ms=round(limits.keepalive_s * 1000),
                keepalive_timeout_ms=round(limits.ping_timeout_s * 1000),
                max_concurrent_streams=limits.connection_calls_max,
                max_metadata_size=2 * limits.metadata_bytes_max,
            )
        except OSError as error:
            raise OSError(f"cannot listen on {self._address}: {error.strerror}") from error

    def _forward(self, front: NativeGrpcFront, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: hand events to the loop until the front is closed."""
        while (events := front.recv_batch_details(EVENTS_AT_ONCE_MAX)) is not None:
            try:
                loop.call_soon_threadsafe(self._take, front, loop, events, time.monotonic())
            except RuntimeError:  # the loop was closed without a stop
                front.close()

    def _take(
        self,
        front: NativeGrpcFront,
        loop: asyncio.AbstractEventLoop,
        events: Sequence[Event],
        came_s: float,
    ) -> None:
        for kind, call_id, method_id, message, _peer, details in events:
            if kind == EVENT_CANCEL:
                self._cancel(call_id)
                continue
            method = self._methods[method_id]
            if refusal := self._refusal_of(method, message):
                front.fail(call_id, *refusal)
                continue
            call = _Call(front, call_id, method, message, details=details, came_s=came_s)
            self._tasks[call_id] = loop.create_task(self._run(call))

    def _refusal_of(self, method: RpcMethod, message: bytes) -> tuple[int, str] | None:
        if len(message) > self._limits.receive_bytes_max:
            return _number(grpc.StatusCode.RESOURCE_EXHAUSTED), "the request message is too large"
        if len(self._tasks) >= self._limits.concurrent_max:
            return _number(grpc.StatusCode.RESOURCE_EXHAUSTED), "the server is full"
        if self._refuses or (self._ends_streams and method.server_streaming):
            return _number(grpc.StatusCode.UNAVAILABLE), "the server is stopping"
        return None

    def _cancel(self, call_id: int) -> None:
        """The caller has left, or its deadline has passed."""
        task = self._tasks.get(call_id)
        if task is not None:
            # One that has not begun yet never comes to its own end.
            task.add_done_callback(lambda _: self._tasks.pop(call_id, None))
            task.cancel()

    async def _run(self, call: "_Call") -> None:
        try:
            call.answer(await call.method.serve(None, call))
        except grpc.aio.AbortError:
            pass  # answered
        except asyncio.CancelledError:
            call.fail(grpc.StatusCode.UNAVAILABLE, "the server is stopping")  # if it still waits
            raise
        except BaseException:
            call.fail(grpc.StatusCode.INTERNAL, "an internal error occurred")
            raise
        finally:
            del self._tasks[call.call_id]

    async def stop(self, grace_s: float) -> None:
        """See RpcEngine.stop; safe to repeat."""
        self._ends_streams = True
        async with asyncio.TaskGroup() as group:
            if self._fallback is not None:
                group.create_task(self._fallback.stop(grace_s))
            group.create_task(self._finish(grace_s))
        front, self._front = self._front, None
        if front is not None:
            await _flush(front)
            await asyncio.to_thread(front.close)
        if self._fallback is not None:
            self._fallback.close()

    async def _finish(self, grace_s: float) -> None:
        """Serve, then refuse, until nothing runs; cancel what outlives the grace."""
        start_s = time.monotonic()
        await self._idle(start_s + grace_s / 2)
        self._refuses = True
        await self._idle(start_s + grace_s)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _idle(self, until_s: float) -> None:
        while self._tasks and (left_s := until_s - time.monotonic()) > 0:
            await asyncio.wait(list(self._tasks.values()), timeout=left_s)


async def _flush(front: NativeGrpcFront) -> None:
    """Let the last answers leave: closing the front drops what is still on its way."""
    until_s = time.monotonic() + FLUSH_MAX_S
    while _unanswered(front) and time.monotonic() < until_s:  # noqa: ASYNC110  no event tells
        await asyncio.sleep(FLUSH_LOOK_S)


def _unanswered(front: NativeGrpcFront) -> int:
    """How many calls have begun and not ended on the wire."""
    metrics = front.metrics()
    assert metrics is not None  # they are switched on
    return sum(
        method["started"] - sum(ended["count"] for ended in method["status"].values())
        for method in metrics["methods"].values()
    )


class _Fallback:
    """A grpcio engine on a Unix socket, for methods whose requests are streams.

    The socket has no name once it listens, so that a process that is killed leaves none behind:
    it is reached over a descriptor, and thus by nobody else.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = replace(limits, connection_age_s=0)
        self._services: dict[str, Mapping[str, RpcMethod]] = {}
        self._engine: GrpcioEngine | None = None
        self._socket = -1

    def add_methods(self, service: str, methods: Mapping[str, RpcMethod]) -> None:
        self._services[service] = methods

    async def start(self) -> str:
        """Listen; returns the path of the socket."""
        with tempfile.TemporaryDirectory(prefix="tenfold-rpc-") as folder:  # mode 0700
            self._engine = GrpcioEngine(f"unix:{folder}/socket", self._limits)
            for service, methods in self._services.items():
                self._engine.add_methods(service, methods)
            await self._engine.start()
            self._socket = os.open(f"{folder}/socket", os.O_PATH | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._socket}"

    async def stop(self, grace_s: float) -> None:
        """Nothing happens if it has not been started, or has been stopped."""
        if self._engine is not None:
            await self._engine.stop(grace_s)

    def close(self) -> None:
        """Give the path up, when nobody connects to it any more."""
        if self._socket >= 0:
            os.close(self._socket)
            self._socket = -1


class _Call:
    """See RpcCall. Its one request message has come with it."""

    __slots__ = (
        "_came_s", "_details", "_front", "_headers", "_message", "_trailers", "call_id", "method",
    )  # fmt: skip

    def __init__(
        self,
        front: NativeGrpcFront,
        call_id: int,
        method: RpcMethod,
        message: bytes,
        *,
        details: Any,  # noqa: ANN401
        came_s: float,
    ) -> None:
        self._front = front
        self._message: bytes | None = message
        self._details = details  # (metadata, peer, seconds left or None)
        self._came_s = came_s  # on time.monotonic()
        self._headers: list[tuple[str, str | bytes]] | None = None
        self._trailers: list[tuple[str, str | bytes]] | None = None
        self.call_id = call_id
        self.method = method

    def invocation_metadata(self) -> Metadata:
        """See RpcCall."""
        metadata: Metadata = self._details[0]
        return metadata

    def time_remaining(self) -> float | None:
        """See RpcCall."""
        left_s: float | None = self._details[2]
        return None if left_s is None else left_s - (time.monotonic() - self._came_s)

    async def read(self) -> Any:  # noqa: ANN401
        """See RpcCall."""
        message, self._message = self._message, None
        return grpc.aio.EOF if message is None else message

    async def write(self, message: bytes) -> None:
        """See RpcCall."""
        looks, wait_s = 0, 0.0
        while (sent := self._front.stream_try_send(self.call_id, message)) == STREAM_FULL:
            # Not the package's blocking send: a thread per slow caller would soon be all there are.
            await asyncio.sleep(wait_s)
            looks += 1
            if looks >= LOOKS_AT_ONCE:
                wait_s = min(max(2 * wait_s, BEHIND_MIN_S), BEHIND_MAX_S)
        if sent == STREAM_CLOSED:  # the event that says so is on its way; do not go on until then
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """See RpcCall; a unary answer takes them along."""
        if self.method.server_streaming:
            self._front.stream_send_initial_metadata(self.call_id, list(metadata))
        else:
            self._headers = list(metadata)

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """See RpcCall."""
        self._trailers = list(metadata)

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata
    ) -> NoReturn:
        """See RpcCall."""
        self._trailers = list(trailing_metadata)
        self.fail(code, details)
        raise grpc.aio.AbortError

    def fail(self, code: grpc.StatusCode, details: str) -> None:
        """End the call, unless it has ended."""
        self._front.fail(self.call_id, _number(code), details, self._trailers)

    def answer(self, message: bytes) -> None:
        """End the call well."""
        if self.method.server_streaming:
            self._front.stream_end(self.call_id, self._trailers)
        else:
            self._front.respond(self.call_id, message, self._headers, self._trailers)


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number


def _require_possible(address: str, limits: EngineLimits) -> None:
    if limits.tls is not None:
        what = "serve TLS: use grpcio, or plaintext on this machine"
    elif limits.compresses:
        what = "compress answers: use grpcio, or switch compression off"
    elif limits.connection_age_s:
        what = "age connections: use grpcio, or set TENFOLD_RPC_CONNECTION_AGE_S=0"
    elif not _is_of_this_machine(address):
        what = (
            f"listen on {address}, only on loopback, since it keeps a message of any size in"
            " memory before it refuses it: use grpcio"
        )
    else:
        return
    raise ValueError(f"TENFOLD_RPC_ENGINE=native cannot {what}")


def _is_of_this_machine(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if address.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
