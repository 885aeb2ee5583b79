"""The operator's commands: up, status, down, backup, restore, config, demo, edge, quota, shards."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.backup_commands import backup_command, restore_command
from deploy.local.address import Address
from deploy.local.child import die_with
from deploy.local.data_folder import DataFolder, children_of, launcher_of
from deploy.local.errors import LaunchError
from deploy.local.processes import memory_bytes
from deploy.quota_commands import quota_app
from deploy.settings import PREFIX, load_settings, require_known, value_of
from deploy.shards_growing import shards_app
from shared.config import ConfigError, ProcessConfig, load

if TYPE_CHECKING:
    from deploy.local.replication import Node

DOWN_TIMEOUT_S = 45.0  # Above the sum of what the launcher gives its children.
EDGE_SETTING = "TENFOLD_EDGE_LISTEN"
DATA_SETTING = "TENFOLD_DATA"
EMBEDDED, CLUSTER = "embedded", "cluster"

app = typer.Typer(
    name="tenfold",
    help="A backend platform that grows from a laptop to a sharded cluster.\n\n"
    "Start with 'tenfold up': it runs the whole mesh on this machine and says where it is. "
    "Then, in another terminal, 'tenfold demo' tells the story of one user through every "
    "service, and 'tenfold status' shows what runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

app.add_typer(quota_app)
app.add_typer(shards_app)

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder that holds everything of one mesh; it is created. "
        f"Default: {DATA_SETTING}, else .tenfold.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def up(
    *,
    profile: Annotated[
        str,
        typer.Option(
            help="embedded: few processes, on SQLite. cluster: sharded Postgres with replicas, "
            "three NATS servers, every service as its own process, payment and the edge twice."
        ),
    ] = EMBEDDED,
    data: DataOption = None,
    edge: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT where REST is served; port 0 picks free ports for everything. "
            f"Default: {EDGE_SETTING}, else 127.0.0.1:8080. "
            "A cluster's second edge is one port above."
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=16,
            help="Of a cluster: Postgres servers. Default: as many as the folder has, else 4.",
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=3,
            help="Of a cluster: replicas of each. Default: as many as the folder has, else 1.",
        ),
    ] = None,
    asynchronous: Annotated[
        bool,
        typer.Option(
            "--asynchronous",
            help="Of a cluster: a commit waits for no replica, so none is promoted when a primary "
            "dies; that is started again.",
        ),
    ] = False,
    stop_with_parent: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Start the mesh in the foreground; Ctrl-C stops everything.

    It ends the start by printing where the edge, the reference, the admin key and the data
    are. What it stored is found again by the next start in the same folder.
    """
    # Not needed, and so not loaded, by the other commands.
    from deploy.local.embedded import Launch, run_embedded
    from deploy.local.report import open_report

    if stop_with_parent:
        die_with(stop_with_parent, signal.SIGTERM)  # make, which may be killed
    if profile not in {EMBEDDED, CLUSTER}:
        raise LaunchError(f"There is no profile '{profile}': use '{EMBEDDED}' or '{CLUSTER}'.")
    if profile == EMBEDDED and (shards, replicas, asynchronous) != (None, None, False):
        raise LaunchError(
            f"--shards, --replicas and --asynchronous are of use only with --profile {CLUSTER}."
        )
    settings = load_settings()
    require_known(os.environ, settings)
    try:
        load(ProcessConfig, PREFIX, os.environ)
    except ConfigError as error:
        raise LaunchError(str(error)) from error
    address = edge or value_of(EDGE_SETTING, os.environ, settings)
    launch = Launch(
        data=_data_path(data),
        edge=Address.parse(address, setting=f"--edge or {EDGE_SETTING}"),
        environ=dict(os.environ),
        settings=settings,
    )
    if profile == EMBEDDED:
        run_embedded(launch, open_report())
        return
    from deploy.local.cluster import run_cluster

    run_cluster(
        launch,
        open_report(),
        shards=shards,
        replicas=replicas,
        is_synchronous=not asynchronous,
    )


