"""Methods whose contract ignores what it does not know."""

import json

import pytest
from google.protobuf import json_format

from edge import ignored
from edge.codec import CodecOptions, Codecs
from edge.ignored import Ignored
from edge.json_text import Wrong
from shared.errors import InvalidRequest
from tests.unit.edge.conftest import request_of

SEARCH = "/v1/books:search"


@pytest.fixture
def noted(monkeypatch):
    """What is logged, in order."""
    lines = []

    class Log:
        def debug(self, event, **values):
            lines.append(f"{values['where']}.{values['name']}")

    monkeypatch.setattr(ignored, "_log", Log())
    return lines


def test_unknown_fields_at_any_depth_are_ignored(library):
    body = {"text": "x", "nothing": [{}], "author": {"nothing": 1, "birthYear": 2}}
    request = request_of(library, "POST", SEARCH, json.dumps(body).encode())
    assert (request.text, request.author.birth_year) == ("x", 2)


def test_unknown_parameters_are_ignored(library):
    request = request_of(library, "GET", f"{SEARCH}?text=x&nothing=1&author.nothing=2&text2=%21")
    assert request.text == "x"


def test_unknown_enum_names_are_left_out(library):
    body = {"kind": "KIND_NEW", "kinds": ["KIND_NOVEL", "KIND_NEW"], "kindByName": {"a": "NEW"}}
    request = request_of(library, "POST", SEARCH, json.dumps(body).encode())
    assert (request.kind, list(request.kinds), dict(request.kind_by_name)) == (0, [1], {})


@pytest.mark.parametrize(
    ("target", "body", "field"),
    [
        (SEARCH, b'{"text": 5}', "text"),
        (SEARCH, b'{"kind": {}}', "kind"),
        (SEARCH, b'{"kind": true}', "kind"),
        (SEARCH, b'{"kinds": [1.5]}', "kinds[0]"),
        (SEARCH, b'{"kind": "1"}', "kind"),
        (SEARCH, b'{"text": "a", "text": "b"}', "text"),
        (f"{SEARCH}?text=x", b"{}", "text"),
    ],
)
def test_what_is_known_is_still_judged(library, target, body, field):
    with pytest.raises(InvalidRequest) as caught:
        request_of(library, "POST", target, body)
    assert caught.value.violations[0].field == field


def test_other_methods_of_the_same_contracts_stay_strict(library):
    with pytest.raises(InvalidRequest, match="nothing: is no field"):
        request_of(library, "PATCH", "/v1/settings/s", b'{"nothing": 1}')


def test_each_name_is_logged_once(noted):
    names = Ignored()
    for _ in range(3):
        names.note("library.v1.Book", "colour")
        names.note("library.v1.Author", "colour")
    assert noted == ["library.v1.Book.colour", "library.v1.Author.colour"]


def test_made_up_names_fill_neither_memory_nor_log(noted):
    names = Ignored()
    for number in range(ignored.NAMES_MAX + 100):
        names.note("library.v1.Book", f"x{number}")
    names.note("library.v1.Book", "y" * 10_000)
    assert len(noted) == ignored.NAMES_MAX
    long = Ignored()
    long.note("m", "y" * 10_000)
    assert len(noted[-1]) < 100


def test_the_reference_ignores_the_same(everything_contracts):
    descriptor = everything_contracts.message("everything.v1.Everything")
    codec = Codecs(everything_contracts.pool, CodecOptions(ignore_unknown=True)).of(descriptor)
    text = json.dumps(
        {
            "text": "x",
            "nothing": {"a": 1},
            "inner": {"nothing": 1, "bigNumber": "5"},
            "innerByNumber": {"7": {"nothing": None}},
            "color": "COLOR_NEW",
            "colors": ["COLOR_NEW", "COLOR_RED"],
            "colorByName": {"a": "COLOR_NEW", "b": "COLOR_RED"},
            "any": {"@type": "t/everything.v1.Inner", "nothing": 1, "text": "y"},
        }
    ).encode()
    peer = json_format.Parse(
        text,
        codec.message_class(),
        ignore_unknown_fields=True,
        descriptor_pool=codec.descriptor.file.pool,
    )
    assert codec.message_of_json(text).SerializeToString(
        deterministic=True
    ) == peer.SerializeToString(deterministic=True)
    with pytest.raises(Wrong):
        Codecs(everything_contracts.pool).of(descriptor).message_of_json(text)
