import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.etags import (
    Condition,
    etag_of_tag,
    etags_of,
    parse_tags,
    tag_of_etag,
    tag_of_gzip,
)
from edge.refusals import HttpRefusal, PreconditionFailed, PreconditionUnsupported
from shared.errors import (
    Aborted,
    FailedPrecondition,
    IdempotencyInFlight,
    InvalidRequest,
    NotFound,
)

BOOK = "/v1/shelves/s/books/b"


@pytest.fixture
def condition_of(library):
    """What the headers of a request to library.proto ask, and the request after it."""

    def make(method, path, *, if_match="", if_none_match="", **fields):
        route = library.match(method, path).route
        request = route.method.input(**fields)
        return etags_of(route).condition(request, if_match, if_none_match), request

    return make


@pytest.mark.parametrize(
    ("etag", "tag"),
    [
        ("", ""),
        ("abc", '"abc"'),
        ("a-1/2:b=,", '"a-1/2:b=,"'),
        ('"quoted by the service"', '"%22quoted%20by%20the%20service%22"'),
        ("100%", '"100%25"'),
        ("ü\n", '"%C3%BC%0A"'),
        ('W/"weak"', 'W/"weak"'),
        ("W/odd", '"W/odd"'),
        ("x" * 513, ""),
    ],
)
def test_a_field_becomes_a_tag_in_quotes(etag, tag):
    assert tag_of_etag(etag) == tag
    if tag.startswith('"'):
        assert etag_of_tag(tag) == etag


@given(st.text(min_size=1).filter(lambda text: not text.startswith("W/")))
def test_whatever_the_service_wrote_comes_back_unchanged(etag):
    tag = tag_of_etag(etag)
    assert parse_tags(tag, "If-Match") == (tag,)
    assert etag_of_tag(tag) == etag


@pytest.mark.parametrize("tag", ['"%"', '"%ff"', '"%C0%80"', '"%41"', '"a%2"', '""'])
def test_a_tag_that_was_never_given_matches_nothing(tag):
    with pytest.raises(PreconditionFailed):
        etag_of_tag(tag)


@pytest.mark.parametrize(
    ("header", "tags"),
    [
        ("*", ("*",)),
        ('"a"', ('"a"',)),
        ('W/"a"', ('W/"a"',)),
        ('"a", W/"b" ,"c,d"', ('"a"', 'W/"b"', '"c,d"')),
        (' , "a",, "b", ', ('"a"', '"b"')),
        ('""', ('""',)),
    ],
)
def test_headers_are_lists_of_tags_or_a_star(header, tags):
    assert parse_tags(header, "If-Match") == tags


@pytest.mark.parametrize(
    "header", ["a", '"a', '"a" "b"', '*, "a"', 'w/"a"', ",", "'a'", '"a"b', '"a b"', '"' * 9001]
)
def test_a_header_that_holds_no_tags_is_refused_by_name(header):
    with pytest.raises(HttpRefusal, match="If-Match: must be entity tags"):
        parse_tags(header, "If-Match")


def test_if_match_fills_the_field_at_the_top_or_in_the_resource(condition_of):
    condition, deletion = condition_of("DELETE", BOOK, if_match='"e%25"')
    assert (condition.is_tagged, deletion.etag) == (True, "e%")
    for method, path in [("PATCH", BOOK), ("PATCH", f"{BOOK}:whole"), ("PUT", BOOK)]:
        _, update = condition_of(method, path, if_match='"e"')
        assert update.book.etag == "e"


def test_a_body_may_repeat_the_tag_and_not_contradict_it(condition_of):
    assert condition_of("PATCH", BOOK, if_match='"e"', book={"etag": "e"})[0].is_tagged
    with pytest.raises(InvalidRequest, match=r"book\.etag: differs from the If-Match header"):
        condition_of("PATCH", BOOK, if_match='"e"', book={"etag": "other"})


@pytest.mark.parametrize(
    ("if_match", "kind", "why"),
    [
        ('"a", "b"', PreconditionUnsupported, "one tag only"),
        ('W/"a"', PreconditionFailed, "not the one"),
        ('W/"a", W/"b"', PreconditionFailed, "not the one"),
        ("abc", HttpRefusal, "entity tags in quotes"),
    ],
)
def test_tags_that_no_service_could_compare_have_stated_answers(condition_of, if_match, kind, why):
    with pytest.raises(kind, match=why):
        condition_of("PATCH", BOOK, if_match=if_match)


