"""`tenfold up` as a user meets it: starting, stopping, dying, refusing."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest

from deploy.local import servers
from deploy.local.address import Address, require_free
from tests.conftest import StartMesh
from tests.mesh import READY_TIMEOUT_S, ROOT, Mesh, poll_until, wait_until_gone

COMMAND_TIMEOUT_S = 60
NAMES = {"nats", "valkey", "mail", "services", "edge"}


def tenfold(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "deploy.cli", *arguments],
        env={**os.environ, **environ},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_TIMEOUT_S,
    )


def refused(run: subprocess.CompletedProcess[str]) -> str:
    """The one sentence with which a command was refused."""
    assert run.returncode == 1, run.stdout + run.stderr
    [sentence] = run.stderr.splitlines()
    return sentence


def ports_of(mesh: Mesh) -> list[Address]:
    children = mesh.state["children"].values()
    return [Address.parse(child["address"], setting="state.json") for child in children]


def require_ports_free(ports: Sequence[Address]) -> None:
    assert len(ports) == len(NAMES)
    for port in ports:
        require_free(port, setting="a held port")


def test_the_start_says_where_everything_is(mesh: Mesh) -> None:
    for said in (mesh.edge_url, "/docs", "admin.key", "secret", str(mesh.data), "/mail"):
        assert said in mesh.output
    assert mesh.admin_key
    assert (mesh.data / "admin.key").stat().st_mode & 0o077 == 0


def test_the_launcher_has_not_loaded_grpc(mesh: Mesh) -> None:
    maps = Path(f"/proc/{mesh.launcher.pid}/maps").read_text()
    assert "grpc" not in maps
    services = Path(f"/proc/{mesh.child('services').pid}/maps").read_text()
    assert "grpc" in services  # so the first assertion means something


def test_no_secret_is_on_a_command_line(mesh: Mesh) -> None:
    lines = [Path(f"/proc/{m.pid}/cmdline").read_bytes() for m in mesh.processes()]
    config = (mesh.data / "nats" / "nats.conf").read_text()
    token = config.partition('token: "')[2].partition('"')[0].encode()
    assert len(token) == 32
    assert not [line for line in lines if token in line or mesh.admin_key.encode() in line]


def test_ctrl_c_stops_everything_and_frees_every_port(start_mesh: StartMesh) -> None:
    with start_mesh() as mesh:
        processes, ports = mesh.processes(), ports_of(mesh)
        mesh.launcher.send_signal(signal.SIGINT)
        assert mesh.launcher.wait(COMMAND_TIMEOUT_S) == 0
        wait_until_gone(processes)
        require_ports_free(ports)
        assert "Tenfold has stopped." in mesh.output
        assert "did not stop in time" not in mesh.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_starting_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    mesh = Mesh(tmp_path / "data")
    try:
        mesh.begin()
        poll_until(lambda: "services" in mesh.state.get("children", {}), timeout_s=30, what="half")
        processes = mesh.processes()
        mesh.launcher.send_signal(number)
        assert mesh.launcher.wait(COMMAND_TIMEOUT_S) == 0
        wait_until_gone(processes)
    finally:
        mesh.close()


def test_a_killed_launcher_takes_everything_with_it_and_the_next_finds_the_data(
    start_mesh: StartMesh, sign_in: Callable[[Mesh], str]
) -> None:
    with start_mesh() as mesh:
        token, admin_key = sign_in(mesh), mesh.admin_key
        account = mesh.post(
            "/v1/accounts",
            json={"currencyCode": "EUR", "displayName": "Savings"},
            headers={"Authorization": f"Bearer {token}", "Idempotency-Key": "one"},
        ).json()
        ports = ports_of(mesh)
        mesh.kill_all()
        require_ports_free(ports)
        mesh.start()
        found = mesh.get(f"/v1/{account['name']}", headers={"Authorization": f"Bearer {token}"})
        assert found.json()["displayName"] == "Savings"
        assert mesh.admin_key == admin_key


def test_every_killed_part_comes_back_and_the_mesh_serves_again(
    start_mesh: StartMesh, sign_in: Callable[[Mesh], str]
) -> None:
    with start_mesh() as mesh:
        for name in sorted(NAMES):
            mesh.kill(name)
            mesh.wait_until_ready()
            assert sign_in(mesh), name
            assert mesh.state["children"][name]["restarts"] == 1
            assert f"{name} is back" in mesh.output


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        run = tenfold("up", "--data", str(tmp_path / "data"), "--edge", f"127.0.0.1:{port}")
    assert refused(run) == (
        f"tenfold: Port {port} on 127.0.0.1 is taken: stop the program that holds it, "
        "or choose another with --edge or TENFOLD_EDGE_LISTEN."
    )


def test_a_data_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sentence = refused(tenfold("up", "--data", str(tmp_path / "file" / "data")))
    assert "cannot be written (Not a directory): choose another with --data" in sentence


def test_a_data_folder_in_use_is_one_sentence(mesh: Mesh) -> None:
    sentence = refused(tenfold("up", "--data", str(mesh.data), "--edge", "127.0.0.1:0"))
    assert f"in use by another mesh (process {mesh.launcher.pid})" in sentence


def test_a_misspelt_setting_is_one_sentence(tmp_path: Path) -> None:
    run = tenfold("up", "--data", str(tmp_path / "data"), TENFOLD_EDGE_LISTN="127.0.0.1:1")
    assert "There is no setting TENFOLD_EDGE_LISTN. Did you mean TENFOLD_EDGE_LISTEN?" in refused(
        run
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TENFOLD_EDGE_LISTEN", "8080"),
        ("TENFOLD_LOG_LEVEL", "loud"),
        ("TENFOLD_EDGE_REQUESTS_MAX", "many"),
        ("TENFOLD_NOTIFICATION_SMTP_REPLY_TIMEOUT_S", "soon"),
    ],
    ids=["the launcher's own", "of every process", "the edge's", "a service's"],
)
def test_a_wrong_value_ends_the_start_and_names_the_setting(
    tmp_path: Path, name: str, value: str
) -> None:
    edge = [] if name == "TENFOLD_EDGE_LISTEN" else ["--edge", "127.0.0.1:0"]
    run = tenfold("up", "--data", str(tmp_path / "data"), *edge, **{name: value})
    sentence = refused(run)
    assert name in sentence
    assert value in sentence


def test_a_missing_server_program_is_one_sentence(tmp_path: Path) -> None:
    arguments = ["up", "--data", str(tmp_path / "data"), "--edge", "127.0.0.1:0"]
    sentence = refused(tenfold(*arguments, TENFOLD_NATS_BIN="/no/nats-server"))
    assert "There is no program /no/nats-server" in sentence


def test_quotas_of_a_running_mesh_are_shown_and_set_from_its_data_folder(mesh):
    def quota(*words: str) -> str:
        run = tenfold("quota", *words, "--data", str(mesh.data))
        assert run.returncode == 0, run.stderr
        return run.stdout

    poll_until(
        lambda: tenfold("quota", "show", "--data", str(mesh.data)).returncode == 0,
        timeout_s=30,
        what="an edge that has told its quotas",
    )
    assert "login        address" in quota("show")
    plan = ("--plan", "tried-out", "--bucket", "api", "--level", "tenant")
    quota("set", *plan, "--rate", "5/min", "--burst", "7")
    assert "limit/tried-out/api/tenant" in json.loads(quota("show", "--json"))["overrides"]
    quota("set", *plan, "--unset")
    assert json.loads(quota("show", "--json"))["overrides"] == {}


def test_status_shows_every_process(mesh: Mesh) -> None:
    run = tenfold("status", "--data", str(mesh.data), "--json")
    status = json.loads(run.stdout)
    assert run.returncode == 0
    assert status["ready"]
    assert {process["name"] for process in status["processes"]} == NAMES
    assert all(process["memory_bytes"] > 2**20 for process in status["processes"])
    assert mesh.edge_url in tenfold("status", "--data", str(mesh.data)).stdout


def test_edge_and_services_tell_their_metrics_on_loopback(mesh: Mesh) -> None:
    mesh.sign_up_and_in()
    told = {name: httpx.get(url).text for name, url in mesh.state["metrics"].items()}
    assert all("//127.0.0.1:" in url for url in mesh.state["metrics"].values())
    assert 'http_route="/v1/users:signUp"' in told["edge"]
    answered = 'rpc_server_duration_seconds_count{rpc_grpc_status_code="OK",rpc_method="SignUp"'
    assert answered in told["services"]


def test_status_of_nothing_says_so(tmp_path: Path) -> None:
    run = tenfold("status", "--data", str(tmp_path))
    assert run.returncode == 1
    assert f"No mesh runs in {tmp_path}" in run.stdout


def test_down_stops_the_mesh(start_mesh: StartMesh) -> None:
    with start_mesh() as mesh:
        processes = mesh.processes()
        run = tenfold("down", "--data", str(mesh.data))
        assert (run.returncode, run.stdout) == (0, "Tenfold has stopped.\n")
        mesh.launcher.wait(COMMAND_TIMEOUT_S)
        wait_until_gone(processes)


def test_a_killed_make_takes_the_mesh_with_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    makefile = tmp_path / "Makefile"
    up = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "tenfold up" in line)
    up = up.replace("$(BIN)/tenfold", f"{sys.executable} -P -m deploy.cli")
    up = up.replace("$(STOPPER)", "--stop-with-parent $$PPID")
    makefile.write_text(f"SHELL := /bin/bash\nup:\n{up}\n")
    arguments = f"ARGS=--data {data} --edge 127.0.0.1:0"
    make = subprocess.Popen(["make", "-f", str(makefile), "up", arguments], cwd=ROOT)
    mesh = Mesh(data)
    try:
        poll_until(lambda: mesh.state.get("ready"), timeout_s=READY_TIMEOUT_S, what="ready")
        processes = [*map(mesh.child, NAMES)]
        make.kill()
        make.wait()
        wait_until_gone(processes)
    finally:
        make.kill()
        make.wait()


def test_a_folder_of_the_same_name_shadows_none_of_our_modules(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").write_text("raise SystemExit('not the right one')")
    run = subprocess.run(
        servers.python_module("services"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_TIMEOUT_S,
    )
    assert "Name the services to run" in run.stderr
