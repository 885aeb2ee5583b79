"""What questions to a mesh need to get past the first check."""

import secrets
from collections.abc import Mapping, Sequence

from tests.mesh import Mesh


def known_values(mesh: Mesh, headers: Mapping[str, str]) -> dict[str, Sequence[str]]:
    """Names of what exists, for `asking.Questions.known`."""
    accounts = [new_account(mesh, headers) for _ in range(2)]
    return {
        "account": [name.removeprefix("accounts/") for name in accounts],
        "toAccount": accounts,
        "currencyCode": ["EUR"],
        "minorUnits": ["1"],
        "firstDay": ["2026-11-01"],
        "lastDay": ["2026-11-02"],
    }


def new_account(mesh: Mesh, headers: Mapping[str, str]) -> str:
    sent = {**headers, "Idempotency-Key": secrets.token_hex(8)}
    answer = mesh.post("/v1/accounts", json={"currencyCode": "EUR"}, headers=sent)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["name"])
