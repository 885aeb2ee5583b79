"""What an edge of a mesh needs beside the contracts: auth behind it, quotas in Valkey.

Loaded only there: an edge in front of another's server needs neither, and starts sooner.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from secrets import token_hex

from edge.accounts import Accounts
from edge.auth import ApiKeys, Authenticator, SigningKeys, has_valid_checksum
from edge.auth_client import EndingRevocations, RpcAuthClient
from edge.live_plans import LivePlans
from edge.quota_valkey import ValkeyQuotas, open_valkey
from edge.slots_valkey import ValkeySlots
from edge.streams import OpenStreams
from edge.valkey import ValkeyConnection, ValkeyError
from shared.clock import Clock
from shared.identity import AccessTokenVerifier, CredentialRevoked
from shared.identity_feed import run_revocation_feed
from shared.lifecycle import Loop
from shared.quota.keys import EFFECTIVE_KEY, OVERRIDES_KEY
from shared.rpc.client import Channels

# How often an edge says that it is alive and looks for changed plans; and how often it looks
# whether Valkey is back.
BEAT_S, PROBE_S = 1.0, 0.2
# What the edges obey is told to operators for this long after the last edge has gone.
EFFECTIVE_KEPT_S = 60


@asynccontextmanager
async def open_quotas(
    valkey_url: str,
    plans: LivePlans,
    accounts: Accounts,
    *,
    edges_min: int,
    timeout_s: float,
    clock: Clock,
) -> AsyncIterator[tuple[ValkeyQuotas, ValkeySlots]]:
    """Quotas and slots of all edges, in Valkey; they keep up with plans and other edges."""
    async with open_valkey(valkey_url, timeout_s=timeout_s) as client:
        name = token_hex(8)
        quotas = ValkeyQuotas(client, clock, edge=name, edges_min=edges_min)
        slots = ValkeySlots(client, clock, edge=name)
        keep_slots = partial(_keep_slots, slots, quotas)
        async with _running(partial(_keep_up, quotas, plans, accounts, client), keep_slots):
            yield quotas, slots
        await quotas.close()


async def _keep_up(
    quotas: ValkeyQuotas, plans: LivePlans, accounts: Accounts, client: ValkeyConnection
) -> None:
    revision: str | None = ""
    while True:
        await plans.refresh()
        heard = await quotas.beat()
        if heard is not None:
            with suppress(ValkeyError, TimeoutError, OSError):  # told again, at the next beat
                if heard != revision:
                    plans.override(_texts(await client.execute("HGETALL", OVERRIDES_KEY)))
                    accounts.forget()  # a bucket may have been reset
                    revision = heard
                kept_s = str(EFFECTIVE_KEPT_S)
                await client.execute("SET", EFFECTIVE_KEY, plans.as_json(), "EX", kept_s)
        await asyncio.sleep(PROBE_S if quotas.is_away else BEAT_S)


async def _keep_slots(slots: ValkeySlots, quotas: ValkeyQuotas) -> None:
    while True:
        slots.edge_count = quotas.edge_count
        await slots.renew_if_due()
        await asyncio.sleep(BEAT_S)


def _texts(flat: list[bytes]) -> dict[str, str]:
    """A hash as Valkey answers it: field, value, field, value."""
    texts = [part.decode(errors="replace") for part in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


@asynccontextmanager
async def open_authenticator(
    channels: Channels, open_streams: OpenStreams, *, revocations_stale_s: float, clock: Clock
) -> AsyncIterator[Authenticator]:
    """What knows credentials; it keeps up with auth's keys and revocations while open."""

    def end_streams(credential: str) -> None:
        open_streams.end(credential, CredentialRevoked("The session or key has ended."))

    client = RpcAuthClient(channels)
    revocations = EndingRevocations(end_streams, clock=clock)
    tokens = AccessTokenVerifier(revocations=revocations, clock=clock)
    signing_keys = SigningKeys(client, tokens, clock)
    async with _running(partial(run_revocation_feed, channels, revocations), signing_keys.run):
        yield Authenticator(
            tokens=tokens,
            signing_keys=signing_keys,
            api_keys=ApiKeys(
                client.resolve_api_key,
                has_valid_checksum=has_valid_checksum,
                revocations=revocations,
                clock=clock,
            ),
            revocations=revocations,
            revocations_stale_s=revocations_stale_s,
        )


@asynccontextmanager
async def _running(*loops: Loop) -> AsyncIterator[None]:
    """Run loops beside what is inside; if one fails, all of it ends and the error surfaces."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop()) for loop in loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
