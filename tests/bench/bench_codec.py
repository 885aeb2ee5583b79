"""JSON at the edge: our compiled codecs against google.protobuf.json_format.

Run: make bench-codec. The last line is one JSON object. Each figure is CPU time per call, the
best of several rounds: what a busy machine disturbs least.
"""

import json
import time

from google.protobuf import json_format

from edge.codec import Codecs
from edge.contracts import load_contracts
from edge.routes import RouteTable
from edge.transcode import request_message, response_json

ROUNDS, ROUND_S, CALLS_PER_LOOK = 7, 0.05, 10
ACCOUNT = "accounts/01900000-0000-7000-8000-000000000000"
TRANSFER = {
    "toAccount": ACCOUNT,
    "amount": {"currencyCode": "EUR", "minorUnits": "1250"},
    "description": "Rent for March: thank you",
}
TRANSACTION = {
    "name": "transactions/01900000-0000-7000-8000-000000000001",
    "reference": "rent-2026-03",
    "description": "Rent for March",
    "entries": [
        {
            "account": ACCOUNT,
            "side": side,
            "amount": {"currencyCode": "EUR", "minorUnits": "1250"},
            "accountSequence": "17",
        }
        for side in ("SIDE_DEBIT", "SIDE_CREDIT")
    ],
    "recordedTime": "2026-03-01T12:00:00.123456Z",
    "owner": "users/01900000-0000-7000-8000-000000000002",
}


def microseconds(call):
    """The CPU time of one call, in the best round."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        count, started = 0, time.thread_time()
        while (elapsed := time.thread_time() - started) < ROUND_S:
            for _ in range(CALLS_PER_LOOK):
                call()
            count += CALLS_PER_LOOK
        best = min(best, elapsed / count)
    return best * 1e6


def codec_rows(codecs, contracts):
    for what, name, document in [
        ("transfer request", "tenfold.ledger.v1.TransferFundsRequest", TRANSFER),
        ("transaction", "tenfold.ledger.v1.Transaction", TRANSACTION),
        (
            "list of 100 transactions",
            "tenfold.ledger.v1.ListTransactionsResponse",
            {"transactions": [TRANSACTION] * 100},
        ),
    ]:
        codec = codecs.of(contracts.message(name))
        text = json.dumps(document).encode()
        message = codec.message_of_json(text)
        make, options = codec.message_class, {"descriptor_pool": contracts.pool}
        yield (
            f"JSON to message: {what}",
            microseconds(lambda c=codec, t=text: c.message_of_json(t)),
            microseconds(lambda m=make, t=text, o=options: json_format.Parse(t, m(), **o)),
        )
        yield (
            f"message to JSON: {what}",
            microseconds(lambda c=codec, m=message: c.json_of_message(m)),
            microseconds(
                lambda m=message, o=options: json_format.MessageToJson(
                    m, always_print_fields_with_no_presence=True, indent=None, **o
                )
            ),
        )


def edge_rows(contracts):
    table = RouteTable.of_contracts(contracts)
    target, body = f"/v1/{ACCOUNT}:transferFunds".encode(), json.dumps(TRANSFER).encode()
    found = table.match("POST", target)
    answer = json_format.ParseDict(TRANSACTION, found.route.method.output())
    listing = table.match("GET", f"/v1/{ACCOUNT}/transactions")
    query = b"pageSize=50&pageToken=abcdef"
    yield "route: POST transferFunds", microseconds(lambda: table.match("POST", target)), None
    yield (
        "request of path and body",
        microseconds(lambda: request_message(found.route, found.captures, b"", body)),
        None,
    )
    yield (
        "request of path and query",
        microseconds(lambda: request_message(listing.route, listing.captures, query, b"")),
        None,
    )
    yield "answer", microseconds(lambda: response_json(found.route, answer)), None


def main():
    contracts = load_contracts()
    rows = []
    measured = [*codec_rows(Codecs(contracts.pool), contracts), *edge_rows(contracts)]
    for what, ours, peer in measured:
        ratio = None if peer is None else round(ours / peer, 3)
        beside = "" if peer is None else f"   json_format {peer:10.1f} µs   ratio {ratio}"
        print(f"{what:42}{ours:10.1f} µs{beside}")
        rows.append(
            {
                "what": what,
                "unit": "µs",
                "ours": round(ours, 2),
                "peer": None if peer is None else round(peer, 2),
                "ratio": ratio,
                "better": "lower",
            }
        )
    print(json.dumps({"bench": "codec", "engine": "orjson", "rows": rows}, ensure_ascii=False))


if __name__ == "__main__":
    main()
