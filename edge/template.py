"""Path templates of google.api.http, by the grammar that http.proto writes down.

    Template = "/" Segments [ Verb ] ;
    Segments = Segment { "/" Segment } ;
    Segment  = "*" | "**" | LITERAL | Variable ;
    Variable = "{" FieldPath [ "=" Segments ] "}" ;
    FieldPath = IDENT { "." IDENT } ;
    Verb     = ":" LITERAL ;

A template is kept flat: the segments to match, and which span of them each variable
captures. Peers that also take "**" in the middle, an empty verb or nested variables
differ from that text; here they are refused when the contract is loaded.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote, unquote_to_bytes

STAR = "*"
DOUBLE_STAR = "**"
# A client removes them before it sends (RFC 3986, section 6.2.2.3): no path has them.
DOT_SEGMENTS = frozenset({b".", b".."})

_IDENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What a literal may hold: RFC 3986 pchar without ":" (it starts the verb) and "*".
_LITERAL = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()+,;=@]|%[0-9A-Fa-f]{2})+")
# RFC 3986 §2.3.
_UNRESERVED_CHARACTER = r"[A-Za-z0-9\-._~]"
_UNRESERVED = re.compile(rf"{_UNRESERVED_CHARACTER}*")
_ESCAPED_SLASH = re.compile(rb"(%2[Ff])")


class TemplateError(ValueError):
    """The template breaks the grammar; the message says where."""


@dataclass(frozen=True)
class Variable:
    """What part of the path a field takes.

    Attributes:
        field_path: proto names joined by dots: "book.name".
        start: the index of its first segment.
        end: the index after its last segment; None if it ends with "**", at the end.
        is_multi_segment: whether "%2F" stays encoded in what it captures (http.proto: every
            variable but {var} and {var=*}).
    """

    field_path: str
    start: int
    end: int | None
    is_multi_segment: bool

    def capture(self, raw_segments: list[bytes]) -> bytes:
        """The captured text, percent-decoded as http.proto says for this kind of variable."""
        raw = b"/".join(raw_segments[self.start : self.end])
        if b"%" not in raw:
            return raw
        if not self.is_multi_segment:
            return unquote_to_bytes(raw)
        pieces = _ESCAPED_SLASH.split(raw)
        return b"".join(p if i % 2 else unquote_to_bytes(p) for i, p in enumerate(pieces))


@dataclass(frozen=True)
class Template:
    """A parsed path template.

    Attributes:
        text: as the contract writes it.
        segments: "*", "**" (only last), or the decoded bytes of a literal.
        variables: what is captured, in the order of the path.
        verb: decoded, without its colon; b"" for none.
    """

    text: str
    segments: tuple[str | bytes, ...]
    variables: tuple[Variable, ...]
    verb: bytes

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Parse a template.

        Raises:
            TemplateError: text breaks the grammar.
        """
        return _Parser(text).template()

    def variable_pattern(self, variable: Variable) -> str:
        """The segments of a variable as text: "accounts/*"."""
        return "/".join(_segment_text(s) for s in self.segments[variable.start : variable.end])

    @property
    def literal_path(self) -> bytes:
        """The only path that matches, decoded; b"" if there are several."""
        literals = [segment for segment in self.segments if isinstance(segment, bytes)]
        if len(literals) < len(self.segments):
            return b""
        return b"/" + b"/".join(literals) + (b":" + self.verb if self.verb else b"")

    @property
    def is_of_one_variable(self) -> bool:
        """Whether one variable and literals are all there is, so that a value makes a path."""
        if len(self.variables) != 1:
            return False
        before, after = self._around(self.variables[0])
        return all(isinstance(segment, bytes) for segment in (*before, *after))

    def path_of(self, value: str) -> str | None:
        """The encoded path whose only variable captures this value; None if it cannot.

        http.proto: all but [-_.~0-9a-zA-Z] is percent-encoded, and "/" only where the variable
        is one segment.
        """
        if self._needs_no_escape.fullmatch(value):
            start, end = self._frame
            return start + value + end
        [variable] = self.variables
        parts = value.split("/") if variable.is_multi_segment else [value]
        if not _fits(self.segments[variable.start : variable.end], parts):
            return None
        if not all(map(_UNRESERVED.fullmatch, parts)):
            value = "/".join([quote(part, safe="") for part in parts])
        start, end = self._frame
        return start + value + end

    @cached_property
    def _needs_no_escape(self) -> re.Pattern[str]:
        """The usual value of the only variable: it fits, and it is its own encoding."""
        [variable] = self.variables
        segments = self.segments[variable.start : variable.end]
        return re.compile("/".join(map(_unescaped_pattern, segments)))

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What stands before and after the only variable, encoded."""
        before, after = self._around(self.variables[0])
        verb = f":{quote(self.verb)}" if self.verb else ""
        start = "/" + "".join(f"{quote(segment)}/" for segment in before)
        return start, "".join(f"/{quote(segment)}" for segment in after) + verb

    def _around(self, variable: Variable) -> tuple[tuple[str | bytes, ...], ...]:
        after = self.segments[variable.end :] if variable.end is not None else ()
        return self.segments[: variable.start], after


def _fits(pattern: tuple[str | bytes, ...], parts: list[str]) -> bool:
    """Whether these segments match; dot segments and empty ones are never served."""
    if not all(parts) or not DOT_SEGMENTS.isdisjoint(part.encode() for part in parts):
        return False
    if pattern[-1] == DOUBLE_STAR:
        pattern = pattern[:-1] + (STAR,) * (len(parts) - len(pattern) + 1)
    return len(pattern) == len(parts) and all(
        segment == STAR or segment == part.encode()
        for segment, part in zip(pattern, parts, strict=True)
    )


def _unescaped_pattern(segment: str | bytes) -> str:
    """Of a segment that needs no escape; what cannot be such, and "**", match nothing here."""
    if segment == STAR:
        return rf"(?!\.\.?(?:/|\Z)){_UNRESERVED_CHARACTER}+"
    text = _segment_text(segment)
    return re.escape(text) if _UNRESERVED.fullmatch(text) else "(?!)"


def _segment_text(segment: str | bytes) -> str:
    return segment if isinstance(segment, str) else segment.decode()


class _Parser:
    """Recursive descent over the grammar above; `at` is the next character."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.segments: list[str | bytes] = []
        self.variables: list[Variable] = []

    def template(self) -> Template:
        self.expect("/")
        self.parse_segments(inside_variable=False)
        verb = self.literal() if self.take(":") else b""
        if self.at < len(self.text):
            raise self.error("nothing may follow here")
        if DOUBLE_STAR in self.segments[:-1]:
            raise self.error('"**" must be the last segment')
        names = [variable.field_path for variable in self.variables]
        if len(names) != len(set(names)):
            raise self.error("a field is captured twice")
        return Template(self.text, tuple(self.segments), tuple(self.variables), verb)

    def parse_segments(self, *, inside_variable: bool) -> None:
        self.parse_segment(inside_variable=inside_variable)
        while self.take("/"):
            self.parse_segment(inside_variable=inside_variable)

    def parse_segment(self, *, inside_variable: bool) -> None:
        if self.take("{"):
            if inside_variable:
                raise self.error("a variable must not contain another")
            self.parse_variable()
        elif self.take(DOUBLE_STAR):
            self.segments.append(DOUBLE_STAR)
        elif self.take(STAR):
            self.segments.append(STAR)
        else:
            self.segments.append(self.literal())

    def parse_variable(self) -> None:
        names = [self.ident()]
        while self.take("."):
            names.append(self.ident())
        start = len(self.segments)
        if self.take("="):
            self.parse_segments(inside_variable=True)
        else:
            self.segments.append(STAR)
        self.expect("}")
        own = self.segments[start:]
        end = None if own[-1] == DOUBLE_STAR else len(self.segments)
        multi = len(own) > 1 or own[0] == DOUBLE_STAR
        self.variables.append(Variable(".".join(names), start, end, multi))

    def ident(self) -> str:
        return self.match(_IDENT, "a field name")

    def literal(self) -> bytes:
        return unquote_to_bytes(self.match(_LITERAL, "a literal"))

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.error(f"{what} is expected")
        self.at = found.end()
        return found.group()

    def take(self, token: str) -> bool:
        taken = self.text.startswith(token, self.at)
        self.at += len(token) * taken
        return taken

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.error(f'"{token}" is expected')

    def error(self, what: str) -> TemplateError:
        return TemplateError(f"path template {self.text!r}, at {self.at}: {what}")
