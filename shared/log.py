"""Structured logs: JSON lines on stdout, one per event, with the request id in each.

Logging never blocks a request: lines go to a bounded queue that a thread writes out. When
nobody reads stdout the queue fills and lines are dropped and counted (spec F53).
"""

import asyncio
import contextlib
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, cast

import orjson
import structlog

# Lines waiting for stdout; beyond this they are dropped. About 5 MB at worst.
LINES_WAITING_MAX = 10_000
# Lines of one moment leave in one write.
GATHER_S = 0.020
TEXT_CHARACTERS_MAX = 4096

MASK = "***"
# Keys that hold secrets or personal data, wherever they appear (spec S133).
SENSITIVE_KEYS = frozenset(
    {
        "access_token",
        "api_key",
        "authorization",
        "cookie",
        "email",
        "key_secret",
        "password",
        "private_key",
        "refresh_token",
        "secret",
        "tenfold-identity",
        "token",
    }
)

Logger = structlog.typing.FilteringBoundLogger

_level = logging.INFO
_request_id: ContextVar[str] = ContextVar("request_id", default="")


def set_request_id(request_id: str) -> None:
    """Name this request id in every line of this task and of the tasks it makes."""
    _request_id.set(request_id)


def current_request_id() -> str:
    """The id that set_request_id gave, or ""."""
    return _request_id.get()


class LineWriter:
    """Writes lines to a descriptor from a thread of its own; never blocks the caller."""

    def __init__(self, descriptor: int, *, lines_max: int = LINES_WAITING_MAX) -> None:
        self._descriptor = descriptor
        self.write_bytes_max = sys.maxsize
        self._lines: deque[bytes] = deque()
        self._lines_max = lines_max
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self.dropped = 0
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def write(self, line: bytes) -> None:
        """Queue one line, which ends in a newline; drop it when the queue is full."""
        if len(self._lines) >= self._lines_max:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._wake.is_set():
            self._idle.clear()
            self._wake.set()

    def flush(self, timeout_s: float = 1.0) -> None:
        """Wait until the queue is written, but no longer than this."""
        self._idle.wait(timeout_s)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(GATHER_S)
            self._wake.clear()
            self._write_out()
            if not self._lines:
                self._idle.set()

    def _write_out(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        for part in _parts(lines, self.write_bytes_max):
            data = memoryview(part)
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except OSError:  # a closed pipe: nobody is left to tell
                    return


def _parts(lines: list[bytes], bytes_max: int) -> Iterator[bytes]:
    """Lines joined, as many as fit into one write."""
    part: list[bytes] = []
    size = 0
    for line in lines:
        if part and size + len(line) > bytes_max:
            yield b"".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    yield b"".join(part)


_writer: LineWriter | None = None


def writer() -> LineWriter:
    """The process's writer to stdout, made at the first use."""
    global _writer  # noqa: PLW0603  one per process, as stdout is
    if _writer is None:
        _writer = LineWriter(sys.__stdout__.fileno() if sys.__stdout__ else 1)
    return _writer


def share_stdout() -> None:
    """Several processes write there: keep their lines whole (pipe(7), PIPE_BUF)."""
    writer().write_bytes_max = select.PIPE_BUF


def configure(level: str = "info") -> None:
    """Send every logger of this process, the libraries' included, to stdout as JSON.

    Args:
        level: "debug", "info", "warning" or "error".
    """
    global _level  # noqa: PLW0603  one per process
    number = _level = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            _add_origin,
            structlog.processors.format_exc_info,
            _mask,
            _render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: _Sink(),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_LibraryHandler()]
    root.setLevel(max(number, logging.WARNING))


def get_logger(component: str) -> Logger:
    """A logger whose lines name this component, such as "rpc" or "auth"."""
    return cast("Logger", structlog.get_logger(component=component))


def writes_requests() -> bool:
    """Whether the level lets the lines of finished requests through."""
    return _level <= logging.INFO


def write_request_line(fields: dict[str, Any]) -> None:
    """Write the one line of a finished request; the fast way, for fields without secrets."""
    fields["time"] = datetime.now(UTC)
    writer().write(orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _add_origin(
    _logger: object, _name: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    event["time"] = _now()
    request_id = _request_id.get()
    if request_id:
        event.setdefault("request_id", request_id)
    return event


def _mask(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return masked(event)


def masked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with every sensitive value replaced, also inside mappings."""
    return {key: _masked_value(key, value) for key, value in fields.items()}


def _masked_value(key: str, value: object) -> object:
    if key.lower() in SENSITIVE_KEYS:
        return MASK
    if isinstance(value, Mapping):
        return masked(value)
    if isinstance(value, str):
        return value[:TEXT_CHARACTERS_MAX]
    return value


def _render(_logger: object, _name: str, event: MutableMapping[str, Any]) -> bytes:
    # JSON escapes control characters: a logged value cannot start a line of its own (S132).
    return orjson.dumps(
        dict(event), default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    )


class _Sink:
    """What structlog writes to."""

    def __getattr__(self, _name: str) -> Callable[[bytes], None]:
        return writer().write


class _LibraryHandler(logging.Handler):
    """Lines of libraries that use the standard logging module."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a broken record of a library breaks nothing here
            logger = get_logger(record.name)
            error = record.exc_info if record.exc_info and record.exc_info[0] else None
            logger.log(record.levelno, record.getMessage(), exc_info=error)


def install_loop_handler(loop: asyncio.AbstractEventLoop) -> None:
    """Log what a loop would print to stderr."""

    def log_it(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        get_logger("asyncio").error(context["message"], exc_info=context.get("exception"))

    loop.set_exception_handler(log_it)
