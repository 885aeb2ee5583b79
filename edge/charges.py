"""What a call costs its caller: charged in full before the work, settled after it.

A method that anyone may call is counted by the caller's address block, whatever credential
comes along: log-in must not get cheaper with many accounts. Everything else is counted by
credential. A refused call and a replay give back all but one point; a strict bucket keeps
what a refusal cost, because there the refused calls are the ones to be slowed down.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edge.contracts import ContractError
from edge.quota import Quota
from edge.quota_store import QuotaStore, Verdict
from edge.routes import Route
from shared.errors import DeadlineExceeded, Internal, QuotaExceeded, TenfoldError
from shared.identity import Principal
from shared.rpc.policy import Access

DEFAULT_BUCKET = "api"
# What a refused call costs, so that refusals cannot be had for nothing.
REFUSED_COST_POINTS = 1


@dataclass(frozen=True)
class Price:
    """What one method costs, from its contract.

    Attributes:
        quota: the bucket that pays.
        cost_points: of one call.
        is_strict: the bucket's share is smaller while the store is away, and keeps refusals.
        is_by_address: paid by the address block, not the credential.
    """

    quota: Quota
    cost_points: int
    is_strict: bool
    is_by_address: bool


@dataclass
class Charge:
    """What one request was charged.

    Attributes:
        key: the bucket's key in the store.
        price: what was asked.
        verdict: what the store said.
        refund_points: what will be given back.
    """

    key: str
    price: Price
    verdict: Verdict
    refund_points: int = 0

    def headers(self) -> list[tuple[bytes, bytes]]:
        """RateLimit fields (draft-ietf-httpapi-ratelimit-headers-10)."""
        quota, verdict = self.price.quota, self.verdict
        remaining = min(quota.burst_points, verdict.remaining_points + self.refund_points)
        debt_s = verdict.full_in_s - self.refund_points * quota.refill_s
        policy = f'"{quota.name}";q={quota.burst_points};w={quota.window_s}'
        limit = f'"{quota.name}";r={remaining};t={max(0, math.ceil(debt_s))}'
        headers = [(b"ratelimit-policy", policy.encode()), (b"ratelimit", limit.encode())]
        if verdict.is_local:
            headers.append((b"tenfold-quota-mode", b"local"))
        return headers


class Charges:
    """Charges calls and settles them.

    Args:
        store: where buckets live.
        prices: by RPC path, from `prices_of`.
    """

    def __init__(self, store: QuotaStore, prices: Mapping[str, Price]) -> None:
        self._store = store
        self._prices = prices

    async def charge(self, route: Route, principal: Principal, address_block: str) -> Charge:
        """Charge a call in full.

        Returns:
            What was charged, or refused: its verdict says which.
        """
        price = self._prices[route.method.full_name]
        key = _key(price, principal, address_block)
        verdict = await self._store.spend(
            key, price.quota, price.cost_points, is_strict=price.is_strict
        )
        return Charge(key, price, verdict)

    async def settle(self, charge: Charge) -> None:
        """Give back what the outcome left over; after the answer, so that nobody waits."""
        if charge.refund_points > 0 and charge.verdict.is_allowed:
            await self._store.give_back(charge.key, charge.price.quota, charge.refund_points)


def refuse(charge: Charge) -> QuotaExceeded:
    """The error of a call that the bucket cannot pay."""
    name = charge.price.quota.name
    return QuotaExceeded(
        f"The quota {name!r} is used up.",
        metadata={"quota": name, "cost_points": str(charge.price.cost_points)},
        retry_after_s=charge.verdict.retry_after_s,
    )


def note_error(charge: Charge, error: TenfoldError) -> None:
    """Decide what a failed call keeps."""
    used_up_our_time = isinstance(error, DeadlineExceeded | Internal)
    if not (charge.price.is_strict or used_up_our_time):
        charge.refund_points = max(0, charge.price.cost_points - REFUSED_COST_POINTS)


def note_replay(charge: Charge) -> None:
    """A repeated request had its effect before; only the look-up is paid."""
    charge.refund_points = max(0, charge.price.cost_points - REFUSED_COST_POINTS)


def prices_of(routes: Iterable[Route], quotas: Mapping[str, Quota]) -> dict[str, Price]:
    """What each method costs, by RPC path.

    Args:
        routes: whose contracts name the buckets.
        quotas: by bucket name.

    Raises:
        ContractError: a contract names a bucket that has no quota, or costs more than it holds.
    """
    return {route.method.full_name: _price(route, quotas) for route in routes}


def _price(route: Route, quotas: Mapping[str, Quota]) -> Price:
    quota = route.method.options.quota
    bucket = quota.bucket or DEFAULT_BUCKET
    cost_points = quota.cost_points if quota.HasField("cost_points") else 1
    if bucket not in quotas:
        raise ContractError(f"{route.method.full_name}: no quota is named {bucket!r}")
    if cost_points > quotas[bucket].burst_points:
        held = quotas[bucket].burst_points
        setting = f"TENFOLD_EDGE_{bucket.upper()}_BURST_POINTS={held}"
        raise ContractError(f"{setting} cannot pay {route.method.full_name}: {cost_points} points.")
    is_public = route.method.policy.access is Access.PUBLIC
    return Price(quotas[bucket], cost_points, quota.strict, is_public)


def _key(price: Price, principal: Principal, address_block: str) -> str:
    who = principal.credential or principal.subject
    if price.is_by_address or not who:
        return f"quota:{price.quota.name}:address:{address_block}"
    return f"quota:{price.quota.name}:{principal.tenant}:{who}"
