import asyncio
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpc_status import rpc_status
from tenfold.auth.v1.auth_events_pb2 import UserRegistered
from tenfold.ledger.v1.ledger_events_pb2 import AccountOpened
from tenfold.ledger.v1.ledger_pb2 import Account
from tenfold.media.v1.media_events_pb2 import VideoFailed, VideoQueued, VideoReady
from tenfold.reporting.v1.reporting_service_pb2 import (
    GetReportRunRequest,
    ListReportRunsRequest,
    QueryDailySumsRequest,
    RunReportRequest,
)

from services.reporting.listener import count
from services.reporting.store import EVERYBODY
from shared.bus import rules
from tests.integration.services.reporting.conftest import (
    bucket_of_owner,
    event_of_message,
    operator,
    person,
    transfer,
)

TODAY = datetime.now(UTC).date().isoformat()


async def apply(shards, event):
    async with shards.bucket(event.bucket).transaction() as tx:
        await count(tx, event)


async def transfers(shards, *messages, tenant="default", bucket=77):
    for message in messages:
        await apply(shards, event_of_message(message, bucket=bucket, tenant=tenant))


async def query(client, principal, *, first=TODAY, last=TODAY, timeout=5.0, **fields):
    request = QueryDailySumsRequest(first_day=first, last_day=last, **fields)
    return await client.metrics.QueryDailySums(
        request, metadata=client.identity(principal), timeout=timeout
    )


async def run(client, principal, key, *, first=TODAY, last=TODAY):
    request = RunReportRequest(first_day=first, last_day=last, request_id=key)
    return await client.reports.RunReport(request, metadata=client.identity(principal), timeout=5)


def sums(answer):
    return {(one.metric, one.currency_code): one.value for one in answer.sums}


def refusal_of(error):
    """(code, reason, first wrong field)."""
    status = rpc_status.from_call(error)
    info, bad = ErrorInfo(), BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    field = bad.field_violations[0].field if bad.field_violations else ""
    return error.code(), info.reason, field, dict(info.metadata)


async def test_each_sees_its_own_side_of_a_transfer_and_an_operator_the_whole(shards, client):
    ann, bob = person(), person()
    await transfers(shards, transfer(ann, bob, 500), transfer(bob, ann, 30))
    assert sums(await query(client, ann)) == {
        ("ledger.debits", "EUR"): 500,
        ("ledger.credits", "EUR"): 30,
        ("ledger.transactions", ""): 1,
    }
    assert sums(await query(client, bob)) == {
        ("ledger.debits", "EUR"): 30,
        ("ledger.credits", "EUR"): 500,
        ("ledger.transactions", ""): 1,
    }
    assert sums(await query(client, operator())) == {
        ("ledger.debits", "EUR"): 530,
        ("ledger.credits", "EUR"): 530,
        ("ledger.transactions", ""): 2,
    }


async def test_parts_of_every_bucket_and_shard_are_added_up(shards, client):
    ann, bob = person(), person()
    for bucket in (0, 1023, 1024, 2048, 4095):
        await transfers(shards, transfer(ann, bob, 10), bucket=bucket)
    answer = await query(client, operator())
    assert sums(answer)["ledger.debits", "EUR"] == 50
    assert answer.watermark.event_count == 5


async def test_every_kind_of_event_is_counted_for_its_owner(shards, client):
    ann = person()
    owner = f"users/{ann.owner}"
    for message in (
        UserRegistered(user=owner, email="ann@example.com"),
        AccountOpened(account=Account(name="accounts/1", owner=owner)),
        VideoQueued(video="videos/1", owner=owner),
        VideoReady(video="videos/1", owner=owner),
        VideoFailed(video="videos/2", owner=owner),
    ):
        await apply(shards, event_of_message(message, bucket=bucket_of_owner(ann)))
    assert sums(await query(client, ann)) == {
        ("auth.users_registered", ""): 1,
        ("ledger.accounts_opened", ""): 1,
        ("media.videos_queued", ""): 1,
        ("media.videos_ready", ""): 1,
        ("media.videos_failed", ""): 1,
    }


