"""Contracts of tests' own, compiled by the same compiler as ours."""

import sysconfig
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = sysconfig.get_paths()["purelib"]


def compile_protos(source: Path, folder: Path) -> FileDescriptorSet:
    """A descriptor set of all .proto files in a folder, with all they import.

    Args:
        source: where they are.
        folder: where the compiler may write.
    """
    image = folder / "protos.binpb"
    imported = (ROOT / "proto", SITE_PACKAGES, f"{SITE_PACKAGES}/grpc_tools/_proto")
    arguments = [f"-I{path}" for path in (source, *imported)]
    arguments += [f"--descriptor_set_out={image}", "--include_imports", "--include_source_info"]
    names = sorted(path.name for path in source.glob("*.proto"))
    assert protoc.main(["protoc", *arguments, *names]) == 0
    return FileDescriptorSet.FromString(image.read_bytes())
