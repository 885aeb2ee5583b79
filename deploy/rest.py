"""A plain REST client that shows what it says: how a stranger would talk to the edge."""

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

CALL_TIMEOUT_S = 60
STREAM_TIMEOUT_S = 120
RETRY_PAUSE_S = 0.25
QUOTA_WAIT_S_MAX = 90
RETRYABLE_STATUSES = frozenset({409, 429, 502, 503, 504})
SECRET_FIELDS = frozenset({"password", "accessToken", "refreshToken", "secret"})


class StoryError(Exception):
    """A step did not end as it must; the message says which and how."""


@dataclass(frozen=True)
class Answer:
    """What came back: status, headers in lower case, body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401 - JSON is of any shape
        """The body as JSON; {} when it is empty."""
        return json.loads(self.body) if self.body else {}


@dataclass
class Narrator:
    """Shows each call and answer, and remembers how long each step took."""

    console: Console
    rows: list[tuple[str, str, float]] = field(default_factory=list)

    def call(self, method: str, path: str, body: object | None) -> None:
        """Show a request; secrets are masked."""
        shown = "" if body is None else " " + json.dumps(masked(body))
        self.console.print(f"  [cyan]→ {method} {path}[/]{escaped(shown)}", highlight=False)

    def answer(self, status: int, shown: object) -> None:
        """Show an answer; secrets are masked, long ones are cut."""
        text = shown if isinstance(shown, str) else json.dumps(masked(shown))
        colour = "green" if status < 400 else "red"
        cut = text if len(text) <= 400 else text[:400] + " …"
        self.console.print(f"  [{colour}]← {status}[/] {escaped(cut)}", highlight=False)

    def step(self, title: str, run: Callable[[], str]) -> None:
        """Run one step under its title and note its outcome and length."""
        self.console.print(f"\n[bold]{len(self.rows) + 1}. {title}[/]")
        started = time.monotonic()
        outcome = run()
        self.rows.append((title, outcome, time.monotonic() - started))

    def table(self) -> None:
        """Show what happened and how long each step took."""
        table = Table("Step", "What happened", "Seconds", title="The story")
        for title, outcome, seconds in self.rows:
            table.add_row(title, outcome, f"{seconds:.2f}")
        self.console.print()
        self.console.print(table)


def escaped(text: str) -> str:
    """Text that rich shows as it is."""
    return text.replace("[", "\\[")


def masked(value: object) -> object:
    """The same JSON with secrets replaced."""
    if isinstance(value, dict):
        return {k: "•••" if k in SECRET_FIELDS else masked(v) for k, v in value.items()}
    if isinstance(value, list):
        return [masked(item) for item in value]
    return value


class Rest:
    """A plain REST client of the edge: one connection per call, as a stranger would write it.

    Args:
        edge_url: "http://127.0.0.1:8080".
        narrator: shows what is said.
        patience_s: how long a call is repeated, under the same key, while the mesh does
            not answer; 0 means that the first failure is final.
    """

    def __init__(self, edge_url: str, narrator: Narrator, *, patience_s: float = 0) -> None:
        parts = urllib.parse.urlsplit(edge_url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self.narrator = narrator
        self.calls = 0
        self.patience_s = patience_s

    def connect(self, *, timeout_s: float = CALL_TIMEOUT_S) -> http.client.HTTPConnection:
        """A fresh connection to the edge."""
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)

    def call(
        self,
        method: str,
        path: str,
        body: object | None = None,
        *,
        token: str = "",
        key: str = "",
        headers: Mapping[str, str] | None = None,
        expect: tuple[int, ...] = (200,),
        quiet: bool = False,
    ) -> Answer:
        """Make one call, patiently; its answer must have an expected status.

        Raises:
            StoryError: another status, or no answer within patience_s.
        """
        sent = dict(headers or {})
        if token:
            sent["Authorization"] = f"Bearer {token}"
        if key:
            sent["Idempotency-Key"] = key
        payload = None
        if body is not None:
            payload = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        if not quiet:
            self.narrator.call(method, path, body)
        attempt = partial(self._once, method, path, payload, sent)
        answer = self._in_quota(partial(self._patiently, attempt), is_final=429 in expect)
        if not quiet:
            self.narrator.answer(answer.status, printable(answer))
        if answer.status not in expect:
            raise StoryError(f"{method} {path} answered {answer.status}: {answer.body[:500]!r}")
        return answer

    def _once(
        self, method: str, path: str, payload: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        self.calls += 1
        connection = self.connect()
        try:
            connection.request(method, path, payload, dict(headers))
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, named, response.read())
        finally:
            connection.close()

    def _in_quota(self, attempt: Callable[[], Answer], *, is_final: bool) -> Answer:
        """Wait as the edge says if a quota is spent, as by a story that was just told."""
        waited_s = 0.0
        while True:
            answer = attempt()
            pause_s = float(answer.headers.get("retry-after", "1"))
            if answer.status != 429 or is_final or waited_s + pause_s > QUOTA_WAIT_S_MAX:
                return answer
            self.narrator.answer(429, f"the quota is spent for now: waiting {pause_s:g} s")
            time.sleep(pause_s)
            waited_s += pause_s

    def _patiently(self, attempt: Callable[[], Answer]) -> Answer:
        give_up = time.monotonic() + self.patience_s
        while True:
            try:
                answer = attempt()
                if answer.status not in RETRYABLE_STATUSES or time.monotonic() >= give_up:
                    return answer
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() >= give_up:
                    raise StoryError(f"the edge does not answer: {error}") from error
            time.sleep(RETRY_PAUSE_S)

    def events(
        self, path: str, *, token: str, ready: threading.Event | None = None
    ) -> Iterator[Any]:
        """Server-sent events, parsed; a cut stream is resumed by Last-Event-ID."""
        last_id = ""
        give_up = time.monotonic() + max(self.patience_s, STREAM_TIMEOUT_S)
        while time.monotonic() < give_up:
            try:
                for event_id, event in self._stream(path, token, last_id, ready):
                    last_id = event_id
                    yield event
                return
            except (OSError, http.client.HTTPException) as error:
                if not self.patience_s:
                    raise StoryError(f"the stream {path} broke: {error}") from error
                time.sleep(RETRY_PAUSE_S)
        raise StoryError(f"the stream {path} did not end in time")

    def _stream(
        self, path: str, token: str, last_id: str, ready: threading.Event | None
    ) -> Iterator[tuple[str, Any]]:
        connection = self.connect(timeout_s=STREAM_TIMEOUT_S)
        headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {token}"}
        if last_id:
            headers["Last-Event-ID"] = last_id
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            if response.status in RETRYABLE_STATUSES:
                raise ConnectionError(f"status {response.status}")
            if response.status != 200:
                raise StoryError(
                    f"GET {path} answered {response.status}: {response.read()[:300]!r}"
                )
            if ready is not None:
                ready.set()
            yield from parsed_events(response, last_id)
        finally:
            connection.close()


def printable(answer: Answer) -> object:
    """What the narrator shows of an answer."""
    if "json" in answer.headers.get("content-type", ""):
        return answer.json
    shown = {
        k: v for k, v in answer.headers.items() if k.startswith(("upload-", "tus-", "location"))
    }
    return shown or f"{len(answer.body)} bytes"


def parsed_events(response: http.client.HTTPResponse, last_id: str) -> Iterator[tuple[str, Any]]:
    """(id, data) of each event of a text/event-stream (WHATWG HTML, section 9.2)."""
    kind, data = "message", ""
    while line := response.readline():
        text = line.decode().rstrip("\r\n")
        name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            last_id = value
        elif name == "event":
            kind = value
        elif name == "data":
            data += value
        elif not text and data:
            if kind == "end":
                return
            if kind == "error":
                raise ConnectionError(f"the stream ended with an error: {data}")
            yield last_id, json.loads(data)
            kind, data = "message", ""
    raise ConnectionError("the stream was cut")
