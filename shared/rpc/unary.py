"""Unary calls to one target: over our own HTTP/2, with what gRPC promises of a channel.

A call that no server has looked at is made again, whatever it does; one that failed with
UNAVAILABLE only where the contract says retry_safe, and under a budget. Streams go
through `shared.rpc.client`.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import unquote

import grpc

from shared import log
from shared.errors import (
    DeadlineExceeded,
    Internal,
    Overloaded,
    TenfoldError,
    Unavailable,
    Unreachable,
)
from shared.rpc import frames
from shared.rpc.breaker import Breaker
from shared.rpc.call import BadAnswer, Call, DeadlinePassed, NoRoom, NotProcessed, StreamReset
from shared.rpc.endpoints import HEALTH_WATCH_PATH, Endpoints
from shared.rpc.header_block import (
    Headers,
    binary_value,
    call_block,
    field,
    metadata_field,
    timeout_field,
)
from shared.rpc.http2 import Http2Connection
from shared.rpc.policy import MethodPolicy
from shared.rpc.retries import (
    RETRY_ATTEMPTS_MAX,
    UNPROCESSED_MAX,
    RetryBudget,
    backoff_s,
    pushback_s,
)
from shared.rpc.status import STATUS_DETAILS_KEY, code_of, error_of
from shared.rpc.tls import ClientTls
from shared.telemetry.calls import CallDurations
from shared.telemetry.metrics import Number

KEEPALIVE_S, PING_TIMEOUT_S = 20.0, 5.0
# Calls that may wait for a connection, or for a place on one.
WAITING_MAX = 10_000
OVERLOADED_RETRY_AFTER_S = 0.5
UNREACHABLE_RETRY_AFTER_S = 1.0
# A call that had so much of the time that its contract gives by default, and got no answer,
# says something of the server; one in a hurry does not.
PATIENCE_SHARE = 0.9

USER_AGENT = "tenfold-grpc/1"
_DNS_SCHEME = "dns:///"
_UNKNOWN = MethodPolicy("")

# PROTOCOL-HTTP2 of gRPC, "Errors"; all other codes mean INTERNAL.
_CODE_OF_RESET = {
    frames.REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    frames.CANCEL: grpc.StatusCode.CANCELLED,
    frames.ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    frames.INADEQUATE_SECURITY: grpc.StatusCode.PERMISSION_DENIED,
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
_STATUS_DETAILS = STATUS_DETAILS_KEY.encode()

_log = log.get_logger("rpc.unary")


class Answer(NamedTuple):
    """What a unary call brought.

    Attributes:
        message: serialized.
        initial, trailing: metadata; values of "-bin" names still in base 64, see
            header_block.binary_value.
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
        keepalive_s, ping_timeout_s: after how much silence to ping, and how long to wait.
        tls: how the servers are believed; None speaks plaintext.
        durations: how long calls took; None where nobody reads it.
        retries: counts calls that are made again.

    Raises:
        ValueError: target is something else.
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
        durations: CallDurations | None = None,
        retries: Number | None = None,
    ) -> None:
        host, port = _host_and_port(target)
        self._loop = asyncio.get_running_loop()
        self._authority = target.removeprefix(_DNS_SCHEME)
        self._is_encrypted = tls is not None
        self._policies = policies
        self._blocks: dict[str, bytes] = {}
        self._waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._budget = RetryBudget()
        self._durations = durations
        self._retries = retries or Number()
        self._is_closed = False
        self._endpoints = Endpoints(
            host,
            port,
            self._wake_waiting,
            watch_block=self._block_of(HEALTH_WATCH_PATH) if checks_health else b"",
            keepalive_s=keepalive_s,
            ping_timeout_s=ping_timeout_s,
            tls=None if tls is None else tls.context(),
        )

    @property
    def served_at_s(self) -> float:
        """When an address of the target began to take calls for the last time; -inf for never."""
        return self._endpoints.served_at_s

    async def call(
        self,
        path: str,
        message: bytes,
        *,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        timeout_s: float,
    ) -> Answer:
        """Make one call.

        Args:
            path: "/package.Service/Method".
            message: the serialized request.
            metadata: visible ASCII, bytes for "-bin" names; names in lower case.
            timeout_s: more than 0; waiting and retries included.

        Raises:
            TenfoldError: what the server answered, or how the call failed.
            ValueError: metadata that cannot be sent.
        """
        durations, started_s = self._durations, time.monotonic()
        deadline_s = started_s + timeout_s
        self._budget.note_call(started_s)
        if durations is None:
            return await self._answer(path, message, metadata, timeout_s, deadline_s)
        code = "OK"
        try:
            return await self._answer(path, message, metadata, timeout_s, deadline_s)
        except BaseException as error:
            code = _name_of(error)
            raise
        finally:
            durations.note(path, code, started_s)

    async def _answer(
        self,
        path: str,
        message: bytes,
        metadata: Sequence[tuple[str, str | bytes]],
        timeout_s: float,
        deadline_s: float,
    ) -> Answer:
        """Attempts until one brings the answer, or no other may be made."""
        block = self._blocks.get(path) or self._block_of(path)
        fields = b"".join([metadata_field(name, value) for name, value in metadata])
        attempts = unprocessed = 0
        while True:
            call = _UnaryCall(self._loop.create_future(), deadline_s, path, timeout_s)
            try:
                return await self._attempt(call, block, fields, message)
            except NotProcessed as error:
                unprocessed += 1
                # The first time it is bad luck, such as a server that just goes.
                is_over = unprocessed >= UNPROCESSED_MAX
                if is_over or (unprocessed > 1 and not self._budget.spend(time.monotonic())):
                    raise _unreachable() from error
                pause_s = backoff_s(unprocessed - 1) if unprocessed > 1 else 0.0
            except Unavailable:
                attempts += 1
                retry_s = self._retry_after_s(path, attempts, call)
                if retry_s is None:
                    raise
                pause_s = retry_s
            self._retries.value += 1
            await asyncio.sleep(pause_s)
            if attempts:
                fields += field(b"grpc-previous-rpc-attempts", b"%d" % attempts)

    async def close(self) -> None:
        """Close every connection; calls in flight, and those to come, fail."""
        self._is_closed = True
        self._wake_waiting()
        await self._endpoints.close()

    # One attempt
    async def _attempt(
        self, call: "_UnaryCall", block: bytes, fields: bytes, message: bytes
    ) -> Answer:
        connection = None if self._waiting else self._endpoints.pick()
        if connection is None:
            connection = await self._place(call.deadline_s)
        breaker, round_ = connection.breaker, connection.breaker.round
        try:
            left_s = call.deadline_s - time.monotonic()
            if left_s <= 0:
                raise _too_late()
            connection.start(call, block + timeout_field(left_s) + fields, message)
            answer = await call.answer
        except asyncio.CancelledError:
            connection.cancel(call)
            breaker.note_nothing(round_)
            raise
        except (TenfoldError, NotProcessed) as error:
            self._note_failure(call, error, breaker, round_)
            raise
        finally:
            if self._waiting:
                self._wake_one()
        breaker.note_success(round_)
        return answer

    def _note_failure(
        self, call: "_UnaryCall", error: Exception, breaker: Breaker, round_: int
    ) -> None:
        """Tell failures that speak of the server from those that are its answers."""
        if isinstance(error, NotProcessed):
            breaker.note_nothing(round_)
        elif isinstance(error.__cause__, DeadlinePassed):
            policy = self._policies.get(call.path, _UNKNOWN)
            if call.timeout_s >= PATIENCE_SHARE * policy.deadline_default_s:
                breaker.note_failure(round_, time.monotonic())
            else:
                breaker.note_nothing(round_)
        elif isinstance(error, Unreachable):
            breaker.note_failure(round_, time.monotonic())
        elif call.stream_id:
            breaker.note_success(round_)
        else:
            breaker.note_nothing(round_)

    def _block_of(self, path: str) -> bytes:
        block = call_block(path, self._authority, USER_AGENT, is_encrypted=self._is_encrypted)
        self._blocks[path] = block
        return block

    def _retry_after_s(self, path: str, attempts: int, call: "_UnaryCall") -> float | None:
        """When to make a failed call again; None if it may not be, or there is no time."""
        policy = self._policies.get(path)
        if policy is None or not policy.retry_safe or attempts >= RETRY_ATTEMPTS_MAX:
            return None
        asked_s = pushback_s(call.trailing)
        pause_s = backoff_s(attempts) if asked_s is None else asked_s
        now_s = time.monotonic()
        if pause_s < 0 or now_s + pause_s >= call.deadline_s or not self._budget.spend(now_s):
            return None
        return pause_s

    # Waiting
    async def _place(self, deadline_s: float) -> Http2Connection:
        """Wait for a connection with room; not while every address is known to be down."""
        was_woken = False
        while True:
            if self._is_closed:
                raise Unavailable("the channel is closed")
            self._endpoints.start()
            if was_woken or not self._waiting:
                connection = self._endpoints.pick()
                if connection is not None:
                    return connection
            if self._endpoints.is_down:
                raise _unreachable()
            await self._turn(deadline_s, is_first=was_woken)
            was_woken = True

    async def _turn(self, deadline_s: float, *, is_first: bool) -> None:
        """Wait until there may be a place; who was woken in vain is the first again."""
        if not is_first and len(self._waiting) >= WAITING_MAX:
            raise Overloaded(
                "Too many calls wait for a service.", retry_after_s=OVERLOADED_RETRY_AFTER_S
            )
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting[turn] = None
        self._waiting.move_to_end(turn, last=not is_first)
        try:
            async with asyncio.timeout(max(0, deadline_s - time.monotonic())):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # its place is another's
                self._wake_one()
            if isinstance(error, TimeoutError):
                raise _too_late() from error
            raise
        finally:
            self._waiting.pop(turn, None)

    def _wake_one(self) -> None:
        while self._waiting:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():
                turn.set_result(None)
                return

    def _wake_waiting(self) -> None:
        """Connections have come or gone: wake as many as find a place, or all to fail."""
        is_over = self._is_closed or self._endpoints.is_down
        count = len(self._waiting) if is_over else self._endpoints.places
        for _ in range(min(count, len(self._waiting))):
            self._wake_one()


