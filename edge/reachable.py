"""What no request can reach: told when contracts are loaded, not by the first who misses it.

Two routes that match alike conflict, and `RouteTable` refuses them. What is left is a route
that something before the table keeps requests from.
"""

from collections.abc import Collection

import httptools

from edge.contracts import ContractError
from edge.routes import ANY_METHOD, Route, RouteTable
from edge.template import DOT_SEGMENTS


def require_reachable(table: RouteTable, own_paths: Collection[bytes]) -> None:
    """Refuse routes that could never answer.

    Args:
        table: of the contracts.
        own_paths: what the edge itself answers, before any route.

    Raises:
        ContractError: names the route, and what stands before it.
    """
    for route in table.routes:
        obstacle = _obstacle(route, own_paths)
        if obstacle:
            raise ContractError(f"{route} can never be reached: {obstacle}")


def _obstacle(route: Route, own_paths: Collection[bytes]) -> str:
    method, template = route.http_method, route.template
    if method == "CONNECT":
        return "CONNECT asks for a host and has no path (RFC 9110, section 9.3.6)"
    if method != ANY_METHOD and not _is_parsed(method):
        return f"the server answers the method {method!r} with 501"
    if not DOT_SEGMENTS.isdisjoint(template.segments):
        return "clients remove dot segments (RFC 3986, section 6.2.2.3)"
    path = template.literal_path
    if path in own_paths:
        return f"the edge itself answers {path.decode()}"
    return ""


def _is_parsed(method: str) -> bool:
    parser = httptools.HttpRequestParser(object())
    try:
        parser.feed_data(f"{method} / HTTP/1.1\r\n".encode("latin-1", "replace"))
    except httptools.HttpParserError:
        return False
    return True
