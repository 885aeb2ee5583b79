"""The backend of `make bench-edge`: answers known messages with answers made beforehand.

It speaks just enough HTTP/2 to cost less than whatever asks it. Header blocks are not read, since
a decoder for them would cost more than all the rest: the message alone says what was called. Each
message is compared, byte for byte, with what was accepted before; one not seen yet is parsed and
must equal a sample, so that every side is proved to have sent the right message every time.

Send windows are not counted: what can be under way at once (answers of under a kilobyte to a few
dozen calls) is less than the 64 KiB that every peer grants.

    python -m tests.bench.sides.responder      (prints its port; shop_pb2 on PYTHONPATH)
"""

import asyncio
import contextlib
from typing import cast

import shop_pb2  # made by contract.compile_contract
import uvloop
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2

from tests.bench.sides import samples
from tests.bench.sides.contract import SERVICE

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
ACK = END_STREAM = 1
END_HEADERS = 4
# RFC 7541: ":status: 200" by index, then literals that no table remembers.
ANSWER_HEAD = b"\x88\x0f\x10\x10application/grpc"
STATUS_OK = b"\x00\x0bgrpc-status\x010"
STATUS_INVALID = b"\x00\x0bgrpc-status\x013"
WINDOW_BYTES = 2**31 - 1
WINDOW_AT_START_BYTES = 65_535


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return b"%b%c%c%b%b" % (
        len(payload).to_bytes(3),
        kind,
        flags,
        stream.to_bytes(4),
        payload,
    )


def framed(message: Message) -> bytes:
    data = message.SerializeToString()
    return b"\0" + len(data).to_bytes(4) + data


class Answers:
    """What a framed message is answered with: the two samples, and health."""

    def __init__(self) -> None:
        parse = json_format.ParseDict
        self._samples: list[tuple[Message, bytes]] = [
            (
                parse(samples.GET_MESSAGE, shop_pb2.GetOrderRequest()),
                framed(parse(samples.GET_ANSWER, shop_pb2.OrderSummary())),
            ),
            (
                parse(samples.POST_MESSAGE, shop_pb2.PlaceOrderRequest()),
                framed(parse(samples.POST_ANSWER, shop_pb2.Order())),
            ),
        ]
        self._known: dict[bytes, bytes] = {}
        serving = health_pb2.HealthCheckResponse(
            status=health_pb2.HealthCheckResponse.ServingStatus.SERVING
        )
        # The edge watches the whole server, and checks a service by its name.
        self.watched = framed(serving)
        self._known[framed(health_pb2.HealthCheckRequest())] = self.watched
        check = health_pb2.HealthCheckRequest(service=SERVICE)
        self._known[framed(check)] = framed(serving)

    def answer(self, message: bytes) -> bytes | None:
        return self._known.get(message) or self._learn(message)

    def _learn(self, message: bytes) -> bytes | None:
        for sample, answer in self._samples:
            with contextlib.suppress(DecodeError):
                if type(sample).FromString(message[5:]) == sample:
                    self._known[message] = answer
                    return answer
        return None


class Connection(asyncio.Protocol):
    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._buffer = b""
        self._is_begun = False
        self._parts: dict[int, bytes] = {}
        self._granted_bytes = WINDOW_AT_START_BYTES

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(frame(SETTINGS, 0, 0, b""))

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        at, out = 0, []
        if not self._is_begun:
            if len(data) < len(PREFACE):
                self._buffer = data
                return
            assert data.startswith(PREFACE)
            at, self._is_begun = len(PREFACE), True
        while len(data) - at >= 9:
            end = at + 9 + int.from_bytes(data[at : at + 3])
            if end > len(data):
                break
            kind, flags = data[at + 3], data[at + 4]
            if kind == DATA:
                stream = int.from_bytes(data[at + 5 : at + 9])
                out.append(self._take(stream, flags, data[at + 9 : end]))
            elif kind == SETTINGS and not flags & ACK:
                out.append(frame(SETTINGS, ACK, 0, b""))
            elif kind == PING and not flags & ACK:
                out.append(frame(PING, ACK, 0, data[at + 9 : end]))
            at = end
        self._buffer = data[at:]
        if self._granted_bytes < WINDOW_BYTES // 2:
            more_bytes = WINDOW_BYTES - self._granted_bytes
            self._granted_bytes = WINDOW_BYTES
            out.append(frame(WINDOW_UPDATE, 0, 0, more_bytes.to_bytes(4)))
        if out:
            self._transport.write(b"".join(out))

    def _take(self, stream: int, flags: int, payload: bytes) -> bytes:
        self._granted_bytes -= len(payload)
        message = self._parts.pop(stream, b"") + payload
        if not flags & END_STREAM:
            self._parts[stream] = message
            return b""
        answer, head = (
            self._answers.answer(message),
            frame(HEADERS, END_HEADERS, stream, ANSWER_HEAD),
        )
        if answer is None:
            ending = ANSWER_HEAD + STATUS_INVALID
            return frame(HEADERS, END_HEADERS | END_STREAM, stream, ending)
        if answer is self._answers.watched:  # no more than this, and no end
            return head + frame(DATA, 0, stream, answer)
        trailers = frame(HEADERS, END_HEADERS | END_STREAM, stream, STATUS_OK)
        return head + frame(DATA, 0, stream, answer) + trailers


async def serve() -> None:
    answers = Answers()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(answers), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
