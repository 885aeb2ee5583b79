"""What the edge asks of auth in `full`: its keys, its feed of revocations; real, in one process.

It writes the identity keys that edge and service need, then an access token in each period.

    python -m tests.bench.sides.auth FOLDER     (prints its port)
"""

import asyncio
import os
import sys
from pathlib import Path

from tests.integration.edge.behind import Behind

SCOPES = "orders.read orders.write"
SUBJECT, SESSION = (
    "01900000-0000-7000-8000-000000000001",
    "01900000-0000-7000-8000-000000000002",
)
# A token lives five minutes, a bench longer; whoever asks reads the newest.
RENEW_S = 60.0
TOKEN_FILE = "token"


async def serve(folder: Path) -> None:
    behind = Behind()
    await behind.start()
    (folder / "edge.pem").write_bytes(behind.identity_pem)
    (folder / "edge.pub").write_bytes(behind.public_pem)
    is_told = False
    while True:
        token = behind.tokens.token(subject=SUBJECT, session=SESSION, scope=SCOPES)
        (folder / "new").write_text(token)
        os.replace(folder / "new", folder / TOKEN_FILE)
        if not is_told:
            print(behind.port, flush=True)
            is_told = True
        await asyncio.sleep(RENEW_S)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