@app.command()
def status(data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show what runs: each process, its address, its memory, and whether it is ready.

    Of a cluster also which server is a shard's primary, and how far behind the standbys are.
    Exit code 0: the mesh is ready; 1: it is not, or it does not run.
    """
    folder = DataFolder(_data_path(data).absolute())
    state = _running_state(folder)
    rows = _rows_of(state)
    is_ready = bool(rows) and all(row["alive"] and row["ready"] for row in rows)
    if as_json:
        shown = {"running": bool(state), "ready": is_ready, "data": str(folder.path)}
        where = {"edge": state.get("edge"), "metrics": state.get("metrics", {})}
        nodes = [node.row for node in _nodes_of(folder, state)] if state else []
        print(json.dumps({**shown, **where, "processes": rows, "shards": nodes}))
    elif state:
        _print_status(state, rows)
        _print_nodes(_nodes_of(folder, state))
    else:
        print(f"No mesh runs in {folder.path}; 'tenfold up' starts one.")
    raise typer.Exit(0 if is_ready else 1)


@app.command()
def down(data: DataOption = None) -> None:
    """Stop the mesh that runs in the data folder, as Ctrl-C in its terminal would."""
    folder = DataFolder(_data_path(data).absolute())
    launcher = launcher_of(_running_state(folder))
    if launcher is None:
        print(f"No mesh runs in {folder.path}.")
        return
    os.kill(launcher.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + DOWN_TIMEOUT_S
    while launcher.is_alive:
        if time.monotonic() > deadline_s:
            os.kill(launcher.pid, signal.SIGKILL)  # Its children end with it.
        time.sleep(0.05)
    print("Tenfold has stopped.")


app.command(name="backup")(backup_command)
app.command(name="restore")(restore_command)


@app.command()
def config(as_json: JsonOption = False) -> None:
    """Print every setting, its value and where it comes from; secrets are masked."""
    settings = load_settings()
    require_known(os.environ, settings)
    rows = [
        {
            "name": setting.name,
            "value": setting.shown(os.environ),
            "source": setting.source(os.environ),
            "comment": setting.comment,
        }
        for setting in settings.values()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"# {row['comment']}\n{row['name']}={row['value']}  # {row['source']}")


@app.command()
def demo(data: DataOption = None) -> None:
    """Tell the story of one user through every service, against the running mesh."""
    folder = DataFolder(_data_path(data).absolute())
    state = _running_state(folder)
    if not state.get("ready"):
        raise LaunchError(
            f"No mesh is ready in {folder.path}: start one with 'tenfold up' in another terminal."
        )
    try:
        from deploy.demo import run_demo
    except ImportError as error:
        raise LaunchError(f"The demo cannot be loaded ({error}): run 'make up' once.") from error
    raise typer.Exit(run_demo(state["edge"], folder.path))


@app.command()
def edge(
    *,
    upstream: Annotated[
        list[str],
        typer.Option(
            help="HOST:PORT of your gRPC server. With several servers, repeat it as "
            "PACKAGE=HOST:PORT; the longest package wins."
        ),
    ],
    descriptors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Its contracts: a descriptor set with all imports, from 'buf build -o FILE' or "
            "'protoc --include_imports --descriptor_set_out=FILE'.",
        ),
    ] = None,
    reflect: Annotated[
        bool, typer.Option("--reflect", help="Ask the server for its contracts (reflection).")
    ] = False,
    listen: Annotated[
        str, typer.Option(help="HOST:PORT where REST is served; port 0 picks a free one.")
    ] = "127.0.0.1:8080",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that serve that address, at most one per core. "
            "Default: TENFOLD_EDGE_WORKERS, else 1.",
        ),
    ] = None,
    allow_anonymous: Annotated[
        bool,
        typer.Option(
            "--allow-anonymous",
            help="Let anybody call the methods that say nothing of who may: all of them, unless "
            "your contracts use Tenfold's options.",
        ),
    ] = False,
    allow_breaking: Annotated[
        bool,
        typer.Option(
            "--allow-breaking",
            help="Serve changed contracts, too, that break clients of the ones before.",
        ),
    ] = False,
    upstream_tls: Annotated[
        bool, typer.Option("--upstream-tls", help="Reach the server over TLS.")
    ] = False,
    ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM file of the authorities that vouch for it; without it, the public ones.",
        ),
    ] = None,
) -> None:
    """Serve REST for any gRPC server whose contracts carry google.api.http.

    Nothing else of Tenfold needs to run. With a server that has reflection on port 50051:

    \b
        tenfold edge --reflect --upstream 127.0.0.1:50051 --allow-anonymous
        curl http://127.0.0.1:8080/openapi.json

    Limits are the settings TENFOLD_EDGE_..., per address: 'tenfold config' lists them.
    """  # noqa: D301 - \b keeps the lines of the example
    if (descriptors is None) != reflect:
        raise LaunchError("Say where the contracts are: either --descriptors FILE, or --reflect.")
    if ca is not None and not upstream_tls:
        raise LaunchError("--ca is of use only with --upstream-tls.")
    require_known(os.environ, load_settings())
    given = {
        "TENFOLD_UPSTREAMS": _upstreams(upstream),
        EDGE_SETTING: str(Address.parse(listen, setting="--listen")),
        "TENFOLD_EDGE_DESCRIPTORS": str(descriptors.absolute()) if descriptors else "",
        "TENFOLD_EDGE_REFLECT": str(reflect),
        "TENFOLD_EDGE_ALLOW_ANONYMOUS": str(allow_anonymous),
        "TENFOLD_EDGE_RELOAD_BREAKING": str(allow_breaking),
        "TENFOLD_EDGE_UPSTREAM_TLS": str(upstream_tls),
        "TENFOLD_EDGE_UPSTREAM_CA": str(ca.absolute()) if ca else "",
        # With identities it would be the edge of a mesh.
        "TENFOLD_IDENTITY_FOLDER": "",
    }
    if workers is not None:
        given["TENFOLD_EDGE_WORKERS"] = str(workers)
    command = [sys.executable, "-P", "-m", "edge"]
    os.execve(command[0], command, {**os.environ, **given})  # noqa: S606 - that is the point


def main() -> None:
    """Run one command; what stops it is said in one sentence, with exit code 1."""
    try:
        app()
    except LaunchError as error:
        print(f"tenfold: {error}", file=sys.stderr)
        sys.exit(1)


def _upstreams(options: list[str]) -> str:
    """Several "HOST:PORT" or "PACKAGE=HOST:PORT" as TENFOLD_UPSTREAMS has them."""
    addresses: dict[str, Address] = {}
    for text in options:
        package, equals, address = text.rpartition("=")
        package = package if equals else "*"
        if package in addresses:
            raise LaunchError(f"--upstream is given twice for '{package}': name a package in each.")
        addresses[package] = Address.parse(address, setting="--upstream")
    return ",".join(f"{package}={address}" for package, address in addresses.items())


def _data_path(option: Path | None) -> Path:
    return option or Path(value_of(DATA_SETTING, os.environ, load_settings()))


def _running_state(folder: DataFolder) -> dict[str, Any]:
    state = folder.read_state()
    launcher = launcher_of(state)
    return state if launcher and launcher.is_alive else {}


def _rows_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    marks = children_of(state)
    return [
        {
            "name": name,
            "pid": child["pid"],
            "address": child["address"],
            "alive": name in marks and marks[name].is_alive,
            "ready": child["ready"],
            "restarts": child["restarts"],
            "memory_bytes": memory_bytes(child["pid"]),
        }
        for name, child in state.get("children", {}).items()
    ]


def _print_status(state: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    print(f"edge {' '.join(state.get('edges') or [state['edge']])}\n")
    width = max(len(row["name"]) for row in rows) if rows else 0
    width = max(width, 10)
    print(f"{'process':<{width}} {'pid':>8}  {'address':<22} {'memory':>8}  restarts  state")
    for row in rows:
        now = "ready" if row["alive"] and row["ready"] else "not ready"
        memory = f"{row['memory_bytes'] / 2**20:.0f} MiB"
        print(
            f"{row['name']:<{width}} {row['pid']:>8}  {row['address']:<22} {memory:>8}"
            f"  {row['restarts']:>8}  {now}"
        )


def _nodes_of(folder: DataFolder, state: dict[str, Any]) -> "Sequence[Node]":
    databases = folder.read_databases()
    if not databases:
        return []
    from deploy.local.replication import ask_nodes

    return ask_nodes(databases, [Path(site) for site in state.get("databases", [])])


def _print_nodes(nodes: "Sequence[Node]") -> None:
    if nodes:
        print(f"\n{'shard':<5}  {'server':<18} {'address':<22} {'lag':>10}  role")
    for node in nodes:
        lag = "" if node.lag_bytes is None else f"{node.lag_bytes} bytes"
        promotable = ", may be promoted" if node.is_promotable else ""
        print(
            f"{node.shard:>5}  {node.name:<18} {node.address:<22} {lag:>10}"
            f"  {node.role}{promotable}"
        )


if __name__ == "__main__":
    main()
