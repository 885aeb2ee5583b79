"""What happens at a live edge moves the metric that claims to tell it."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge.config import EdgeConfig
from shared import telemetry
from shared.telemetry.metrics import Metrics
from shared.telemetry.scrapes import open_telemetry
from tests.integration.edge.behind import KNOWN
from tests.integration.edge.conftest import Edge
from tests.integration.edge.test_process import environment, running

ROUTE = "/v1/{name=accounts/*}"
NAMES_PAGE = Path(telemetry.__file__).with_name("README.md")


@dataclass(frozen=True)
class Scraped:
    """An edge, and the address of its metrics."""

    edge: Edge
    url: str

    async def told(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that carry these labels; 0 if there is none."""
        async with httpx.AsyncClient(timeout=10) as client:
            text = (await client.get(self.url)).text
        return sum(
            one.value
            for family in text_string_to_metric_families(text)
            for one in family.samples
            if one.name == name and labels.items() <= one.labels.items()
        )


@pytest.fixture(scope="module")
async def scraped(start_edge) -> AsyncIterator[Scraped]:
    async with opened(start_edge) as opened_one:
        yield opened_one


@asynccontextmanager
async def opened(start_edge, **settings) -> AsyncIterator[Scraped]:
    metrics = Metrics(is_served=True)
    config = EdgeConfig(drain_s=1.0, **settings)
    async with (
        open_telemetry(metrics, "127.0.0.1:0") as port,
        start_edge(config, metrics=metrics) as edge,
    ):
        yield Scraped(edge, f"http://127.0.0.1:{port}/metrics")


DURATION = "http_server_request_duration_seconds_count"
CALL = "rpc_client_duration_seconds_count"
GET_ACCOUNT = {"rpc_service": "tenfold.ledger.v1.LedgerService", "rpc_method": "GetAccount"}


async def known(edge: Edge) -> None:
    answer = await edge.client.get(f"/v1/{KNOWN}", headers=edge.bearer())
    assert answer.status_code == 200


async def unknown(edge: Edge) -> None:
    answer = await edge.client.get("/v1/accounts/other", headers=edge.bearer())
    assert answer.status_code == 404


async def nowhere(edge: Edge) -> None:
    assert (await edge.client.get("/nowhere/at/all")).status_code == 404


async def anonymous(edge: Edge) -> None:
    assert (await edge.client.get(f"/v1/{KNOWN}")).status_code == 401


async def health(edge: Edge) -> None:
    assert (await edge.client.get("/healthz")).status_code == 200


async def strange_method(edge: Edge) -> None:
    assert (await edge.client.request("PROPFIND", "/nowhere")).status_code == 404


async def bad_framing(edge: Edge) -> None:
    assert await edge.raw(b"GET /\0 HTTP/1.1\r\n\r\n")


def request_of(route: str, method: str, status: int) -> dict[str, str]:
    return {
        "http_route": route,
        "http_request_method": method,
        "http_response_status_code": str(status),
    }


@pytest.mark.parametrize(
    ("happens", "name", "labels"),
    [
        (known, DURATION, request_of(ROUTE, "GET", 200)),
        (unknown, DURATION, request_of(ROUTE, "GET", 404)),
        (nowhere, DURATION, request_of("unmatched", "GET", 404)),
        (strange_method, DURATION, request_of("unmatched", "_OTHER", 404)),
        (health, DURATION, request_of("own", "GET", 200)),
        (known, CALL, {**GET_ACCOUNT, "rpc_grpc_status_code": "OK"}),
        (unknown, CALL, {**GET_ACCOUNT, "rpc_grpc_status_code": "NOT_FOUND"}),
        (nowhere, "tenfold_http_refusals_total", {"reason": "ROUTE_NOT_FOUND"}),
        (bad_framing, "tenfold_http_refusals_total", {"reason": "BAD_HTTP"}),
        (anonymous, "tenfold_http_refusals_total", {"http_response_status_code": "401"}),
        (known, "tenfold_quota_decisions_total", {"quota": "api", "decision": "allowed"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else value if str(value) == value else "",
)
async def test_an_event_moves_its_metric_by_one(
    scraped: Scraped, happens: Callable[[Edge], Awaitable[None]], name: str, labels: dict[str, str]
):
    before = await scraped.told(name, **labels)
    await happens(scraped.edge)
    assert await scraped.told(name, **labels) == before + 1


async def test_requests_in_flight_are_told_while_they_are(scraped):
    edge = scraped.edge
    headers = {**edge.bearer(), "grpc-timeout": "1S"}
    slow = asyncio.create_task(edge.client.get("/v1/accounts/slow", headers=headers))
    await asyncio.sleep(0.3)
    assert await scraped.told("http_server_active_requests") == 1
    await slow
    assert await scraped.told("http_server_active_requests") == 0


async def test_what_a_quota_refuses_is_told_and_where_it_was_decided(start_edge):
    settings = {"api_burst_points": 50, "api_points_per_s": 0.001}
    async with opened(start_edge, **settings) as scraped:
        client, headers = scraped.edge.client, scraped.edge.bearer()
        await asyncio.gather(*(client.get(f"/v1/{KNOWN}", headers=headers) for _ in range(55)))
        name = "tenfold_quota_decisions_total"
        assert await scraped.told(name, decision="refused") == 5
        assert await scraped.told(name, decision="allowed") == 50
        assert await scraped.told(name, path="local") == 0


async def test_no_path_that_a_caller_made_up_is_a_label(scraped):
    for number in range(20):
        await scraped.edge.client.get(f"/made/up/{number}")
        headers = scraped.edge.bearer()
        await scraped.edge.client.get(f"/v1/accounts/madeup{number}", headers=headers)
    async with httpx.AsyncClient() as client:
        text = (await client.get(scraped.url)).text
    assert not re.search("made.?up", text)


async def test_the_page_of_names_has_every_metric_of_an_edge(scraped):
    async with httpx.AsyncClient() as client:
        text = (await client.get(scraped.url)).text
    names = {family.name for family in text_string_to_metric_families(text)}
    page = NAMES_PAGE.read_text()
    own = {name for name in names if not name.startswith(("process_", "python_"))}
    assert len(own) > 10
    assert not {name for name in own if f"`{name}" not in page}


async def test_a_process_serves_its_metrics_beside_and_never_on_its_public_address(
    behind, tmp_path
):
    environ = environment(behind, tmp_path, TENFOLD_METRICS_LISTEN="127.0.0.1:0")
    async with running(environ) as (_, told), httpx.AsyncClient(timeout=10) as client:
        assert (await client.get(f"{told['url']}/metrics")).status_code == 404
        text = (await client.get(f"http://127.0.0.1:{told['metrics_port']}/metrics")).text
    assert "\nprocess_resident_memory_bytes " in text
    assert 'http_route="unmatched"' in text


async def test_no_process_serves_metrics_unless_it_is_asked_to(behind, tmp_path):
    async with running(environment(behind, tmp_path)) as (_, told):
        assert told["metrics_port"] == 0
