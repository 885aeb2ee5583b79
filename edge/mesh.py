"""What an edge of a mesh needs beside the contracts: auth behind it, quotas in Valkey.

Loaded only there: an edge in front of another's server needs neither, and starts sooner.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from edge.auth import ApiKeys, Authenticator, SigningKeys, has_valid_checksum
from edge.auth_client import EndingRevocations, RpcAuthClient
from edge.quota_store import LocalQuotaStore, QuotaStore
from edge.quota_valkey import FallbackQuotaStore, ValkeyQuotaStore, open_valkey
from edge.streams import OpenStreams
from shared.clock import Clock
from shared.identity import AccessTokenVerifier, CredentialRevoked
from shared.identity_feed import run_revocation_feed
from shared.lifecycle import Loop
from shared.rpc.client import Channels


@asynccontextmanager
async def open_quota_store(
    valkey_url: str, *, edge_count: int, clock: Clock
) -> AsyncIterator[QuotaStore]:
    """Quotas of all edges, in Valkey; while it is away, this edge's share."""
    async with open_valkey(valkey_url) as client:
        yield FallbackQuotaStore(
            ValkeyQuotaStore(client), LocalQuotaStore(clock), edge_count=edge_count, clock=clock
        )


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
