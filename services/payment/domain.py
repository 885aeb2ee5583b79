"""Values and rules of the ledger: pure, no await.

An account counts its debits and credits; its balance grows on its normal side and stays at
or above zero unless it may be overdrawn. A transaction is a set of entries whose debits
equal their credits in every currency; once posted it is never changed. Whether a transaction
passes is decided in posting.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from uuid import UUID

from services.payment.currencies import EXPONENTS
from shared.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    PermissionDenied,
)

INT64_MAX = 2**63 - 1
ENTRIES_MIN, ENTRIES_MAX = 2, 100


class Side(IntEnum):
    """The two columns of a ledger; the numbers are the contract's."""

    DEBIT = 1
    CREDIT = 2


class AccountState(IntEnum):
    """Whether entries are taken; the numbers are the contract's."""

    OPEN = 1
    CLOSED = 2


class OwnerKind(IntEnum):
    """What sort of thing owns."""

    USER = 1
    SERVICE_ACCOUNT = 2


@dataclass(frozen=True)
class Owner:
    """Who owns an account, or posted a transaction."""

    kind: OwnerKind
    id: UUID

    def __str__(self) -> str:
        """The resource name."""
        collection = "users" if self.kind is OwnerKind.USER else "serviceAccounts"
        return f"{collection}/{self.id}"


# Errors ---------------------------------------------------------------------------------


class AccountNotFound(NotFound):
    """No such account, or not the caller's: they look alike."""

    def __init__(self, account_id: UUID) -> None:
        super().__init__(f"{account_name(account_id)} does not exist")


class TransactionNotFound(NotFound):
    """No such transaction, or none of the caller's: they look alike."""

    def __init__(self, transaction_id: UUID) -> None:
        super().__init__(f"{transaction_name(transaction_id)} does not exist")


class HoldNotFound(NotFound):
    """No such hold, or not the caller's: they look alike."""

    def __init__(self, hold_id: UUID | None) -> None:
        super().__init__(f"holds/{hold_id} does not exist")


class HoldEnded(FailedPrecondition):
    """The hold was posted, voided or has expired."""

    reason = "HOLD_ENDED"

    def __init__(self, how: str) -> None:
        words = how.lower().replace("_", " ")
        super().__init__(f"the hold is {words}", metadata={"state": how})


class BatchRefused(FailedPrecondition):
    """Another transaction of an atomic batch was refused."""

    reason = "BATCH_REFUSED"


class CurrencyUnknown(InvalidRequest):
    """Not an ISO 4217 currency."""

    reason = "CURRENCY_UNKNOWN"


class CurrencyMismatch(InvalidRequest):
    """An entry's currency is not its account's."""

    reason = "CURRENCY_MISMATCH"


class EntriesUnbalanced(InvalidRequest):
    """Debits and credits differ."""

    reason = "ENTRIES_UNBALANCED"


class BalanceOverflow(InvalidRequest):
    """A sum would leave the range of int64."""

    reason = "BALANCE_OVERFLOW"


class InsufficientFunds(FailedPrecondition):
    """The account would fall below zero."""

    reason = "INSUFFICIENT_FUNDS"

    def __init__(self, account_id: UUID) -> None:
        # Not the balance: in a transaction of an operator it may be another's account.
        name = account_name(account_id)
        super().__init__(f"{name} has too little for this", metadata={"account": name})


class AccountClosed(FailedPrecondition):
    """The account takes no entries."""

    reason = "ACCOUNT_CLOSED"

    def __init__(self, account_id: UUID) -> None:
        name = account_name(account_id)
        super().__init__(f"{name} is closed", metadata={"account": name})


class ReferenceTaken(AlreadyExists):
    """The reference belongs to another transaction of the same owner."""

    reason = "REFERENCE_TAKEN"

    def __init__(self, reference: str) -> None:
        super().__init__(
            f"the reference {reference!r} belongs to another transaction",
            metadata={"reference": reference},
        )


# Values ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """A place where money of one currency is counted."""

    account_id: UUID
    tenant: str
    owner: Owner
    currency_code: str
    exponent: int
    normal_side: Side
    may_overdraw: bool
    display_name: str
    state: AccountState
    created_at: datetime
    posted_debit: int = 0
    posted_credit: int = 0
    pending_debit: int = 0
    pending_credit: int = 0
    entry_count: int = 0

    @property
    def available_minor_units(self) -> int:
        """What may be spent: the normal side less the other and less what is held of it."""
        if self.normal_side is Side.CREDIT:
            return self.posted_credit - self.posted_debit - self.pending_debit
        return self.posted_debit - self.posted_credit - self.pending_credit


@dataclass(frozen=True)
class NewEntry:
    """One side of a transaction that is asked for.

    Attributes:
        account_field: the request's field that names the account, for errors.
        amount_field: the request's field that holds the amount, for errors.
    """

    account_id: UUID
    side: Side
    currency_code: str
    minor_units: int
    account_field: str
    amount_field: str


@dataclass(frozen=True)
class Entry:
    """One side of a posted transaction."""

    account_id: UUID
    owner: Owner
    side: Side
    currency_code: str
    minor_units: int
    account_sequence: int


