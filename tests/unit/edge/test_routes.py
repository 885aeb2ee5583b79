import re
import time

import pytest
from google.protobuf.empty_pb2 import Empty
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.contracts import ContractError, Contracts, MethodInfo, load_contracts
from edge.routes import Match, NoMatch, Route, RouteTable
from edge.template import Template
from shared.errors import InvalidRequest
from shared.rpc.policy import MethodPolicy


def called(table, method, path):
    """The method's own name and the captures, or the allowed methods of no match."""
    found = table.match(method, path)
    if isinstance(found, Match):
        return found.route.method.name, found.captures
    return found.allowed_methods


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/things/x", ("Get", {"text": "x"})),
        ("GET", "/v1/things/special", ("Special", {})),
        ("POST", "/v1/things/special", ("SpecialPost", {})),
        ("PURGE", "/v1/things/special", ("Purge", {"text": "special"})),
        ("GET", "/v1/inners/i/things/5", ("Get", {"inner.text": "i", "an_int64": "5"})),
        ("GET", "/v1/shelves/a/books/b", ("Named", {"text": "shelves/a/books/b"})),
        ("GET", "/v1/files", ("Files", {"text": ""})),
        ("GET", "/v1/files/a/b/c", ("Files", {"text": "a/b/c"})),
        ("GET", "/v1/files/a/b:stat", ("FilesVerb", {"text": "a/b"})),
        ("GET", "/v1/files:stat", ("FilesVerb", {"text": ""})),
        ("POST", "/v1/things/x:check", ("Check", {"text": "x"})),
        ("LOCK", "/v1/open/caf%c3%a9", ("AnyMethod", {})),
        ("PUT", "/v1/inners/i", ("Replace", {"inner.text": "inners/i"})),
    ],
)
def test_the_most_specific_route_answers(everything_table, method, path, expected):
    assert called(everything_table, method, path) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/things/a%2Fb", {"text": "a/b"}),
        ("/v1/things/a%3Acheck", {"text": "a:check"}),
        ("/v1/things/a:other", {"text": "a:other"}),
        ("/v1/things/a%20b+c", {"text": "a b+c"}),
        ("/v1/things/%C3%BC", {"text": "ü"}),
        ("/v1/th%69ngs/x", {"text": "x"}),
        ("/v1/files/a%2fb/c%3Fd", {"text": "a%2fb/c?d"}),
        ("/v1/shelves/%2e/books/b", None),
        ("/v1/things/..", None),
        ("/v1/things/%2E%2e", None),
        ("/v1/things/", None),
        ("/v1//things/x", None),
        ("/v1/files/a//b", None),
        ("/v1/things/x/", None),
        ("/v1/Things/x", None),
        ("*", None),
        ("", None),
        ("/v1/things/" + "x" * 9000, None),
        ("/" * 8192, None),
    ],
)
def test_segments_are_split_before_they_are_decoded(everything_table, path, expected):
    found = everything_table.match("GET", path.encode())
    assert (found.captures if isinstance(found, Match) else None) == expected
    if expected is None:
        assert found == NoMatch()


@pytest.mark.parametrize("part", ["%ff", "%C0%80", "%ED%A0%80", "a%00b"])
def test_a_capture_that_is_no_text_is_refused_by_name(everything_table, part):
    with pytest.raises(InvalidRequest) as caught:
        everything_table.match("GET", f"/v1/things/{part}")
    assert caught.value.violations[0].field == "text"


@pytest.mark.parametrize("part", ["%", "%4", "%zz", "a%%41"])
def test_a_broken_escape_is_refused_and_not_taken_literally(everything_table, part):
    with pytest.raises(InvalidRequest, match="percent-encoded"):
        everything_table.match("GET", f"/v1/things/{part}")


def test_a_wrong_method_learns_which_are_allowed(everything_table):
    assert called(everything_table, "DELETE", "/v1/things/special") == ("GET", "POST", "PURGE")
    assert called(everything_table, "GET", "/v1/nothing") == ()


