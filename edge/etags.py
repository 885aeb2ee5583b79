"""A resource's `etag` field as HTTP's ETag, If-Match and If-None-Match (AIP-154, RFC 9110 §13).

The service compares, in its own transaction; the edge only carries the tag. A field may hold
any text while an entity tag is printable ASCII without quotes, so the field's value is
percent-encoded between the quotes: what the service wrote comes back to it unchanged. Only a
weak tag (W/"...") leaves as it is.

Stated answers (RFC 9110 §13.1):
- If-Match on a method whose request has no etag field: 400, for to ignore it would overwrite.
- If-Match with weak tags only: 412. It compares strongly, and no weak tag ever matches.
- If-Match with several strong tags: 400. The request has room for one.
- If-Match: *: the method is called without a tag; the service says whether there is anything.
- A compressed answer has a tag of its own, with "%gzip" at its end, which no encoded value has.
  It names the same etag when it comes back.
- If-None-Match on GET and HEAD compares weakly, takes lists and *, and is answered with 304;
  to an answer without an etag nothing matches. On other methods it is 400.
"""

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from google.protobuf.descriptor import FieldDescriptor

from edge.fields import AnyMessage, descriptor_of, has_one_text, message_type
from edge.masks import ALLOW_MISSING, ETAG, resource_field_of
from edge.refusals import HttpRefusal, PreconditionFailed, PreconditionUnsupported
from edge.routes import Route, answered_message
from shared.errors import (
    Aborted,
    FailedPrecondition,
    InvalidRequest,
    TenfoldError,
    Violation,
)

IF_MATCH, IF_NONE_MATCH = "If-Match", "If-None-Match"
ANY_TAG = "*"
ETAG_CHARACTERS_MAX = 512

# RFC 9110, section 8.8.3, without obs-text.
_TAG_TEXT = r'(?:W/)?"[!#-~]*"'
_TAG = re.compile(_TAG_TEXT)
_TAGS = re.compile(rf"[ \t,]*{_TAG_TEXT}(?:[ \t]*,[ \t,]*{_TAG_TEXT})*[ \t,]*")
# What may stand in a tag as it is: etagc without "%", which begins an encoded character.
_PLAIN = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')
_WEAK = "W/"
_GZIP = '%gzip"'


def tag_of_etag(etag: str) -> str:
    """The entity tag for a field's value; "" for one that is not set, or too long for a header."""
    if len(etag) > ETAG_CHARACTERS_MAX:
        return ""
    if not etag or (etag.startswith(_WEAK) and _TAG.fullmatch(etag)):
        return etag
    return f'"{quote(etag, safe=_PLAIN)}"'


def etag_of_tag(tag: str) -> str:
    """The field's value for which tag_of_etag gave this strong tag.

    Raises:
        PreconditionFailed: it gave it for none.
    """
    etag = unquote(tag[1:-1], errors="replace")
    if tag_of_etag(etag) != tag:
        raise _mismatch()
    return etag


def tag_of_gzip(tag: str) -> str:
    """The tag of the compressed form; a weak tag stands for both forms.

    A strong one names bytes (RFC 9110, section 8.8.3.3). It is not weakened instead, since
    If-Match takes no weak ones: whoever reads compressed could never write.
    """
    return tag if tag.startswith(_WEAK) else tag[:-1] + _GZIP


def _tag_of_either(tag: str) -> str:
    """The tag of the plain form, for that of the plain or the compressed one."""
    return tag.removesuffix(_GZIP) + '"' if tag.endswith(_GZIP) else tag


def parse_tags(header: str, name: str) -> tuple[str, ...]:
    """The entity tags of a header, or ("*",).

    Raises:
        HttpRefusal: it holds something else.
    """
    if header == ANY_TAG:
        return (ANY_TAG,)
    if not _TAGS.fullmatch(header):
        raise _refusal(HttpRefusal, name, "must be entity tags in quotes, as ETag has them, or *")
    return tuple(_TAG.findall(header))


@dataclass(frozen=True)
class Condition:
    """What the headers of one request ask.

    Attributes:
        is_tagged: whether If-Match put a tag into the request.
        known_tags: what If-None-Match says that the client has.
    """

    is_tagged: bool
    known_tags: tuple[str, ...]

    def known_form(self, tag: str) -> str:
        """The tag of the form that the client has: plain, or compressed; "" if it has neither.

        Weak comparison (section 8.8.3.2).
        """
        known = {known_tag.removeprefix(_WEAK) for known_tag in self.known_tags}
        if not tag or ANY_TAG in known:
            return tag
        forms = (tag, tag_of_gzip(tag))
        return next((form for form in forms if form.removeprefix(_WEAK) in known), "")

    def failure_of(self, error: TenfoldError) -> PreconditionFailed | None:
        """What a refusal of the service means if it refused the tag of If-Match; else None."""
        if not (self.is_tagged and _is_about_etag(error)):
            return None
        own_reason = error.error_reason if error.error_reason != type(error).reason else None
        return PreconditionFailed(error.message, metadata=error.metadata, reason=own_reason)


