"""What differs between two sets of contracts, and what of it would break a client.

A client breaks when what it sends is no longer taken, or what it reads is no longer there: a route,
a field or an enum value that is gone, or one that has become something else. What is new breaks
nobody, and neither does what a policy says: to close a method must never need permission.

Source: the rules FILE and WIRE_JSON of buf's breaking change detection, for what REST can see.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from edge.contracts import MethodInfo
from edge.fields import descriptor_of
from edge.routes import Route


@dataclass(frozen=True)
class Changes:
    """What differs; each entry is a sentence that names what it is about.

    Attributes:
        added, removed: routes.
        changed: routes that are there in both and do not do the same.
        breaking: what a client of before would meet.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    breaking: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether anything differs that a caller could notice."""
        return bool(self.added or self.removed or self.changed)

    def lines(self) -> Iterator[str]:
        """One line each, by kind."""
        for sign, entries in (("+", self.added), ("-", self.removed), ("~", self.changed)):
            for entry in entries:
                yield f"{sign} {entry}"


def changes_between(before: Iterable[Route], after: Iterable[Route]) -> Changes:
    """Compare the routes of two sets of contracts."""
    old = {_key(route): route for route in before}
    new = {_key(route): route for route in after}
    removed = [route for key, route in old.items() if key not in new]
    breaking = [f"{route}: it is gone" for route in removed]
    changed = []
    messages = _Messages()
    for key, route in old.items():
        if key not in new:
            continue
        found = list(_route_changes(route, new[key], messages))
        changed += [f"{route}: {difference.what}" for difference in found]
        breaking += [f"{route}: {difference.what}" for difference in found if difference.breaks]
    return Changes(
        added=tuple(str(route) for key, route in new.items() if key not in old),
        removed=tuple(str(route) for route in removed),
        changed=tuple(changed),
        breaking=tuple(breaking),
    )


@dataclass(frozen=True)
class _Difference:
    what: str
    breaks: bool = True


def _key(route: Route) -> tuple[str, str]:
    return route.http_method, route.template.text


def _route_changes(old: Route, new: Route, messages: "_Messages") -> Iterator[_Difference]:
    if old.method.full_name != new.method.full_name:
        yield _Difference(f"it calls {new.method.full_name}")
    if old.body != new.body:
        yield _Difference(f"its body was {old.body or 'none'!r} and is {new.body or 'none'!r}")
    if old.response_body != new.response_body:
        yield _Difference(f"its answer was the field {old.response_body or '(all)'!r}")
    if _kind(old.method) != _kind(new.method):
        yield _Difference(f"it was {_kind(old.method)} and is {_kind(new.method)}")
    if old.method.options != new.method.options:
        yield _Difference("its policy is another", breaks=False)
    for one, other in (
        (old.method.input, new.method.input),
        (old.method.output, new.method.output),
    ):
        yield from messages.differences(descriptor_of(one), descriptor_of(other))


def _kind(method: MethodInfo) -> str:
    kinds = {
        (False, False): "unary",
        (False, True): "a server stream",
        (True, False): "a client stream",
        (True, True): "a stream both ways",
    }
    return kinds[method.client_streaming, method.server_streaming]


class _Messages:
    """Compares messages, each pair once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], list[_Difference]] = {}

    def differences(self, old: Descriptor, new: Descriptor) -> list[_Difference]:
        """What differs in two messages, and in all that their fields hold."""
        seen: set[tuple[str, str]] = set()
        return list(self._of_tree(old, new, seen))

    def _of_tree(
        self, old: Descriptor, new: Descriptor, seen: set[tuple[str, str]]
    ) -> Iterator[_Difference]:
        key = old.full_name, new.full_name
        if key in seen:
            return
        seen.add(key)
        if key not in self._known:
            self._known[key] = list(_message_changes(old, new))
        yield from self._known[key]
        for field in old.fields:
            other = new.fields_by_number.get(field.number)
            if other is not None and field.message_type and other.message_type:
                yield from self._of_tree(field.message_type, other.message_type, seen)


def _message_changes(old: Descriptor, new: Descriptor) -> Iterator[_Difference]:
    """What differs in the fields of a message itself."""
    for field in old.fields:
        other = new.fields_by_number.get(field.number)
        if other is None:
            moved = new.fields_by_name.get(field.name)
            what = "is gone" if moved is None else f"has become number {moved.number}"
            yield _Difference(f"{field.full_name} {what}")
        else:
            yield from _field_changes(field, other)
    for field in new.fields:
        if field.number not in old.fields_by_number and field.name not in old.fields_by_name:
            yield _Difference(f"{field.full_name} is new", breaks=field.is_required)


def _field_changes(old: FieldDescriptor, new: FieldDescriptor) -> Iterator[_Difference]:
    name = old.full_name
    if old.name != new.name:
        yield _Difference(f"{name} is called {new.name}")
    elif old.json_name != new.json_name:
        yield _Difference(f"{name} is {new.json_name!r} in JSON")
    if old.type != new.type:
        yield _Difference(f"{name} has another type")
    if old.is_repeated != new.is_repeated:
        yield _Difference(f"{name} {'is' if new.is_repeated else 'was'} a list")
    if new.is_required and not old.is_required:
        yield _Difference(f"{name} is required")
    if _oneof(old) != _oneof(new):
        yield _Difference(f"{name} is in another oneof")
    if old.enum_type and new.enum_type:
        yield from _enum_changes(old.enum_type, new.enum_type)


def _oneof(field: FieldDescriptor) -> str:
    oneof = field.containing_oneof
    # The compiler makes one of its own for every "optional".
    return "" if oneof is None or len(oneof.fields) == 1 else str(oneof.name)


def _enum_changes(old: EnumDescriptor, new: EnumDescriptor) -> Iterator[_Difference]:
    for value in old.values:
        other = new.values_by_name.get(value.name)
        if other is None:
            yield _Difference(f"{old.full_name} has no value {value.name} any more")
        elif other.number != value.number:
            yield _Difference(f"{old.full_name}.{value.name} is another number")
    for value in new.values:
        if value.name not in old.values_by_name:
            yield _Difference(f"{old.full_name} has a value {value.name}", breaks=False)