@dataclass(frozen=True)
class Transaction:
    """Entries whose debits equal their credits."""

    transaction_id: UUID
    tenant: str
    owner: Owner
    reference: str
    description: str
    entries: tuple[Entry, ...]
    recorded_at: datetime


@dataclass(frozen=True)
class CurrencyTotal:
    """One currency's sums over a tenant's ledger."""

    currency_code: str
    debit_minor_units: int
    credit_minor_units: int
    transaction_count: int


# Names ----------------------------------------------------------------------------------


def account_name(account_id: UUID) -> str:
    """accounts/{account}."""
    return f"accounts/{account_id}"


def transaction_name(transaction_id: UUID) -> str:
    """transactions/{transaction}."""
    return f"transactions/{transaction_id}"


def account_id_of_name(name: str, *, field: str) -> UUID:
    """The id in "accounts/{account}".

    Raises:
        InvalidRequest: it is not of that form; `field` is named.
    """
    return _id_of_name("accounts/", name, field)


def transaction_id_of_name(name: str, *, field: str) -> UUID:
    """The id in "transactions/{transaction}". See account_id_of_name."""
    return _id_of_name("transactions/", name, field)


def _id_of_name(prefix: str, name: str, field: str) -> UUID:
    text = name.removeprefix(prefix)
    try:
        id_ = UUID(text)
    except ValueError:
        id_ = None
    if id_ is None or f"{prefix}{id_}" != name or id_.version != 7:
        raise InvalidRequest.of_field(field, f"must be {prefix} and a lower-case UUIDv7")
    return id_


# Rules ----------------------------------------------------------------------------------


def exponent_of(currency_code: str, *, field: str) -> int:
    """Digits after the point of a currency.

    Raises:
        CurrencyUnknown: it is not an ISO 4217 currency.
    """
    exponent = EXPONENTS.get(currency_code)
    if exponent is None:
        raise CurrencyUnknown.of_field(field, "must be an active ISO 4217 currency code")
    return exponent


def require_operator_for(*, normal_side: Side, may_overdraw: bool, is_operator: bool) -> None:
    """Only an operator opens accounts through which money enters the books.

    Raises:
        PermissionDenied: anyone else.
    """
    if not is_operator and (normal_side is Side.DEBIT or may_overdraw):
        raise PermissionDenied(
            "only an operator may open an account with a debit side or without a floor"
        )


def transfer_entries(
    payer_id: UUID, payee_id: UUID, *, currency_code: str, minor_units: int
) -> tuple[NewEntry, NewEntry]:
    """What moving money means: the payer is debited, the payee credited.

    Raises:
        InvalidRequest: they are the same account, or the amount is not a whole positive number.
    """
    if payer_id == payee_id:
        raise InvalidRequest.of_field("to_account", "must be another account than the payer's")
    require_amount(minor_units, field="amount.minor_units")
    debit = NewEntry(payer_id, Side.DEBIT, currency_code, minor_units, "account", "amount")
    credit = NewEntry(payee_id, Side.CREDIT, currency_code, minor_units, "to_account", "amount")
    return debit, credit


def require_amount(minor_units: int, *, field: str) -> None:
    """An entry's amount is 1 to 2^63-1 minor units.

    Raises:
        InvalidRequest: it is not.
    """
    if not 0 < minor_units <= INT64_MAX:
        raise InvalidRequest.of_field(field, "must be 1 or more minor units")


def require_balanced(entries: Sequence[NewEntry], *, field: str = "transaction.entries") -> None:
    """Check what can be checked before any account is read; `field` is the request's, for errors.

    Raises:
        EntriesUnbalanced: debits and credits differ in some currency.
        InvalidRequest: too few entries, a wrong amount, or one account twice.
    """
    if not ENTRIES_MIN <= len(entries) <= ENTRIES_MAX:
        raise InvalidRequest.of_field(field, "must be 2 to 100 entries")
    seen: set[UUID] = set()
    debited: dict[str, int] = {}
    credited: dict[str, int] = {}
    for entry in entries:
        require_amount(entry.minor_units, field=f"{entry.amount_field}.minor_units")
        if entry.account_id in seen:
            raise InvalidRequest.of_field(entry.account_field, "must not be named twice")
        seen.add(entry.account_id)
        sums = debited if entry.side is Side.DEBIT else credited
        sums[entry.currency_code] = sums.get(entry.currency_code, 0) + entry.minor_units
    codes = sorted(debited | credited)
    if wrong := [code for code in codes if debited.get(code) != credited.get(code)]:
        description = f"debits and credits differ in {', '.join(wrong)}"
        raise EntriesUnbalanced.of_field(field, description)
    if max(debited.values()) > INT64_MAX:
        raise BalanceOverflow.of_field(field, "add up to more than 2^63-1")


def bucket_account(entries: Sequence[NewEntry]) -> UUID:
    """The account whose bucket a transaction takes: the first that is debited."""
    return next(entry.account_id for entry in entries if entry.side is Side.DEBIT)