def test_a_path_with_a_declared_verb_is_never_read_without_it(everything_table):
    assert called(everything_table, "GET", "/v1/things/x:check") == ("POST",)


def test_a_verb_is_matched_decoded_as_every_literal_is(everything_table):
    assert called(everything_table, "POST", "/v1/things/x:ch%65ck") == ("Check", {"text": "x"})
    assert called(everything_table, "GET", "/v1/things/x%3Acheck") == ("Get", {"text": "x:check"})


def test_two_stars_match_the_root_which_has_no_segment(table_of):
    table = table_of('get: "/{a=**}"')
    assert called(table, "GET", "/") == ("M0", {"a": ""})
    assert called(table, "GET", "/a/b") == ("M0", {"a": "a/b"})
    assert called(table, "GET", "//") == ()


@pytest.mark.parametrize(
    "rules",
    [
        ['get: "/v1/{a}"', 'get: "/v1/{b}"'],
        ['get: "/v1/x"', 'get: "/v1/x"'],
        ['get: "/v1/{a=**}"', 'get: "/v1/**"'],
        ['get: "/v1/%78"', 'get: "/v1/x"'],
        ['get: "/v1/{a}:do"', 'get: "/v1/*:do"'],
        ['custom: {kind: "get" path: "/v1/x"}', 'get: "/v1/x"'],
    ],
)
def test_two_routes_that_match_alike_are_refused_and_both_named(table_of, rules):
    with pytest.raises(ContractError, match=r"conflict.*t\.S/M0.*t\.S/M1"):
        table_of(*rules)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ('get: "/v1/{r}"', "repeated"),
        ('get: "/v1/{m}"', "repeated"),
        ('get: "/v1/{q}"', "message"),
        ('get: "/v1/{q.r}"', "repeated"),
        ('get: "/v1/{a.b}"', "no message"),
        ('get: "/v1/{nothing}"', "no field"),
        ('post: "/v1/x" body: "nothing"', "body 'nothing' is no field"),
        ('post: "/v1/x" body: "q.a"', "is no field"),
        ('post: "/v1/x" response_body: "nothing"', "is no field"),
        ('get: "/v1/{a=**}/x"', "last segment"),
        ('body: "*"', "names no path"),
        (
            'get: "/x" additional_bindings: {get: "/y" additional_bindings: {get: "/z"}}',
            "must not be nested",
        ),
    ],
)
def test_a_rule_that_does_not_fit_its_message_is_refused_by_method(table_of, rule, why):
    with pytest.raises(ContractError, match=rf"t\.S/M0.*{why}"):
        table_of(rule)


def test_head_goes_where_get_goes_unless_a_route_names_it(table_of):
    table = table_of(
        'get: "/v1/x"',
        'custom: {kind: "*" path: "/v1/{a}"}',
        'get: "/v1/y"',
        'custom: {kind: "HEAD" path: "/v1/y"}',
        'post: "/v1/z/z"',
    )
    assert called(table, "HEAD", "/v1/x") == ("M0", {})
    assert called(table, "HEAD", "/v1/y") == ("M3", {})
    assert called(table, "HEAD", "/v1/other") == ("M1", {"a": "other"})
    assert called(table, "HEAD", "/v1/z/z") == ("POST",)


def test_a_star_takes_every_method_that_no_other_route_of_the_path_does(table_of):
    table = table_of('custom: {kind: "*" path: "/v1/{a}"}', 'put: "/v1/{b}"', 'get: "/v1/x"')
    assert called(table, "PUT", "/v1/y") == ("M1", {"b": "y"})
    for method in ("GET", "OPTIONS", "PURGE", "DELETE"):
        assert called(table, method, "/v1/y") == ("M0", {"a": "y"})
    assert called(table, "POST", "/v1/x") == ("M0", {"a": "x"})


