"""What a laptop pays for the embedded mesh: time to ready, memory, and calls per second.

There is no peer: nothing else starts these parts together. The numbers are of the machine it
runs on, with the load generator on the same cores.
"""

import asyncio
import json
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from deploy.local.processes import memory_bytes
from tests.bench.http_load import Load, Request, run_load
from tests.mesh import Mesh

CONNECTIONS = 16
WARM_UP_S = 2.0
DURATION_S = 8.0
ENGINE = "grpcio"
# Quotas are not what is measured here.
ENVIRON = {
    "TENFOLD_EDGE_API_POINTS_PER_S": "100000",
    "TENFOLD_EDGE_API_BURST_POINTS": "10000000",
    "TENFOLD_EDGE_ADDRESS_POINTS_PER_S": "100000",
}

Row = dict[str, object]


def row(what: str, unit: str, ours: float, *, better: str = "lower") -> Row:
    """One line of the result; there is no peer."""
    rounded = round(ours, 2)
    return {
        "what": what,
        "unit": unit,
        "ours": rounded,
        "peer": None,
        "ratio": None,
        "better": better,
    }


def seconds_to_ready(mesh: Mesh) -> float:
    """From the command to an edge that answers 200 on /readyz."""
    started_s = time.perf_counter()
    mesh.start(environ=ENVIRON)
    return time.perf_counter() - started_s


def memory_mib(mesh: Mesh) -> float:
    """Resident memory of the launcher and everything below it, shared pages counted once."""
    return sum(memory_bytes(process.pid) for process in mesh.processes()) / 2**20


def call(mesh: Mesh, path: str, body: object, *, token: str = "") -> dict[str, object]:
    """One POST under a key of its own; its JSON answer."""
    headers = {"Idempotency-Key": secrets.token_hex(8)}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    answer = mesh.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    result: dict[str, object] = answer.json()
    return result


def two_accounts(mesh: Mesh) -> tuple[str, str, str]:
    """(token, payer, payee): accounts of one new user; the payer has a lot."""
    login = {
        "email": f"bench-{secrets.token_hex(4)}@example.com",
        "password": secrets.token_hex(16),
    }
    call(mesh, "/v1/users:signUp", login)
    token = str(call(mesh, "/v1/sessions", login)["tokens"]["accessToken"])  # type: ignore[index] # JSON
    account = {"currencyCode": "EUR", "displayName": "Bench"}
    payer, payee = (str(call(mesh, "/v1/accounts", account, token=token)["name"]) for _ in "12")
    cash = {**account, "normalSide": "SIDE_DEBIT", "mayOverdraw": True}
    source = str(call(mesh, "/v1/accounts", cash, token=mesh.admin_key)["name"])
    amount = {"currencyCode": "EUR", "minorUnits": "1000000000"}
    entries = [
        {"account": source, "side": "SIDE_DEBIT", "amount": amount},
        {"account": payer, "side": "SIDE_CREDIT", "amount": amount},
    ]
    deposit = {"reference": secrets.token_hex(8), "entries": entries}
    call(mesh, "/v1/transactions", deposit, token=mesh.admin_key)
    return token, payer, payee


def requests_of(token: str, payer: str, payee: str) -> dict[str, Callable[[int], Request]]:
    """What is asked: the balance of an account, and a transfer of one cent under a new key."""
    bearer, run = ("Authorization", f"Bearer {token}"), secrets.token_hex(4)
    amount = {"currencyCode": "EUR", "minorUnits": "1"}
    body = json.dumps({"toAccount": payee, "amount": amount}).encode()

    def read(number: int) -> Request:
        return Request("GET", f"/v1/{payer}/balance", (bearer,))

    def write(number: int) -> Request:
        key = ("Idempotency-Key", f"{run}-{number}")
        return Request("POST", f"/v1/{payer}:transferFunds", (bearer, key), body)

    return {"read": read, "write": write}


def measured(mesh: Mesh, make: Callable[[int], Request]) -> Load:
    """The load of one kind of request, after a warm-up."""
    url = httpx.URL(mesh.edge_url)
    port = url.port or 80

    async def both() -> Load:
        await run_load(url.host, port, make, connections=CONNECTIONS, duration_s=WARM_UP_S)
        return await run_load(url.host, port, make, connections=CONNECTIONS, duration_s=DURATION_S)

    return asyncio.run(both())


def rows_of(folder: Path) -> list[Row]:
    """Run everything on a fresh data folder."""
    mesh = Mesh(folder / "data")
    try:
        rows = [row("first start to ready", "s", seconds_to_ready(mesh))]
        rows.append(row("resident memory, idle", "MiB", memory_mib(mesh)))
        for kind, make in requests_of(*two_accounts(mesh)).items():
            load = measured(mesh, make)
            rows += [
                row(f"{kind}s through the edge", "1/s", load.requests_per_s, better="higher"),
                row(f"{kind} p50", "ms", load.percentile_ms(0.50)),
                row(f"{kind} p99", "ms", load.percentile_ms(0.99)),
            ]
        rows.append(row("resident memory, after load", "MiB", memory_mib(mesh)))
        mesh.stop()
        rows.append(row("second start to ready", "s", seconds_to_ready(mesh)))
        return rows
    finally:
        mesh.close()


def main() -> None:
    """Print a table, then the one JSON line that scripts read."""
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(Path(folder))
    for line in rows:
        print(f"{line['what']:<28} {line['ours']:>10} {line['unit']}")
    print(json.dumps({"bench": "start", "engine": ENGINE, "rows": rows}))


if __name__ == "__main__":
    main()
