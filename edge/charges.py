"""What a call costs its caller: charged in full before the work, settled after it.

A method that anyone may call is counted by the caller's address block, whatever credential
comes along: log-in must not get cheaper with many accounts. Everything else is counted by
credential, and both also by what the plan says of wider levels. A refused call and a replay
give back all but one point; a strict bucket keeps what a refused credential cost, because
there the refused calls are the ones to be slowed down.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from random import random

from edge.accounts import Account, Accounts
from edge.contracts import ContractError
from edge.quota_store import QuotaStore, Verdict
from edge.refusals import CAPACITY_REDUCED
from edge.routes import Route
from edge.slots import SlotLimit
from shared.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    QuotaExceeded,
    TenfoldError,
)
from shared.identity import DEFAULT_TENANT, Principal
from shared.quota.keys import Level
from shared.quota.plans import DEFAULT_PLAN, Plans
from shared.rpc.policy import Access

DEFAULT_BUCKET = "api"
# What a refused call costs, so that refusals cannot be had for nothing.
REFUSED_COST_POINTS = 1
# Callers who share a bucket shall not all come back at the same moment.
JITTER_PART = 0.2


@dataclass(frozen=True)
class Price:
    """What one method costs, from its contract.

    Attributes:
        bucket: the name of what pays.
        cost_points: of one call.
        is_strict: some method of the bucket is: no lease pays, and its share is smaller while
            the store is away.
        keeps_refusals: the method is strict: what a refused credential cost is kept.
        is_by_address: paid by the address block, not the credential.
        slot: how many such calls may be open at once; None for those that end by themselves.
    """

    bucket: str
    cost_points: int
    is_strict: bool
    keeps_refusals: bool
    is_by_address: bool
    slot: SlotLimit | None = None


@dataclass(slots=True)
class Charge:
    """What one request was charged.

    Attributes:
        account: who pays.
        price: what was asked.
        verdict: what the store said.
        store: what said it.
        refund_points: what will be given back.
    """

    account: Account
    price: Price
    verdict: Verdict
    store: QuotaStore
    refund_points: int = 0

    def headers(self) -> list[tuple[bytes, bytes]]:
        """RateLimit fields (draft-ietf-httpapi-ratelimit-headers-10)."""
        account, verdict = self.account, self.verdict
        if verdict.is_allowed:
            limit = account.limit(self.store.now_us(), self.refund_points, verdict.part)
        else:
            limit = self._used_up()
        slot, policy = self.price.slot, account.policy
        if slot is not None:
            policy = b"%b, %b" % (policy, slot.policy)
        headers = [(b"ratelimit-policy", policy), (b"ratelimit", limit)]
        if verdict.is_local:
            headers.append((b"tenfold-quota-mode", b"local"))
        return headers

    def _used_up(self) -> bytes:
        """Of a refused call; its time is not later than Retry-After, as section 4 asks."""
        verdict = self.verdict
        bucket = next(b for b in (*verdict.refused_by, self.account.own) if b in self.account.told)
        left = int(bucket.remaining_points(self.store.now_us()) * verdict.part)
        return b'"%b";r=%d;t=%d' % (
            bucket.quota.name.encode(), left, max(1, math.ceil(verdict.retry_after_s))
        )  # fmt: skip


class Charges:
    """Charges calls and settles them.

    Args:
        store: decides.
        prices: by RPC path, from `prices_of`.
        accounts: who pays.
    """

    def __init__(self, store: QuotaStore, prices: Mapping[str, Price], accounts: Accounts) -> None:
        self._store = store
        self._prices = prices
        self._accounts = accounts

    def charge_now(self, route: Route, principal: Principal, address_block: str) -> Charge | None:
        """Charge a call in full, if that takes no question to the store.

        Returns:
            What was charged, or refused: its verdict says which. None: `charge` must ask.
        """
        price = self._prices[route.method.full_name]
        account = self._account(price, principal, address_block)
        if price.cost_points == 0:
            return Charge(account, price, _FREE, self._store)
        verdict = self._store.decide_now(account, price.cost_points, is_strict=price.is_strict)
        return None if verdict is None else Charge(account, price, verdict, self._store)

    async def charge(self, route: Route, principal: Principal, address_block: str) -> Charge:
        """Charge a call in full. See charge_now."""
        price = self._prices[route.method.full_name]
        account = self._account(price, principal, address_block)
        verdict = await self._store.decide(account, price.cost_points, is_strict=price.is_strict)
        return Charge(account, price, verdict, self._store)

    def settle(self, charge: Charge) -> None:
        """Give back what the outcome left over."""
        if charge.refund_points > 0 and charge.verdict.is_allowed:
            self._store.give_back(charge.account, charge.refund_points)

    def _account(self, price: Price, principal: Principal, address_block: str) -> Account:
        who = "" if price.is_by_address else principal.credential or principal.subject
        tenant = principal.tenant if who else DEFAULT_TENANT
        return self._accounts.of(price.bucket, tenant, who, address_block)


def refuse(charge: Charge) -> TenfoldError:
    """The error of a call that its buckets cannot pay.

    What a caller has used up is its own affair. What all tenants have used up together, and what
    is only short because Valkey is away, is ours: the server is full.
    """
    verdict = charge.verdict
    buckets = verdict.refused_by
    names = ",".join(bucket.quota.name for bucket in buckets)
    metadata = {"quota": names, "cost_points": str(charge.price.cost_points)}
    wait_s = verdict.retry_after_s
    if any(bucket.level in _SHARED for bucket in buckets):
        wait_s *= 1 + JITTER_PART * random()  # noqa: S311 - no secret
    is_short = verdict.is_local and verdict.part < 1
    if is_short or all(bucket.level is Level.GLOBAL for bucket in buckets):
        message = "There is less capacity than usual; the quota that is left is used up."
        return Overloaded(message, metadata=metadata, retry_after_s=wait_s, reason=CAPACITY_REDUCED)
    metadata["subject"] = ",".join(bucket.level for bucket in buckets)
    return QuotaExceeded(
        f"The quota {names!r} is used up.", metadata=metadata, retry_after_s=wait_s
    )


def note_error(charge: Charge, error: TenfoldError) -> None:
    """Decide what a failed call keeps."""
    used_up_our_time = isinstance(error, DeadlineExceeded | Internal)
    is_invalid = isinstance(error, InvalidRequest)
    if not used_up_our_time and (is_invalid or not charge.price.keeps_refusals):
        charge.refund_points = max(0, charge.price.cost_points - REFUSED_COST_POINTS)


def note_replay(charge: Charge) -> None:
    """A repeated request had its effect before; only the look-up is paid."""
    charge.refund_points = max(0, charge.price.cost_points - REFUSED_COST_POINTS)


def prices_of(
    routes: Iterable[Route], *, streams: SlotLimit, uploads: SlotLimit
) -> dict[str, Price]:
    """What each method costs, by RPC path.

    Args:
        routes: whose contracts name the buckets.
        streams: what one caller may have open of them.
        uploads: likewise.
    """
    routes = tuple(routes)
    options = [route.method.options.quota for route in routes]
    strict = {option.bucket or DEFAULT_BUCKET for option in options if option.strict}
    return {
        route.method.full_name: replace(
            _price(route, strict), slot={"stream": streams, "upload": uploads}.get(_kind_of(route))
        )
        for route in routes
    }


def require_payable(prices: Mapping[str, Price], plans: Plans) -> None:
    """Check that a full bucket can pay for each method.

    Raises:
        ContractError: a contract names a bucket that has no limit, or costs more than it holds.
    """
    for method, price in prices.items():
        if price.bucket not in plans.buckets:
            raise ContractError(f"{method}: no quota is named {price.bucket!r}")
        for plan, bucket, level, quota in plans.rows():
            if bucket != price.bucket or quota is None or price.cost_points <= quota.burst_points:
                continue
            is_setting = plan == DEFAULT_PLAN and level is not Level.GLOBAL
            name = (
                f"TENFOLD_EDGE_{bucket.upper()}_BURST_POINTS"
                if is_setting
                else (f"plans.{plan}.{bucket}.{level}.burst")
            )
            held = f"{name}={quota.burst_points}"
            raise ContractError(f"{held} cannot pay {method}: {price.cost_points} points.")


def _price(route: Route, strict: set[str]) -> Price:
    quota = route.method.options.quota
    bucket = quota.bucket or DEFAULT_BUCKET
    return Price(
        bucket,
        cost_points=quota.cost_points if quota.HasField("cost_points") else 1,
        is_strict=bucket in strict,
        keeps_refusals=quota.strict,
        is_by_address=route.method.policy.access is Access.PUBLIC,
    )


def _kind_of(route: Route) -> str:
    """Whether a call stays open: "stream", "upload", or "" for one that ends by itself."""
    method = route.method
    if route.raw is not None:
        return {"POST": "upload", "PATCH": "upload", "PUT": "upload", "GET": "stream"}.get(
            route.http_method, ""
        )
    if method.server_streaming:
        return "stream"
    return "upload" if method.client_streaming else ""


_SHARED = (Level.TENANT, Level.GLOBAL)
_FREE = Verdict(True, path="free")
