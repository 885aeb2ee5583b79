"""tenfold.ledger.v1 through a real gRPC server, down to a real database."""

import asyncio
from collections import Counter
from uuid import UUID

import pytest
from tenfold.ledger.v1.ledger_events_pb2 import AccountOpened, TransactionPosted
from tenfold.ledger.v1.ledger_pb2 import SIDE_CREDIT, SIDE_DEBIT, Account
from tenfold.ledger.v1.ledger_service_pb2 import (
    BatchPostResult,
    BatchPostTransactionsRequest,
    CreateAccountRequest,
    GetAccountRequest,
    GetBalanceRequest,
    GetTransactionRequest,
    GetTrialBalanceRequest,
    ListAccountsRequest,
    ListTransactionsRequest,
    NewAccount,
    NewTransaction,
    PostTransactionRequest,
    TransferFundsRequest,
)

from shared.db.ids import bucket_of, new_id
from shared.errors import (
    AlreadyExists,
    FailedPrecondition,
    IdempotencyKeyReused,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    TenfoldError,
)
from tests.integration.services.payment.conftest import (
    credit,
    debit,
    euros,
    key,
    new_operator,
    new_user,
)

INT64_MAX = 2**63 - 1


async def events(ledger, message_class):
    rows = await ledger.shards.bucket(0).fetch_all("SELECT * FROM outbox ORDER BY seq")
    name = message_class.DESCRIPTOR.name
    return [
        message_class.FromString(row["payload"])
        for row in rows
        if row["subject"].startswith(f"evt.payment.{name}.")
    ]


async def posted_counts(ledger) -> tuple[int, int]:
    """Entries, and transactions that were not refused."""
    return await ledger.count("entry"), await ledger.count("ledger_transaction WHERE result = 0")


# Accounts --------------------------------------------------------------------------------


async def test_an_account_is_its_callers_in_its_callers_bucket_and_says_so(ledger, clock):
    ada = new_user(bucket=1234)
    request = CreateAccountRequest(
        account=NewAccount(currency_code="KWD", display_name="Ada's"), request_id=key()
    )
    account = await ledger.call("CreateAccount", request, ada)
    assert account.owner == f"users/{ada.subject}"
    assert (account.exponent, account.normal_side) == (3, SIDE_CREDIT)
    assert (account.state, account.display_name) == (Account.STATE_OPEN, "Ada's")
    assert account.create_time.ToDatetime(tzinfo=clock.now().tzinfo) == clock.now()
    assert bucket_of(type(ada.owner)(account.name.removeprefix("accounts/"))) == 1234
    assert await ledger.call("GetAccount", GetAccountRequest(name=account.name), ada) == account
    [event] = await events(ledger, AccountOpened)
    assert event.account == account


async def test_a_repeated_creation_gives_the_same_account(ledger):
    ada = new_user()
    request = CreateAccountRequest(account=NewAccount(currency_code="EUR"), request_id=key())
    accounts = [await ledger.call("CreateAccount", request, ada) for _ in range(2)]
    assert accounts[0] == accounts[1]
    assert await ledger.count("account") == 1


@pytest.mark.parametrize("code", ["XXX", "XAU", "ZZZ"])
async def test_what_is_not_a_currency_is_refused(ledger, code):
    with pytest.raises(InvalidRequest) as caught:
        await ledger.open_account(new_user(), code)
    assert caught.value.error_reason == "CURRENCY_UNKNOWN"
    assert caught.value.violations[0].field == "account.currency_code"


@pytest.mark.parametrize("options", [{"normal_side": SIDE_DEBIT}, {"may_overdraw": True}])
async def test_only_an_operator_opens_what_money_may_enter_by(ledger, options):
    with pytest.raises(PermissionDenied):
        await ledger.open_account(new_user(), **options)
    assert await ledger.open_account(new_operator(), **options)


async def test_accounts_are_listed_newest_first_page_by_page(ledger):
    ada, seen, token = new_user(), [], ""
    names = [await ledger.open_account(ada) for _ in range(5)]
    await ledger.open_account(new_user())
    while True:
        request = ListAccountsRequest(page_size=2, page_token=token)
        page = await ledger.call("ListAccounts", request, ada)
        seen += [account.name for account in page.accounts]
        token = page.next_page_token
        if not token:
            break
    assert seen == names[::-1]


