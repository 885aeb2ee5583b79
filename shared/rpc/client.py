"""Channels that carry deadlines, identity and request ids, and raise our errors.

A channel looks like a grpc.aio.Channel to generated stubs; its calls look like grpc.aio's, but
fail with a TenfoldError. Retries happen in gRPC's core by the service config, only for methods
that the contract marks retry_safe, and under one budget per target.
"""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import grpc
import grpc.aio

from shared import causal, deadline, log
from shared.errors import TenfoldError, Unavailable
from shared.identity import IDENTITY_METADATA_KEY, IdentitySigner
from shared.rpc.context import REQUEST_ID_KEY, current_call
from shared.rpc.policy import Access, MethodPolicy, contract_policies
from shared.rpc.status import STATUS_DETAILS_KEY, error_of
from shared.rpc.tls import ClientTls
from shared.rpc.unary import UnaryChannel
from shared.telemetry.calls import CallDurations, client_durations
from shared.telemetry.metrics import Metrics

# Below what the core queues without refusing (spec d.1: 2,000 at once lost 138).
CALLS_AT_ONCE_MAX = 1000
STREAMS_AT_ONCE_MAX = 2000
KEEPALIVE_S = 20.0
PING_TIMEOUT_S = 5.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.1, 2.0
RETRY_ATTEMPTS_MAX = 3
CLOSE_GRACE_S = 0.5

