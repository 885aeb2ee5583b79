"""A load generator that does not wait: requests go out when their time has come, answered or not.

A closed loop asks less when answers are slow, and so hides what it looks for. Here times are
measured from the moment at which a request was due, over as many keep-alive connections as that
takes.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

ANSWER_TIMEOUT_S = 60.0
LOST = 0  # the status of a request whose connections broke


@dataclass(frozen=True)
class Request:
    """What is sent again and again.

    Attributes:
        name: of its kind.
        data: the whole request.
    """

    name: str
    data: bytes

    @property
    def is_repeatable(self) -> bool:
        """Whether a client may send it once more when a connection breaks (RFC 9110 §9.2.2)."""
        return self.data.startswith(b"GET ")

    @classmethod
    def of(
        cls, name: str, method: str, target: str, body: object = None, **headers: str
    ) -> "Request":
        """A request with a JSON body, if any; names of headers with "_" for "-"."""
        payload = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {target} HTTP/1.1", "host: edge"]
        lines += [f"{key.replace('_', '-')}: {value}" for key, value in headers.items()]
        if payload:
            lines += ["content-type: application/json", f"content-length: {len(payload)}"]
        return cls(name, "\r\n".join([*lines, "", ""]).encode() + payload)


@dataclass(frozen=True)
class Shot:
    """What became of one request.

    Attributes:
        name: of its kind.
        due_s: when it was to be sent, from the beginning.
        status: of the answer; LOST without one.
        took_s: from when it was due to the end of the answer.
        head: of the answer.
        is_repeated: whether a connection broke and it was sent once more.
    """

    name: str
    due_s: float
    status: int
    took_s: float
    head: bytes = b""
    is_repeated: bool = False


@dataclass
class Shots:
    """What became of them all."""

    shots: list[Shot] = field(default_factory=list)

    def of(self, name: str) -> "Shots":
        """Those of one kind."""
        return Shots([shot for shot in self.shots if shot.name == name])

    def with_status(self, *statuses: int) -> "Shots":
        """Those that were answered so."""
        return Shots([shot for shot in self.shots if shot.status in statuses])

    def since(self, due_s: float) -> "Shots":
        """Those that were due from then on."""
        return Shots([shot for shot in self.shots if shot.due_s >= due_s])

    @property
    def statuses(self) -> Counter[int]:
        """How many there are of each status."""
        return Counter(shot.status for shot in self.shots)

    def slowest_s(self, share: float = 0.99) -> float:
        """What so many took at most; 0 of none."""
        times_s = sorted(shot.took_s for shot in self.shots)
        return times_s[min(len(times_s) - 1, int(share * len(times_s)))] if times_s else 0.0

    def __len__(self) -> int:
        """How many."""
        return len(self.shots)


def steadily(
    requests: Mapping[Request, float], seconds: float, *, since_s: float = 0.0
) -> list[tuple[float, Request]]:
    """When to send what: each at its rate, evenly.

    Args:
        requests: how many a second of each.
        seconds: for how long.
        since_s: after how much time it begins.
    """
    due = [
        (since_s + (number + index / len(requests)) / rate, request)
        for index, (request, rate) in enumerate(requests.items())
        for number in range(int(rate * seconds))
    ]
    return sorted(due, key=lambda entry: entry[0])


async def fire(url: str, plan: Iterable[tuple[float, Request]]) -> Shots:
    """Send everything when it is due, and wait for all answers.

    What can be repeated is sent once more, on another connection, when its own breaks.
    """
    where = urlsplit(url)
    assert where.hostname is not None
    gun = _Gun(where.hostname, where.port or 80)
    began_s = time.monotonic()
    for due_s, request in plan:
        pause_s = began_s + due_s - time.monotonic()
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        gun.send(_Asked(request, due_s, began_s + due_s))
    await gun.close()
    return Shots(gun.shots)


@dataclass(frozen=True)
class _Asked:
    """A request under way."""

    request: Request
    due_s: float
    due_at_s: float
    is_repeated: bool = False

    def answered(self, status: int, head: bytes = b"") -> Shot:
        took_s = time.monotonic() - self.due_at_s
        return Shot(self.request.name, self.due_s, status, took_s, head, self.is_repeated)


class _Gun:
    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: list[_Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._busy = 0
        self.shots: list[Shot] = []

    def send(self, asked: _Asked) -> None:
        self._busy += 1
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed:
                connection.send(asked)
                return
        self._open(asked)

    def _open(self, asked: _Asked) -> None:
        task = asyncio.create_task(self._send_on_new(asked))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _send_on_new(self, asked: _Asked) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self), self._host, self._port
            )
        except OSError:
            self.broke(asked)
        else:
            connection.send(asked)

    def broke(self, asked: _Asked) -> None:
        if asked.request.is_repeatable and not asked.is_repeated:
            self._open(replace(asked, is_repeated=True))
        else:
            self.end(asked.answered(LOST))

    def end(self, shot: Shot) -> None:
        self._busy -= 1
        self.shots.append(shot)

    def keep(self, connection: "_Connection") -> None:
        self._idle.append(connection)

    async def close(self) -> None:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while self._busy:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for connection in self._idle:
            connection.close()


class _Connection(asyncio.Protocol):
    def __init__(self, gun: _Gun) -> None:
        self._gun = gun
        self._asked: _Asked | None = None
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, asked: _Asked) -> None:
        assert self._transport is not None
        self._asked = asked
        self._transport.write(asked.request.data)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or self._asked is None:
            return
        head = head.lower()
        _, found, rest = head.partition(b"\r\ncontent-length: ")
        if len(body) < (int(rest.split(b"\r\n", 1)[0]) if found else 0):
            return
        asked, self._asked, self._received = self._asked, None, b""
        self._gun.end(asked.answered(int(head[9:12]), head))
        if b"\r\nconnection: close" in head:
            self.close()
        else:
            self._gun.keep(self)

    def connection_lost(self, _error: Exception | None) -> None:
        self.is_closed = True
        if self._asked is not None:
            asked, self._asked = self._asked, None
            self._gun.broke(asked)

    def close(self) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.close()
