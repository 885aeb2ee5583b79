"""Notices, inboxes and deliveries: values and rules, pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Self
from uuid import UUID

from shared.errors import InvalidRequest, NotFound

ITEM_COLLECTION = "inbox/items/"
DELIVERY_COLLECTION = "deliveries/"
USER_COLLECTION = "users/"

NOBODY = UUID(int=0)
CONTACT_UNKNOWN = "CONTACT_UNKNOWN"
CLAIM_LOST_TWICE = "CLAIM_LOST_TWICE"
MAIL_QUOTA_EXCEEDED = "MAIL_QUOTA_EXCEEDED"
# A person who cannot be reached in this many tries (about a day and a half) is given up.
ATTEMPT_COUNT_MAX = 40
RETRY_FIRST_S = 30.0
RETRY_MAX_S = 3600.0
JITTER = 0.2
# UserRegistered may come after the first notice; it is waited for this long.
CONTACT_WAIT = timedelta(days=3)
CONTACT_RECHECK_S = 300.0
# A claim that ended without a word may or may not have sent: repeated once, then left alone.
LOST_CLAIM_COUNT_MAX = 1
REASON_CHARS_MAX = 300


class InboxItemNotFound(NotFound):
    """There is no such notice in the caller's inbox."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not in your inbox.", metadata={"name": name})


def item_id_of_name(name: str) -> UUID:
    """The id in "inbox/items/{item}".

    Raises:
        InvalidRequest: it is not such a name.
    """
    return _id_of_name("name", name, ITEM_COLLECTION)


def item_name(item_id: UUID) -> str:
    """The resource name of a notice."""
    return f"{ITEM_COLLECTION}{item_id}"


def delivery_name(delivery_id: UUID) -> str:
    """The resource name of a delivery."""
    return f"{DELIVERY_COLLECTION}{delivery_id}"


def user_name(user_id: UUID) -> str:
    """The resource name of a user."""
    return f"{USER_COLLECTION}{user_id}"


def user_id_of_name(name: str) -> UUID | None:
    """The id in "users/{user}"; None for any other owner (a service account has no inbox)."""
    try:
        return _id_of_name("user", name, USER_COLLECTION)
    except InvalidRequest:
        return None


def _id_of_name(field: str, name: str, collection: str) -> UUID:
    text = name.removeprefix(collection)
    try:
        found = UUID(text)
    except ValueError:
        found = None
    # UUID() also reads braces, URNs and upper case: only the canonical form is a name.
    if found is None or not name.startswith(collection) or str(found) != text:
        raise InvalidRequest.of_field(field, f'must be "{collection}" and a UUID in lower case.')
    return found


@dataclass(frozen=True)
class Contact:
    """Where a user can be reached outside the mesh."""

    user_id: UUID
    tenant: str
    email: str
    display_name: str
    locale: str


@dataclass(frozen=True)
class Notice:
    """What one recipient is to be told, once.

    Attributes:
        cause: what makes it unique with recipient and category: an event's id, or the
            aggregate of a NoticeRequested.
        subject: the resource it is about, or "".
        email: whether it also goes out by e-mail.
    """

    recipient: UUID
    tenant: str
    cause: str
    category: str
    title: str
    body: str
    subject: str
    email: bool


@dataclass(frozen=True)
class InboxItem:
    """A notice in an inbox.

    Attributes:
        position: the inbox's version when this item last changed; the stream's cursor.
    """

    item_id: UUID
    category: str
    title: str
    body: str
    subject: str
    position: int
    created_at: datetime
    read_at: datetime | None


@dataclass(frozen=True)
class InboxSummary:
    """The counts of one inbox; version grows by one with every change."""

    unread_count: int = 0
    total_count: int = 0
    version: int = 0


