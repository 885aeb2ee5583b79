"""The two calls that are measured: their HTTP requests, and the JSON of message and answer.

Every side is asked with these bytes and has to give these answers.
"""

import json
from typing import Any

NAME = "shops/eu-1/orders/1042"
PATH, QUERY = (
    f"/v1/{NAME}",
    "view=VIEW_FULL&revision=17&includeHistory=true&tags=gift&tags=express",
)
PARENT = "shops/eu-1"
ORDERS = f"/v1/{PARENT}/orders"

GET_MESSAGE: dict[str, Any] = {
    "name": NAME,
    "view": "VIEW_FULL",
    "revision": 17,
    "includeHistory": True,
    "tags": ["gift", "express"],
}
# 300 bytes as JSON without spaces.
GET_ANSWER: dict[str, Any] = {
    "name": NAME,
    "state": "STATE_PAID",
    "displayName": "Three things for the kitchen and one big thing that nobody needs at all",
    "lineCount": 4,
    "revision": 17,
    "hasHistory": True,
    "total": {"currencyCode": "EUR", "minorUnits": 12950},
    "tags": ["gift", "express"],
    "createTime": "2026-03-01T12:00:00Z",
}
_CUSTOMER = {
    "email": "ada@example.com",
    "displayName": "Ada L.",
    "address": {
        "lines": ["12 St James's Square", "Second floor"],
        "city": "London",
        "postalCode": "SW1Y 4JH",
        "countryCode": "GB",
    },
}
_LINES = [
    {
        "sku": f"sku-{number}-{word}",
        "quantity": number,
        "price": {"currencyCode": "EUR", "minorUnits": 1000 + number},
    }
    for number, word in enumerate(("kettle", "spoon", "whisk"), 1)
]
POST_BODY: dict[str, Any] = {
    "customer": _CUSTOMER,
    "lines": _LINES,
    "labels": {"channel": "web", "campaign": "spring"},
    "discountPercent": 2.5,
    "note": "Leave it with the neighbours, please.",
}
POST_MESSAGE = {"parent": PARENT, **POST_BODY}
POST_ANSWER: dict[str, Any] = {
    "name": f"{PARENT}/orders/1043",
    "state": "STATE_PLACED",
    **POST_BODY,
    "total": {"currencyCode": "EUR", "minorUnits": 6014},
    "createTime": "2026-03-01T12:00:00Z",
}
ANSWERS = {"GET": GET_ANSWER, "POST": POST_ANSWER}


def compact(value: object) -> bytes:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def http_request(method: str, *, bearer: str = "") -> bytes:
    """The bytes on the wire of the GET or the POST.

    Args:
        method: "GET" or "POST".
        bearer: the access token; "" sends none.
    """
    target, body = (f"{PATH}?{QUERY}", b"") if method == "GET" else (ORDERS, compact(POST_BODY))
    head = f"{method} {target} HTTP/1.1\r\nhost: shop.example\r\naccept: application/json\r\n"
    if bearer:
        head += f"authorization: Bearer {bearer}\r\n"
    if body:
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body
