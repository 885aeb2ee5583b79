import json

import pytest

from edge.masks import PATHS_MAX
from shared.errors import InvalidRequest
from tests.unit.edge.conftest import request_of

BOOK = "/v1/shelves/s/books/b"


def patched(library, body, target=BOOK):
    return request_of(library, "PATCH", target, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ({"title": "x"}, ["title"]),
        ({"title": "", "pageCount": 0}, ["title", "page_count"]),
        ({"title": None}, ["title"]),
        ({"author": {"birth_year": 1}}, ["author.birth_year"]),
        ({"author": {"displayName": None}}, ["author.display_name"]),
        ({"author": {}}, ["author"]),
        ({"author": None}, ["author"]),
        ({"sequel": {"sequel": {"author": {"birthYear": 2}}}}, ["sequel.sequel.author.birth_year"]),
        ({"coverArtist": {"birthYear": 2}}, ["cover_artist.birth_year"]),
        ({"tags": ["a"], "editors": [{"birthYear": 1}]}, ["tags", "editors"]),
        ({"tags": []}, ["tags"]),
        ({"labels": {"title": "x"}}, ["labels"]),
        ({"labels": {}}, ["labels"]),
        ({"subTitle": "x"}, ["sub_title"]),
        ({"subTitle": None}, ["sub_title"]),
        ({"extra": {"a": {"b": 1}}}, ["extra"]),
        ({"publishTime": "2026-01-01T00:00:00Z"}, ["publish_time"]),
        ({"attachment": {"@type": "t/library.v1.Author", "birthYear": 1}}, ["attachment"]),
        ({"marker": {}}, ["marker"]),
        ({"note": None}, ["note"]),
        ({"note": {"a": 1}}, ["note"]),
        ({"otherName": "x"}, ["custom_named"]),
        ({"custom_named": "x"}, ["custom_named"]),
    ],
    ids=str,
)  # fmt: skip
def test_the_mask_of_a_patch_is_what_its_body_names(library, body, paths):
    assert list(patched(library, body).update_mask.paths) == paths


def test_null_clears_the_path_is_in_the_mask_and_the_field_unset(library):
    request = patched(library, {"author": None, "paper": None, "pageCount": None})
    assert list(request.update_mask.paths) == ["author", "paper", "page_count"]
    assert not request.book.HasField("author")
    assert request.book.WhichOneof("binding") is None
    assert not request.book.HasField("page_count")


def test_what_names_the_resource_is_no_change(library):
    body = {"name": "shelves/s/books/b", "etag": "e", "title": "x"}
    assert list(patched(library, body).update_mask.paths) == ["title"]


@pytest.mark.parametrize("body", [{}, {"name": "shelves/s/books/b"}, {"etag": "e"}], ids=str)
def test_a_patch_that_names_nothing_to_change_is_refused(library, body):
    """Many services would read an empty mask as "all fields", and clear them."""
    with pytest.raises(InvalidRequest, match="names no field to change"):
        patched(library, body)
    with pytest.raises(InvalidRequest, match="names no field to change"):
        request_of(library, "PATCH", BOOK)


@pytest.mark.parametrize(
    ("query", "paths"),
    [
        ("updateMask=title", ["title"]),
        ("update_mask=title,author.displayName", ["title", "author.display_name"]),
        ("updateMask=author", ["author"]),
        ("updateMask=labels", ["labels"]),
        ("updateMask=otherName", ["custom_named"]),
        ("updateMask=*", ["*"]),
        ("updateMask=sequel.sequel.title", ["sequel.sequel.title"]),
    ],
)
def test_a_mask_that_the_client_gives_wins(library, query, paths):
    request = patched(library, {"title": "x", "tags": ["t"]}, f"{BOOK}?{query}")
    assert list(request.update_mask.paths) == paths


def test_an_empty_mask_is_none_given(library):
    assert list(patched(library, {"title": "x"}, f"{BOOK}?updateMask=").update_mask.paths) == [
        "title"
    ]


@pytest.mark.parametrize(
    "path",
    ["nothing", "author.nothing", "title.x", "editors.name", "labels.a", "book.title", "*,title"],
)
def test_a_path_that_names_no_field_is_refused_by_name(library, path):
    with pytest.raises(InvalidRequest) as caught:
        patched(library, {"title": "x"}, f"{BOOK}?updateMask={path}")
    violation = caught.value.violations[0]
    assert violation.field == "updateMask"
    assert path.partition(",")[0] in violation.description
    assert "library.v1.Book" in violation.description


def test_a_mask_in_the_body_wins_where_the_body_is_all(library):
    body = {"book": {"title": "x", "tags": []}, "updateMask": "tags"}
    assert list(patched(library, body, f"{BOOK}:whole").update_mask.paths) == ["tags"]
    with pytest.raises(InvalidRequest, match=r"updateMask: 'tag' names no field"):
        patched(library, body | {"updateMask": "tag"}, f"{BOOK}:whole")


def test_in_a_whole_body_the_mask_starts_at_the_resource(library):
    body = {"book": {"title": "x", "author": {"birthYear": 1}}, "allowMissing": True}
    request = patched(library, body, f"{BOOK}:whole")
    assert list(request.update_mask.paths) == ["title", "author.birth_year"]
    with pytest.raises(InvalidRequest, match="names no field to change"):
        patched(library, {"allowMissing": True}, f"{BOOK}:whole")


def test_a_request_that_is_its_own_resource_leaves_out_what_is_about_the_call(library):
    body = {"theme": "dark", "owner": {"birthYear": 1}, "requestId": "r", "name": "settings/s"}
    request = patched(library, body, "/v1/settings/s")
    assert list(request.changes.paths) == ["theme", "owner.birth_year"]
    body["changes"] = "theme"
    assert list(patched(library, body, "/v1/settings/s").changes.paths) == ["theme"]


def test_put_replaces_the_whole_and_gets_no_mask_but_a_given_one_is_checked(library):
    assert not request_of(library, "PUT", BOOK, b'{"title": "x"}').HasField("update_mask")
    with pytest.raises(InvalidRequest, match="updateMask"):
        request_of(library, "PUT", f"{BOOK}?updateMask=nothing", b"{}")


def test_a_read_mask_is_left_alone(library):
    request = patched(library, {"title": "x"}, f"{BOOK}?readMask=anything")
    assert list(request.read_mask.paths) == ["anything"]


def test_a_body_that_is_no_resource_makes_no_mask(library):
    request = request_of(library, "PATCH", f"{BOOK}:title", b"true")
    assert request.force
    assert not request.HasField("update_mask")


def test_a_deep_body_cannot_make_a_mask_without_end(library):
    level = {"title": "", "tags": [], "labels": {}, "author": {"displayName": "", "birthYear": 1}}
    level |= {"subTitle": "", "extra": {}, "paper": "", "pageCount": 1, "otherName": ""}
    level |= {"marker": {}, "note": 1, "editors": []}
    body = level
    for _ in range(90):
        body = level | {"sequel": body}
    with pytest.raises(InvalidRequest, match=f"more than {PATHS_MAX} fields"):
        patched(library, body)
