import pytest

from edge.template import Template, TemplateError


@pytest.mark.parametrize(
    ("text", "segments", "verb"),
    [
        ("/v1/things", (b"v1", b"things"), b""),
        ("/v1/{a}", (b"v1", "*"), b""),
        ("/v1/{a=*}", (b"v1", "*"), b""),
        ("/v1/*/{a}", (b"v1", "*", "*"), b""),
        ("/v1/{a=x/*/y/**}", (b"v1", b"x", "*", b"y", "**"), b""),
        ("/v1/{a.b.c=x/*}/z:do", (b"v1", b"x", "*", b"z"), b"do"),
        ("/v1/**:do", (b"v1", "**"), b"do"),
        ("/.well-known/jwks.json", (b".well-known", b"jwks.json"), b""),
        ("/caf%C3%A9/a%24b", ("café".encode(), b"a$b"), b""),
    ],
)
def test_a_template_of_the_grammar_is_parsed(text, segments, verb):
    template = Template.parse(text)
    assert template.segments == segments
    assert template.verb == verb


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v1/things",
        "/",
        "/v1/",
        "/v1//x",
        "/v1/{}",
        "/v1/{a",
        "/v1/{a=}",
        "/v1/{a={b}}",
        "/v1/{a=**}/x",
        "/v1/**/x",
        "/v1/x:",
        "/v1/x:do:more",
        "/v1/x:do/y",
        "/v1/{a}{b}",
        "/v1/{a}x",
        "/v1/{a.}",
        "/v1/{1a}",
        "/v1/***",
        "/v1/{a}/{a}",
        "/v1/x?y",
        "/v1/x y",
        "/v1/%zz",
    ],
)
def test_a_text_outside_the_grammar_is_refused(text):
    with pytest.raises(TemplateError, match="path template"):
        Template.parse(text)


def test_only_one_bare_segment_makes_a_single_segment_variable():
    kinds = {
        "/{a}": False,
        "/{a=*}": False,
        "/{a=**}": True,
        "/{a=x/*}": True,
        "/{a=x/**}": True,
    }
    parsed = {text: Template.parse(text).variables[0].is_multi_segment for text in kinds}
    assert parsed == kinds


@pytest.mark.parametrize(
    ("text", "raw", "captured"),
    [
        ("/{a}", [b"x%2Fy%20z"], b"x/y z"),
        ("/{a=**}", [b"x%2Fy%20z", b"w"], b"x%2Fy z/w"),
        ("/{a=x/*}", [b"x", b"%2f%41"], b"x/%2fA"),
        ("/{a=**}", [], b""),
    ],
)
def test_an_escaped_slash_is_decoded_in_single_segments_only(text, raw, captured):
    assert Template.parse(text).variables[0].capture(raw) == captured
