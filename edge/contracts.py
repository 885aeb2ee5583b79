"""The contracts that the edge serves: their messages, methods, policies and comments.

Everything is read from one FileDescriptorSet, ours or another's, into a pool of its
own: the edge imports no generated module of a service.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from google.api import (
    annotations_pb2,
    http_pb2,
)
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    Edition,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodOptions,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet
from tenfold.options.v1 import policy_pb2

from shared.rpc.policy import Access, Idempotency, MethodPolicy, contracts, load_policies

# Field numbers of descriptor.proto, by which SourceCodeInfo names what it comments on.
_FILE_MESSAGES, _FILE_ENUMS, _FILE_SERVICES = 4, 5, 6
_MESSAGE_FIELDS, _MESSAGE_NESTED, _MESSAGE_ENUMS = 2, 3, 4
_ENUM_VALUES, _SERVICE_METHODS = 2, 2
_FILE_EDITION = 14
# Those that are released, by number: 1000 is 2023.
_EDITIONS = {
    number: name.removeprefix("EDITION_")
    for name, number in Edition.items()
    if name.removeprefix("EDITION_").isdigit()
}


class ContractError(ValueError):
    """The contracts cannot be served; the message says which part, and why."""


@dataclass(frozen=True)
class MethodInfo:
    """One RPC method.

    Attributes:
        full_name: the RPC path, "/tenfold.ledger.v1.LedgerService/GetAccount".
        input: the class of its request message.
        output: the class of its answer message.
        client_streaming: whether requests are a stream.
        server_streaming: whether answers are a stream.
        policy: who may call, deadlines, idempotency: what the services obey as well.
        options: the same options as written, with what only the edge needs: quota,
            cache_max_age, raw bindings.
        rule: its google.api.http rule, or None.
        has_side_effects: False if the contract says that it changes nothing: by our idempotency
            SAFE, or by protobuf's own idempotency_level.
    """

    full_name: str
    input: type[Message]
    output: type[Message]
    client_streaming: bool
    server_streaming: bool
    policy: MethodPolicy
    options: policy_pb2.MethodPolicy
    rule: http_pb2.HttpRule | None
    has_side_effects: bool = True

    @cached_property
    def service(self) -> str:
        """The full name of its service: "tenfold.ledger.v1.LedgerService"."""
        return self.full_name[1:].partition("/")[0]

    @property
    def name(self) -> str:
        """Its own name: "GetAccount"."""
        return self.full_name.rpartition("/")[2]

    @property
    def is_bound(self) -> bool:
        """Whether the contract binds it to an HTTP path, besides its RPC path."""
        return self.rule is not None or bool(self.options.raw)

    @property
    def is_reachable(self) -> bool:
        """Whether REST may reach it at all."""
        return not self.options.internal and self.policy.access is not Access.SERVICE


class Contracts:
    """Messages, methods and comments of one descriptor set.

    Args:
        file_set: the files with all they import (protoc --include_imports), in any order;
            with source info (--include_source_info), their comments are known too. The same
            file may be there twice: descriptor sets can be joined with cat.

    Raises:
        ContractError: a file is missing or does not build.
    """

    def __init__(self, file_set: FileDescriptorSet) -> None:
        # Parsed again so that options read before their extensions were imported are known.
        self.file_set = _without_repeats(FileDescriptorSet.FromString(file_set.SerializeToString()))
        self.pool = DescriptorPool()
        self._add_files()
        self._comments: dict[str, str] | None = None

    @classmethod
    def of_bytes(cls, image: bytes) -> "Contracts":
        """The contracts of a serialized FileDescriptorSet.

        Raises:
            ContractError: see file_set_of; or it is not complete, or a file does not build.
        """
        return cls(file_set_of(image))

    def message(self, full_name: str) -> Descriptor:
        """The descriptor of a message; KeyError if there is none."""
        return self.pool.FindMessageTypeByName(full_name)

    def methods(self) -> Iterator[MethodInfo]:
        """Every method, in the order of the files."""
        policies = load_policies(self.file_set)
        for file in self.file_set.file:
            for service in file.service:
                prefix = f"{file.package}." if file.package else ""
                for method in service.method:
                    options = method.options
                    full_name = f"/{prefix}{service.name}/{method.name}"
                    has_rule = options.HasExtension(annotations_pb2.http)
                    yield MethodInfo(
                        full_name=full_name,
                        input=self._message_class(method.input_type),
                        output=self._message_class(method.output_type),
                        client_streaming=method.client_streaming,
                        server_streaming=method.server_streaming,
                        policy=policies[full_name],
                        options=options.Extensions[policy_pb2.method],
                        rule=options.Extensions[annotations_pb2.http] if has_rule else None,
                        has_side_effects=(
                            policies[full_name].idempotency is not Idempotency.SAFE
                            and options.idempotency_level != MethodOptions.NO_SIDE_EFFECTS
                        ),
                    )

    def comment(self, full_name: str) -> str:
        """What the contract says above a message, field, enum, value, service or method.

        Args:
            full_name: "tenfold.ledger.v1.Account.owner"; a method is
                "tenfold.ledger.v1.LedgerService.GetAccount".

        Returns:
            The text without lines that only speak to the linter; "" if there is none.
        """
        if self._comments is None:
            self._comments = dict(self._read_comments())
        return self._comments.get(full_name, "")

    def _message_class(self, type_name: str) -> type[Message]:
        descriptor = self.pool.FindMessageTypeByName(type_name.lstrip("."))
        message_class: type[Message] = GetMessageClass(descriptor)
        return message_class

    def _add_files(self) -> None:
        """Add each file after what it imports."""
        waiting = {file.name: file for file in self.file_set.file}
        for file in waiting.values():
            _require_complete(file, waiting)
        while waiting:
            ready = [file for file in waiting.values() if not waiting.keys() & set(file.dependency)]
            if not ready:
                raise ContractError(f"these files import each other: {sorted(waiting)}")
            for file in ready:
                try:
                    self.pool.Add(file)
                except (TypeError, KeyError) as error:
                    raise ContractError(f"{file.name} does not build: {error}") from error
                del waiting[file.name]

    def _read_comments(self) -> Iterator[tuple[str, str]]:
        for file in self.file_set.file:
            names = dict(_names_by_path(file))
            for location in file.source_code_info.location:
                name = names.get(tuple(location.path))
                text = _clean_comment(location.leading_comments)
                if name and text:
                    yield name, text


def file_set_of(image: bytes) -> FileDescriptorSet:
    """A serialized FileDescriptorSet.

    Raises:
        ContractError: it is none, or an empty one.
    """
    try:
        file_set = FileDescriptorSet.FromString(image)
    except DecodeError as error:
        raise ContractError("it is no FileDescriptorSet, or only a part of one") from error
    if not file_set.file:
        raise ContractError("it is a FileDescriptorSet without any file, or none at all")
    return file_set


def load_contracts() -> Contracts:
    """Tenfold's own contracts, from the image that `make stubs` writes."""
    return Contracts(contracts())