def test_the_one_strong_tag_of_a_list_is_taken_since_weak_ones_match_nothing(condition_of):
    _, request = condition_of("DELETE", BOOK, if_match='W/"a", "b", "b"')
    assert request.etag == "b"


def test_a_star_leaves_the_question_to_the_service(condition_of):
    condition, request = condition_of("DELETE", BOOK, if_match="*")
    assert (condition.is_tagged, request.etag) == (False, "")
    with pytest.raises(HttpRefusal, match="allowMissing"):
        condition_of("PATCH", BOOK, if_match="*", allow_missing=True)


@pytest.mark.parametrize(
    ("method", "path", "headers", "header"),
    [
        ("GET", BOOK, {"if_match": '"a"'}, "If-Match"),
        ("POST", "/v1/books:search", {"if_match": "*"}, "If-Match"),
        ("PATCH", "/v1/settings/s", {"if_match": '"a"'}, "If-Match"),
        ("PATCH", BOOK, {"if_none_match": "*"}, "If-None-Match"),
        ("DELETE", BOOK, {"if_none_match": '"a"'}, "If-None-Match"),
    ],
)
def test_a_condition_that_a_method_cannot_keep_is_refused(
    condition_of, method, path, headers, header
):
    with pytest.raises(PreconditionUnsupported, match=f"^{header}: "):
        condition_of(method, path, **headers)


@pytest.mark.parametrize(
    ("known", "tag", "is_known"),
    [
        (('"a"',), '"a"', True),
        (('W/"a"',), '"a"', True),
        (('"a"',), 'W/"a"', True),
        (('"b"', '"a"'), '"a"', True),
        (("*",), '"a"', True),
        (("*",), "", False),
        (('"b"',), '"a"', False),
        ((), '"a"', False),
    ],
)
def test_if_none_match_compares_weakly(known, tag, is_known):
    form = Condition(is_tagged=False, known_tags=known).known_form(tag)
    assert form == (tag if is_known else "")


@pytest.mark.parametrize(
    ("known", "tag", "form"),
    [
        ('"a%gzip"', '"a"', '"a%gzip"'),
        ('W/"a%gzip"', '"a"', '"a%gzip"'),
        ('"a-gzip"', '"a"', ""),
        ('W/"a"', 'W/"a"', 'W/"a"'),
    ],
)
def test_a_client_that_has_the_compressed_form_is_told_of_that_form(known, tag, form):
    assert Condition(is_tagged=False, known_tags=(known,)).known_form(tag) == form


def test_the_tag_of_the_compressed_form_comes_back_as_the_same_etag_and_no_etag_looks_like_it():
    assert tag_of_gzip(tag_of_etag("7")) == '"7%gzip"'
    assert tag_of_gzip(tag_of_etag('W/"7"')) == 'W/"7"'
    assert tag_of_etag("7%gzip") == '"7%25gzip"'


@pytest.mark.parametrize(
    ("error", "is_412"),
    [
        (Aborted("lost"), True),
        (Aborted("lost", reason="ETAG_MISMATCH"), True),
        (FailedPrecondition("x", reason="ETAG_MISMATCH"), True),
        (FailedPrecondition("The etag does not match."), True),
        (FailedPrecondition("The account is closed."), False),
        (FailedPrecondition("x", reason="ACCOUNT_CLOSED"), False),
        (Aborted("x", reason="LEASE_LOST"), False),
        (IdempotencyInFlight("wait"), False),
        (NotFound("x", reason="ETAG_UNKNOWN"), False),
    ],
)
def test_only_a_refusal_of_the_tag_becomes_412(error, is_412):
    failure = Condition(is_tagged=True, known_tags=()).failure_of(error)
    assert (failure is not None) is is_412
    assert failure is None or failure.message == error.message
    assert Condition(is_tagged=False, known_tags=()).failure_of(error) is None


def test_the_reason_of_the_service_is_kept():
    condition = Condition(is_tagged=True, known_tags=())
    told = condition.failure_of(Aborted("x", reason="ETAG_MISMATCH", metadata={"etag": "now"}))
    assert (told.error_reason, told.metadata) == ("ETAG_MISMATCH", {"etag": "now"})
    assert condition.failure_of(Aborted("x")).error_reason == "PRECONDITION_FAILED"
