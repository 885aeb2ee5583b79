"""The load generator of the HTTP benches: one process, plain sockets, one request over and over.

It sends fixed bytes on keep-alive connections, reads answers by their content-length, and checks
each: status 200, and a body of the length it was told. Written for little CPU per request, so
that it is never what limits: no event loop, no parser, no object per request.

Either each connection asks again as soon as it is answered, or requests start on a fixed
schedule; then a latency counts from the moment a request was due, whether or not a connection was
free for it.

    python -m tests.bench.sides.load   (a Job as JSON on stdin; a Result as JSON on stdout)
"""

import base64
import json
import resource
import select
import socket
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass

HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length:"
READ_BYTES = 65536
STUCK_S = 10.0


@dataclass(frozen=True)
class Job:
    """What to ask.

    Attributes:
        port: of a server on loopback.
        request: the bytes of one request, in base 64.
        duration_s: for how long.
        connections: how many at once.
        body_bytes: what each answer must have; 0 takes the first one's.
        rate_per_s: requests started in a second; 0 for as many as are answered.
    """

    port: int
    request: str
    duration_s: float
    connections: int
    body_bytes: int = 0
    rate_per_s: float = 0.0


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        requests: how many were answered.
        elapsed_s: in what time.
        cpu_s: what this process spent on it.
        p50_ms, p99_ms: latencies.
        body: of the first answer, in base 64.
    """

    requests: int
    elapsed_s: float
    cpu_s: float
    p50_ms: float
    p99_ms: float
    body: str


class Wrong(Exception):
    """The server answered otherwise than it must."""


def run(job: Job) -> Result:
    """Ask, and check every answer.

    Raises:
        Wrong: an answer is not 200, has another length, or does not come.
    """
    request = base64.b64decode(job.request)
    sockets = [socket.create_connection(("127.0.0.1", job.port)) for _ in range(job.connections)]
    for one in sockets:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        sockets[0].sendall(request)
        _, body = _whole_answer(sockets[0])
        if job.body_bytes not in (0, len(body)):
            raise Wrong(f"a body of {len(body)} bytes, not {job.body_bytes}: {body[:500]!r}")
        started_s, cpu_s = time.perf_counter(), _cpu_s()
        asking = _asking_on_schedule if job.rate_per_s else _asking_at_once
        latencies_s = asking(job, sockets, request, len(body))
        elapsed_s = time.perf_counter() - started_s
        latencies_s.sort()
        return Result(
            len(latencies_s),
            elapsed_s,
            _cpu_s() - cpu_s,
            latencies_s[len(latencies_s) // 2] * 1000,
            latencies_s[len(latencies_s) * 99 // 100] * 1000,
            base64.b64encode(body).decode(),
        )
    finally:
        for one in sockets:
            one.close()


def _asking_at_once(
    job: Job, sockets: list[socket.socket], request: bytes, body_bytes: int
) -> list[float]:
    """Every connection asks again when it is answered. Returns latencies in seconds."""
    poll, by_number = _registered(sockets)
    now, latencies = time.perf_counter, list[float]()
    end_s = now() + job.duration_s
    sent_s = dict.fromkeys(by_number, 0.0)
    for number, one in by_number.items():
        sent_s[number] = now()
        one.send(request)
    open_count = len(by_number)
    while open_count:
        events = poll.poll(STUCK_S)
        if not events:
            raise Wrong(f"no answer within {STUCK_S} s")
        for number, _ in events:
            one = by_number[number]
            _check(one.recv(READ_BYTES), one, body_bytes)
            moment_s = now()
            latencies.append(moment_s - sent_s[number])
            if moment_s < end_s:
                sent_s[number] = moment_s
                one.send(request)
            else:
                open_count -= 1
    return latencies


def _asking_on_schedule(
    job: Job, sockets: list[socket.socket], request: bytes, body_bytes: int
) -> list[float]:
    """Requests start when they are due. Returns latencies in seconds, from then."""
    poll, by_number = _registered(sockets)
    now, latencies = time.perf_counter, list[float]()
    free = deque(by_number)
    begun_s, step_s = now(), 1 / job.rate_per_s
    count, sent, due_s = round(job.duration_s * job.rate_per_s), 0, dict[int, float]()
    while len(latencies) < count:
        while free and sent < count and begun_s + sent * step_s <= now():
            number = free.popleft()
            due_s[number] = begun_s + sent * step_s
            by_number[number].send(request)
            sent += 1
        # The next one is due in microseconds; epoll itself counts in milliseconds.
        is_waiting = bool(free) and sent < count
        wait_s = max(0.0, begun_s + sent * step_s - now()) if is_waiting else STUCK_S
        ready, _, _ = select.select([poll], [], [], wait_s)
        if not ready and not is_waiting:
            raise Wrong(f"no answer within {STUCK_S} s")
        for number, _ in poll.poll(0) if ready else ():
            one = by_number[number]
            _check(one.recv(READ_BYTES), one, body_bytes)
            latencies.append(now() - due_s.pop(number))
            free.append(number)
    return latencies


def _registered(sockets: list[socket.socket]) -> tuple[select.epoll, dict[int, socket.socket]]:
    poll = select.epoll()
    for one in sockets:
        poll.register(one.fileno(), select.EPOLLIN)
    return poll, {one.fileno(): one for one in sockets}


def _check(data: bytes, connection: socket.socket, body_bytes: int) -> None:
    """The answer is whole, has status 200 and that length; the fast way for one that came whole."""
    head_bytes = data.find(HEAD_END) + 4
    if len(data) == head_bytes + body_bytes and data.startswith(b"HTTP/1.1 200 "):
        head = data[:head_bytes].lower()
        at = head.find(LENGTH)
        if at > 0 and int(head[at + len(LENGTH) : head.index(b"\r", at)]) == body_bytes:
            return
    head, body = _whole_answer(connection, data)
    if len(body) != body_bytes:
        raise Wrong(f"a body of {len(body)} bytes, not {body_bytes}: {head + body!r}")


def _whole_answer(connection: socket.socket, data: bytes = b"") -> tuple[bytes, bytes]:
    """Head and body of one answer, of which `data` has come already."""
    while HEAD_END not in data:
        data += _more(connection)
    head, _, body = data.partition(HEAD_END)
    if not head.startswith(b"HTTP/1.1 200 "):
        raise Wrong(f"not 200: {data!r}")
    lines = head.lower().split(b"\r\n")
    lengths = [int(line[len(LENGTH) :]) for line in lines if line.startswith(LENGTH)]
    if len(lengths) != 1:
        raise Wrong(f"no content-length: {head!r}")
    while len(body) < lengths[0]:
        body += _more(connection)
    if len(body) > lengths[0]:
        raise Wrong(f"more than one answer: {data!r}")
    return head, body


def _more(connection: socket.socket) -> bytes:
    connection.settimeout(STUCK_S)
    data = connection.recv(READ_BYTES)
    if not data:
        raise Wrong("the connection was closed")
    return data


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """One job."""
    try:
        result = run(Job(**json.load(sys.stdin)))
    except (Wrong, OSError) as error:
        print(f"load: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