async def test_another_callers_page_token_is_refused(ledger):
    ada, eve = new_user(), new_user()
    for _ in range(2):
        await ledger.open_account(ada)
    page = await ledger.call("ListAccounts", ListAccountsRequest(page_size=1), ada)
    request = ListAccountsRequest(page_size=1, page_token=page.next_page_token)
    with pytest.raises(InvalidRequest) as caught:
        await ledger.call("ListAccounts", request, eve)
    assert caught.value.violations[0].field == "page_token"


# What is another's looks absent ------------------------------------------------------------


@pytest.mark.parametrize(
    "stranger",
    [new_user(), new_user(tenant="other"), new_operator(tenant="other")],
    ids=["another user", "another tenant's user", "another tenant's operator"],
)
async def test_anothers_account_looks_like_one_that_does_not_exist(ledger, stranger):
    ada = new_user()
    account = await ledger.open_account(ada)
    await ledger.deposit(account, 100)
    absent, own = f"accounts/{new_id(5)}", await ledger.open_account(stranger)
    for name in (account, absent):
        for method, request in (
            ("GetAccount", GetAccountRequest(name=name)),
            ("GetBalance", GetBalanceRequest(account=name)),
            ("ListTransactions", ListTransactionsRequest(account=name)),
            (
                "TransferFunds",
                TransferFundsRequest(
                    account=name, to_account=own, amount=euros(1), request_id=key()
                ),
            ),
        ):
            with pytest.raises(NotFound) as caught:
                await ledger.call(method, request, stranger)
            assert caught.value.message == f"{name} does not exist"
    assert await ledger.available(ada, account) == 100


async def test_a_transaction_is_seen_by_both_its_parties_and_nobody_else(ledger):
    ada, bob, eve = new_user(), new_user(3000), new_user()
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    await ledger.deposit(payer, 100)
    posted = await ledger.transfer(ada, payer, payee, euros(30), description="Lunch")
    request = GetTransactionRequest(name=posted.name)
    for party in (ada, bob, ledger.operator):
        assert await ledger.call("GetTransaction", request, party) == posted
    for stranger in (eve, new_user(tenant="other"), new_operator(tenant="other")):
        with pytest.raises(NotFound):
            await ledger.call("GetTransaction", request, stranger)


# Transfers -------------------------------------------------------------------------------


async def test_a_transfer_moves_money_between_buckets_and_tells_the_world(ledger, clock):
    ada, bob = new_user(77), new_user(3000)
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    await ledger.deposit(payer, 100)
    posted = await ledger.transfer(ada, payer, payee, euros(30), description="Lunch")
    assert posted.owner == f"users/{ada.subject}"
    sides = [(entry.account, entry.side, entry.account_sequence) for entry in posted.entries]
    assert sides == [(payer, SIDE_DEBIT, 2), (payee, SIDE_CREDIT, 1)]
    assert await ledger.available(ada, payer) == 70
    assert await ledger.available(bob, payee) == 30
    event = (await events(ledger, TransactionPosted))[-1]
    assert (event.transaction, event.description) == (posted.name, "Lunch")
    assert [(entry.account, entry.owner, entry.minor_units) for entry in event.entries] == [
        (payer, f"users/{ada.subject}", 30),
        (payee, f"users/{bob.subject}", 30),
    ]


async def test_a_repeated_transfer_moves_money_once_and_says_so(ledger):
    ada, bob = new_user(77), new_user(3000)
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    await ledger.deposit(payer, 100)
    request_id = key()
    first = await ledger.transfer(ada, payer, payee, euros(30), request_id=request_id)
    again = await asyncio.gather(
        *(ledger.transfer(ada, payer, payee, euros(30), request_id=request_id) for _ in range(64))
    )
    assert all(answer == first for answer in again)
    assert await ledger.available(ada, payer) == 70
    request = TransferFundsRequest(
        account=payer, to_account=payee, amount=euros(30), request_id=request_id
    )
    call = ledger.stub.TransferFunds(request, metadata=ledger.headers(ada))
    await call
    assert ("idempotency-replayed", "true") in dict(await call.trailing_metadata()).items()


