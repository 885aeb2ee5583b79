"""python -m edge: serve REST until SIGTERM or SIGINT.

Wrong settings, contracts that cannot be served and a taken address end it with exit code 1
and one sentence. Whoever starts it gives it the parent-death signal, if it shall have one.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path
from typing import Any

import uvloop

from edge.api import Api
from edge.config import EdgeConfig
from edge.contracts import ContractError
from edge.docs import DOCS_PATH
from edge.handover import Handover, talking
from edge.serving import serving
from edge.wiring import Surroundings, load_api, open_edge
from shared import log
from shared.clock import SystemClock
from shared.config import ConfigError, ProcessConfig, load, read_identity_key
from shared.identity import EDGE_ISSUER, IdentitySigner
from shared.listening import ListenError, bind
from shared.rpc.client import Upstreams
from shared.rpc.tls import ClientTls
from shared.telemetry.metrics import Metrics
from shared.telemetry.scrapes import open_telemetry, telling

# Until a worker that others stand in for is ready; then it serves, whatever is missing.
READY_WAIT_S = 5.0

_log = log.get_logger("edge")


async def run(config: EdgeConfig, process: ProcessConfig, handover: Handover | None = None) -> None:
    """Serve until signalled; a signal that comes before it serves, or a second one, ends it.

    Args:
        config: of the edge.
        process: of every process.
        handover: what a worker has of its parent; None for an edge of one process.

    Raises:
        ConfigError: a setting is wrong.
        ContractError: the contracts cannot be served.
        ListenError: the address is taken, or none.
        asyncio.CancelledError: a signal has ended it.
    """
    stop = _Stop()
    around = _surroundings(config, process)
    log.install_loop_handler(asyncio.get_running_loop())
    # Before it listens: what cannot be served shall not look like a server.
    is_first = handover is None or handover.turn.worker == 0
    api = await load_api(config, around, _tell if is_first else _log.info)
    if handover is None:
        await _serve_alone(config, process.metrics_listen, around, api, stop)
    else:
        await _serve_among_workers(config, handover, around, api, stop)


async def _serve_alone(
    config: EdgeConfig, metrics_listen: str, around: Surroundings, api: Api, stop: "_Stop"
) -> None:
    with closing(bind(config.listen, setting="TENFOLD_EDGE_LISTEN")) as listener:
        async with (
            open_telemetry(around.metrics, metrics_listen) as metrics_port,
            open_edge(config, around, api, tell=_tell) as app,
            serving(app, config, listener) as port,
        ):
            stop.on_hangup = app.ask_reload
            where = _where(config, around, api, port)
            sentence = where.pop("sentence")
            _log.info("serving", **where, metrics_port=metrics_port)
            if sentence:
                _tell(sentence)
            await stop.asked()
            _log.info("draining")


async def _serve_among_workers(
    config: EdgeConfig, handover: Handover, around: Surroundings, api: Api, stop: "_Stop"
) -> None:
    log.share_stdout()
    worker = str(handover.turn.worker)
    async with (
        telling(around.metrics, {"worker": worker}) as render,
        talking(handover.control, render, on_gone=stop.ask) as parent,
        open_edge(config, around, api, tell=_tell if worker == "0" else _log.info) as app,
        AsyncExitStack() as stack,
    ):
        if handover.others_serve:
            await app.until_ready(READY_WAIT_S)
        opened = serving(app, config, handover.listener, handover.turn)
        port = await stack.enter_async_context(opened)
        stop.on_hangup = app.ask_reload
        parent.say_serving(_where(config, around, api, port))
        await stop.asked()
        _log.info("draining", worker=handover.turn.worker)


class _Stop:
    """SIGTERM and SIGINT: the first asks a serving process to drain; any other ends it.

    Attributes:
        on_hangup: what SIGHUP does; nothing before contracts are served, for they are being read.
    """

    def __init__(self) -> None:
        self.on_hangup: Callable[[], None] = lambda: None
        self._asked: asyncio.Event | None = None
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    async def asked(self) -> None:
        """Return when the process shall drain."""
        self._asked = asyncio.Event()
        await self._asked.wait()

    def ask(self) -> None:
        """What the first signal does; without effect after it."""
        if self._asked is None or not self._asked.is_set():
            self._on_signal()

    def _on_hangup(self) -> None:
        self.on_hangup()

    def _on_signal(self) -> None:
        if self._asked is not None and not self._asked.is_set():
            self._asked.set()
        elif self._task is not None:
            self._task.cancel()


def _where(config: EdgeConfig, around: Surroundings, api: Api, port: int) -> dict[str, Any]:
    """What is served, and where; with a sentence for people, where there are no other parts."""
    host = config.listen.rpartition(":")[0]
    url, route_count = f"http://{host}:{port}", len(api.routes.routes)
    targets = sorted(set(around.upstreams.targets.values()))
    sentence = ""
    if around.signer is None:
        what = f"{route_count} route{'s' if route_count > 1 else ''} of {', '.join(api.packages)}"
        behind = ", ".join(targets)
        sentence = f"{url} serves {what} from {behind}; the reference is at {url}{DOCS_PATH}"
    return {
        "host": host,
        "port": port,
        "url": url,
        "routes": route_count,
        "upstreams": targets,
        "sentence": sentence,
    }


def _surroundings(config: EdgeConfig, process: ProcessConfig) -> Surroundings:
    try:
        upstreams = Upstreams.parse(process.upstreams or f"*={process.listen}")
    except ValueError as error:
        raise ConfigError(f"TENFOLD_UPSTREAMS={process.upstreams!r}: {error}.") from error
    if config.reflect and config.descriptors:
        raise ConfigError("TENFOLD_EDGE_REFLECT and TENFOLD_EDGE_DESCRIPTORS exclude each other.")
    # A stranger's server, fronted by its descriptors alone, knows nothing of our identities.
    is_foreign = bool(config.descriptors or config.reflect) and not process.identity_folder
    if config.allow_anonymous and not is_foreign:
        raise ConfigError("TENFOLD_EDGE_ALLOW_ANONYMOUS is not for an edge that knows identities.")
    signer = None
    if not is_foreign:
        key = read_identity_key(process.identity_path, EDGE_ISSUER)
        signer = IdentitySigner(EDGE_ISSUER, key)
    return Surroundings(
        upstreams,
        signer,
        process.valkey_url,
        SystemClock(),
        _tls(config),
        Metrics(is_served=bool(process.metrics_listen)),
        Path(process.quota_plans) if process.quota_plans else None,
    )


def _tls(config: EdgeConfig) -> ClientTls | None:
    if not config.upstream_tls:
        if config.upstream_ca:
            raise ConfigError("TENFOLD_EDGE_UPSTREAM_CA needs TENFOLD_EDGE_UPSTREAM_TLS=true.")
        return None
    if not config.upstream_ca:
        return ClientTls()
    try:
        return ClientTls.of_file(Path(config.upstream_ca))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"TENFOLD_EDGE_UPSTREAM_CA={config.upstream_ca}: {reason}.") from error


def _tell(sentence: object) -> None:
    """Say one sentence to whoever started it; names in it may come from anywhere."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(sentence))
    print(f"edge: {text}", file=sys.stderr, flush=True)  # noqa: T201


def main() -> None:
    """Run, and say in one sentence why it could not."""
    try:
        handover = Handover.of_arguments(sys.argv[1:])
        process = load(ProcessConfig, "TENFOLD_", os.environ)
        config = load(EdgeConfig, "TENFOLD_EDGE_", os.environ)
        if config.workers > 1 and handover is None:
            # Another program, which loads none of what serves requests.
            command = [sys.executable, "-P", "-m", "edge.workers"]
            os.execv(command[0], command)  # noqa: S606 - that is the point
        log.configure(process.log_level)
        with (
            suppress(asyncio.CancelledError),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(run(config, process, handover))
    except (ConfigError, ContractError, ListenError) as error:
        _tell(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
