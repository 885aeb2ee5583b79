"""The HTTP server under the edge beside two others, each with the same app: CPU per request.

The app answers 300 fixed bytes. One load generator drives all servers over as many keep-alive
connections; rounds alternate, and a ratio is the median of the ratios of neighbours. Printed
besides: whether a server hands over the target as it came. One that decodes "/a%2f..%2fb" cannot
be used: google.api.http decodes per segment, and a proxy in front may have judged another path.

  make bench-http                    about a minute; it needs Linux
  make bench-http ARGS=--quick       ten seconds, to see that it works; figures are rough
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import distributions
from pathlib import Path

import httpx

from deploy.local.address import free_addresses
from tests.bench.sides.children import BESIDE, PEERS, module, running
from tests.bench.sides.http_servers import BODY, RUN, TARGET_QUERY
from tests.bench.sides.looks import (
    Call,
    Effort,
    Looker,
    Row,
    Side,
    cpu_row,
    print_rows,
    tell,
)

TARGET = "/a%2f..%2fb"
REQUEST = b"GET /v1/orders/1042 HTTP/1.1\r\nhost: shop.example\r\naccept: application/json\r\n\r\n"
CALL = Call("GET", len(BODY), BODY.__eq__)
THOROUGH, QUICK = Effort(rounds=7, look_s=2.0), Effort(rounds=2, look_s=0.4)
OURS = "edge"


def start(stack: ExitStack, folder: Path, name: str) -> Side:
    """One of the servers."""
    [address] = free_addresses(1)
    command = module("tests.bench.sides.http_servers", name, str(address.port))
    environ, log = {"PYTHONPATH": str(PEERS)}, folder / f"{name}.log"
    child = stack.enter_context(running(command, log, port=address.port, environ=environ))
    return Side(name, (child,), lambda _: REQUEST)


def handed_over(side: Side) -> str:
    """TARGET as the server's app sees it."""
    url = httpx.URL(f"http://127.0.0.1:{side.children[0].port}")
    raw_path = f"{TARGET}?{TARGET_QUERY.decode()}".encode()
    return httpx.get(url.copy_with(raw_path=raw_path)).text


def rows_of(effort: Effort) -> tuple[list[Row], dict[str, str]]:
    """The rows, and the target as each server hands it over."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = [start(stack, folder, name) for name in RUN]
        targets = {side.name: handed_over(side) for side in sides}
        looks = Looker(effort).rounds(sides, CALL)
        peers = [side.name for side in sides if side.name != OURS]
        rows = [cpu_row(f"GET, peer {name}", looks[OURS], looks[name]) for name in peers]
        return rows, targets


def versions(names: Sequence[str]) -> str:
    """Of the packages that are compared."""
    found = [*distributions(), *distributions(path=[str(PEERS)])]
    return ", ".join(f"{each.name} {each.version}" for each in found if each.name in names)


def main() -> None:
    """Print what each hands over and a table, then the one JSON line that scripts read."""
    parser = argparse.ArgumentParser(
        prog="make bench-http",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a short run with rough figures")
    effort = QUICK if parser.parse_args().quick else THOROUGH
    os.sched_setaffinity(0, BESIDE)
    rows, targets = rows_of(effort)
    tell("")
    print(versions(("uvicorn", "httptools", "uvloop", "granian")))
    for name, target in targets.items():
        verdict = "as it came" if target == TARGET else "DECODED"
        print(f"{name:<10}hands over {TARGET} as {target}: {verdict}")
    print()
    print_rows("http", "uvloop", rows)


if __name__ == "__main__":
    main()
