"""A server to be frozen: prints its port, then serves until killed."""

import asyncio
import os
import sys

from tenfold.auth.v1 import auth_service_pb2 as auth
from tenfold.auth.v1 import auth_service_pb2_grpc as auth_grpc

from shared.identity import IdentityVerifier
from shared.lifecycle import Registration
from shared.rpc.server import RpcServer, RpcServerConfig


class Tokens:
    async def GetJwks(self, request: object, context: object) -> auth.Jwks:
        return auth.Jwks()


async def main() -> None:
    config = RpcServerConfig(engine=os.environ["TENFOLD_RPC_ENGINE"])
    server = RpcServer(address="127.0.0.1:0", verifier=IdentityVerifier({}), config=config)
    server.add(Registration(auth_grpc.add_TokenServiceServicer_to_server, Tokens()))
    port = await server.start()
    server.set_serving("", True)
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


asyncio.run(main())
