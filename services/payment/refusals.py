"""What a caller is told when a batch has refused its order."""

from uuid import UUID

from services.payment.domain import (
    AccountClosed,
    AccountNotFound,
    BalanceOverflow,
    BatchRefused,
    CurrencyMismatch,
    HoldEnded,
    HoldNotFound,
    InsufficientFunds,
    NewEntry,
    ReferenceTaken,
)
from services.payment.posting import Answer, Order, Result
from shared.errors import IdempotencyKeyReused, InvalidRequest, TenfoldError

REPLAYED = frozenset({Result.EXISTS, Result.ID_ALREADY_FAILED})


def refusal_of(answer: Answer, order: Order) -> TenfoldError | None:
    """The error that an answer is to its caller; None if the order has passed.

    An order that was refused before is refused in the same words.
    """
    result = answer.result
    if result is Result.ID_ALREADY_FAILED and answer.record is not None:
        result = answer.record.result
    if result in (Result.OK, Result.EXISTS):
        return None
    if answer.concerns is not None:
        return _refusal_for_account(result, answer.concerns, order)
    return _refusal(result, order)


def _refusal_for_account(result: Result, account_id: UUID, order: Order) -> TenfoldError:
    entry = next((one for one in order.entries if one.account_id == account_id), None)
    field = entry.amount_field if entry is not None else "name"
    errors: dict[Result, TenfoldError] = {
        Result.ACCOUNT_NOT_FOUND: AccountNotFound(account_id),
        Result.ACCOUNT_ALREADY_CLOSED: AccountClosed(account_id),
        Result.EXCEEDS_CREDITS: InsufficientFunds(account_id),
        Result.EXCEEDS_DEBITS: InsufficientFunds(account_id),
        Result.CURRENCY_MISMATCH: CurrencyMismatch.of_field(
            f"{field}.currency_code", "must be the account's currency"
        ),
        Result.OVERFLOWS: BalanceOverflow.of_field(
            f"{field}.minor_units", "would take the account's sums beyond 9223372036854775807"
        ),
        Result.ACCOUNT_NOT_TRANSFERABLE: InvalidRequest.of_field(
            _account_field(entry), "must be a CREDIT account; use PostTransaction"
        ),
    }
    return errors[result]


def _account_field(entry: NewEntry | None) -> str:
    return entry.account_field if entry is not None else "account"


def _refusal(result: Result, order: Order) -> TenfoldError:
    # A table: what is wrong with the order itself, or with the hold that it ends.
    if result is Result.EXISTS_WITH_DIFFERENT_FIELDS:
        return IdempotencyKeyReused(
            "this request id came with another request before; use a new one for a new request"
        )
    if result is Result.REFERENCE_TAKEN:
        return ReferenceTaken(order.reference)
    if result is Result.PENDING_TRANSFER_NOT_FOUND:
        return HoldNotFound(order.pending_id)
    if result is Result.EXCEEDS_PENDING_TRANSFER_AMOUNT:
        return InvalidRequest.of_field("amount.minor_units", "must be at most what is held")
    if result in (Result.LINKED_EVENT_FAILED, Result.LINKED_EVENT_CHAIN_OPEN):
        return BatchRefused("another transaction of this batch was refused")
    return HoldEnded(result.name.removeprefix("PENDING_TRANSFER_"))
