"""UUIDv7 keys that carry their bucket, and the bucket of a natural key.

Layout (RFC 9562, version 7): 48 bits of unix milliseconds · version · 12 bits
`rand_a` holding the bucket · variant · 62 bits tail. The tail is an 18-bit counter,
seeded at random each millisecond, and 44 random bits: ids of one process and one
bucket only grow, and two processes that mint in the same millisecond collide with
odds of about 2^-62 per pair.
"""

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from uuid import UUID

BUCKET_COUNT = 4096
BUCKET_MASK = BUCKET_COUNT - 1
_COUNTER_BITS = 18
_RANDOM_BITS = 44
_COUNTER_LIMIT = 1 << _COUNTER_BITS
# Seeds stay in the lower half, so that each millisecond has room for 2^17 ids or more.
_SEED_LIMIT = _COUNTER_LIMIT >> 1
_VERSION_7 = 0x7 << 76
_VARIANT_RFC = 0b10 << 62


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class IdMaker:
    """Mints ids; one per process, since the counter is what keeps them in order.

    Args:
        now_ms: unix milliseconds; may go back, ids do not.
        random_below: a uniform random integer from 0 up to, not including, its argument.
    """

    def __init__(
        self,
        now_ms: Callable[[], int] = _now_ms,
        random_below: Callable[[int], int] = secrets.randbelow,
    ) -> None:
        self._now_ms = now_ms
        self._random_below = random_below
        self._lock = threading.Lock()
        self._last_ms = -1
        self._counter = 0

    def make(self, bucket: int) -> UUID:
        """A new id in this bucket, above every earlier one of the same bucket.

        Args:
            bucket: 0 to 4095.

        Raises:
            ValueError: there is no such bucket.
        """
        if not 0 <= bucket < BUCKET_COUNT:
            raise ValueError(f"bucket {bucket} is not between 0 and {BUCKET_COUNT - 1}")
        with self._lock:
            moment_ms, counter = self._advance()
        tail = counter << _RANDOM_BITS | self._random_below(1 << _RANDOM_BITS)
        return UUID(int=moment_ms << 80 | _VERSION_7 | bucket << 64 | _VARIANT_RFC | tail)

    def _advance(self) -> tuple[int, int]:
        now_ms = self._now_ms()
        if now_ms > self._last_ms:
            self._last_ms, self._counter = now_ms, self._random_below(_SEED_LIMIT)
        else:
            # The same millisecond, or the clock stepped back: keep the last and count on.
            self._counter += 1
            if self._counter == _COUNTER_LIMIT:
                self._last_ms, self._counter = self._last_ms + 1, 0
        return self._last_ms, self._counter


_maker = IdMaker()


def new_id(bucket: int) -> UUID:
    """A new UUIDv7 in this bucket (0 to 4095). See IdMaker.make."""
    return _maker.make(bucket)


def random_bucket() -> int:
    """A uniformly random bucket, for a root that has neither owner nor request id."""
    return secrets.randbelow(BUCKET_COUNT)


def bucket_of(id: UUID) -> int:  # noqa: A002 - the interface every caller knows
    """The bucket that an id carries, 0 to 4095."""
    return (id.int >> 64) & BUCKET_MASK


def moment_ms_of(id: UUID) -> int:  # noqa: A002 - as bucket_of
    """Unix milliseconds at which an id was made."""
    return id.int >> 80


def hash_bucket(*parts: str) -> int:
    """The bucket of a natural key (tenant, kind, normalised value), 0 to 4095.

    BLAKE2b instead of the faster xxHash: it is in the standard library, and a caller who
    chooses the value cannot aim at one bucket any better.
    """
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) & BUCKET_MASK


def secret_bucket(secret: bytes, *parts: str) -> int:
    """As hash_bucket, but unpredictable without the secret (HMAC-SHA-256, RFC 2104)."""
    digest = hmac.digest(secret, "\0".join(parts).encode(), "sha256")
    return int.from_bytes(digest[:8]) & BUCKET_MASK