class DeliveryState(StrEnum):
    """Where a delivery stands. SENDING is shown to callers as QUEUED."""

    QUEUED = "QUEUED"
    SENDING = "SENDING"
    SENT = "SENT"
    FAILED = "FAILED"
    UNKNOWN = "UNKNOWN"

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen."""
        return self not in (DeliveryState.QUEUED, DeliveryState.SENDING)


class Reply(StrEnum):
    """What the mail server made of a message."""

    ACCEPTED = "ACCEPTED"
    # Not now (4xx), or the connection ended before the message was handed over.
    DEFERRED = "DEFERRED"
    # Never (5xx, or an address or header that must not be used).
    REFUSED = "REFUSED"
    # The message was handed over and the answer never came: it may have arrived.
    LOST = "LOST"


@dataclass(frozen=True)
class Outcome:
    """A reply and, unless accepted, what was said."""

    reply: Reply
    reason: str = ""


@dataclass(frozen=True)
class Delivery:
    """One notice on its way to a person by e-mail.

    Attributes:
        attempt_count: how often it was handed to a mail server, or begun to be.
        lost_claim_count: how many attempts ended without a word (the process died).
        next_attempt_at: when it is due; while SENDING, when the claim ends.
        claim_holder: who began the last attempt; NOBODY before the first.
        version: of the row; a change is made only to the version it was decided on.
    """

    delivery_id: UUID
    tenant: str
    owner: UUID
    item_id: UUID
    state: DeliveryState
    attempt_count: int
    lost_claim_count: int
    claim_holder: UUID
    reason: str
    created_at: datetime
    next_attempt_at: datetime | None
    sent_at: datetime | None
    version: int

    def claim(self, holder: UUID, *, now: datetime, claim_s: float) -> Self:
        """Begin an attempt, or end a delivery whose outcome was lost too often.

        The claim is durable before the mail server hears anything, so a process that
        dies in between leaves a trace: SENDING, past its time. Such a delivery is
        repeated once under the same Message-ID; a second loss makes it UNKNOWN.
        """
        assert not self.state.is_final
        lost = self.lost_claim_count + (self.state is DeliveryState.SENDING)
        if lost > LOST_CLAIM_COUNT_MAX:
            ended = replace(self, lost_claim_count=lost)
            return ended._end(DeliveryState.UNKNOWN, CLAIM_LOST_TWICE)
        return replace(
            self,
            state=DeliveryState.SENDING,
            attempt_count=self.attempt_count + 1,
            lost_claim_count=lost,
            claim_holder=holder,
            next_attempt_at=now + timedelta(seconds=claim_s),
        )

    def orphaned(self, *, now: datetime) -> Self:
        """The holder of the claim is gone: due at once, and still marked as in doubt."""
        assert self.state is DeliveryState.SENDING
        return replace(self, next_attempt_at=now)

    def conclude(self, outcome: Outcome, *, now: datetime, jitter: float) -> Self:
        """Turn an attempt's outcome into the next state.

        Args:
            outcome: what the mail server said.
            now: the current time, UTC.
            jitter: -1 to 1; spreads retries by up to a fifth.
        """
        assert self.state is DeliveryState.SENDING
        match outcome.reply:
            case Reply.ACCEPTED:
                return replace(self._end(DeliveryState.SENT, ""), sent_at=now)
            case Reply.REFUSED:
                return self._end(DeliveryState.FAILED, outcome.reason)
            case Reply.LOST:
                return self._end(DeliveryState.UNKNOWN, outcome.reason)
            case Reply.DEFERRED:
                return self._retry(outcome.reason, now=now, jitter=jitter)

    def wait_for_tomorrow(self, *, now: datetime) -> Self:
        """The recipient has had as many e-mails today as it may: the next day it is due (UTC)."""
        assert not self.state.is_final
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        return replace(
            self,
            state=DeliveryState.QUEUED,
            reason=MAIL_QUOTA_EXCEEDED,
            next_attempt_at=midnight + timedelta(days=1),
        )

    def wait_for_contact(self, *, now: datetime) -> Self:
        """Nobody knows the address yet: look again later, within bounds."""
        assert not self.state.is_final
        if now - self.created_at >= CONTACT_WAIT:
            return self._end(DeliveryState.FAILED, CONTACT_UNKNOWN)
        return replace(
            self,
            state=DeliveryState.QUEUED,
            reason=CONTACT_UNKNOWN,
            next_attempt_at=now + timedelta(seconds=CONTACT_RECHECK_S),
        )

    def _retry(self, reason: str, *, now: datetime, jitter: float) -> Self:
        if self.attempt_count >= ATTEMPT_COUNT_MAX:
            return self._end(DeliveryState.FAILED, reason)
        wait_s = retry_wait_s(self.attempt_count, jitter=jitter)
        return replace(
            self,
            state=DeliveryState.QUEUED,
            reason=reason[:REASON_CHARS_MAX],
            next_attempt_at=now + timedelta(seconds=wait_s),
        )

    def _end(self, state: DeliveryState, reason: str) -> Self:
        return replace(self, state=state, reason=reason[:REASON_CHARS_MAX], next_attempt_at=None)


def retry_wait_s(attempt_count: int, *, jitter: float) -> float:
    """How long to wait after that many attempts: doubling from 30 s, at most an hour."""
    wait_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(attempt_count - 1, 20))
    return wait_s * (1 + JITTER * jitter)


@dataclass(frozen=True)
class Credited:
    """One user whom a transaction credits, and how much per currency."""

    user_id: UUID
    minor_units: Mapping[str, int]


@dataclass(frozen=True)
class PostedEntry:
    """One side of a posted transaction: the owner's resource name, signed by side."""

    owner: str
    is_credit: bool
    currency_code: str
    minor_units: int


def credited_users(entries: tuple[PostedEntry, ...]) -> list[Credited]:
    """The users who received money from somebody else, in the order of the entries.

    A user who is also debited moved his own money and is not told so.
    """
    debited = {entry.owner for entry in entries if not entry.is_credit}
    sums: dict[UUID, dict[str, int]] = {}
    for entry in entries:
        user_id = user_id_of_name(entry.owner)
        if not entry.is_credit or entry.owner in debited or user_id is None:
            continue
        sum_of = sums.setdefault(user_id, {})
        sum_of[entry.currency_code] = sum_of.get(entry.currency_code, 0) + entry.minor_units
    return [Credited(user_id, sum_of) for user_id, sum_of in sums.items()]
