"""shared/log.py: one escaped line per event, no secrets, never blocking."""

import os
import time

import orjson
import pytest

from shared import log


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def lines_of(read: int) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in os.read(read, 65_536).splitlines()]


def test_a_line_holds_its_request_id_and_no_secret(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = pipe
    monkeypatch.setattr(log, "_writer", log.LineWriter(write))
    log.configure("info")
    log.set_request_id("r-1")
    try:
        log.get_logger("test").info(
            "told", password="hunter2", inner={"Authorization": "Bearer x"}, text="a\nb\x1b[31m"
        )
        log.writer().flush()
    finally:
        log.set_request_id("")
    [line] = lines_of(read)
    assert line["request_id"] == "r-1"
    assert (line["password"], line["inner"]) == ("***", {"Authorization": "***"})
    assert line["text"] == "a\nb\x1b[31m"


def test_where_several_processes_write_no_write_cuts_a_line(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(bytes(data)) or real(fd, data))
    writer = log.LineWriter(pipe[1])
    writer.write_bytes_max = 100
    for number in range(50):
        writer.write(b"%d:%b\n" % (number, b"x" * (number % 30)))
    writer.flush()
    assert all(part.endswith(b"\n") and len(part) <= 100 for part in written)
    assert [int(line.partition(b":")[0]) for line in b"".join(written).splitlines()] == [*range(50)]


def test_when_nobody_reads_lines_are_dropped_and_nothing_blocks(pipe: tuple[int, int]) -> None:
    read, write = pipe
    writer = log.LineWriter(write, lines_max=100)
    start_s = time.monotonic()
    for _ in range(10_000):
        writer.write(b"x" * 1000 + b"\n")
    assert time.monotonic() - start_s < 2
    assert writer.dropped > 9_000
    os.close(read)  # the writer's thread meets the closed pipe and goes on