async def test_a_day_is_the_ledgers_day_and_days_are_told_apart(shards, client):
    ann, bob = person(), person()
    yesterday = datetime.now(UTC) - timedelta(days=1)
    await transfers(shards, transfer(ann, bob, 1), transfer(ann, bob, 2, at=yesterday))
    first = yesterday.date().isoformat()
    answer = await query(client, ann, first=first)
    debits = [(one.day, one.value) for one in answer.sums if one.metric == "ledger.debits"]
    assert debits == [(first, 2), (TODAY, 1)]
    assert sums(await query(client, ann))["ledger.debits", "EUR"] == 1


async def test_another_tenants_day_is_empty_even_to_an_operator(shards, client):
    ann, bob = person(), person()
    await transfers(shards, transfer(ann, bob, 500))
    answer = await query(client, operator("acme"))
    assert not answer.sums
    assert answer.watermark.event_count == 0
    assert not answer.watermark.HasField("event_time")


async def test_an_owner_learns_nothing_of_anothers_events_from_the_watermark(shards, client):
    ann, bob, eve = person(), person(), person()
    await transfers(shards, transfer(ann, bob, 500))
    watermark = (await query(client, eve)).watermark
    assert (watermark.event_count, watermark.HasField("event_time")) == (0, False)
    assert (await query(client, ann)).watermark.event_count == 1


async def test_the_same_request_id_runs_one_report(shards, client):
    ann, bob = person(), person()
    await transfers(shards, transfer(ann, bob, 500))
    first = await run(client, ann, "key")
    await transfers(shards, transfer(ann, bob, 1))
    again = await run(client, ann, "key")
    assert again == first
    assert sums(await run(client, ann, "other key"))["ledger.debits", "EUR"] == 501
    listed = await client.reports.ListReportRuns(
        ListReportRunsRequest(), metadata=client.identity(ann)
    )
    assert len(listed.report_runs) == 2


async def test_the_same_request_id_for_other_days_is_refused(shards, client):
    ann = person()
    await run(client, ann, "key")
    yesterday = (datetime.now(UTC).date() - timedelta(days=1)).isoformat()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await run(client, ann, "key", first=yesterday)
    assert refusal_of(refused.value)[:2] == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "IDEMPOTENCY_KEY_REUSED",
    )


async def test_a_report_stays_as_it_was_when_it_ran(shards, client):
    ann, bob = person(), person()
    await transfers(shards, transfer(ann, bob, 500))
    made = await run(client, ann, "key")
    await transfers(shards, transfer(ann, bob, 1))
    got = await client.reports.GetReportRun(
        GetReportRunRequest(name=made.name), metadata=client.identity(ann)
    )
    assert got == made
    assert got.owner == f"users/{ann.owner}"
    assert not got.whole_tenant
    assert got.watermark.event_count == 1


@pytest.mark.parametrize(
    "other",
    [person, lambda: person("acme"), lambda: operator("acme")],
    ids=["user", "tenant", "operator of another tenant"],
)
async def test_anothers_report_looks_absent(shards, client, other):
    made = await run(client, person(), "key")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.reports.GetReportRun(
            GetReportRunRequest(name=made.name), metadata=client.identity(other())
        )
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_operator_finds_every_report_of_the_tenant(shards, client):
    made = await run(client, person(), "key")
    got = await client.reports.GetReportRun(
        GetReportRunRequest(name=made.name), metadata=client.identity(operator())
    )
    assert got == made
    assert (await run(client, operator(), "key")).whole_tenant


async def test_reports_are_listed_newest_first_page_by_page_and_only_ones_own(shards, client):
    ann = person()
    await run(client, person(), "x")
    made = [(await run(client, ann, str(number))).name for number in range(5)]
    names, token = [], ""
    while True:
        page = await client.reports.ListReportRuns(
            ListReportRunsRequest(page_size=2, page_token=token), metadata=client.identity(ann)
        )
        names += [one.name for one in page.report_runs]
        token = page.next_page_token
        if not token:
            break
    assert names == made[::-1]