async def test_a_key_with_another_amount_is_refused_and_moves_nothing(ledger):
    ada, bob = new_user(), new_user()
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    await ledger.deposit(payer, 100)
    request_id = key()
    await ledger.transfer(ada, payer, payee, euros(30), request_id=request_id)
    with pytest.raises(IdempotencyKeyReused):
        await ledger.transfer(ada, payer, payee, euros(31), request_id=request_id)
    assert await ledger.available(ada, payer) == 70


async def test_too_little_money_stays_too_little_under_its_key(ledger):
    ada, bob = new_user(), new_user()
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    request_id = key()
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as caught:
            await ledger.transfer(ada, payer, payee, euros(30), request_id=request_id)
        assert caught.value.error_reason == "INSUFFICIENT_FUNDS"
        assert caught.value.metadata["account"] == payer
        await ledger.deposit(payer, 100)
    assert await ledger.available(ada, payer) == 200


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"amount": euros(0)}, "amount", None),
        ({"amount": euros(-1)}, "amount", None),
        ({"amount": euros(1, "USD")}, "amount.currency_code", "CURRENCY_MISMATCH"),
        ({"amount": euros(1, "eur")}, "amount.currency_code", None),
        ({"amount": None}, "amount", None),
        ({"to": "accounts/" + "0" * 36}, "to_account", None),
        ({"to": "accounts/not-an-account"}, "to_account", None),
        ({"to": "ACCOUNTS/" + str(new_id(1))}, "to_account", None),
        ({"request_id": ""}, "request_id", None),
        ({"request_id": "x" * 256}, "request_id", None),
        ({"description": "x" * 201}, "description", None),
    ],
)
async def test_a_wrong_field_of_a_transfer_is_named_and_changes_nothing(
    ledger, changes, field, reason
):
    ada, bob = new_user(), new_user()
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    await ledger.deposit(payer, 100)
    options = {"to": payee, "amount": euros(1), **changes}
    with pytest.raises(InvalidRequest) as caught:
        await ledger.transfer(ada, payer, options.pop("to"), options.pop("amount"), **options)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert reason is None or caught.value.error_reason == reason
    assert await ledger.available(ada, payer) == 100


async def test_the_largest_amount_is_refused_for_want_of_money_and_of_room(ledger):
    ada, bob = new_user(), new_user()
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    with pytest.raises(FailedPrecondition):
        await ledger.transfer(ada, payer, payee, euros(INT64_MAX))
    await ledger.deposit(payer, INT64_MAX)
    with pytest.raises(InvalidRequest) as caught:
        await ledger.deposit(payer, 1)
    assert caught.value.error_reason == "BALANCE_OVERFLOW"
    assert await ledger.available(ada, payer) == INT64_MAX


async def test_paying_oneself_is_refused(ledger):
    ada = new_user()
    account = await ledger.open_account(ada)
    with pytest.raises(InvalidRequest) as caught:
        await ledger.transfer(ada, account, account, euros(1))
    assert caught.value.violations[0].field == "to_account"


async def test_a_user_cannot_move_money_out_of_the_books(ledger):
    ada = new_user()
    account = await ledger.open_account(ada)
    await ledger.deposit(account, 100)
    with pytest.raises(NotFound):
        await ledger.transfer(ada, account, ledger.cash, euros(1))


async def test_a_closed_account_takes_nothing_from_either_side(ledger):
    ada, bob = new_user(), new_user()
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    await ledger.deposit(payer, 100)
    closed = ledger.place.literal(UUID(payee.removeprefix("accounts/")))
    close = f"UPDATE account SET state = 2 WHERE id = {closed}"
    await ledger.place.run_raw(0, close, admitted=[77])
    for action in (
        ledger.transfer(ada, payer, payee, euros(1)),
        ledger.transfer(bob, payee, payer, euros(1)),
        ledger.deposit(payee, 1),
    ):
        with pytest.raises(FailedPrecondition) as caught:
            await action
        assert caught.value.error_reason == "ACCOUNT_CLOSED"
    assert await ledger.available(ada, payer) == 100