@dataclass(frozen=True)
class ETags:
    """What one route does with entity tags.

    Attributes:
        is_answered: whether its answer has an etag. That of a PUT is in the body only: a header
            would say that what was sent is stored as it is (RFC 9110, section 9.3.4).
        request_fields: from the request down to its etag field; empty if it has none.
        is_read: whether it is a GET.
    """

    is_answered: bool
    request_fields: tuple[FieldDescriptor, ...]
    is_read: bool

    def condition(self, request: AnyMessage, if_match: str, if_none_match: str) -> Condition:
        """Put what If-Match names into the request.

        Args:
            request: complete but for its etag.
            if_match: the header; "" for none.
            if_none_match: the header; "" for none.

        Raises:
            HttpRefusal: a header is malformed, or this route cannot keep it.
            InvalidRequest: the body holds another etag.
            PreconditionFailed: no tag of If-Match can match.
        """
        if if_none_match and not self.is_read:
            raise _refusal(PreconditionUnsupported, IF_NONE_MATCH, "is kept by GET only")
        known_tags = parse_tags(if_none_match, IF_NONE_MATCH) if if_none_match else ()
        is_tagged = bool(if_match) and self._require(request, parse_tags(if_match, IF_MATCH))
        return Condition(is_tagged, known_tags)

    def _require(self, request: AnyMessage, tags: tuple[str, ...]) -> bool:
        """Whether the request carries a tag now."""
        if not self.request_fields:
            raise _refusal(PreconditionUnsupported, IF_MATCH, "is not kept by this method")
        if tags == (ANY_TAG,):
            if getattr(request, ALLOW_MISSING, False):
                raise _refusal(HttpRefusal, IF_MATCH, "* contradicts allowMissing")
            return False
        strong = {_tag_of_either(tag) for tag in tags if not tag.startswith(_WEAK)}
        if not strong:
            raise _mismatch()
        if len(strong) > 1:
            raise _refusal(PreconditionUnsupported, IF_MATCH, "may name one tag only")
        self._set(request, etag_of_tag(strong.pop()))
        return True

    def _set(self, request: AnyMessage, etag: str) -> None:
        *parents, _ = self.request_fields
        target = request
        for field in parents:
            target = getattr(target, field.name)
        if target.etag and target.etag != etag:
            path = ".".join(field.json_name for field in self.request_fields)
            raise InvalidRequest.of_field(path, f"differs from the {IF_MATCH} header")
        target.etag = etag


def etags_of(route: Route) -> ETags:
    """What a route does with entity tags."""
    answer = answered_message(route)
    return ETags(
        is_answered=answer is not None
        and has_one_text(answer, ETAG)
        and route.http_method != "PUT",
        request_fields=_request_fields(route),
        is_read=route.http_method == "GET",
    )


def _request_fields(route: Route) -> tuple[FieldDescriptor, ...]:
    request = descriptor_of(route.method.input)
    if has_one_text(request, ETAG):
        return (request.fields_by_name[ETAG],)
    resource = resource_field_of(route)
    if resource is None or not has_one_text(message_type(resource), ETAG):
        return ()
    return resource, message_type(resource).fields_by_name[ETAG]


def _is_about_etag(error: TenfoldError) -> bool:
    """Whether a refusal is that of an etag.

    A service that gives a reason is taken at its word. Without one, AIP-154's code for it is
    ABORTED; FAILED_PRECONDITION is used for many things, so its message has to say it.
    """
    if error.error_reason != type(error).reason:
        return isinstance(error, Aborted | FailedPrecondition) and "ETAG" in error.error_reason
    if isinstance(error, FailedPrecondition):
        return ETAG in error.message.lower()
    return type(error) is Aborted


def _mismatch() -> PreconditionFailed:
    return PreconditionFailed("The resource is not the one that If-Match names.")


def _refusal(kind: type[HttpRefusal], name: str, what: str) -> HttpRefusal:
    return kind(f"{name}: {what}", violations=[Violation(name, what)])
