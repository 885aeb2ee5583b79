"""Conformance cases as data: `cases/README.md` says what they may hold."""

import dataclasses
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CASES = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Case:
    """One case; the attributes are the keys of its table."""

    name: str
    send: str
    source: str = ""
    headers: tuple[str, ...] = ()
    body: str = ""
    body_hex: str = ""
    body_parts: tuple[tuple[str, int], ...] = ()

    calls: str = ""
    receives: str | None = None
    receives_all: tuple[str, ...] | None = None
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    answers: str | None = None
    streams: tuple[str, ...] | None = None
    fails: dict[str, str] | None = None

    status: int = 0
    response_headers: dict[str, str] = dataclasses.field(default_factory=dict)
    json: str | None = None
    json_has: str | None = None
    json_lacks: tuple[str, ...] = ()
    text: str | None = None
    text_hex: str | None = None
    code: str = ""
    reason: str = ""
    detail: str = ""
    field: str | None = None
    pointer: str | None = None

    @property
    def method(self) -> str:
        """The HTTP method."""
        return self.send.partition(" ")[0]

    @property
    def target(self) -> str:
        """The undecoded target."""
        return self.send.partition(" ")[2]

    @property
    def body_bytes(self) -> bytes:
        """The body, however it is written down."""
        parts = "".join(text * times for text, times in self.body_parts)
        return bytes.fromhex(self.body_hex) or (self.body + parts).encode()

    @property
    def header_lines(self) -> list[str]:
        """The headers; a body is JSON where nothing else is said."""
        is_said = any(line.lower().startswith("content-type:") for line in self.headers)
        default = ["Content-Type: application/json"] if self.body_bytes and not is_said else []
        return [*self.headers, *default]

    @property
    def is_refused(self) -> bool:
        """Whether the edge says no before it calls anything."""
        has_answer = (self.answers, self.streams, self.fails) != (None, None, None)
        return self.expected_status >= 400 and not has_answer

    @property
    def expected_status(self) -> int:
        """As stated, else 200."""
        return self.status or 200


def all_cases() -> Iterator[tuple[str, Case]]:
    """Every case with the name of its file, in order."""
    for path in sorted(CASES.glob("*.toml")):
        document = tomllib.loads(path.read_text())
        for table in document["case"]:
            yield path.stem, case_of(document.get("defaults", {}) | table)


def case_of(table: dict[str, Any]) -> Case:
    """A case of its table; a key that means nothing is an error, not a wish."""
    known = {item.name for item in dataclasses.fields(Case)}
    assert table.keys() <= known, f"{table['name']}: {sorted(table.keys() - known)}"
    frozen = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    return Case(**frozen)