async def test_five_hundred_debits_at_once_never_go_below_the_floor(ledger):
    ada, bob = new_user(77), new_user(3000)
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    await ledger.deposit(payer, 1_000)
    results = await asyncio.gather(
        *(ledger.transfer(ada, payer, payee, euros(7)) for _ in range(500)), return_exceptions=True
    )
    refusals = [result for result in results if isinstance(result, Exception)]
    assert {type(error) for error in refusals} <= {FailedPrecondition}
    assert len(results) - len(refusals) == 142
    assert await ledger.available(ada, payer) == 1_000 - 142 * 7
    assert await ledger.available(bob, payee) == 142 * 7


async def test_transfers_back_and_forth_at_once_keep_every_cent(ledger):
    users = [new_user(number * 400) for number in range(6)]
    accounts = [await ledger.open_account(user) for user in users]
    for account in accounts:
        await ledger.deposit(account, 100)
    await asyncio.gather(
        *(
            ledger.transfer(
                users[n % 6], accounts[n % 6], accounts[(n * 5 + 1) % 6], euros(n % 40 + 1)
            )
            for n in range(300)
            if n % 6 != (n * 5 + 1) % 6
        ),
        return_exceptions=True,
    )
    balances = [
        await ledger.available(user, account) for user, account in zip(users, accounts, strict=True)
    ]
    assert sum(balances) == 600
    assert min(balances) >= 0


# Posting ---------------------------------------------------------------------------------


@pytest.fixture
async def accounts(ledger) -> list[str]:
    await ledger.deposit(await ledger.open_account(new_user()), 1_000)
    opened = [await ledger.open_account(new_user()) for _ in range(2)]
    dollars = await ledger.open_account(new_user(), "USD")
    foreign = await ledger.open_account(new_user(tenant="other"))
    return [ledger.cash, *opened, dollars, foreign]


@pytest.mark.parametrize(
    ("entries", "error", "field", "reason"),
    [
        ([("d", 0, 5), ("c", 1, 4)], InvalidRequest, "transaction.entries", "ENTRIES_UNBALANCED"),
        ([("d", 0, 5), ("d", 1, 5)], InvalidRequest, "transaction.entries", "ENTRIES_UNBALANCED"),
        ([("d", 0, 5), ("c", 3, 5, "USD")], InvalidRequest, "transaction.entries", None),
        ([("d", 0, 5), ("c", 3, 5)], InvalidRequest, "transaction.entries[1].amount.curr", None),
        ([("d", 0, 5)], InvalidRequest, "transaction.entries", None),
        ([("d", 0, 5), ("c", 0, 5)], InvalidRequest, "transaction.entries[1].account", None),
        ([("d", 0, 0), ("c", 1, 0)], InvalidRequest, "transaction.entries[0].amount", None),
        ([("d", 0, -5), ("c", 1, -5)], InvalidRequest, "transaction.entries[0].amount", None),
        ([("d", 0, 5), ("c", 4, 5)], NotFound, None, None),
        ([("c", 0, 5), ("d", 1, 5)], FailedPrecondition, None, "INSUFFICIENT_FUNDS"),
    ],
)
async def test_entries_that_may_not_be_are_refused_and_leave_nothing(
    ledger, accounts, entries, error, field, reason
):
    before = await posted_counts(ledger)
    built = []
    for side, account, amount, *code in entries:
        make = debit if side == "d" else credit
        built.append(make(accounts[account], euros(amount, *code)))
    with pytest.raises(error) as caught:
        await ledger.post(*built)
    if field:
        assert caught.value.violations[0].field.startswith(field)
    assert reason is None or caught.value.error_reason == reason
    assert before == await posted_counts(ledger)


async def test_ten_thousand_entries_are_refused(ledger, accounts):
    with pytest.raises(InvalidRequest):
        await ledger.post(*[debit(accounts[0], euros(1))] * 10_000)


async def test_sums_beyond_int64_are_refused_even_if_each_account_could_take_its_own(
    ledger, accounts
):
    other_cash = await ledger.open_account(ledger.operator, normal_side=SIDE_DEBIT)
    another_cash = await ledger.open_account(ledger.operator, normal_side=SIDE_DEBIT)
    with pytest.raises(InvalidRequest) as caught:
        await ledger.post(
            debit(other_cash, euros(INT64_MAX)),
            debit(another_cash, euros(INT64_MAX)),
            credit(accounts[1], euros(INT64_MAX)),
            credit(accounts[2], euros(INT64_MAX)),
        )
    assert caught.value.error_reason == "BALANCE_OVERFLOW"


