"""The HTTP servers that were weighed, each with the same app: one fixed answer of 300 bytes.

Asked for "?target" the app answers the target that it was handed, so that one can see whether a
server decodes it. No server logs, all write a Date header and run on uvloop, and each gives every
request a task or something like it. Ours bounds heads, times and connections besides.

    python -m tests.bench.sides.http_servers edge|uvicorn|granian PORT
"""

import asyncio
import sys
from contextlib import closing
from typing import Any

import uvloop

BODY = b'{"note":"' + b"x" * 289 + b'"}'
HEADERS = [(b"content-type", b"application/json")]
TARGET_QUERY = b"target"


def answer(query: bytes, target: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body."""
    body = target if query == TARGET_QUERY else BODY
    return [*HEADERS, (b"content-length", b"%d" % len(body))], body


async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
    """For the servers that speak ASGI."""
    assert scope["type"] == "http"
    headers, body = answer(scope["query_string"], scope.get("raw_path") or scope["path"].encode())
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class EdgeApp:
    """For the edge's own server."""

    async def serve(self, request: Any) -> None:
        headers, body = answer(request.query, request.raw_path)
        request.write(request.begin(200, headers, b""), body, is_last=True)

    def drain(self) -> None:
        """Nothing is open."""

    def watch_connections(self, _count: Any) -> None:
        """As note_refusal."""

    def note_refusal(self, _refusal: Any) -> None:
        """Nothing is counted."""


def run_edge(port: int) -> None:
    from edge.config import EdgeConfig
    from edge.serving import serving
    from shared.listening import bind

    async def run() -> None:
        with closing(bind(f"127.0.0.1:{port}", setting="PORT")) as listener:
            async with serving(EdgeApp(), EdgeConfig(), listener):
                await asyncio.Event().wait()

    uvloop.run(run())


def run_uvicorn(port: int) -> None:
    import uvicorn

    uvicorn.run(
        asgi_app,
        port=port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="warning",
    )


def run_granian(port: int) -> None:
    from granian import Granian

    server = Granian(
        "tests.bench.sides.http_servers:asgi_app",
        port=port,
        interface="asginl",  # ASGI without lifespan
        loop="uvloop",
        http="1",
        websockets=False,
        log_enabled=False,
    )
    server.serve()


RUN = {"edge": run_edge, "uvicorn": run_uvicorn, "granian": run_granian}

if __name__ == "__main__":
    RUN[sys.argv[1]](int(sys.argv[2]))
