"""Work that only one process may do at a time, with a token that fences the others.

The token only grows: a holder that was stopped for a while and comes back shows a lower
one than its successor, and whoever checks tokens refuses it.
"""

from dataclasses import dataclass

from shared.clock import CLOCKS_APART_US
from shared.db.port import Transaction

_TAKE = """
INSERT INTO tenfold_lease (name, holder, token, expires_at_us) VALUES ($1, $2, 1, $3)
ON CONFLICT (name) DO UPDATE
SET holder = $2, token = tenfold_lease.token + 1, expires_at_us = $3
WHERE tenfold_lease.expires_at_us <= $4 OR tenfold_lease.expires_at_us > $5
RETURNING token
"""
_RENEW = """
UPDATE tenfold_lease SET expires_at_us = $4
WHERE name = $1 AND holder = $2 AND token = $3 AND expires_at_us > $5
"""
_RELEASE = (
    "UPDATE tenfold_lease SET expires_at_us = 0 WHERE name = $1 AND holder = $2 AND token = $3"
)


@dataclass(frozen=True)
class Lease:
    """A lease that is held until it expires."""

    name: str
    holder: str
    token: int


async def take_lease(
    tx: Transaction, name: str, *, holder: str, now_us: int, ttl_us: int
) -> Lease | None:
    """Take a lease that is free or has expired; None while another holds it.

    One that lasts longer than any could is left from before the clock was set back.
    """
    until_us = now_us + ttl_us
    row = await tx.fetch_one(_TAKE, name, holder, until_us, now_us, until_us + CLOCKS_APART_US)
    return None if row is None else Lease(name, holder, row["token"])


async def renew_lease(tx: Transaction, lease: Lease, *, now_us: int, ttl_us: int) -> bool:
    """Hold on to it; False if it has expired or is another's: stop the work then."""
    arguments = (lease.name, lease.holder, lease.token, now_us + ttl_us, now_us)
    return await tx.execute(_RENEW, *arguments) == 1


async def release_lease(tx: Transaction, lease: Lease) -> None:
    """Let another take it at once; harmless if it is no longer held."""
    await tx.execute(_RELEASE, lease.name, lease.holder, lease.token)
