"""Comes in by RPC: tenfold.ledger.v1, message -> domain -> message."""

from datetime import UTC, date, datetime, timedelta
from uuid import UUID

from tenfold.ledger.v1.ledger_pb2 import Account as AccountMessage
from tenfold.ledger.v1.ledger_pb2 import Balance as BalanceMessage
from tenfold.ledger.v1.ledger_pb2 import Entry as EntryMessage
from tenfold.ledger.v1.ledger_pb2 import Transaction as TransactionMessage
from tenfold.ledger.v1.ledger_service_pb2 import (
    BatchPostResult,
    BatchPostTransactionsRequest,
    BatchPostTransactionsResponse,
    CreateAccountRequest,
    CurrencyTotal,
    GetAccountRequest,
    GetBalanceRequest,
    GetTransactionRequest,
    GetTrialBalanceRequest,
    ListAccountsRequest,
    ListAccountsResponse,
    ListTransactionsRequest,
    ListTransactionsResponse,
    PostTransactionRequest,
    TransferFundsRequest,
    TrialBalance,
)
from tenfold.ledger.v1.ledger_service_pb2 import NewTransaction as NewTransactionMessage

from services.payment.domain import (
    Account,
    AccountState,
    NewEntry,
    Owner,
    OwnerKind,
    Side,
    account_id_of_name,
    account_name,
    bucket_account,
    exponent_of,
    require_balanced,
    require_operator_for,
    transaction_id_of_name,
    transaction_name,
    transfer_entries,
)
from services.payment.events import account_to_proto, timestamp_of, transaction_to_proto
from services.payment.posting import Answer, Order, Result
from services.payment.refusals import REPLAYED, refusal_of
from services.payment.store import (
    LAST_ID,
    LAST_SEQUENCE,
    Caller,
    LedgerStore,
    transaction_of_record,
)
from shared.clock import Clock
from shared.db.ids import bucket_of, new_id
from shared.db.paging import PageScope, open_page_token, page_size_of, seal_page_token
from shared.db.port import Once
from shared.errors import InvalidRequest, PermissionDenied
from shared.identity import Principal, PrincipalKind
from shared.rpc.context import Context, once_of

_ALL_TIME = (datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC))


