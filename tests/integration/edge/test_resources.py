"""Resources over HTTP, in front of a server that is not ours: masks, etags, statuses, settings."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from edge.config import EdgeConfig
from edge.contracts import ContractError, Contracts, MethodInfo
from edge.serving import serving
from edge.wiring import Surroundings, open_edge
from shared.clock import SystemClock
from shared.listening import bind
from shared.rpc.client import Upstreams
from tests.integration.edge.echo import Echo, Script, code_number
from tests.protos import ROOT, compile_protos

PROTOS = ROOT / "tests" / "unit" / "edge" / "library"
BOOK, NAME = "/v1/shelves/s/books/b", "shelves/s/books/b"


@dataclass(frozen=True)
class Library:
    """An edge in front of a server of library.proto, and a client of it."""

    methods: dict[str, MethodInfo]
    echo: Echo
    client: httpx.AsyncClient

    def answers(self, method: str, **fields: Any) -> None:
        """What the server says next."""
        message = self.methods[f"/library.v1.Library/{method}"].output(**fields)
        self.echo.follow(Script([message.SerializeToString()]))

    def fails(self, code: str, message: str, *details: Message) -> None:
        """How the server refuses next."""
        status = status_pb2.Status(code=code_number(code), message=message)
        for detail in details:
            status.details.add().Pack(detail)
        self.echo.follow(Script([], status))

    @property
    def received(self) -> Any:
        """The only request that came since."""
        [call] = self.echo.received
        [request] = call.requests
        return self.methods[call.path].input.FromString(request)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    image = folder / "image.binpb"
    image.write_bytes(compile_protos(PROTOS, folder).SerializeToString())
    return image


def methods_of(image: Path) -> dict[str, MethodInfo]:
    methods = Contracts.of_bytes(image.read_bytes()).methods()
    return {method.full_name: method for method in methods}


@asynccontextmanager
async def opened(image: Path, **settings: Any) -> AsyncIterator[Library]:
    methods = methods_of(image)
    echo, server = Echo(methods), grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers([echo])
    upstream = f"*=127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    config = EdgeConfig(
        listen="127.0.0.1:0", descriptors=str(image), allow_anonymous=True, **settings
    )
    around = Surroundings(Upstreams.parse(upstream), None, "", SystemClock())
    async with AsyncExitStack() as stack:
        await server.start()
        stack.push_async_callback(server.stop, 0)
        listener = stack.enter_context(closing(bind(config.listen, setting="listen")))
        app = await stack.enter_async_context(open_edge(config, around))
        port = await stack.enter_async_context(serving(app, config, listener))
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10)
        yield Library(methods, echo, await stack.enter_async_context(client))


@pytest.fixture(scope="module")
async def library(image: Path) -> AsyncIterator[Library]:
    async with opened(image) as running:
        yield running


async def test_a_patch_reaches_the_service_with_the_mask_of_its_body(library: Library) -> None:
    library.answers("UpdateBook", name=NAME, title="x", etag="2")
    body = {"title": "x", "author": {"birthYear": None}, "labels": {}}
    answer = await library.client.patch(BOOK, json=body, headers={"If-Match": '"1"'})
    assert (answer.status_code, answer.headers["etag"]) == (200, '"2"')
    assert list(library.received.update_mask.paths) == ["title", "author.birth_year", "labels"]
    assert (library.received.book.name, library.received.book.etag) == (NAME, "1")


async def test_a_misspelt_mask_never_reaches_the_service(library: Library) -> None:
    library.answers("UpdateBook")
    answer = await library.client.patch(f"{BOOK}?updateMask=titel", json={"title": "x"})
    assert answer.status_code == 400
    [violation] = answer.json()["violations"]
    assert (violation["field"], violation["in"]) == ("updateMask", "query")
    assert "titel" in violation["description"]
    assert not library.echo.received


@pytest.mark.parametrize(
    ("code", "reason", "status"),
    [
        ("ABORTED", "", 412),
        ("ABORTED", "ETAG_MISMATCH", 412),
        ("FAILED_PRECONDITION", "ETAG_MISMATCH", 412),
        ("FAILED_PRECONDITION", "BOOK_LENT", 400),
        ("NOT_FOUND", "", 404),
    ],
)
async def test_412_is_a_refusal_of_the_tag_and_of_nothing_else(
    library: Library, code: str, reason: str, status: int
) -> None:
    details = [ErrorInfo(reason=reason, domain="library.example")] if reason else []
    library.fails(code, "No.", *details)
    answer = await library.client.delete(BOOK, headers={"If-Match": '"1"'})
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"] == "No."
    assert library.received.etag == "1"
    without = await library.client.delete(BOOK)
    assert without.status_code != 412


async def test_a_condition_that_cannot_be_kept_never_reaches_the_service(library: Library) -> None:
    library.answers("GetBook")
    for method, headers, status in [
        ("GET", {"If-Match": '"1"'}, 400),
        ("DELETE", {"If-Match": 'W/"1"'}, 412),
        ("DELETE", {"If-Match": '"1", "2"'}, 400),
        ("DELETE", {"If-None-Match": "*"}, 400),
    ]:
        answer = await library.client.request(method, BOOK, headers=headers)
        assert answer.status_code == status, (method, headers)
    assert not library.echo.received


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_what_the_client_has_is_not_sent_again(library: Library, method: str) -> None:
    library.answers("GetBook", name=NAME, etag="1")
    same = await library.client.request(method, BOOK, headers={"If-None-Match": '"0", W/"1"'})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", '"1"')
    assert "content-type" not in same.headers
    new = await library.client.request(method, BOOK, headers={"If-None-Match": '"0"'})
    assert (new.status_code, new.headers["etag"]) == (200, '"1"')


async def test_a_create_is_201_and_its_location_is_served(library: Library) -> None:
    library.answers("CreateBook", name="shelves/s/books/ü 1")
    created = await library.client.post("/v1/shelves/s/books", json={"title": "x"})
    assert created.status_code == 201
    assert created.headers["location"] == "/v1/shelves/s/books/%C3%BC%201"
    library.answers("GetBook")
    assert (await library.client.get(created.headers["location"])).status_code == 200
    assert library.received.name == "shelves/s/books/ü 1"


async def test_a_delete_is_204_without_a_body(library: Library) -> None:
    library.answers("DeleteBook")
    answer = await library.client.delete(BOOK)
    assert (answer.status_code, answer.content) == (204, b"")
    assert not {"content-type", "content-length"} & answer.headers.keys()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("UNAVAILABLE", 503),
        ("RESOURCE_EXHAUSTED", 429),
        ("INVALID_ARGUMENT", 400),
        ("ABORTED", 409),
    ],
)
async def test_a_delay_of_any_code_is_retry_after(library: Library, code: str, status: int) -> None:
    delay = RetryInfo(retry_delay=Duration(seconds=2, nanos=1))
    library.fails(code, "Later.", delay, BadRequest())
    answer = await library.client.get(BOOK)
    assert (answer.status_code, answer.headers["retry-after"]) == (status, "3")


async def test_a_lenient_method_ignores_what_it_does_not_know(library: Library) -> None:
    library.answers("SearchBooks")
    answer = await library.client.get("/v1/books:search?text=x&colour=red")
    assert (answer.status_code, library.received.text) == (200, "x")
    strict = await library.client.get(f"{BOOK}?colour=red")
    assert strict.status_code == 400
    assert strict.json()["violations"][0]["field"] == "colour"


async def test_bytes_go_both_ways_with_their_type(library: Library) -> None:
    library.answers("WritePage", scan={"content_type": "image/png", "data": b"\x89"})
    headers = {"content-type": "text/plain; charset=utf-8", "accept": "image/*"}
    answer = await library.client.put(f"{BOOK}:page", content=b"\xff\x00", headers=headers)
    assert (answer.headers["content-type"], answer.content) == ("image/png", b"\x89")
    page = library.received.page
    assert (page.content_type, page.data) == ("text/plain; charset=utf-8", b"\xff\x00")
    empty = await library.client.put(f"{BOOK}:page", headers=headers)
    assert empty.status_code == 200


async def test_a_body_of_another_type_learns_which_is_taken(library: Library) -> None:
    headers = {"content-type": "application/merge-patch+json"}
    answer = await library.client.patch(BOOK, content=b"{}", headers=headers)
    assert (answer.status_code, answer.headers["accept"]) == (415, "application/json")


async def test_answers_are_written_as_the_settings_say(image: Path) -> None:
    settings = {"json_proto_names": True, "json_emit_defaults": False, "json_pretty": True}
    async with opened(image, **settings) as library:
        library.answers("GetBook", name=NAME, author={"birth_year": 1})
        answer = await library.client.get(BOOK)
        document = {"name": NAME, "author": {"birth_year": 1}}
        assert answer.text == json.dumps(document, indent=2)
        described = (await library.client.get("/openapi.json")).json()
        book = described["components"]["schemas"]["library.v1.Book"]["properties"]
        assert {"sub_title", "custom_named"} <= book.keys()


async def test_errors_are_told_as_the_setting_says(image: Path) -> None:
    async with opened(image, error_format="google") as library:
        library.fails("NOT_FOUND", "No such book.")
        for path, status in [(BOOK, 404), ("/v1/nothing", 404), (f"{BOOK}?nothing=1", 400)]:
            answer = await library.client.get(path)
            assert answer.headers["content-type"] == "application/json"
            assert answer.status_code == answer.json()["error"]["code"] == status
        described = (await library.client.get("/openapi.json")).json()["components"]
        assert described["responses"]["Problem"]["content"].keys() == {"application/json"}
        assert described["schemas"]["Problem"]["required"] == ["error"]


async def test_a_contract_that_the_edge_itself_stands_before_does_not_start(
    table_image: Path,
) -> None:
    with pytest.raises(ContractError, match=r"t\.S/Docs\) can never be reached: .*/docs"):
        async with opened(table_image):
            pass


@pytest.fixture
def table_image(tmp_path: Path) -> Path:
    (tmp_path / "t.proto").write_text(
        'syntax = "proto3"; package t; import "google/api/annotations.proto"; message Q {}'
        'service S { rpc Docs(Q) returns (Q) { option (google.api.http) = {get: "/docs"}; } }'
    )
    image = tmp_path / "image.binpb"
    image.write_bytes(compile_protos(tmp_path, tmp_path).SerializeToString())
    return image
