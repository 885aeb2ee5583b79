"""Our service process for `whole path`: the shop as one of our own services would serve it.

Everything that shared/rpc does for a service is on: the signed identity, access and scopes by
contract, validation, deadline, one log line per call. What it answers is made, not stored.

    TENFOLD_RPC_ENGINE=grpcio python -m tests.bench.sides.service FOLDER    (prints its port)
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import shop_pb2
import shop_pb2_grpc
import uvloop
from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from shared import log
from shared.config import ProcessConfig, load, read_trust
from shared.identity import IdentityVerifier
from shared.lifecycle import Registration
from shared.rpc.policy import load_policies
from shared.rpc.server import RpcServer, RpcServerConfig
from tests.bench.sides import samples
from tests.bench.sides.contract import SERVICE

CREATED = json_format.ParseDict(samples.GET_ANSWER, shop_pb2.OrderSummary()).create_time


class Shop(shop_pb2_grpc.OrderServiceServicer):
    async def GetOrder(self, request: Any, context: Any) -> shop_pb2.OrderSummary:
        return shop_pb2.OrderSummary(
            name=request.name,
            state=shop_pb2.STATE_PAID,
            display_name=samples.GET_ANSWER["displayName"],
            line_count=4,
            revision=request.revision,
            has_history=request.include_history,
            total=shop_pb2.Money(currency_code="EUR", minor_units=12950),
            tags=request.tags,
            create_time=CREATED,
        )

    async def PlaceOrder(self, request: Any, context: Any) -> shop_pb2.Order:
        total = sum(line.quantity * line.price.minor_units for line in request.lines)
        return shop_pb2.Order(
            name=f"{request.parent}/orders/1043",
            state=shop_pb2.STATE_PLACED,
            customer=request.customer,
            lines=request.lines,
            labels=request.labels,
            discount_percent=request.discount_percent,
            note=request.note,
            total=shop_pb2.Money(
                currency_code=request.lines[0].price.currency_code, minor_units=total
            ),
            create_time=CREATED,
        )


async def serve(folder: Path) -> None:
    log.configure()
    process = load(ProcessConfig, "TENFOLD_", os.environ)
    descriptors = FileDescriptorSet.FromString((folder / "shop.binpb").read_bytes())
    server = RpcServer(
        address="127.0.0.1:0",
        verifier=IdentityVerifier(read_trust(folder)),
        config=RpcServerConfig(engine=process.rpc_engine),
        policies=load_policies(descriptors),
    )
    server.add(Registration(shop_pb2_grpc.add_OrderServiceServicer_to_server, Shop()))
    port = await server.start()
    server.set_serving(SERVICE, True)
    server.set_serving("", True)
    # Its log lines go to a file, as a service's do; the first line is for whoever started it.
    os.write(1, f"{port}\n".encode())
    os.dup2(os.open(folder / "service.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1])))
