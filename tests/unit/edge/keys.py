"""API keys in auth's format, for tests."""

import secrets
import string
import zlib

BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase


def make_key() -> str:
    body = "tf_user_live_" + "".join(secrets.choice(BASE62) for _ in range(28))
    value, checksum = zlib.crc32(body.encode()), ""
    for _ in range(6):
        value, digit = divmod(value, 62)
        checksum = BASE62[digit] + checksum
    return body + checksum
