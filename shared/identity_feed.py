"""Keeps a RevocationList in step with auth: a log-out is effective at once in every process."""

import asyncio
import random

from tenfold.auth.v1 import auth_service_pb2 as auth
from tenfold.auth.v1 import auth_service_pb2_grpc as auth_grpc

from shared import log
from shared.errors import TenfoldError
from shared.identity import RevocationList
from shared.rpc.client import Channels

AUTH_SESSIONS = "tenfold.auth.v1.SessionService"
RETRY_MIN_S, RETRY_MAX_S = 0.1, 2.0
# The server sends a heartbeat at least this often; a silent stream is taken for dead.
HEARTBEAT_S = 5.0
SILENCE_MAX_S = 3 * HEARTBEAT_S

_logger = log.get_logger("revocations")


async def run_revocation_feed(channels: Channels, revocations: RevocationList) -> None:
    """Follow auth's revocations until cancelled; after a break, start over.

    Each stream begins with everything still of interest, so a break loses nothing.
    RevocationList.age_s says how long ago the list was known to be complete.
    """
    delay_s = RETRY_MIN_S
    while True:
        try:
            await _follow(channels, revocations)
            delay_s = RETRY_MIN_S
        except (TenfoldError, TimeoutError) as error:
            _logger.info("the revocation feed broke", error=str(error))
            delay_s = min(delay_s * 2, RETRY_MAX_S)
        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311  jitter


async def _follow(channels: Channels, revocations: RevocationList) -> None:
    stub = auth_grpc.SessionServiceStub(channels.channel(AUTH_SESSIONS))
    is_caught_up = False
    async with stub.WatchRevocations(auth.WatchRevocationsRequest()) as stream:  # type: ignore[attr-defined]
        answers = aiter(stream)
        while True:
            async with asyncio.timeout(SILENCE_MAX_S):
                answer = await anext(answers, None)
            if answer is None:
                return
            if answer.credential:
                revocations.revoke(answer.credential, answer.forget_time.ToNanoseconds() / 1e9)
            is_caught_up = is_caught_up or answer.caught_up
            if is_caught_up:
                revocations.mark_current()
