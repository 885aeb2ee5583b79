"""Days, sums, watermarks and what events add to them: pure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Self
from uuid import UUID

from shared.errors import FailedPrecondition, InvalidRequest, NotFound

DAYS_MAX = 366
FIRST_DAY = date(2000, 1, 1)
"""Nothing was recorded before; an earlier start is a mistake in the request."""

CLOCK_LEEWAY = timedelta(seconds=60)
INT64_MAX = 2**63 - 1
RUN_COLLECTION = "reportRuns/"
OWNER_COLLECTIONS = ("users/", "serviceAccounts/")

DEBITS = "ledger.debits"
CREDITS = "ledger.credits"
TRANSACTIONS = "ledger.transactions"
ACCOUNTS_OPENED = "ledger.accounts_opened"
VIDEOS_QUEUED = "media.videos_queued"
VIDEOS_READY = "media.videos_ready"
VIDEOS_FAILED = "media.videos_failed"
USERS_REGISTERED = "auth.users_registered"


class IntervalInvalid(InvalidRequest):
    """The days asked for are reversed, too many, or not there yet."""

    reason = "INTERVAL_INVALID"


class NotYetVisible(FailedPrecondition):
    """The events up to the time asked for have not all arrived."""

    reason = "NOT_YET_VISIBLE"

    def __init__(self, watermark: "Watermark") -> None:
        reached = watermark.event_time
        super().__init__(
            "The events up to min_event_time are not counted yet; ask again, or without it.",
            metadata={
                "watermark_event_time": reached.isoformat() if reached else "",
                "watermark_event_count": str(watermark.event_count),
            },
        )


class ReportRunNotFound(NotFound):
    """There is no such report for this caller."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: there is no such report.")


class SumOverflowError(ValueError):
    """A day's sum would leave int64. The event is parked, never wrapped around."""


class OwnerMalformedError(ValueError):
    """An event names an owner that is none: a bug of its emitter; the event is parked."""


@dataclass(frozen=True)
class DayInterval:
    """Days, both ends included, UTC."""

    first: date
    last: date

    @classmethod
    def parse(cls, first_day: str, last_day: str, *, today: date) -> Self:
        """Read what a request asks for.

        Raises:
            IntervalInvalid: not a day, reversed, over 366 days, or not there yet.
        """
        first, last = _day("first_day", first_day), _day("last_day", last_day)
        if last < first:
            raise IntervalInvalid.of_field("last_day", "must not be before first_day")
        if last - first >= timedelta(days=DAYS_MAX):
            raise IntervalInvalid.of_field("last_day", f"must be within {DAYS_MAX} days")
        if first < FIRST_DAY:
            raise IntervalInvalid.of_field("first_day", f"must not be before {FIRST_DAY}")
        if last > today:
            raise IntervalInvalid.of_field("last_day", f"must not be after today, {today} UTC")
        return cls(first, last)


def _day(field: str, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise IntervalInvalid.of_field(field, "must be a day such as 2026-11-23") from error


def check_min_event_time(wanted: datetime, *, now: datetime) -> None:
    """Refuse to wait for what cannot have happened.

    Raises:
        IntervalInvalid: wanted lies in the future, clocks' differences allowed for.
    """
    if wanted > now + CLOCK_LEEWAY:
        raise IntervalInvalid.of_field("min_event_time", "must not be in the future")


@dataclass(frozen=True)
class Addition:
    """What one event adds to one owner's day."""

    owner: UUID
    day: date
    metric: str
    currency_code: str
    value: int


@dataclass(frozen=True)
class PostedEntry:
    """One entry of a posted transaction; owner as the event names it."""

    owner: str
    is_debit: bool
    currency_code: str
    minor_units: int


def additions_of_transaction(entries: Iterable[PostedEntry], day: date) -> list[Addition]:
    """Debits and credits for each account's owner, and the transaction itself once.

    It is counted for the owner of the first debited account, so that a tenant's sum counts
    it once.

    Raises:
        OwnerMalformedError: an owner's name is none.
    """
    sums: dict[tuple[UUID, str, str], int] = defaultdict(int)
    counted_for: UUID | None = None
    for entry in entries:
        owner = owner_of_name(entry.owner)
        sums[owner, DEBITS if entry.is_debit else CREDITS, entry.currency_code] += entry.minor_units
        if entry.is_debit and counted_for is None:
            counted_for = owner
    if counted_for is not None:
        sums[counted_for, TRANSACTIONS, ""] += 1
    return [
        Addition(owner, day, metric, currency_code, value)
        for (owner, metric, currency_code), value in sums.items()
    ]


def one_more(owner: str, metric: str, day: date) -> list[Addition]:
    """The addition of an event that is only counted.

    Raises:
        OwnerMalformedError: the owner's name is none.
    """
    return [Addition(owner_of_name(owner), day, metric, "", 1)]


def owner_of_name(name: str) -> UUID:
    """The id in users/{user} or serviceAccounts/{service_account}.

    Raises:
        OwnerMalformedError: the name is neither.
    """
    for collection in OWNER_COLLECTIONS:
        if name.startswith(collection):
            try:
                return UUID(name.removeprefix(collection))
            except ValueError:
                break
    raise OwnerMalformedError(f"{name!r} is not the name of an owner")


@dataclass(frozen=True)
class Scope:
    """Whose sums: an owner's, or the whole tenant's when owner is None."""

    tenant: str
    owner: UUID | None


@dataclass(frozen=True)
class DailySum:
    """One sum of one day; currency_code is empty for counts."""

    day: str
    metric: str
    currency_code: str
    value: int


@dataclass(frozen=True)
class Watermark:
    """How far the events behind an answer go."""

    event_time: datetime | None
    event_count: int
    degraded: bool

    def has_reached(self, wanted: datetime | None) -> bool:
        """Whether an event of that time or a newer one is counted."""
        if wanted is None:
            return True
        return self.event_time is not None and self.event_time >= wanted


@dataclass(frozen=True)
class Sums:
    """Sums that were added up; is_complete is False if one of them left int64 and is absent."""

    sums: Sequence[DailySum]
    is_complete: bool


def sums_of_parts(parts: Iterable[DailySum]) -> Sums:
    """Add up the buckets' parts, sorted by day, metric and currency."""
    totals: dict[tuple[str, str, str], int] = defaultdict(int)
    for part in parts:
        totals[part.day, part.metric, part.currency_code] += part.value
    fitting = [(key, value) for key, value in sorted(totals.items()) if value <= INT64_MAX]
    sums = [DailySum(*key, value) for key, value in fitting]
    return Sums(sums, is_complete=len(sums) == len(totals))


@dataclass(frozen=True)
class ReportRun:
    """A report, as it was when it ran. Attributes as in the contract."""

    id: UUID
    tenant: str
    owner: UUID
    owner_name: str
    whole_tenant: bool
    first_day: str
    last_day: str
    sums: Sequence[DailySum]
    watermark: Watermark
    create_time: datetime

    @property
    def name(self) -> str:
        """reportRuns/{report_run}."""
        return f"{RUN_COLLECTION}{self.id}"


def run_id_of_name(name: str) -> UUID:
    """The id in reportRuns/{report_run}.

    Raises:
        InvalidRequest: it is no such name.
    """
    try:
        number = UUID(name.removeprefix(RUN_COLLECTION))
    except ValueError:
        number = None
    if number is None or name != f"{RUN_COLLECTION}{number}":
        raise InvalidRequest.of_field("name", "must be reportRuns/ and an id")
    return number