class LedgerHandler:
    """Serves LedgerService."""

    def __init__(self, store: LedgerStore, *, page_secret: bytes, clock: Clock) -> None:
        self._store = store
        self._page_secret = page_secret
        self._clock = clock

    async def CreateAccount(
        self, request: CreateAccountRequest, context: Context
    ) -> AccountMessage:
        """Opens an account of the caller, in the caller's bucket."""
        caller, asked = caller_of(context.principal), request.account
        normal_side = Side(asked.normal_side or Side.CREDIT)
        require_operator_for(
            normal_side=normal_side,
            may_overdraw=asked.may_overdraw,
            is_operator=caller.is_operator,
        )
        account = Account(
            account_id=new_id(bucket_of(caller.owner.id)),
            tenant=caller.tenant,
            owner=caller.owner,
            currency_code=asked.currency_code,
            exponent=exponent_of(asked.currency_code, field="account.currency_code"),
            normal_side=normal_side,
            may_overdraw=asked.may_overdraw,
            display_name=asked.display_name,
            state=AccountState.OPEN,
            created_at=self._clock.now(),
        )
        once = once_of(context, request)
        return account_to_proto(await self._store.open_account(account, once=once))

    async def GetAccount(self, request: GetAccountRequest, context: Context) -> AccountMessage:
        """The caller's account."""
        account_id = account_id_of_name(request.name, field="name")
        account = await self._store.get_account(account_id, caller_of(context.principal))
        return account_to_proto(account)

    async def ListAccounts(
        self, request: ListAccountsRequest, context: Context
    ) -> ListAccountsResponse:
        """The caller's own, newest first."""
        scope = PageScope.of(context.method, context.principal)
        position = open_page_token(self._page_secret, scope, request.page_token)
        before = UUID(str(position[0])) if position else LAST_ID
        size = page_size_of(request.page_size)
        # One more than asked for tells whether there is a next page.
        found = await self._store.list_accounts(
            caller_of(context.principal), before=before, limit=size + 1
        )
        response = ListAccountsResponse(accounts=map(account_to_proto, found[:size]))
        if len(found) > size:
            last_id = found[size - 1].account_id
            response.next_page_token = seal_page_token(self._page_secret, scope, last_id)
        return response

    async def GetBalance(self, request: GetBalanceRequest, context: Context) -> BalanceMessage:
        """The sums of the caller's account."""
        account_id = account_id_of_name(request.account, field="account")
        account = await self._store.get_account(account_id, caller_of(context.principal))
        return balance_to_proto(account)

    async def TransferFunds(
        self, request: TransferFundsRequest, context: Context
    ) -> TransactionMessage:
        """One debit of the caller's account, one credit of any account of the tenant."""
        caller, once = caller_of(context.principal), once_of(context, request)
        entries = transfer_entries(
            account_id_of_name(request.account, field="account"),
            account_id_of_name(request.to_account, field="to_account"),
            currency_code=request.amount.currency_code,
            minor_units=request.amount.minor_units,
        )
        order = Order(
            self._store.order_id(once, bucket_of(entries[0].account_id)),
            caller.tenant,
            caller.owner,
            entries,
            once.fingerprint,
            description=request.description,
            payer=None if caller.is_operator else caller.owner,
            is_transfer=True,
        )
        return await self._post(order, once, is_preview=request.validate_only)

    async def PostTransaction(
        self, request: PostTransactionRequest, context: Context
    ) -> TransactionMessage:
        """Any balanced entries on the tenant's accounts, by an operator."""
        caller, once = caller_of(context.principal), once_of(context, request)
        asked = request.transaction
        order = self._order_of_proto(asked, caller, once, field="transaction")
        return await self._post(order, once, is_preview=request.validate_only)

    async def BatchPostTransactions(
        self, request: BatchPostTransactionsRequest, context: Context
    ) -> BatchPostTransactionsResponse:
        """Many transactions of an operator, decided in one batch."""
        caller, once = caller_of(context.principal), once_of(context, request)
        last = len(request.transactions) - 1
        orders = [
            self._order_of_proto(
                asked,
                caller,
                once,
                field=f"transactions[{at}]",
                at=at,
                is_linked=request.atomic and at < last,
            )
            for at, asked in enumerate(request.transactions)
        ]
        if request.validate_only:
            answers = await self._store.preview(orders)
        else:
            answers = await self._store.decide(orders, once=once)
        if all(answer.result in REPLAYED for answer in answers):
            once.on_replay()
        return BatchPostTransactionsResponse(
            results=[
                batch_result_to_proto(answer, order, is_preview=request.validate_only)
                for answer, order in zip(answers, orders, strict=True)
            ]
        )

    def _order_of_proto(
        self,
        asked: NewTransactionMessage,
        caller: Caller,
        once: Once,
        *,
        field: str,
        at: int = 0,
        is_linked: bool = False,
    ) -> Order:
        entries = tuple(
            new_entry_of_proto(entry, field=f"{field}.entries[{number}]")
            for number, entry in enumerate(asked.entries)
        )
        require_balanced(entries, field=f"{field}.entries")
        return Order(
            self._store.order_id(once, bucket_of(bucket_account(entries)), at=at),
            caller.tenant,
            caller.owner,
            entries,
            once.fingerprint,
            reference=asked.reference,
            description=asked.description,
            is_linked=is_linked,
        )

    async def _post(
        self, order: Order, once: Once, *, is_preview: bool = False
    ) -> TransactionMessage:
        if is_preview:
            [answer] = await self._store.preview([order])
        else:
            [answer] = await self._store.decide([order], once=once)
        if answer.result in REPLAYED:
            once.on_replay()
        refusal = refusal_of(answer, order)
        if refusal is not None:
            raise refusal
        assert answer.record is not None
        message = transaction_to_proto(transaction_of_record(answer.record))
        if is_preview and answer.result is Result.OK:
            message.ClearField("name")
        return message

    async def GetTransaction(
        self, request: GetTransactionRequest, context: Context
    ) -> TransactionMessage:
        """A transaction that touches an account of the caller."""
        transaction_id = transaction_id_of_name(request.name, field="name")
        caller = caller_of(context.principal)
        return transaction_to_proto(await self._store.get_transaction(transaction_id, caller))

    async def ListTransactions(
        self, request: ListTransactionsRequest, context: Context
    ) -> ListTransactionsResponse:
        """Of one account, newest first."""
        account_id = account_id_of_name(request.account, field="account")
        scope = PageScope.of(context.method, context.principal, request.account)
        position = open_page_token(self._page_secret, scope, request.page_token)
        size = page_size_of(request.page_size)
        found = await self._store.list_transactions(
            account_id,
            caller_of(context.principal),
            before=int(position[0]) if position else LAST_SEQUENCE,
            limit=size + 1,
        )
        transactions = [transaction_to_proto(transaction) for _, transaction in found[:size]]
        response = ListTransactionsResponse(transactions=transactions)
        if len(found) > size:
            last_sequence = found[size - 1][0]
            response.next_page_token = seal_page_token(self._page_secret, scope, last_sequence)
        return response

    async def GetTrialBalance(
        self, request: GetTrialBalanceRequest, context: Context
    ) -> TrialBalance:
        """The sums of the tenant's ledger, of all time or of one day."""
        read_at = self._clock.now()
        since, until = day_of_text(request.day, field="day")
        totals = await self._store.add_up(context.principal.tenant, since=since, until=until)
        return TrialBalance(
            totals=[
                CurrencyTotal(
                    currency_code=total.currency_code,
                    debit_minor_units=total.debit_minor_units,
                    credit_minor_units=total.credit_minor_units,
                    transaction_count=total.transaction_count,
                )
                for total in totals
            ],
            read_time=timestamp_of(read_at),
        )


