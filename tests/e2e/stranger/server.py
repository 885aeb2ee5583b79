"""A plain grpc.aio server: python server.py PORT [FLAG…], with its stubs on the path.

Flags: "reflection" and "health" serve those; "cert=FILE" and "key=FILE" serve TLS.
"""

import asyncio
import sys
from pathlib import Path

import grpc
import shop_pb2
import shop_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

NAME = shop_pb2.DESCRIPTOR.services_by_name["Shop"].full_name
CODES = {code.value[0]: code for code in grpc.StatusCode}


class Shop(shop_pb2_grpc.ShopServicer):
    def __init__(self):
        self.items = {"items/tea": shop_pb2.Item(name="items/tea", title="Tea", stock=2**53 + 1)}

    async def GetItem(self, request, context):
        if request.name not in self.items:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no {request.name} here")
        return self.items[request.name]

    async def CreateItem(self, request, context):
        item = request.item
        item.name = f"items/{item.title.lower()}"
        self.items[item.name] = item
        return item

    async def UpdateItem(self, request, context):
        item = self.items[request.item.name]
        request.update_mask.MergeMessage(request.item, item)
        return item

    async def WatchItems(self, request, context):
        for number in range(request.count):
            yield shop_pb2.Item(name=f"items/{number}")
        await asyncio.sleep(request.pause_s)
        if request.code:
            await context.abort(CODES[request.code], "the shelf broke")

    async def Fail(self, request, context):
        await asyncio.sleep(request.sleep_s)
        metadata = (("grpc-status-details-bin", request.details),) if request.details else ()
        await context.abort(CODES[request.code], request.message, metadata)

    async def Hear(self, request, context):
        return shop_pb2.HearResponse(names=sorted(key for key, _ in context.invocation_metadata()))


def credentials(options):
    pair = Path(options["key"]).read_bytes(), Path(options["cert"]).read_bytes()
    return grpc.ssl_server_credentials([pair])


async def main(port, *flags):
    options = dict(flag.partition("=")[::2] for flag in flags)
    server = grpc.aio.server()
    shop_pb2_grpc.add_ShopServicer_to_server(Shop(), server)
    if "reflection" in options:
        reflection.enable_server_reflection((NAME, reflection.SERVICE_NAME), server)
    if "health" in options:
        servicer = health.aio.HealthServicer()
        status = health_pb2.HealthCheckResponse.ServingStatus.Value(options["health"])
        await servicer.set("", status)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if "cert" in options:
        bound = server.add_secure_port(f"127.0.0.1:{port}", credentials(options))
    else:
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(bound, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
