"""The engine of our servers in tests: TENFOLD_RPC_ENGINE says it, as for a process of services.

So that all of them run on the other by one word; tests/integration/shared/rpc meets both anyway.
"""

import os

from shared.config import RPC_ENGINES
from shared.rpc.server import RpcServerConfig

CONFIG = RpcServerConfig(
    engine=os.environ.get("TENFOLD_RPC_ENGINE", RPC_ENGINES[0]), logs_requests=False
)