def test_the_same_path_may_differ_by_method_or_verb(table_of):
    table = table_of('get: "/v1/x"', 'post: "/v1/x"', 'get: "/v1/x:do"', 'get: "/v1/{a}"')
    assert len(table.routes) == 4


def test_a_path_without_its_method_falls_back_to_a_less_specific_one(table_of):
    table = table_of('post: "/v1/x/y"', 'get: "/v1/{a}/y"', 'get: "/v1/{a=**}"')
    assert called(table, "GET", "/v1/x/y") == ("M1", {"a": "x"})
    assert called(table, "GET", "/v1/x/z") == ("M2", {"a": "x/z"})
    assert called(table, "POST", "/v1/x/y") == ("M0", {})


def test_matching_a_hostile_path_stays_cheap(everything_table):
    def cost_s(parts):
        started = time.thread_time()
        for path in ["/" + "a/" * parts, "/v1/files" + "/%41" * parts, "/v1/things/" + ":" * parts]:
            everything_table.match("GET", path)
        return time.thread_time() - started

    small_s, large_s = (min(cost_s(parts) for _ in range(5)) for parts in (250, 4000))
    assert large_s < 16 * 4 * small_s + 0.01  # squared, it would be 256 times


def test_our_contracts_have_routes_and_mesh_internal_methods_none():
    contracts = load_contracts()
    table = RouteTable.of_contracts(contracts)
    routed = {route.method.name for route in table.routes}
    assert {"TransferFunds", "SignUp", "PatchTusUpload", "WatchInbox"} <= routed
    assert not {"ResolveApiKey", "WatchRevocations"} & routed


def test_raw_bindings_capture_their_variables():
    table = RouteTable.of_contracts(load_contracts())
    found = table.match("PATCH", "/v1/files/0190-abc")
    assert found.route.raw is not None
    assert found.captures == {"upload": "0190-abc"}


def test_contracts_whose_imports_are_missing_are_refused_by_file():
    file_set = load_contracts().file_set
    lonely = type(file_set)(file=[f for f in file_set.file if "ledger_service" in f.name])
    with pytest.raises(ContractError, match="ledger_service"):
        Contracts(lonely)


def test_comments_are_found_by_full_name():
    contracts = load_contracts()
    assert contracts.comment("tenfold.common.v1.Money") == (
        "An amount of one currency, in its minor unit."
    )
    assert "buf:lint" not in contracts.comment("tenfold.media.v1.UploadService.CreateTusUpload")
    assert contracts.comment("tenfold.nothing") == ""


# --- against a second reading of http.proto, by brute force

SEGMENTS = st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=3)
TEMPLATES = st.builds(
    lambda segments, rest, verb: "/" + "/".join(segments + rest) + verb,
    SEGMENTS,
    st.sampled_from([[], ["**"]]),
    st.sampled_from(["", "", ":do", ":undo"]),
)
PATHS = st.builds(
    lambda segments, verb: "/" + "/".join(segments) + verb,
    st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=1, max_size=5),
    st.sampled_from(["", "", ":do", ":undo", ":other"]),
)
KINDS = {"**": 2, "*": 1}


def specificity(template):
    return [KINDS.get(segment, 0) for segment in template.rpartition(":")[0][1:].split("/")]


def pattern_of(template):
    """The path up to its verb as a regular expression; "**" takes the slash before it along."""
    text = re.escape(template).replace(r"/\*\*", r"(?:/[^/]+)*").replace(r"\*", "[^/]+")
    return re.compile(text)


def by_brute_force(bindings, method, path):
    """The winning template and method, or the methods allowed."""
    stem, colon, verb = path.rpartition(":")
    readings = [(stem, ":" + verb)] if colon and "/" not in verb else []
    for text, own_verb in [*readings, (path, "")]:
        fits = []
        for template, allowed in bindings:
            bare, _, template_verb = template.partition(":")
            same_verb = own_verb == (":" + template_verb if template_verb else "")
            if same_verb and pattern_of(bare).fullmatch(text):
                fits.append((specificity(template + ":" * (not template_verb)), template, allowed))
        winners = [fit for fit in sorted(fits) if fit[2] == method]
        if winners:
            return winners[0][1:]
        if fits:
            return tuple(sorted({allowed for _, _, allowed in fits}))
    return ()


