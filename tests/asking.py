"""Asks every operation of an edge's OpenAPI document for what it expects, and for what it does not.

Schemathesis makes the requests from the document. What comes back must be in the document,
too: its status by name ("default" does not count), its content type, headers and schema; and
never a status from 500 on.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

CHECKS = [
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
CALL_TIMEOUT_S = 10.0
# A stream without an end is asked for this long; then 504 is what it was asked for.
STREAM_TIMEOUT = "300m"
STREAM_TYPE = "text/event-stream"

Headers = Callable[[], Mapping[str, str]]


@schemathesis.serializer("application/x-ndjson")
def _line(context: Any, message: Any) -> bytes:
    """A client stream of one message, for the document gives the schema of one."""
    return json.dumps(message).encode() + b"\n"


@dataclass
class Asked:
    """What was asked, and what was wrong with the answers.

    Attributes:
        calls: how many requests were made.
        faults: how many of them were not as documented.
        statuses: how many answers had which status.
        wrong: what was not as documented: the operation, what, and how to ask again.
    """

    calls: int = 0
    faults: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Questions:
    """How to ask.

    Attributes:
        examples: requests for each operation and kind: as documented, and not.
        is_repeatable: whether each run makes the same requests.
        headers: of each request; they replace made-up ones.
        known: values that lead somewhere, by the name of a path's parameter or a body's field;
            they are used beside made-up ones.
        is_asked: by the operation's tag, which is its service.
    """

    examples: int
    is_repeatable: bool = True
    headers: Headers = dict
    known: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    is_asked: Callable[[str], bool] = lambda service: True


def ask_all(url: str, questions: Questions) -> Asked:
    """Ask every operation of the document that the edge at this URL serves."""
    document = requests.get(f"{url}/openapi.json", timeout=CALL_TIMEOUT_S).json()
    _close(document)
    _suggest(document, questions.known)
    schema = schemathesis.openapi.from_dict(document)
    asked = Asked()
    with requests.Session() as session:
        for result in schema.get_all_operations():
            operation = result.ok()
            if questions.is_asked(operation.definition.raw["tags"][0]):
                _ask(operation, url, session, questions, asked)
    return asked


def _close(node: Any) -> None:
    """Let objects have the properties that are named, and no others.

    The document leaves room for fields to come; a request with one is refused today, before
    anything that would be worth asking.
    """
    for inner in node.values() if isinstance(node, dict) else node:
        if isinstance(inner, dict | list):
            _close(inner)
    if isinstance(node, dict) and isinstance(node.get("properties"), dict):
        node.setdefault("additionalProperties", False)


def _suggest(node: Any, known: Mapping[str, Sequence[Any]]) -> None:
    for inner in node.values() if isinstance(node, dict) else node:
        if isinstance(inner, dict | list):
            _suggest(inner, known)
    if not isinstance(node, dict):
        return
    if node.get("in") == "path" and node["name"] in known:
        node["schema"] = _either(known[node["name"]], node["schema"])
    properties = node.get("properties", {})
    for name in known.keys() & properties.keys():
        properties[name] = _either(known[name], properties[name])


def _either(values: Sequence[Any], schema: Any) -> dict[str, Any]:
    return {"anyOf": [{"enum": list(values)}, schema]}


def _ask(operation: Any, url: str, session: Any, questions: Questions, asked: Asked) -> None:
    responses = operation.definition.raw["responses"]
    is_stream = STREAM_TYPE in responses.get("200", {}).get("content", {})
    own = {"grpc-timeout": STREAM_TIMEOUT} if is_stream else {}

    def ask(case: Any) -> None:
        headers = {**questions.headers(), **own}
        answer = case.call(base_url=url, session=session, headers=headers, timeout=CALL_TIMEOUT_S)
        asked.calls += 1
        asked.faults += case.meta.generation.mode is GenerationMode.NEGATIVE
        asked.statuses[answer.status_code] += 1
        for wrong in _wrong(case, answer, responses, is_stream=is_stream):
            asked.wrong.append(f"{operation.label}: {wrong}\n{case.as_curl_command()}")

    for mode in GenerationMode:
        _settings(questions)(given(case=operation.as_strategy(generation_mode=mode))(ask))()


def _wrong(case: Any, answer: Any, responses: Mapping[str, Any], *, is_stream: bool) -> list[str]:
    status = answer.status_code
    if is_stream and status == 504:
        return []
    if status >= 500:
        return [f"answered {status}: {answer.text[:500]}"]
    if str(status) not in responses and f"{status // 100}XX" not in responses:
        return [f"{status} is not documented: {answer.text[:500]}"]
    if is_stream and status == 200:
        return []  # its schema is that of a message, not of the whole body
    try:
        case.validate_response(answer, checks=CHECKS)
    except FailureGroup as failures:
        return [str(failure) for failure in failures.exceptions]
    return []


def _settings(questions: Questions) -> settings:
    return settings(
        max_examples=questions.examples,
        derandomize=questions.is_repeatable,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