class _UnaryCall(Call):
    """Completes one future with a unary answer, or with why there is none."""

    __slots__ = ("answer", "message", "path", "timeout_s", "trailing")

    def __init__(
        self, answer: "asyncio.Future[Answer]", deadline_s: float, path: str, timeout_s: float
    ) -> None:
        super().__init__(deadline_s)
        self.answer = answer
        self.path, self.timeout_s = path, timeout_s
        self.message: bytes | None = None
        self.trailing: Headers = {}

    def on_message(self, message: bytes) -> bool:
        if self.message is not None:
            return False
        self.message = message
        return True

    def on_end(self, initial: Headers, trailing: Headers) -> None:
        self.trailing = trailing
        if self.answer.done():
            return
        if trailing.get(b"grpc-status") == _OK and self.message is not None:
            self.answer.set_result(Answer(self.message, initial, trailing))
        else:
            self.answer.set_exception(_error_of_answer(initial, trailing))

    def on_failure(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(_error_of_failure(error))


def _name_of(error: BaseException) -> str:
    """The code that tells how a call ended for its caller; one that is cancelled is no error."""
    return code_of(error).name if isinstance(error, TenfoldError) else "CANCELLED"


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
    return error_of(code, message, binary_value(trailing.get(_STATUS_DETAILS, b"")))


def _error_of_failure(failure: Exception) -> Exception:
    """The error that tells how a call failed; NotProcessed is for whoever makes it again."""
    if isinstance(failure, NotProcessed):
        return failure
    error: TenfoldError
    if isinstance(failure, DeadlinePassed):
        error = _too_late()
    elif isinstance(failure, StreamReset):
        error = error_of(_CODE_OF_RESET.get(failure.code, grpc.StatusCode.INTERNAL), "", None)
    elif isinstance(failure, BadAnswer):
        _log.warning("bad answer", error=str(failure))
        error = Internal("a service answered what is no answer of gRPC")
    elif isinstance(failure, NoRoom):
        error = Overloaded(
            "Too many large answers come at once.", retry_after_s=OVERLOADED_RETRY_AFTER_S
        )
    else:  # ConnectionLost
        error = _unreachable()
    error.__cause__ = failure
    return error


def _host_and_port(target: str) -> tuple[str, int]:
    host, _, port = target.removeprefix(_DNS_SCHEME).rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise ValueError(f"{target!r} is not host:port")
    return host.strip("[]"), int(port)


def _unreachable() -> Unreachable:
    return Unreachable(
        "a service that is needed does not answer", retry_after_s=UNREACHABLE_RETRY_AFTER_S
    )


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the time for this call is spent")
