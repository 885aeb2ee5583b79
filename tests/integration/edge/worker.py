"""A server of `works/works.proto` in a process of its own, to be killed, frozen and overloaded.

    python -m tests.integration.edge.worker IMAGE ADDRESS

prints its port when it serves. SIGTERM ends it gracefully.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from edge.contracts import Contracts, MethodInfo
from tests.protos import compile_protos

CONTRACT = Path(__file__).parent / "works"
SERVICE = "/works.v1.Works/"


def works_image(folder: Path) -> Path:
    """The compiled contract, written into a folder."""
    image = folder / "works.binpb"
    image.write_bytes(compile_protos(CONTRACT, folder).SerializeToString())
    return image


@asynccontextmanager
async def worker(image: Path, address: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker that serves; killed in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.integration.edge.worker", str(image), address,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 30), "it does not start"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Worker(grpc.GenericRpcHandler):
    """Does what each request asks for."""

    def __init__(self, contracts: Contracts) -> None:
        self._methods = {method.full_name: method for method in contracts.methods()}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """See grpc.GenericRpcHandler."""
        method = self._methods.get(details.method)
        if method is None:
            return None
        codec = {
            "request_deserializer": method.input.FromString,
            "response_serializer": method.output.SerializeToString,
        }
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(_stream_of(method), **codec)
        return grpc.unary_unary_rpc_method_handler(_behaviour_of(method), **codec)


def _behaviour_of(method: MethodInfo) -> Any:
    async def behave(request: Any, context: Any) -> Any:
        if method.name == "Toil":
            # The loop stands still, as under work that only one core can do; no core is used up.
            time.sleep(request.work_ms / 1000)  # noqa: ASYNC251
        elif request.work_ms:
            await asyncio.sleep(request.work_ms / 1000)
        return method.output(name=request.name, process_id=os.getpid())

    return behave


def _stream_of(method: MethodInfo) -> Any:
    behave = _behaviour_of(method)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        yield await behave(request, context)

    return stream


async def main(image: bytes, address: str) -> None:
    """Serve until SIGTERM."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    server.add_generic_rpc_handlers([Worker(Contracts.of_bytes(image))])
    port = server.add_insecure_port(address)
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.stop(5)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]).read_bytes(), sys.argv[2]))