async def test_a_page_token_of_another_user_is_refused(shards, client):
    ann = person()
    for number in range(2):
        await run(client, ann, str(number))
    page = await client.reports.ListReportRuns(
        ListReportRunsRequest(page_size=1), metadata=client.identity(ann)
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.reports.ListReportRuns(
            ListReportRunsRequest(page_size=1, page_token=page.next_page_token),
            metadata=client.identity(person()),
        )
    assert refusal_of(refused.value)[2] == "page_token"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        pytest.param({"first": "2026-11-23", "last": "2026-11-22"}, "last_day", id="reversed"),
        pytest.param({"first": "1926-01-01"}, "last_day", id="a hundred years"),
        pytest.param({"last": "2999-01-01"}, "last_day", id="future"),
        pytest.param({"first": "2026-02-30"}, "first_day", id="no such day"),
        pytest.param({"first": "yesterday"}, "first_day", id="no day at all"),
        pytest.param({"first": "2026-01-01T00:00"}, "first_day", id="sub-day grain"),
        pytest.param(
            {"first": "\u0662\u0660\u0662\u0666-\u0661\u0661-\u0662\u0663"},
            "first_day",
            id="other digits",
        ),
        pytest.param(
            {"min_event_time": Timestamp(seconds=32503680000)}, "min_event_time", id="never"
        ),
        pytest.param(
            {"min_event_time": Timestamp(seconds=2**62)}, "min_event_time", id="no moment"
        ),
    ],
)
async def test_bad_input_is_refused_by_the_name_of_its_field(shards, client, fields, field):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await query(client, person(), **fields)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal_of(refused.value)[2] == field


async def test_an_answer_waits_for_the_event_it_is_asked_for(shards, client):
    ann, bob = person(), person()
    wanted = Timestamp()
    wanted.FromDatetime(datetime.now(UTC))
    asked = asyncio.create_task(query(client, ann, min_event_time=wanted))
    await asyncio.sleep(0.1)
    assert not asked.done()
    await transfers(shards, transfer(ann, bob, 500))
    assert sums(await asked)["ledger.debits", "EUR"] == 500


async def test_an_event_that_does_not_come_by_the_deadline_is_said_to_be_missing(shards, client):
    ann, bob = person(), person()
    await transfers(shards, transfer(ann, bob, 500))
    wanted = Timestamp()
    wanted.FromDatetime(datetime.now(UTC) + timedelta(seconds=30))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await query(client, ann, min_event_time=wanted, timeout=1.2)
    code, reason, _, metadata = refusal_of(refused.value)
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_YET_VISIBLE")
    assert metadata["watermark_event_time"].startswith(TODAY)


async def test_sums_that_would_leave_int64_are_refused_and_nothing_changes(shards, client):
    ann, bob = person(), person()
    most = 2**63 - 1
    await transfers(shards, transfer(ann, bob, most))
    with pytest.raises(ValueError, match="would leave int64"):
        await transfers(shards, transfer(ann, bob, 1))
    answer = await query(client, ann)
    assert sums(answer)["ledger.debits", "EUR"] == most
    assert (answer.watermark.event_count, answer.watermark.degraded) == (1, False)


async def test_sums_that_leave_int64_only_together_are_left_out_and_flagged(shards, client):
    ann, bob = person(), person()
    for bucket in (1, 4000):
        await transfers(shards, transfer(ann, bob, 2**62), bucket=bucket)
    answer = await query(client, ann)
    assert sums(answer) == {("ledger.transactions", ""): 2}
    assert answer.watermark.degraded


async def test_a_parked_event_marks_the_answers_of_its_tenant_alone(shards, client):
    ann = person()
    async with shards.bucket(9).transaction() as tx:
        await tx.execute(
            "INSERT INTO dead_letter (bucket, id, consumer, subject, headers, payload, error,"
            " tries, at_us) VALUES (9, $1, 'reporting-sums', 'evt.x.Y.9', $2, $3, 'x', 8, 0)",
            rules.dead_letter_id(9, "reporting-sums", EVERYBODY),
            '{"tenfold-tenant": "default"}',
            b"",
        )
    assert (await query(client, ann)).watermark.degraded
    assert not (await query(client, person("acme"))).watermark.degraded
