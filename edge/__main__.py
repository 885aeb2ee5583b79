"""python -m edge: serve REST until SIGTERM or SIGINT.

Wrong settings, contracts that cannot be served and a taken address end it with exit code 1
and one sentence. Whoever starts it gives it the parent-death signal, if it shall have one.
"""

import asyncio
import os
import signal
import socket
import sys
from contextlib import closing

import uvloop

from edge.config import EdgeConfig
from edge.contracts import ContractError
from edge.serving import ListenError, bind, serving
from edge.wiring import Surroundings, open_edge
from shared import log
from shared.clock import SystemClock
from shared.config import ConfigError, ProcessConfig, load, read_identity_key
from shared.identity import EDGE_ISSUER, IdentitySigner
from shared.rpc.client import Upstreams

_log = log.get_logger("edge")


async def run(config: EdgeConfig, process: ProcessConfig) -> None:
    """Serve until signalled.

    Raises:
        ConfigError: a setting is wrong.
        ContractError: the contracts cannot be served.
        ListenError: the address is taken, or none.
    """
    around = _surroundings(config, process)
    listener = bind(config.listen, setting="TENFOLD_EDGE_LISTEN")
    log.install_loop_handler(asyncio.get_running_loop())
    with closing(listener):
        await _serve(config, around, listener)


async def _serve(config: EdgeConfig, around: Surroundings, listener: socket.socket) -> None:
    async with open_edge(config, around) as app, serving(app, config, listener) as port:
        host = config.listen.rpartition(":")[0]
        _log.info("serving", host=host, port=port, url=f"http://{host}:{port}")
        await _until_signalled()
        _log.info("draining")


def _surroundings(config: EdgeConfig, process: ProcessConfig) -> Surroundings:
    try:
        upstreams = Upstreams.parse(process.upstreams or f"*={process.listen}")
    except ValueError as error:
        raise ConfigError(f"TENFOLD_UPSTREAMS={process.upstreams!r}: {error}.") from error
    # A stranger's server, fronted by its descriptors alone, knows nothing of our identities.
    is_foreign = bool(config.descriptors) and not process.identity_folder
    signer = None
    if not is_foreign:
        key = read_identity_key(process.identity_path, EDGE_ISSUER)
        signer = IdentitySigner(EDGE_ISSUER, key)
    return Surroundings(upstreams, signer, process.valkey_url, SystemClock())


async def _until_signalled() -> None:
    signalled = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled.set)
    await signalled.wait()


def main() -> None:
    """Run, and say in one sentence why it could not."""
    try:
        process = load(ProcessConfig, "TENFOLD_", os.environ)
        config = load(EdgeConfig, "TENFOLD_EDGE_", os.environ)
        log.configure(process.log_level)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(config, process))
    except (ConfigError, ContractError, ListenError) as error:
        print(f"edge: {error}", file=sys.stderr)  # noqa: T201 - to whoever starts it
        sys.exit(1)


if __name__ == "__main__":
    main()
