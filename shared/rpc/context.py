"""What every handler method gets beside its request."""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from google.protobuf.message import Message

from shared import causal
from shared.db.port import Once
from shared.identity import PUBLIC, Principal
from shared.rpc.policy import REQUEST_ID_FIELD

REQUEST_ID_KEY = "x-request-id"
REPLAYED_METADATA = ("idempotency-replayed", "true")


class Context:
    """One call: who asks, under which ids, until when.

    Attributes:
        principal: who asks; PUBLIC without a credential.
        method: the RPC path, "/tenfold.ledger.v1.LedgerService/TransferFunds".
        request_id: correlates log lines and error answers of all hops.
        idempotency_key: the request's request_id, else metadata "idempotency-key", else "".
        metadata: the call's text metadata; raw bindings find "http-method", "http-url",
            "http-path-<variable>" and "http-header-<name>" here.
        identity_token: the token that was believed; "" without one. Clients pass it on.
        seen: what the caller has seen of the data, and what this call has written.
    """

    __slots__ = (
        "_rpc",
        "awaits_message",
        "deadline_s",
        "has_ended_by_server",
        "has_expired",
        "idempotency_key",
        "identity_token",
        "is_replayed",
        "metadata",
        "method",
        "principal",
        "reached_handler",
        "request_id",
        "seen",
        "started_s",
        "task",
    )

    def __init__(
        self,
        *,
        method: str,
        request_id: str,
        metadata: Mapping[str, str],
        rpc: Any,  # noqa: ANN401  the engine's context, whichever engine it is
    ) -> None:
        self.principal: Principal = PUBLIC
        self.method = method
        self.request_id = request_id
        self.idempotency_key = ""
        self.metadata = metadata
        self.identity_token = ""
        self.seen = causal.Seen()
        self.deadline_s = 0.0
        self.has_ended_by_server = False
        self.has_expired = False
        self.reached_handler = False
        self.is_replayed = False
        self.awaits_message = False
        self.task: asyncio.Task[Any] | None = None
        self.started_s = 0.0
        self._rpc = rpc

    def remaining_s(self) -> float:
        """Seconds until the deadline; negative when it has passed."""
        return self.deadline_s - time.monotonic()

    async def send_headers(self, headers: Mapping[str, str]) -> None:
        """Send initial metadata now; at most once, before the first answer message.

        A raw binding's answer starts with this: "http-status": "201",
        "http-header-location": "/v1/files/…". It carries the causal token of what was written
        until now, if the binding lists that header.
        """
        if self.seen.is_changed and "http-status" in headers:
            headers = {**headers, f"http-header-{causal.KEY}": self.seen.token()}
        await self._rpc.send_initial_metadata(tuple(headers.items()))

    def mark_replayed(self) -> None:
        """Say, in trailing metadata, that this request had its effect before."""
        self.is_replayed = True
        self._rpc.set_trailing_metadata((REPLAYED_METADATA,))

    def tell_written(self) -> None:
        """Say, in trailing metadata, what a read must have that is to see this call's writes."""
        if self.seen.is_changed:
            replayed = (REPLAYED_METADATA,) if self.is_replayed else ()
            self._rpc.set_trailing_metadata(((causal.KEY, self.seen.token()), *replayed))


current_call: ContextVar[Context | None] = ContextVar("current_call", default=None)


def once_of(context: Context, request: Message) -> Once:
    """The identity of this request's effect.

    The fingerprint covers the method and the request without its request id, in deterministic
    serialization, so that the same request under the same key is recognised and another is not.
    """
    body = request
    if REQUEST_ID_FIELD in request.DESCRIPTOR.fields_by_name:
        body = type(request)()
        body.CopyFrom(request)
        body.ClearField(REQUEST_ID_FIELD)
    digest = hashlib.sha256(context.method.encode())
    digest.update(b"\0")
    digest.update(body.SerializePartialToString(deterministic=True))
    return Once(
        principal=context.principal,
        method=context.method,
        request_id=context.idempotency_key,
        fingerprint=digest.digest(),
        on_replay=context.mark_replayed,
    )
