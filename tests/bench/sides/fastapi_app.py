"""The peer of `whole path`: what a good Python team writes when it writes no mesh at all.

One process, one event loop (uvloop), uvicorn with httptools, pydantic v2 models that are written
by pydantic-core itself, an HS256 token checked on every request with the key at hand, and a
token bucket in Valkey, one Lua script by hash in one round trip (redis.asyncio with hiredis).
It has the two endpoints of shop.proto and answers the same bytes.

What it does not do, and our side does: sign and verify an identity between two processes, write
log lines, validate against a contract in two places, send RateLimit headers.

    python -m tests.bench.sides.fastapi_app PORT SECRET VALKEY_URL
"""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import redis.asyncio as redis
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from tests.bench.sides import samples
from tests.bench.sides.hs256 import Caller, caller_of

POINTS_PER_S, BURST_POINTS = 1_000_000, 1_000_000
CREATED = datetime(2026, 3, 1, 12, tzinfo=UTC)
TOKEN_BUCKET = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local state = redis.call('HMGET', KEYS[1], 'left', 'at')
local left = tonumber(state[1]) or burst
left = math.min(burst, left + (now - (tonumber(state[2]) or now)) * rate)
local allowed = left >= 1
if allowed then left = left - 1 end
redis.call('HSET', KEYS[1], 'left', left, 'at', now)
redis.call('EXPIRE', KEYS[1], math.ceil(burst / rate) + 1)
return allowed and 1 or 0
"""


class Model(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class State(StrEnum):
    PLACED = "STATE_PLACED"
    PAID = "STATE_PAID"


class View(StrEnum):
    BASIC = "VIEW_BASIC"
    FULL = "VIEW_FULL"


class Money(Model):
    currency_code: str
    minor_units: int


class Line(Model):
    sku: str
    quantity: int
    price: Money


class Address(Model):
    lines: list[str]
    city: str
    postal_code: str
    country_code: str


class Customer(Model):
    email: str
    display_name: str
    address: Address


class GetOrder(Model):
    view: View = View.BASIC
    revision: int = 0
    include_history: bool = False
    tags: list[str] = []


class OrderSummary(Model):
    name: str
    state: State
    display_name: str
    line_count: int
    revision: int
    has_history: bool
    total: Money
    tags: list[str]
    create_time: datetime


class PlaceOrder(Model):
    customer: Customer
    lines: list[Line]
    labels: dict[str, str]
    discount_percent: float
    note: str


class Order(Model):
    name: str
    state: State
    customer: Customer
    lines: list[Line]
    labels: dict[str, str]
    discount_percent: float
    note: str
    total: Money
    create_time: datetime


def app_of(secret: bytes, valkey_url: str) -> FastAPI:
    """The application."""
    client = redis.Redis.from_url(valkey_url)
    spend: Callable[..., Awaitable[Any]] = client.register_script(TOKEN_BUCKET)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()

    # Nothing is traced: its own hooks would only look whether they are wanted.
    app = FastAPI(lifespan=lifespan, telemetry={"tracing": False, "metrics": False, "logs": False})

    async def admitted(request: Request) -> Caller:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        caller = caller_of(secret, token) if scheme == "Bearer" else None
        if caller is None:
            raise HTTPException(401, "Send a valid bearer token.")
        keys, arguments = [f"bucket:{caller.subject}"], [POINTS_PER_S, BURST_POINTS]
        if not await spend(keys=keys, args=arguments):
            raise HTTPException(429, "Too many requests.")
        return caller

    def require(caller: Caller, scope: str) -> None:
        if scope not in caller.scopes:
            raise HTTPException(403, f"The token lacks {scope}.")

    @app.get("/v1/shops/{shop}/orders/{order}", response_model=None)
    async def get_order(
        shop: Annotated[str, Path()],
        order: Annotated[str, Path()],
        caller: Annotated[Caller, Depends(admitted)],
        query: Annotated[GetOrder, Query()],
    ) -> Response:
        require(caller, "orders.read")
        return written(
            OrderSummary(
                name=f"shops/{shop}/orders/{order}",
                state=State.PAID,
                display_name=samples.GET_ANSWER["displayName"],
                line_count=4,
                revision=query.revision,
                has_history=query.include_history,
                total=Money(currency_code="EUR", minor_units=12950),
                tags=query.tags,
                create_time=CREATED,
            )
        )

    @app.post("/v1/shops/{shop}/orders", response_model=None)
    async def place_order(
        shop: Annotated[str, Path()],
        order: PlaceOrder,
        caller: Annotated[Caller, Depends(admitted)],
    ) -> Response:
        require(caller, "orders.write")
        total = sum(line.quantity * line.price.minor_units for line in order.lines)
        return written(
            Order(
                name=f"shops/{shop}/orders/1043",
                state=State.PLACED,
                customer=order.customer,
                lines=order.lines,
                labels=order.labels,
                discount_percent=order.discount_percent,
                note=order.note,
                total=Money(currency_code=order.lines[0].price.currency_code, minor_units=total),
                create_time=CREATED,
            )
        )

    return app


def written(model: Model) -> Response:
    """JSON written by pydantic-core in one pass: no dict in between, no second validation."""
    body = model.__pydantic_serializer__.to_json(model, by_alias=True)
    return Response(body, media_type="application/json")


def main() -> None:
    """Serve until signalled."""
    port, secret, valkey_url = sys.argv[1:]
    uvicorn.run(
        app_of(secret.encode(), valkey_url),
        port=int(port),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        proxy_headers=False,
    )


if __name__ == "__main__":
    main()