def caller_of(principal: Principal) -> Caller:
    """Whose data this principal may see.

    Raises:
        PermissionDenied: it is a service of the mesh, which owns nothing.
    """
    is_operator = principal.kind is PrincipalKind.ADMIN
    kind = OwnerKind.SERVICE_ACCOUNT if is_operator else OwnerKind.USER
    try:
        return Caller(principal.tenant, Owner(kind, principal.owner), is_operator)
    except ValueError as error:
        raise PermissionDenied("only users and service accounts have accounts") from error


def batch_result_to_proto(answer: Answer, order: Order, *, is_preview: bool) -> BatchPostResult:
    """What one transaction of a batch is answered."""
    refusal = refusal_of(answer, order)
    if refusal is not None:
        return BatchPostResult(
            outcome=BatchPostResult.OUTCOME_REFUSED,
            reason=refusal.error_reason,
            message=refusal.message,
        )
    is_new = answer.result is Result.OK
    return BatchPostResult(
        outcome=BatchPostResult.OUTCOME_POSTED if is_new else BatchPostResult.OUTCOME_EXISTED,
        transaction="" if is_preview and is_new else transaction_name(order.order_id),
    )


def new_entry_of_proto(entry: EntryMessage, *, field: str) -> NewEntry:
    """One entry of a request, which the request calls `field`."""
    return NewEntry(
        account_id=account_id_of_name(entry.account, field=f"{field}.account"),
        side=Side(entry.side),
        currency_code=entry.amount.currency_code,
        minor_units=entry.amount.minor_units,
        account_field=f"{field}.account",
        amount_field=f"{field}.amount",
    )


def balance_to_proto(account: Account) -> BalanceMessage:
    """An account's sums."""
    return BalanceMessage(
        account=account_name(account.account_id),
        currency_code=account.currency_code,
        posted_debit_minor_units=account.posted_debit,
        posted_credit_minor_units=account.posted_credit,
        available_minor_units=account.available_minor_units,
        version=account.entry_count,
    )


def day_of_text(text: str, *, field: str) -> tuple[datetime, datetime]:
    """The first moment of a UTC day and of the next; all time for "".

    Raises:
        InvalidRequest: there is no such day.
    """
    if not text:
        return _ALL_TIME
    try:
        day = date.fromisoformat(text)
        since = datetime(day.year, day.month, day.day, tzinfo=UTC)
        return since, since + timedelta(days=1)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest.of_field(field, "must be a day such as 2026-11-23") from error