_TARGET = re.compile(r"(dns:///)?(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/]+):[0-9]{1,5}")

Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Upstreams:
    """Which process serves which package.

    Attributes:
        targets: package prefix -> gRPC target; "*" for all others.
    """

    targets: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "tenfold.media=127.0.0.1:9091,*=127.0.0.1:9090".

        Raises:
            ValueError: an entry has no "=", no package before it, or no host:port after it.
        """
        targets = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            prefix, _, target = entry.partition("=")
            if not prefix.strip() or not _TARGET.fullmatch(target.strip()):
                raise ValueError(f"{entry!r} is not of the form package=host:port")
            targets[prefix.strip()] = target.strip()
        return cls(targets)

    def target_of(self, service: str) -> str:
        """The target of a service's full name: the longest prefix, in whole words, wins.

        Raises:
            Unavailable: no entry fits and there is no "*".
        """
        prefix = service
        while prefix:
            if prefix in self.targets:
                return self.targets[prefix]
            prefix = prefix.rpartition(".")[0]
        target = self.targets.get("*")
        if target is None:
            raise Unavailable(f"no upstream is configured for {service}")
        return target


class Channels:
    """One channel per target, made at the first use, inside the running loop.

    `upstreams` may be replaced while none of its channels has been made yet.

    Args:
        upstreams: where each service is.
        identity: signs this process's own calls; None sends no identity of its own.
        policies: deadlines and retry safety by path; by default what our contracts say.
        calls_max: calls at once per target; more wait for a place within their deadline.
        checks_health: whether a target that says NOT_SERVING gets no calls.
        tls: how servers are believed; None speaks plaintext.
        metrics: where unary calls are timed, and retries counted.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        identity: IdentitySigner | None = None,
        *,
        policies: Mapping[str, MethodPolicy] | None = None,
        calls_max: int = CALLS_AT_ONCE_MAX,
        keepalive_s: float = KEEPALIVE_S,
        ping_timeout_s: float = PING_TIMEOUT_S,
        checks_health: bool = True,
        tls: ClientTls | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.upstreams = upstreams
        self._identity = identity
        self._policies = contract_policies() if policies is None else policies
        self._calls_max = calls_max
        self._keepalive_s, self._ping_timeout_s = keepalive_s, ping_timeout_s
        self._checks_health = checks_health
        self._tls = tls
        metrics = metrics or Metrics()
        self._durations = client_durations(metrics)
        text = "Unary calls that were made again; streams are retried by gRPC itself."
        self._retries = metrics.counter("tenfold_rpc_retries_total", text, "target")
        self._channels: dict[str, Channel] = {}
        self._unary_channels: dict[str, UnaryChannel] = {}  # by target
        self._unary_of_service: dict[str, UnaryChannel] = {}
        self._options = [
            ("grpc.service_config", service_config(self._policies, checks_health=checks_health)),
            ("grpc.enable_retries", 1),
            ("grpc.keepalive_time_ms", round(keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(ping_timeout_s * 1000)),
            # Without this one a frozen server is noticed only after 60 s (spec d.1).
            ("grpc.http2.ping_timeout_ms", round(ping_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", round(RECONNECT_MIN_S * 1000)),
            ("grpc.min_reconnect_backoff_ms", round(RECONNECT_MIN_S * 1000)),
            ("grpc.max_reconnect_backoff_ms", round(RECONNECT_MAX_S * 1000)),
            ("grpc.max_receive_message_length", 16 * 1024 * 1024),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.use_local_subchannel_pool", 1),
            # Services are reached directly, whatever proxy the environment names for the web.
            ("grpc.enable_http_proxy", 0),
        ]

    def channel(self, service: str) -> "Channel":
        """The channel that reaches a service, by its full name, for a generated stub."""
        target = self.upstreams.target_of(service)
        channel = self._channels.get(target)
        if channel is None:
            raw = self._raw_channel(target)
            channel = Channel(raw, self._identity, self._policies, self._calls_max, self._durations)
            self._channels[target] = channel
        return channel

    def _raw_channel(self, target: str) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(target, options=self._options)
        return grpc.aio.secure_channel(target, self._tls.credentials(), options=self._options)

    def unary_channel(self, service: str) -> UnaryChannel:
        """The way to a service, by its full name, for unary calls alone; cheaper than the other."""
        known = self._unary_of_service.get(service)
        if known is not None:
            return known
        target = self.upstreams.target_of(service)
        channel = self._unary_channels.get(target)
        if channel is None:
            channel = self._unary_channels[target] = UnaryChannel(
                target,
                self._policies,
                checks_health=self._checks_health,
                keepalive_s=self._keepalive_s,
                ping_timeout_s=self._ping_timeout_s,
                tls=self._tls,
                durations=self._durations,
                retries=self._retries.of(target),
            )
        self._unary_of_service[service] = channel
        return channel

    async def close(self) -> None:
        """Close every channel; calls that still run are cut after half a second."""
        channels, self._channels = list(self._channels.values()), {}
        unary_channels, self._unary_channels = list(self._unary_channels.values()), {}
        self._unary_of_service.clear()
        await asyncio.gather(
            *(channel.close(CLOSE_GRACE_S) for channel in channels),
            *(channel.close() for channel in unary_channels),
        )


def service_config(policies: Mapping[str, MethodPolicy], *, checks_health: bool) -> str:
    """GRPC's service config: round robin, health, and retries only where they are safe."""
    safe = [policy.path[1:].split("/") for policy in policies.values() if policy.retry_safe]
    config: dict[str, Any] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        # One budget per target: at most a tenth of the calls are retries once things go wrong.
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
    }
    if checks_health:
        config["healthCheckConfig"] = {"serviceName": ""}
    if safe:
        config["methodConfig"] = [
            {
                "name": [{"service": service, "method": method} for service, method in safe],
                "retryPolicy": {
                    "maxAttempts": RETRY_ATTEMPTS_MAX,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    return json.dumps(config)


class _Callers:
    """What every call of one channel shares."""

    def __init__(
        self,
        identity: IdentitySigner | None,
        policies: Mapping[str, MethodPolicy],
        calls_max: int,
        durations: CallDurations | None,
    ) -> None:
        self._identity = identity
        self._policies = policies
        self.durations = durations
        self.calls = asyncio.Semaphore(calls_max)
        self.streams = asyncio.Semaphore(STREAMS_AT_ONCE_MAX)

    def timeout_s(self, path: str, asked_s: float | None) -> float:
        """The tightest of what was asked, what is left here, and what the contract allows."""
        policy = self._policies.get(path)
        left_s = deadline.forwarded_s()
        limits_s = [limit for limit in (asked_s, left_s) if limit is not None]
        if policy is None:
            policy = _UNKNOWN
        default_s = policy.deadline_default_s if not limits_s else policy.deadline_max_s
        return min([*limits_s, default_s])

    def metadata(self, path: str, given: Metadata | None) -> Metadata:
        """What was given, with the request id and an identity where it has none."""
        entries = list(given or ())
        names = {name for name, _ in entries}
        if REQUEST_ID_KEY not in names and (request_id := log.current_request_id()):
            entries.append((REQUEST_ID_KEY, request_id))
        if IDENTITY_METADATA_KEY not in names and (token := self._token(path)):
            entries.append((IDENTITY_METADATA_KEY, token))
        seen = causal.current()
        if seen is not None and seen.positions and causal.KEY not in names:
            entries.append((causal.KEY, seen.token()))
        return tuple(entries)

    def _token(self, path: str) -> str:
        """The caller's own identity goes on, unless the method is for services alone."""
        policy, call = self._policies.get(path), current_call.get()
        is_for_services = policy is not None and policy.access is Access.SERVICE
        if call is not None and call.identity_token and not is_for_services:
            return call.identity_token
        return self._identity.token_for(self._identity.own) if self._identity else ""


_UNKNOWN = MethodPolicy("")


class Channel(grpc.aio.Channel):
    """See grpc.aio.Channel. Its calls carry deadline, identity and request id."""

    def __init__(
        self,
        raw: grpc.aio.Channel,
        identity: IdentitySigner | None,
        policies: Mapping[str, MethodPolicy],
        calls_max: int,
        durations: CallDurations | None = None,
    ) -> None:
        self._raw = raw
        self._callers = _Callers(identity, policies, calls_max, durations)

    async def __aenter__(self) -> Self:
        """See grpc.aio.Channel."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See grpc.aio.Channel."""
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """See grpc.aio.Channel."""
        await self._raw.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See grpc.aio.Channel."""
        return self._raw.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See grpc.aio.Channel."""
        await self._raw.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See grpc.aio.Channel."""
        await self._raw.channel_ready()

    def unary_unary(self, method: str, *codec: Any, **options: Any) -> Any:  # noqa: ANN401
        """See grpc.aio.Channel; the result is called like any stub's method."""
        return _UnaryMethod(self._callers, method, self._raw.unary_unary(method, *codec, **options))

    def stream_unary(self, method: str, *codec: Any, **options: Any) -> Any:  # noqa: ANN401
        """See grpc.aio.Channel."""
        return _UnaryMethod(
            self._callers, method, self._raw.stream_unary(method, *codec, **options)
        )

    def unary_stream(self, method: str, *codec: Any, **options: Any) -> Any:  # noqa: ANN401
        """See grpc.aio.Channel."""
        return _StreamMethod(
            self._callers, method, self._raw.unary_stream(method, *codec, **options)
        )

    def stream_stream(self, method: str, *codec: Any, **options: Any) -> Any:  # noqa: ANN401
        """See grpc.aio.Channel."""
        return _StreamMethod(
            self._callers, method, self._raw.stream_stream(method, *codec, **options)
        )


class _Method:
    def __init__(self, callers: _Callers, path: str, start: Callable[..., Any]) -> None:
        self._callers = callers
        self._path = path
        self._start = start


class _UnaryMethod(_Method):
    def __call__(
        self,
        request: object = None,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        wait_for_ready: bool | None = None,
    ) -> "UnaryCall":
        def start() -> Any:  # noqa: ANN401
            return self._start(
                request,
                timeout=self._callers.timeout_s(self._path, timeout),
                metadata=self._callers.metadata(self._path, metadata),
                wait_for_ready=wait_for_ready,
            )

        return UnaryCall(start, self._callers, self._path)


class _StreamMethod(_Method):
    def __call__(
        self,
        request: object = None,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        wait_for_ready: bool | None = None,
    ) -> "StreamCall":
        raw = self._start(
            request,
            timeout=self._callers.timeout_s(self._path, timeout),
            metadata=self._callers.metadata(self._path, metadata),
            wait_for_ready=wait_for_ready,
        )
        return StreamCall(raw)


class _Call:
    """What both kinds of call tell once they have begun."""

    _raw: Any = None

    def cancel(self) -> bool:
        """End the call now; True if it was still running."""
        return bool(self._raw is not None and self._raw.cancel())

    async def initial_metadata(self) -> Mapping[str, str | bytes]:
        """The headers of the answer; the last value of a repeated name."""
        with _our_errors():
            try:
                return dict(await self._raw.initial_metadata())
            except asyncio.CancelledError:
                await _raise_if_refused(self._raw)
                raise

    async def trailing_metadata(self) -> Mapping[str, str | bytes]:
        """The trailers of the answer, once it has ended."""
        return dict(await self._raw.trailing_metadata())


class UnaryCall(_Call):
    """One answer to come: await it, once. Nothing is sent before that."""

    def __init__(self, start: Callable[[], Any], callers: _Callers, path: str) -> None:
        self._begin = start
        self._callers = callers
        self._path = path

    def __await__(self) -> Generator[Any, Any, Any]:
        """The answer message.

        Raises:
            TenfoldError: what the server answered, or how the call failed.
        """
        return self._run().__await__()

    async def _run(self) -> Any:  # noqa: ANN401
        started_s, code = time.monotonic(), "CANCELLED"
        async with self._callers.calls:
            raw = self._raw = self._begin()
            try:
                answer = await raw
                code = "OK"
                await _learn_of(raw)
                return answer
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                raise _error_of(error) from error
            except asyncio.CancelledError:
                await _raise_if_refused(raw)
                raise
            finally:
                raw.cancel()  # a dropped call is never collected (spec d.1)
                if self._callers.durations is not None:
                    self._callers.durations.note(self._path, code, started_s)


class StreamCall(_Call):
    """A stream of answers: iterate over it, then cancel it (or use it as a context manager)."""

    def __init__(self, raw: Any) -> None:  # noqa: ANN401
        self._raw = raw

    async def __aenter__(self) -> Self:
        """The call itself; leaving cancels what is left of it."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See __aenter__."""
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """The answer messages.

        Raises:
            TenfoldError: what the server answered, or how the call failed.
        """
        try:
            with _our_errors():
                async for answer in self._raw:
                    yield answer
        except asyncio.CancelledError:
            await _raise_if_refused(self._raw)
            raise
        finally:
            self._raw.cancel()

    async def read(self) -> Any:  # noqa: ANN401
        """The next message, or grpc.aio.EOF."""
        with _our_errors():
            return await self._raw.read()

    async def write(self, request: object) -> None:
        """Send one message; waits while the server's window is full."""
        try:
            with _our_errors():
                await _write_keeping_status(self._raw, request)
        except asyncio.InvalidStateError as error:  # the server has answered already
            await _raise_if_refused(self._raw)
            raise Unavailable("the stream has ended") from error

    async def done_writing(self) -> None:
        """Say that no more messages come."""
        with contextlib.suppress(asyncio.InvalidStateError), _our_errors():
            await self._raw.done_writing()


async def _write_keeping_status(raw: Any, request: object) -> None:  # noqa: ANN401
    """grpc.aio's write, less one habit.

    When its own write meets the end of a call it sets INTERNAL as the call's status, and the
    refusal that the server sent is lost (grpc/aio/_call.py, _write). So this goes one level
    below; the parts used are private and pinned by the lock file.
    """
    if raw.done():
        raise asyncio.InvalidStateError
    if not raw._metadata_sent.is_set():
        await raw._metadata_sent.wait()
    serializer = raw._request_serializer
    try:
        await raw._cython_call.send_serialized_message(serializer(request))
    except asyncio.CancelledError:
        if not raw.cancelled():
            raw.cancel()
        raise


async def _learn_of(raw: Any) -> None:  # noqa: ANN401
    """Remember, for the call that this one was made for, what it has written."""
    seen = causal.current()
    if seen is not None:
        written = dict(await raw.trailing_metadata() or ()).get(causal.KEY)
        if isinstance(written, str):
            seen.learn(written)


@contextlib.contextmanager
def _our_errors() -> Generator[None, None, None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _error_of(error) from error
    except grpc.aio.InternalError as error:  # the core refused the operation: the call is over
        raise Unavailable("the connection broke in the middle of a call") from error


def _error_of(error: grpc.aio.AioRpcError) -> TenfoldError:
    trailing = dict(error.trailing_metadata() or ())
    details = cast("bytes | None", trailing.get(STATUS_DETAILS_KEY))
    return error_of(error.code(), error.details() or "", details)


async def _raise_if_refused(raw: Any) -> None:  # noqa: ANN401
    """Raise what the call ended with, if it was the server or the core that ended it.

    grpc.aio raises CancelledError also when nobody here cancelled; a task that is really being
    cancelled must not wait for the server.
    """
    task = asyncio.current_task()
    if (task is not None and task.cancelling()) or not raw.done():
        return
    code = await raw.code()
    if code is grpc.StatusCode.OK:
        return
    trailing = dict(await raw.trailing_metadata() or ())
    raise error_of(code, await raw.details() or "", trailing.get(STATUS_DETAILS_KEY))