@given(st.lists(st.tuples(TEMPLATES, st.sampled_from(["GET", "POST"])), unique=True), PATHS)
@settings(max_examples=500, deadline=None)
def test_the_tree_answers_as_a_search_through_all_templates_does(bindings, path):
    method = MethodInfo("/s.S/M", Empty, Empty, False, False, MethodPolicy("/s.S/M"), None, None)
    routes = [Route(kind, Template.parse(text), method) for text, kind in bindings]
    found = RouteTable(routes).match("GET", path)
    if isinstance(found, Match):
        answer = found.route.template.text, found.route.http_method
    else:
        answer = found.allowed_methods
    assert answer == by_brute_force(bindings, "GET", path)


SAFE = "option (tenfold.options.v1.method) = {access: ACCESS_USER idempotency: IDEMPOTENCY_SAFE};"
FREE = "option idempotency_level = NO_SIDE_EFFECTS;"
RULE = 'option (google.api.http) = {get: "/v1/x"};'
HIDDEN = "option (tenfold.options.v1.method) = {access: ACCESS_SERVICE};"
INTERNAL = "option (tenfold.options.v1.method) = {access: ACCESS_PUBLIC internal: true};"
PUBLIC = "option (tenfold.options.v1.method) = {access: ACCESS_PUBLIC};"


@pytest.mark.parametrize(
    ("method", "allowed"),
    [
        (f"rpc M(Q) returns (Q) {{ {PUBLIC} }}", ("POST",)),
        (f"rpc M(Q) returns (Q) {{ {SAFE} }}", ("GET", "POST")),
        (f"rpc M(Q) returns (Q) {{ {FREE} {RULE} }}", ("GET", "POST")),
        (f"rpc M(Q) returns (stream Q) {{ {SAFE} }}", ("POST",)),
        (f"rpc M(stream Q) returns (Q) {{ {SAFE} }}", ("POST",)),
        (f"rpc M(Q) returns (Q) {{ {RULE} }}", ("POST",)),
        ("rpc M(Q) returns (Q);", ()),
        (f"rpc M(Q) returns (Q) {{ {HIDDEN} }}", ()),
        (f"rpc M(Q) returns (Q) {{ {INTERNAL} {RULE} }}", ()),
    ],
    ids=[
        "ours, without a rule", "safe", "free of side effects", "server stream", "client stream",
        "a stranger's with a rule", "a stranger's without", "for services", "internal",
    ],
)  # fmt: skip
def test_an_rpc_path_is_answered_where_the_policy_lets_anyone_in(table_of, method, allowed):
    table = table_of(more=method)
    assert called(table, "PUT", "/t.S/M") == allowed
    assert {route.http_method for route in table.connect_routes} == set(allowed)


@pytest.mark.parametrize(
    ("rule", "conflicts"),
    [
        ('post: "/t.S/M"', True),
        ('post: "/{a=*/*}"', True),
        ('post: "/{a}/M"', True),
        ('post: "/{a=**}"', True),
        ('custom: {kind: "*" path: "/t.S/{a}"}', True),
        ('get: "/t.S/M"', False),
        ('get: "/{a=**}"', False),
        ('post: "/t.S/M:do"', False),
        ('post: "/v1/{a=**}"', False),
    ],
)
def test_a_rest_path_that_an_rpc_path_would_shadow_is_refused(table_of, rule, conflicts):
    method = f"rpc M(Q) returns (Q) {{ {PUBLIC} }}"
    if not conflicts:
        found = table_of(rule, more=method).match("POST", "/t.S/M")
        assert found.route.is_connect
        return
    with pytest.raises(ContractError, match=r"conflict: .*t\.S/M0.* and POST /t\.S/M .*CONNECT"):
        table_of(rule, more=method)
