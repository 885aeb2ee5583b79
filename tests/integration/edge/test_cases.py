"""The conformance cases, over real HTTP, through a real edge, to a real gRPC server."""

import json
import re
from decimal import Decimal
from typing import Any

import pytest
from google.protobuf.message import Message

from tests.integration.edge.bench import Bench
from tests.integration.edge.case import Case, all_cases
from tests.integration.edge.wire import Answer

CASE_LIST = [pytest.param(case, id=f"{topic}: {case.name}") for topic, case in all_cases()]


def test_each_case_has_a_name_of_its_own() -> None:
    names = [param.id for param in CASE_LIST]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASE_LIST)
async def test_case(bench: Bench, case: Case) -> None:
    bench.echo.follow(bench.script(case))
    answer = await bench.connection.ask(
        case.method, case.target, case.header_lines, case.body_bytes
    )
    check_answer(case, answer)
    if case.is_refused:
        assert not bench.echo.received, "a refused request has reached the server"
    elif case.calls:
        check_call(bench, case)


def check_call(bench: Bench, case: Case) -> None:
    [received] = bench.echo.received
    method = bench.method(case.calls)
    assert received.path == method.full_name
    wanted = case.receives_all if case.receives is None else (case.receives,)
    if wanted is not None:
        got = [method.input.FromString(request) for request in received.requests]
        expected = [bench.message(method.input, text) for text in wanted]
        # As bytes: NaN is not equal to itself.
        assert [*map(canonical, got)] == [*map(canonical, expected)], f"received {got}"
    for name, value in case.metadata.items():
        assert received.metadata.get(name, "") == value, name


def canonical(message: Message) -> bytes:
    return message.SerializePartialToString(deterministic=True)


def check_answer(case: Case, answer: Answer) -> None:
    told = answer.body.decode("utf-8", "replace")
    assert answer.status == case.expected_status, told
    for name, value in case.response_headers.items():
        assert answer.headers.get(name.lower(), "") == value, name
    if case.text is not None:
        assert told == case.text
    if case.text_hex is not None:
        assert answer.body.hex() == case.text_hex
    check_json(case, answer.body)
    check_problem(case, answer)


def check_json(case: Case, body: bytes) -> None:
    if case.json is not None:
        assert exact(parsed(body)) == exact(parsed(case.json)), body.decode()
    if case.json_has is not None:
        document = parsed(body)
        for name, value in parsed(case.json_has).items():
            assert exact(document[name]) == exact(value), name
    for path in case.json_lacks:
        assert not has_member(parsed(body), path.split(".")), path


def check_problem(case: Case, answer: Answer) -> None:
    """RFC 9457, section 3; and what the case says of its members."""
    if case.expected_status < 400 or case.method == "HEAD":
        return
    assert answer.headers["content-type"] == "application/problem+json"
    problem = parsed(answer.body)
    assert problem["status"] == answer.status
    assert {"type", "title", "detail", "code", "reason", "request_id"} <= problem.keys()
    violation = problem.get("violations", [{}])[0]
    told = {**problem, **violation}
    for name in ("code", "reason", "field", "pointer"):
        wanted = getattr(case, name)
        if wanted:
            assert told.get(name) == wanted, problem
    assert case.detail in problem["detail"]
    # What is wrong is said by name, not by the name of a class or a line of a trace.
    assert not re.search(r"Traceback|Error\b.*\bline [0-9]", problem["detail"])


def parsed(text: str | bytes) -> Any:
    return json.loads(text, parse_float=Decimal)


def exact(value: Any) -> Any:
    """A value that equals another only if both are the same JSON: true is not 1."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    return ("bool", value) if isinstance(value, bool) else value


def has_member(document: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(document, dict) or name not in document:
            return False
        document = document[name]
    return True
