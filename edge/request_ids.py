"""The id by which a request is found in every log: the client's, if it is well formed, or ours."""

import re
from collections.abc import Mapping
from itertools import count
from secrets import randbits, token_hex

_PROCESS_ID = token_hex(8)
_numbers = count(randbits(63))
_WELL_FORMED = re.compile(rb"[A-Za-z0-9._~-]{1,128}")


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """The id of the request with these headers, whose names are in lower case."""
    given = headers.get(b"x-request-id")
    if given and _WELL_FORMED.fullmatch(given):
        return given.decode("ascii")
    return f"{_PROCESS_ID}{next(_numbers):016x}"  # 128 bits, without asking the kernel for each