def _without_repeats(file_set: FileDescriptorSet) -> FileDescriptorSet:
    files: dict[str, FileDescriptorProto] = {}
    for file in file_set.file:
        if files.setdefault(file.name, file) != file:
            raise ContractError(f"two different files are named {file.name}")
    if len(files) == len(file_set.file):
        return file_set
    return FileDescriptorSet(file=files.values())


def _require_complete(file: FileDescriptorProto, names: Container[str]) -> None:
    """Refuse in our own words what the pool would refuse in its.

    Raises:
        ContractError: the file imports what is not there, or has an edition yet to come.
    """
    for imported in file.dependency:
        if imported not in names:
            remedy = "write the set with protoc --include_imports, or with buf build"
            raise ContractError(f"{file.name} imports {imported}, which is missing: {remedy}")
    if file.syntax == "editions" and _edition(file) not in _EDITIONS:
        what = f"{file.name} is of an unknown edition, number {_edition(file)}"
        raise ContractError(f"{what}: the last known is {max(_EDITIONS.values())}")


def _edition(file: FileDescriptorProto) -> int:
    """The number of a file's edition, also of one that descriptor.proto does not name yet."""
    unknown: Any = UnknownFieldSet(file)  # its stub lacks __iter__
    numbers = [field.data for field in unknown if field.field_number == _FILE_EDITION]
    return int(numbers[0]) if numbers else file.edition


def _clean_comment(comment: str) -> str:
    lines = [line.strip() for line in comment.splitlines()]
    return "\n".join(line for line in lines if not line.startswith("buf:lint:")).strip()


def _names_by_path(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    prefix = f"{file.package}." if file.package else ""
    for index, message in enumerate(file.message_type):
        yield from _message_paths(message, (_FILE_MESSAGES, index), prefix + message.name)
    for index, enum in enumerate(file.enum_type):
        yield from _enum_paths(enum, (_FILE_ENUMS, index), prefix + enum.name)
    for index, service in enumerate(file.service):
        path, name = (_FILE_SERVICES, index), prefix + service.name
        yield path, name
        for number, method in enumerate(service.method):
            yield (*path, _SERVICE_METHODS, number), f"{name}.{method.name}"


def _message_paths(
    message: DescriptorProto, path: tuple[int, ...], name: str
) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, name
    for index, field in enumerate(message.field):
        yield (*path, _MESSAGE_FIELDS, index), f"{name}.{field.name}"
    for index, nested in enumerate(message.nested_type):
        yield from _message_paths(nested, (*path, _MESSAGE_NESTED, index), f"{name}.{nested.name}")
    for index, enum in enumerate(message.enum_type):
        yield from _enum_paths(enum, (*path, _MESSAGE_ENUMS, index), f"{name}.{enum.name}")


def _enum_paths(
    enum: EnumDescriptorProto, path: tuple[int, ...], name: str
) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, name
    for index, value in enumerate(enum.value):
        yield (*path, _ENUM_VALUES, index), f"{name}.{value.name}"
