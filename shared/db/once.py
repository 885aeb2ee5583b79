"""An effect happens once per request id, wherever it lands.

Where the row is. A key has a home bucket that depends on the key alone: the owner's bucket
for a user, else an HMAC of scope and key. The effect's own row, with the answer, is in the
bucket of the effect, in its transaction. If that is another bucket than the home, the home
holds a claim that names it; so the same key under another shard key meets the claim and is
refused. When both buckets share a shard, claim and effect are one transaction; else the
claim commits first, and a retry after a kill in between finds a claim that fits and goes on.

What is remembered. Answers, and business refusals (FailedPrecondition): a retry is refused
alike. Other errors roll everything back, so there is nothing to repeat; only a claim that
was committed on another shard stays, and ties its key to that request.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from shared.db.ids import bucket_of, secret_bucket
from shared.db.port import Once, Row, Transaction
from shared.errors import FailedPrecondition, IdempotencyKeyReused
from shared.identity import PrincipalKind

CLAIMED, DONE, REFUSED = "CLAIMED", "DONE", "REFUSED"

SELECT = """
SELECT req_hash, target_bucket, status, response FROM idempotency
WHERE bucket = $1 AND scope = $2 AND key = $3
"""
INSERT = """
INSERT INTO idempotency
    (bucket, scope, key, req_hash, target_bucket, status, response, created_at_us)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
"""


def home_bucket(once: Once, secret: bytes) -> int:
    """The bucket that remembers this key, whatever bucket its effect is in."""
    if once.principal.kind is PrincipalKind.USER:
        return bucket_of(once.principal.owner)
    return secret_bucket(secret, once.scope, once.request_id)


@dataclass
class Memory:
    """What one transaction knows and will remember about its request id.

    Attributes:
        home: the key's home bucket.
        is_joined: whether this transaction also writes the home bucket.
    """

    tx: Transaction
    once: Once
    home: int
    is_joined: bool
    now_us: int
    answered: bool = False
    answer: bytes = b""
    is_claimed: bool = False

    async def recall(self) -> None:
        """Look for an earlier answer.

        Raises:
            IdempotencyKeyReused: the key came with another request.
            FailedPrecondition: the first request was refused; so is this one.
        """
        if self.is_joined and self.home != self.tx.bucket:
            self.is_claimed = await self._check(self.home) is not None
        row = await self._check(self.tx.bucket)
        if row is None or row["status"] == CLAIMED:
            return
        self.once.on_replay()
        if row["status"] == REFUSED:
            raise refusal_of_bytes(row["response"])
        self.answered, self.answer = True, row["response"]

    async def remember_answer(self) -> None:
        """Store the answer, in the transaction of the effect."""
        if not self.answered:
            await self._store(DONE, self.answer)

    async def remember_refusal(self, refusal: FailedPrecondition) -> None:
        """Store a business refusal, after its effects have been undone."""
        await self._store(REFUSED, refusal_to_bytes(refusal))

    async def _check(self, bucket: int) -> Row | None:
        row = await self.tx.fetch_one(SELECT, bucket, self.once.scope, self.once.request_id)
        if row is not None:
            refuse_other(row, self.once, self.tx.bucket)
        return row

    async def _store(self, status: str, response: bytes) -> None:
        if self.is_joined and self.home != self.tx.bucket and not self.is_claimed:
            await insert_claim(self.tx, self.once, self.home, self.tx.bucket, self.now_us)
        await self.tx.execute(
            INSERT,
            *(self.tx.bucket, self.once.scope, self.once.request_id, self.once.fingerprint),
            *(self.tx.bucket, status, response, self.now_us),
        )


def refuse_other(row: Row, once: Once, target_bucket: int) -> None:
    """Refuse a key whose row was written for another request or another bucket."""
    if row["req_hash"] == once.fingerprint and row["target_bucket"] == target_bucket:
        return
    raise IdempotencyKeyReused(
        "this request id came with another request before; use a new one for a new request"
    )


async def insert_claim(
    tx: Transaction, once: Once, home: int, target_bucket: int, now_us: int
) -> None:
    """Write the row in the home bucket that names the effect's bucket."""
    await tx.execute(
        INSERT,
        *(home, once.scope, once.request_id, once.fingerprint),
        *(target_bucket, CLAIMED, b"", now_us),
    )


async def claim_at_home(
    tx: Transaction, once: Once, *, home: int, target_bucket: int, now_us: int
) -> None:
    """Claim a key whose effect is on another shard; repeating it is harmless.

    Raises:
        IdempotencyKeyReused: the key came with another request.
    """
    row = await tx.fetch_one(SELECT, home, once.scope, once.request_id)
    if row is None:
        await insert_claim(tx, once, home, target_bucket, now_us)
    else:
        refuse_other(row, once, target_bucket)


def refusal_to_bytes(refusal: FailedPrecondition) -> bytes:
    """A refusal as it is stored; its class is not, its reason is."""
    return orjson.dumps(
        {
            "reason": refusal.error_reason,
            "message": refusal.message,
            "metadata": refusal.metadata,
            "retry_after_s": refusal.retry_after_s,
        }
    )


def refusal_of_bytes(content: bytes) -> FailedPrecondition:
    """The refusal that refusal_to_bytes stored."""
    stored: dict[str, Any] = orjson.loads(content)
    return FailedPrecondition(
        stored["message"],
        metadata=stored["metadata"],
        retry_after_s=stored["retry_after_s"],
        reason=stored["reason"],
    )


def keyed_id_bucket(once: Once, secret: bytes) -> int:
    """The bucket for a root without an owner that is created under a request id.

    A keyed create never draws a random bucket: a retry would look in the wrong place.
    """
    return secret_bucket(secret, once.scope, once.request_id)