async def test_a_reference_belongs_to_one_transaction_for_ever(ledger, accounts):
    entries = debit(accounts[0], euros(5)), credit(accounts[1], euros(5))
    posted = await ledger.post(*entries, reference="invoice 1")
    assert posted.reference == "invoice 1"
    with pytest.raises(AlreadyExists) as caught:
        await ledger.post(*entries, reference="invoice 1")
    assert caught.value.error_reason == "REFERENCE_TAKEN"
    for _ in range(2):
        await ledger.post(*entries)  # without one, as often as asked


async def test_a_user_may_neither_post_nor_audit(ledger, accounts):
    eve = new_user()
    for method, request in (
        ("PostTransaction", PostTransactionRequest(request_id=key())),
        ("GetTrialBalance", GetTrialBalanceRequest()),
    ):
        with pytest.raises(PermissionDenied):
            await ledger.call(method, request, eve)


# Batches and dry runs ---------------------------------------------------------------------


def moves(*asked: tuple[str, str, int]) -> list[NewTransaction]:
    """Transactions of one debit and one credit each."""
    return [
        NewTransaction(entries=[debit(payer, euros(units)), credit(payee, euros(units))])
        for payer, payee, units in asked
    ]


async def batch(ledger, *asked: NewTransaction, **options):
    request = BatchPostTransactionsRequest(transactions=asked, **{"request_id": key(), **options})
    answer = await ledger.call("BatchPostTransactions", request, ledger.operator)
    return [(one.outcome, one.reason) for one in answer.results], answer


POSTED, EXISTED, REFUSED = (
    (BatchPostResult.OUTCOME_POSTED, ""),
    (BatchPostResult.OUTCOME_EXISTED, ""),
    (BatchPostResult.OUTCOME_REFUSED, "INSUFFICIENT_FUNDS"),
)


async def test_each_transaction_of_a_batch_has_a_result_of_its_own_and_keeps_it(ledger, accounts):
    cash, first, second, *_ = accounts
    asked = moves((cash, first, 100), (first, second, 101), (first, second, 60))
    results, answer = await batch(ledger, *asked, request_id="one batch")
    assert results == [POSTED, REFUSED, POSTED]
    await ledger.deposit(first, 1_000)
    again, repeated = await batch(ledger, *asked, request_id="one batch")
    assert again == [EXISTED, REFUSED, EXISTED]
    assert [one.transaction for one in repeated.results] == [
        one.transaction for one in answer.results
    ]
    request = GetTransactionRequest(name=answer.results[2].transaction)
    read = await ledger.call("GetTransaction", request, ledger.operator)
    assert [entry.amount.minor_units for entry in read.entries] == [60, 60]
    with pytest.raises(IdempotencyKeyReused):
        await batch(ledger, *asked[:2], request_id="one batch")


async def test_an_atomic_batch_is_posted_whole_or_not_at_all(ledger, accounts):
    cash, first, second, *_ = accounts
    other = (BatchPostResult.OUTCOME_REFUSED, "BATCH_REFUSED")
    asked = moves((cash, first, 100), (first, second, 101), (first, second, 1))
    assert (await batch(ledger, *asked, atomic=True))[0] == [other, REFUSED, other]
    asked = moves((cash, first, 100), (first, second, 100))
    assert (await batch(ledger, *asked, atomic=True))[0] == [POSTED, POSTED]
    assert await ledger.available(ledger.operator, second) == 100


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (lambda a: moves((a[0], a[1], 0)), "transactions[1].entries[0].amount.minor_units"),
        (lambda a: moves((a[0], a[0], 1)), "transactions[1].entries[1].account"),
        (lambda a: moves((a[0], "accounts/x1", 1)), "transactions[1].entries[1].account"),
        (
            lambda a: [NewTransaction(entries=[debit(a[0], euros(1)), credit(a[1], euros(2))])],
            "transactions[1].entries",
        ),
        (lambda a: moves((a[0], a[1], 1)) * 500, "transactions"),
    ],
    ids=["amount", "account twice", "account", "uneven", "501 of them"],
)
async def test_a_wrong_transaction_of_a_batch_is_named_and_none_is_posted(
    ledger, accounts, wrong, field
):
    before = await posted_counts(ledger)
    with pytest.raises(InvalidRequest) as caught:
        await batch(ledger, *moves((accounts[0], accounts[1], 1)), *wrong(accounts))
    assert caught.value.violations[0].field == field
    assert await posted_counts(ledger) == before


async def test_a_dry_run_says_what_would_happen_and_leaves_its_key_unused(ledger, accounts):
    cash, first, second, *_ = accounts
    before = await ledger.count("entry"), await ledger.count("ledger_transaction")
    asked = moves((cash, first, 100), (first, second, 60), (first, second, 60))
    results, answer = await batch(ledger, *asked, request_id="later", validate_only=True)
    assert results == [POSTED, POSTED, REFUSED]
    assert [one.transaction for one in answer.results] == ["", "", ""]
    request = PostTransactionRequest(transaction=asked[0], validate_only=True, request_id=key())
    said = await ledger.call("PostTransaction", request, ledger.operator)
    assert (said.name, said.entries[0].amount.minor_units) == ("", 100)
    with pytest.raises(FailedPrecondition):
        await ledger.transfer(ledger.operator, first, second, euros(1), validate_only=True)
    assert before == (await ledger.count("entry"), await ledger.count("ledger_transaction"))
    assert (await batch(ledger, *asked[:1], request_id="later"))[0] == [POSTED]


# Lists and sums --------------------------------------------------------------------------


async def test_transactions_of_an_account_are_listed_newest_first_page_by_page(ledger):
    ada, bob = new_user(), new_user(3000)
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    await ledger.deposit(payer, 100)
    posted = [await ledger.transfer(ada, payer, payee, euros(n + 1)) for n in range(5)]
    seen, token = [], ""
    while True:
        request = ListTransactionsRequest(account=payee, page_size=2, page_token=token)
        page = await ledger.call("ListTransactions", request, bob)
        seen += page.transactions
        token = page.next_page_token
        if not token:
            break
    assert seen == posted[::-1]
    request = ListTransactionsRequest(account=payer, page_token=token or "forged")
    with pytest.raises(InvalidRequest):
        await ledger.call("ListTransactions", request, ada)


async def test_the_trial_balance_of_each_day_and_of_all_time_is_even(ledger, clock):
    ada, bob = new_user(), new_user(3000)
    payer, payee = await ledger.open_account(ada), await ledger.open_account(bob)
    await ledger.deposit(payer, 100)
    clock.advance(24 * 3600)
    await ledger.transfer(ada, payer, payee, euros(30))

    async def sums(day: str, principal=ledger.operator) -> list[tuple[str, int, int, int]]:
        request = GetTrialBalanceRequest(day=day)
        answer = await ledger.call("GetTrialBalance", request, principal)
        return [
            (t.currency_code, t.debit_minor_units, t.credit_minor_units, t.transaction_count)
            for t in answer.totals
        ]

    assert await sums("") == [("EUR", 130, 130, 2)]
    assert await sums("2026-01-01") == [("EUR", 100, 100, 1)]
    assert await sums("2026-01-02") == [("EUR", 30, 30, 1)]
    assert await sums("2026-01-03") == []
    assert await sums("", new_operator("other")) == []
    for day in ("2026-02-30", "9999-12-31"):
        with pytest.raises(InvalidRequest) as caught:
            await sums(day)
        assert caught.value.violations[0].field == "day"


async def test_no_answer_is_ever_an_internal_error(ledger, accounts):
    outcomes: Counter[str] = Counter()
    names = ["", "accounts/", accounts[0], "accounts/\x00", "transactions/" + str(new_id(1))]
    for name in names:
        for method, request in (
            ("GetAccount", GetAccountRequest(name=name)),
            ("GetBalance", GetBalanceRequest(account=name)),
            ("GetTransaction", GetTransactionRequest(name=name)),
            ("ListTransactions", ListTransactionsRequest(account=name, page_size=2**31 - 1)),
        ):
            try:
                await ledger.call(method, request, new_user())
            except TenfoldError as error:
                outcomes[type(error).__name__] += 1
    assert set(outcomes) == {"InvalidRequest", "NotFound"}
